"""Every tab for everyone: axe-core, keyboard, widths from phone to desk, and a strict browser.

One page a theme walks through the tabs with something on each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser import TABS, Visit
from tests.test_ui import HOSTILE

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

WIDTHS = (360, 768, 1440)
# By tab, what the Tab key must come to; arrows go on from there.
REACHED = {
    "Compare": (
        "#mtad-prompt textarea",
        "#mtad-run",
        "#mtad-methods input",
        ".mtad-lane [role=listbox]",
        "#mtad-board button",
        "#mtad-board input[type=range]",
        "#mtad-board select",
    ),
    "Chat": ("#mtad-chat-question textarea", "#mtad-chat-method input", ".mtad-answer summary"),
    "Inspect": ("#mtad-pick", ".mtad-strip", "#mtad-inspect input[type=range]"),
    "Trade-off": ("#mtad-sweep-methods input", "#mtad-sweep-run"),
    "Method": (".mtad-bibtex", "#mtad-method button"),
}
pytestmark = pytest.mark.timeout(600)


def fill(page: Any, tab: str) -> None:
    """Something to look at, and nothing half drawn."""
    page.get_by_role("tab", name=tab).click()
    if tab == "Chat":
        page.fill("#mtad-chat-question textarea", "Name three rivers.")
        page.press("#mtad-chat-question textarea", "Enter")
        page.wait_for_selector(".mtad-answer[data-state=done]", state="attached", timeout=120_000)
        page.wait_for_selector(".mtad-chat:not(.mtad-busy)")
    if tab == "Inspect":
        page.wait_for_selector(".mtad-stage svg")
    if tab == "Trade-off":
        page.wait_for_selector(".mtad-plan:not(:empty)")
    page.wait_for_timeout(400)


def unfold(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(box => { box.open = true; })")


@pytest.fixture(scope="module", params=["light", "dark"])
def walk(request: pytest.FixtureRequest, app: str, chromium: Any) -> Iterator[Visit]:
    """A page whose tabs all hold something, under a policy that trusts this server alone."""
    context = chromium.new_context(
        viewport={"width": 1440, "height": 900}, color_scheme=request.param
    )
    context.add_init_script(
        "window.broken = []; document.addEventListener('securitypolicyviolation',"
        " event => window.broken.push(event.violatedDirective + ' ' + event.blockedURI));"
    )
    page = context.new_page()

    def guard(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(
            response=answer, headers={**answer.headers, "content-security-policy": POLICY}
        )

    page.route(lambda url: url.partition("?")[0] == app, guard)
    one = Visit(page, f"{app}?__theme={request.param}")
    for tab in TABS:
        fill(page, tab)
    yield one
    context.close()


# Gradio starts from scripts in its page and makes functions of strings; nothing may come from,
# or go to, anywhere else.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:;"
    " connect-src 'self' data: blob:; media-src 'self' blob:; worker-src 'self' blob:;"
    " manifest-src 'self'; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


def serious(page: Any) -> list[str]:
    found = axe.Axe().run(page).response["violations"]
    left = []
    for violation in found:
        if violation["impact"] not in ("serious", "critical"):
            continue
        # Gradio's own nodes have nothing serious either: no exceptions are needed.
        for node in violation["nodes"]:
            left.append(f"{violation['id']}: {node['target']}: {node['html'][:120]}")
    return left


@pytest.mark.parametrize("tab", TABS)
def test_axe_finds_nothing_serious(walk: Visit, tab: str) -> None:
    walk.page.set_viewport_size({"width": 1440, "height": 900})
    walk.page.get_by_role("tab", name=tab).click()
    unfold(walk.page)
    walk.page.wait_for_timeout(300)
    assert serious(walk.page) == []


@pytest.mark.parametrize("tab", TABS)
def test_no_width_scrolls_sideways(walk: Visit, tab: str) -> None:
    page = walk.page
    page.set_viewport_size({"width": 1440, "height": 900})
    page.get_by_role("tab", name=tab).click()
    unfold(page)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        beyond = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert beyond <= 0, f"{tab} at {width}"


@pytest.mark.parametrize("tab", TABS)
def test_the_tab_key_comes_to_everything(walk: Visit, tab: str) -> None:
    page = walk.page
    page.set_viewport_size({"width": 1440, "height": 900})
    page.get_by_role("tab", name=tab).click()
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0);")
    wanted = set(REACHED[tab])
    for _ in range(160):
        page.keyboard.press("Tab")
        wanted -= {
            selector
            for selector in wanted
            if page.evaluate("which => document.activeElement.matches(which)", selector)
        }
        if not wanted:
            return
    assert not wanted, tab


def test_one_status_line_speaks_and_no_stream_does(walk: Visit) -> None:
    live = walk.page.eval_on_selector_all(
        "[class^=mtad] [aria-live]:not([aria-live=off]), [class^=mtad] [role=log]",
        "nodes => nodes.map(node => node.getBoundingClientRect().width)",
    )
    assert live and max(live) <= 1, "visually hidden"


@pytest.mark.parametrize("tab", ["Compare", "Chat"])
def test_a_strict_browser_has_nothing_to_refuse(walk: Visit, tab: str) -> None:
    """With hostile words as prompt and as question; all tabs were opened before."""
    page = walk.page
    page.get_by_role("tab", name=tab).click()
    if tab == "Compare":
        page.fill("#mtad-prompt textarea", " ".join(HOSTILE))
        walk.set(max_new_tokens=4)
        walk.run()
        walk.wait()
    else:
        page.fill("#mtad-chat-question textarea", " ".join(HOSTILE))
        page.press("#mtad-chat-question textarea", "Enter")
        page.wait_for_selector(".mtad-turn:nth-of-type(2) > .mtad-answer[data-state=done]")
    assert page.evaluate("window.broken") == []
    assert walk.problems == []
