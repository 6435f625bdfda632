"""A short version of `python -m tests.load`: 20 clients at once, some of whom go away."""

from __future__ import annotations

import pytest

from tests.browser import server
from tests.load import load, report

pytestmark = pytest.mark.timeout(400)


def test_everyone_is_served_and_nothing_is_left_behind() -> None:
    with server("app.py") as address:
        found = load(address, seconds=12, clients=20)
    print("\n".join(report(found)))
    before, after = found.before, found.after
    assert before is not None and after is not None
    assert found.errors == []
    assert found.counts["served"] >= 20 and found.counts["cancelled"] >= 3
    assert found.counts["refused"] == 0
    assert found.places >= 10, "who waits is told where"
    assert found.free_seconds < 5.0, "whoever has gone holds the device no longer"
    assert after.threads <= before.threads
    assert after.files <= before.files + 8
    assert after.megabytes < 1.05 * before.megabytes
