"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.models import load_real_pair

# Slow machines are no failures: the time limit of a test is pytest-timeout's.
settings.register_profile(
    "mtad", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("mtad")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models run fastest on one thread; the real one takes what there is."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if "smollm2" in request.fixturenames else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The real embedded pair, fetched on first use."""
    return load_real_pair()
