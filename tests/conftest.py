"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.browser import ARGUMENTS, CHROMIUM, Visit, server
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


# ------------------------------------------------------------------ the page in a browser


@pytest.fixture(scope="session")
def app() -> Iterator[str]:
    """The address of `app.py`, served with the real pair."""
    with server("app.py") as address:
        yield address


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    with server("-m", "tests.browser", "hostile") as address:
        yield address


@pytest.fixture(scope="module")
def lossy() -> Iterator[str]:
    with server("-m", "tests.browser", "lossy") as address:
        yield address


@pytest.fixture(scope="module")
def long() -> Iterator[str]:
    with server("-m", "tests.browser", "long") as address:
        yield address


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium; name one in $CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """Opens pages; at the end of the test nothing forbidden has happened on any of them."""
    visits: list[Visit] = []
    contexts: list[Any] = []

    def open_page(
        address: str,
        *,
        width: int = 1280,
        scheme: str = "light",
        motion: str = "no-preference",
        before: str = "",
    ) -> Visit:
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion=motion,
            accept_downloads=True,
        )
        # A script that runs before any of the page's own.
        context.add_init_script(before)
        contexts.append(context)
        visits.append(Visit(context.new_page(), address))
        return visits[-1]

    yield open_page
    for context in contexts:
        context.close()
    assert [problem for each in visits for problem in each.problems] == []
