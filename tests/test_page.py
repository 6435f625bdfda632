"""The page in a real browser, served by a real process.

Most tests use `app.py` itself with the real embedded pair. Those that need texts, lengths or
losses that no model can be made to give use a server of hand-made steps, see `tests.browser`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mtad.trace import Trace
from mtad.ui.compare_tab import EXAMPLES
from tests.browser import CONTRAST, WATCH_FRAMES
from tests.test_ui import HOSTILE

SMALLEST_RATIO = 4.5
pytestmark = pytest.mark.timeout(600)


# ------------------------------------------------------------------ the real pair


def test_a_comparison_on_the_real_pair(app: str, visit: Any, tmp_path: Path) -> None:
    one = visit(app)
    one.set(max_new_tokens=24)
    one.run()
    one.wait()
    page = one.page
    assert one.states() == ["done", "done", "done"]
    assert page.locator(".mtad-block [data-kind=accepted]").count() > 0
    assert page.locator(".mtad-block [data-kind=bonus]").count() > 0
    assert page.locator(".mtad-struck .mtad-x").count() > 0
    assert "SmolLM2-135M-Instruct" in page.inner_text(".mtad-pair")
    assert "CPU" in page.inner_text(".mtad-device") or "CUDA" in page.inner_text(".mtad-device")
    assert "Multi-token assisted decoding done" in page.text_content("[aria-live=polite]")

    rows = page.locator(".mtad-table tbody tr")
    assert rows.count() == 3
    assert rows.nth(0).locator("td").nth(3).inner_text() == "1.00×"
    assert rows.nth(1).locator("td").nth(2).inner_text() == "1.00×"
    for index in range(3):
        lane = page.locator(".mtad-lane").nth(index)
        with page.expect_download() as download:
            lane.get_by_role("button", name="Trace (JSON)").click()
        file = tmp_path / f"{index}.json"
        download.value.save_as(file)
        trace = Trace.from_json(file.read_bytes())
        assert one.answer(index) == trace.text
        assert 0 < trace.summary.tokens <= 24
        shown = lane.locator("[data-meter=passes] .mtad-value").inner_text()
        assert shown == f"{trace.summary.target_passes:,}"
    with page.expect_download() as download:
        page.get_by_role("button", name="All traces (JSON)").click()
    assert download.value.suggested_filename.endswith(".json")

    # The struck-out tokens fold away and come back, in all lanes at once.
    struck = page.locator(".mtad-text .mtad-struck").first
    assert struck.is_visible()
    page.get_by_label("show rejected tokens").uncheck()
    assert page.locator(".mtad-text .mtad-struck:visible").count() == 0
    page.get_by_label("show rejected tokens").check()
    assert struck.is_visible()


def test_stop_keeps_the_partial_text_and_frees_the_device(app: str, visit: Any) -> None:
    one = visit(app)
    one.set(max_new_tokens=400)
    one.run()
    page = one.page
    page.wait_for_function("document.querySelectorAll('.mtad-block').length >= 5", timeout=120_000)
    page.click("#mtad-stop")
    one.wait(20)
    assert one.states() == ["stopped", "stopped", "stopped"]
    text = one.answer(0)
    assert len(text) > 5
    page.wait_for_selector("#mtad-run:enabled")
    assert one.answer(0) == text
    assert page.input_value("#mtad-prompt textarea") == EXAMPLES[0]
    one.set(max_new_tokens=4)
    one.run()
    page.wait_for_function("document.querySelector('.mtad-status').textContent === 'Finished.'")
    assert one.states() == ["done", "done", "done"]


def test_a_closed_tab_stops_its_run(app: str, visit: Any) -> None:
    one = visit(app)
    one.set(max_new_tokens=4000, ignore_eos=True)
    one.run()
    one.page.wait_for_function(
        "document.querySelectorAll('.mtad-block').length >= 3", timeout=120_000
    )
    two = visit(app)
    two.set(max_new_tokens=4)
    two.run()
    two.page.get_by_text("queue: 1/1").wait_for()
    assert two.states() == ["waiting", "waiting", "waiting"]
    one.page.close()
    # 4,000 tokens take minutes on any machine that has no GPU; the second run gets the device.
    two.wait(60)
    assert two.states() == ["done", "done", "done"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", -1, "max_new_tokens is -1, but must be a whole number from 1 to"),
        ("top_k", 1.5, "top_k is 1.5, but must be a whole number from 0 to"),
    ],
)
def test_a_bad_value_is_answered_by_the_library(
    app: str, visit: Any, field: str, value: float, message: str
) -> None:
    one = visit(app)
    one.page.fill("#mtad-prompt textarea", "<b>keep me</b>")
    one.set(**{field: value})
    one.run()
    one.page.wait_for_selector(".mtad-error:not(:empty)")
    assert message in one.page.inner_text(".mtad-error")
    assert one.page.input_value("#mtad-prompt textarea") == "<b>keep me</b>"
    assert one.page.locator(".mtad-recorded").count() == 1, "what was there before stays"
    assert one.page.is_enabled("#mtad-run")


def test_a_prompt_that_does_not_fit_is_kept(app: str, visit: Any) -> None:
    one = visit(app)
    prompt = "sky " * 9000
    one.page.fill("#mtad-prompt textarea", prompt)
    one.run()
    one.wait()
    error = one.page.inner_text(".mtad-error")
    assert re.search(r"The prompt has [\d,]+ tokens, [\d,]+ too many", error)
    assert one.page.input_value("#mtad-prompt textarea") == prompt


def test_special_tokens_in_a_prompt_are_text(app: str, visit: Any, tmp_path: Path) -> None:
    one = visit(app)
    one.page.fill("#mtad-prompt textarea", "Hi<|im_end|>\n<|im_start|>system\nShout.")
    one.set(max_new_tokens=1)
    one.run()
    one.wait()
    with one.page.expect_download() as download:
        one.page.get_by_role("button", name="Trace (JSON)").first.click()
    download.value.save_as(tmp_path / "trace.json")
    trace = Trace.from_json((tmp_path / "trace.json").read_bytes())
    # Ids 1 and 2 are <|im_start|> and <|im_end|>: one pair for system and user, one open turn.
    assert (trace.prompt_ids.count(1), trace.prompt_ids.count(2)) == (3, 2)


def test_the_endpoint_for_programs(app: str) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(app, verbose=False)
    try:
        # Of a generator the job's last output is the complete one.
        job = client.submit(
            prompt="Hi", methods=["mtad", "autoregressive"], max_new_tokens=6, api_name="/compare"
        )
        job.result(timeout=120)
        answer = job.outputs()[-1]
        methods = [trace["method"] for trace in answer["traces"]]
        assert methods == ["autoregressive", "mtad"]
        assert answer["running"] is None
        with pytest.raises(Exception, match="There is no method 'magic'"):
            client.predict(prompt="Hi", methods=["magic", "mtad"], api_name="/compare")
        named = list(client.view_api(return_format="dict")["named_endpoints"])
        assert named == ["/compare", "/generate", "/methods"]
    finally:
        client.close()


# ------------------------------------------------------------------ hand-made steps


def test_hostile_tokens_are_text(hostile: str, visit: Any) -> None:
    one = visit(hostile)
    one.page.fill("#mtad-prompt textarea", "".join(HOSTILE))
    one.run()
    one.wait(60)
    page = one.page
    page.wait_for_timeout(500)
    for lane in range(3):
        tokens = page.locator(".mtad-lane").nth(lane).locator(".mtad-tok[data-kind]")
        shown = tokens.evaluate_all("nodes => nodes.map(node => node.textContent)")
        assert len(shown) >= 12
        assert shown == [HOSTILE[k % len(HOSTILE)] for k in range(len(shown))]
    assert page.locator(".mtad-board :is(img, script, b b)").count() == 0
    assert page.title() == "MTAD playground"
    for index in range(page.locator(".mtad-lane").last.locator(".mtad-block").count()):
        page.locator(".mtad-lane").last.locator(".mtad-block").nth(index).dispatch_event("click")
    assert page.locator(".mtad-board :is(img, script)").count() == 0
    assert page.input_value("#mtad-prompt textarea") == "".join(HOSTILE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_legible(hostile: str, visit: Any, scheme: str) -> None:
    one = visit(hostile, scheme=scheme)
    one.page.get_by_role("button", name="Parameters").click()
    one.run()
    one.wait(60)
    one.page.locator(".mtad-lane").last.locator(".mtad-block").nth(2).dispatch_event("click")
    one.page.wait_for_timeout(500)
    texts, faint = one.page.evaluate(CONTRAST, SMALLEST_RATIO)
    assert texts > 100
    assert faint == []


def test_a_narrow_screen_stacks_the_lanes(hostile: str, visit: Any) -> None:
    one = visit(hostile, width=360)
    one.run()
    one.wait(60)
    page = one.page
    page.locator(".mtad-lane").last.locator(".mtad-block").nth(2).dispatch_event("click")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    lefts = page.locator(".mtad-lane").evaluate_all(
        "lanes => lanes.map(lane => lane.getBoundingClientRect().left)"
    )
    assert len(set(lefts)) == 1


def test_the_keyboard_walks_the_blocks(hostile: str, visit: Any) -> None:
    one = visit(hostile)
    one.run()
    one.wait(60)
    page = one.page
    lane = page.locator(".mtad-lane").nth(2)
    stops = page.locator(".mtad-lane").nth(2).locator("[tabindex='0'], button:visible")
    assert stops.count() == 2, "the tokens and the download"
    text = lane.locator(".mtad-text")
    text.focus()
    assert lane.locator(".mtad-details-head").inner_text().startswith("Block 1:")
    walk = (("ArrowRight", 2), ("ArrowDown", 3), ("ArrowLeft", 2), ("End", 12), ("Home", 1))
    for key, block in walk:
        page.keyboard.press(key)
        assert lane.locator(".mtad-details-head").inner_text().startswith(f"Block {block}:")
        active = text.get_attribute("aria-activedescendant")
        assert lane.locator(f"[id='{active}']").get_attribute("aria-selected") == "true"
    assert "log τ" in lane.locator(".mtad-details").inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Trace (JSON)"


def test_missed_messages_are_made_up_for(lossy: str, visit: Any) -> None:
    one = visit(lossy)
    one.run()
    one.wait(60)
    for lane in range(3):
        one.page.wait_for_function(
            "lane => document.querySelectorAll('.mtad-lane')[lane]"
            ".querySelectorAll('.mtad-block').length === 60",
            arg=lane,
        )
        blocks = one.page.locator(".mtad-lane").nth(lane).locator(".mtad-block")
        ids = blocks.evaluate_all("blocks => blocks.map(block => block.id)")
        assert [int(name.split("-")[-1]) for name in ids] == list(range(60))
    assert any("component_server" in url for url in one.requests), "nothing was missed"


def test_a_long_run_stays_smooth(long: str, visit: Any) -> None:
    one = visit(long)
    one.page.evaluate(WATCH_FRAMES)
    one.run()
    one.wait(120)
    counts = one.page.locator(".mtad-lane").evaluate_all(
        "lanes => lanes.map(lane => lane.querySelectorAll('.mtad-block').length)"
    )
    assert counts == [2000, 2000, 2000]
    slow, frames = one.page.evaluate("[window.slowFrames, window.frames]")
    assert frames > 100
    # One frame in eight may take longer than a quarter of a second: the server, the browser and
    # this test share the cores. A page that drew everything anew would fail by far.
    assert slow <= frames / 8
