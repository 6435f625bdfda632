"""The Method tab in a real browser, on the real pair."""

from __future__ import annotations

from typing import Any

import pytest

from mtad.energy import probe
from mtad.ui.method import BIBTEX, example
from tests.browser import CONTRAST

pytestmark = pytest.mark.timeout(300)


def open_tab(page: Any) -> None:
    page.get_by_role("tab", name="Method").click()
    page.wait_for_selector(".mtad-bibtex")
    page.wait_for_function(
        "document.querySelector('.mtad-facts-here').textContent.includes('licence')",
        timeout=120_000,
    )


def test_what_is_true_of_this_machine(app: str, visit: Any) -> None:
    one = visit(app)
    page = one.page
    open_tab(page)
    device = page.evaluate(
        "[...document.querySelectorAll('.mtad-fact-box dt')]"
        ".find(node => node.textContent === 'device').nextSibling.textContent"
    )
    assert page.inner_text(".mtad-energy-here") == probe(device).describe()
    facts = page.inner_text(".mtad-facts-here")
    for text in ("SmolLM2-135M-Instruct", "134.5 million", "smollm2-draft", "Apache-2.0", "torch"):
        assert text in facts
    rows = page.locator(".mtad-all tbody tr")
    assert rows.count() == 9
    assert rows.filter(has_text="= yes").count() == 3

    drawn = example()
    assert drawn is not None
    figures = page.locator(".mtad-pass .mtad-pass-figure").all_text_contents()
    assert figures == [row["cells"][2] for row in drawn["rows"]]
    assert page.locator(".mtad-pass .mtad-pass-yes").count() == sum(
        row["passes"] for row in drawn["rows"]
    )
    assert page.locator(".mtad-pass-accepted").count() == drawn["accepted"]
    assert page.locator(".mtad-example tbody tr").count() == len(drawn["rows"])

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy BibTeX").click()
    page.get_by_text("Copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == BIBTEX

    link = page.locator(".mtad-contents a").last
    link.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "mtad-m-cite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_legible(app: str, visit: Any, scheme: str) -> None:
    one = visit(app, width=360, scheme=scheme)
    page = one.page
    open_tab(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    texts, faint = page.evaluate(CONTRAST, 4.5)
    assert texts > 120
    assert faint == []
