"""What watching costs the decoder, on the real pair: roughly, but in every run of the tests.

The figure itself takes more pairs and a quiet machine: `python -m tests.streaming_cost`.
"""

from __future__ import annotations

import statistics

import pytest

from tests.streaming_cost import measure

pytestmark = pytest.mark.timeout(300)


def test_a_viewer_does_not_slow_the_decoder_down() -> None:
    found = measure(5, "client")
    assert len(found) == 5
    assert statistics.median(found) > 0.8, found
