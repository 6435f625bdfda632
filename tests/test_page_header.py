"""The header in a real browser: the pair on every tab, its menu, and a page for strangers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mtad.presets import presets
from mtad.ui.limits import HOSTED
from tests.browser import TABS, server

PAIR = "SmolLM2-135M-Instruct"
ABSENT = "smollm2-1.7b-instruct"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def offline() -> Iterator[str]:
    """The real page where no model hub can be reached."""
    with server("app.py", HF_HUB_OFFLINE="1", MTAD_HOSTED="0") as address:
        yield address


@pytest.fixture(scope="module")
def hosted() -> Iterator[str]:
    with server("app.py", MTAD_HOSTED="1") as address:
        yield address


def test_it_stands_on_every_tab(app: str, visit: Any) -> None:
    one = visit(app)
    page = one.page
    one.wait_for_pair()
    for name in TABS:
        page.get_by_role("tab", name=name).click()
        assert PAIR in page.locator(".mtad-pair:visible").inner_text()
        assert page.locator(".mtad-device").is_visible()
        assert page.get_by_role("tab", name=name).get_attribute("aria-selected") == "true"


def test_a_pair_that_cannot_be_loaded_changes_nothing(offline: str, visit: Any) -> None:
    one = visit(offline)
    page = one.page
    one.wait_for_pair()
    menu = page.get_by_label("Pair")
    page.wait_for_function(
        "document.querySelectorAll('.mtad-pair-choice option:not(:disabled)').length > 1"
    )
    options = menu.locator("option")
    found = [str(options.nth(k).get_attribute("value")) for k in range(options.count())]
    assert found == [preset.id for preset in presets()]
    greyed = menu.locator("option:disabled").all_text_contents()
    assert all(" – " in text and "GB" in text for text in greyed)
    assert menu.input_value() == "smollm2"

    menu.select_option(ABSENT)
    failure = page.locator(".mtad-pair-next.mtad-failed")
    failure.wait_for(timeout=60_000)
    assert "SmolLM2-1.7B-Instruct" in failure.inner_text()
    assert PAIR in page.inner_text(".mtad-pair")
    page.wait_for_function("document.querySelector('.mtad-pair-choice select').value === 'smollm2'")
    one.set(max_new_tokens=4)
    one.run()
    one.wait()
    assert one.states() == ["done", "done", "done"]


def test_a_page_for_strangers(hosted: str, visit: Any) -> None:
    one = visit(hosted)
    page = one.page
    one.wait_for_pair()
    assert PAIR in page.inner_text(".mtad-pair")
    assert f"at most {HOSTED.max_new_tokens} tokens" in page.inner_text(".mtad-pair-notes")
    assert page.locator(".mtad-pair-choice").is_hidden()
    one.set(max_new_tokens=HOSTED.max_new_tokens + 1)
    one.run()
    error = page.locator(".mtad-error:not(:empty)")
    error.wait_for()
    assert f"this hosted page allows at most {HOSTED.max_new_tokens}" in error.inner_text()
    one.set(max_new_tokens=8)
    one.run()
    one.wait()
    assert one.states() == ["done", "done", "done"]
