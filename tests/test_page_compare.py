"""The Compare tab in a real browser: recordings, replay, charts, downloads, links, restarts.

Runs, Stop, queueing, hostile tokens and the keyboard in the lanes are in `tests.test_page`.
"""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from PIL import Image

from mtad.trace import Trace
from mtad.ui.compare_tab import EXAMPLES
from mtad.ui.recordings import Gallery
from tests.browser import CONTRAST, free_port, server
from tests.test_ui import HOSTILE

pytestmark = pytest.mark.timeout(300)

LONGEST_TASK_MS = 100

# Notes when the first lane stood, in milliseconds since the page was asked for.
WATCH_LANES = """
window.lanesAt = null;
new MutationObserver((_, watcher) => {
  if (!document.querySelector(".mtad-lane .mtad-block")) return;
  window.lanesAt = performance.now();
  watcher.disconnect();
}).observe(document, { childList: true, subtree: true });
"""
# The blocks of each lane that are to be seen.
SEEN = """() => [...document.querySelectorAll("#mtad-board .mtad-lane")].map(
  lane => lane.querySelectorAll(".mtad-block:not(.mtad-later)").length)"""
CLOCK = "#mtad-board .mtad-clock"
NOTE = "#mtad-share .mtad-share-text"


@pytest.fixture(scope="module")
def loading() -> Iterator[str]:
    """A page whose models never come."""
    with server("-m", "tests.browser", "loading") as address:
        yield address


@pytest.fixture(scope="module")
def race() -> Iterator[str]:
    """Hand-made runs of 2,000 blocks with the joules of a sensor."""
    with server("-m", "tests.browser", "race") as address:
        yield address


def clock(page: Any) -> float:
    return float(page.inner_text(CLOCK).split()[0])


def scrub(page: Any, share: float) -> None:
    page.locator("#mtad-board .mtad-scrub").evaluate(
        "(slider, share) => { slider.value = share * slider.max;"
        " slider.dispatchEvent(new Event('input')); }",
        share,
    )


def saved(page: Any, button: Any, folder: Path) -> Path:
    """The file that a button hands out."""
    with page.expect_download() as download:
        button.click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file


def check_picture(file: Path) -> None:
    """It is a PNG of a chart: wide, with a ground and lines of several colours."""
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    ground = max(count for count, _ in colours)
    assert ground < 0.99 * sum(count for count, _ in colours)
    assert sum(max(rgb) - min(rgb) > 60 for _, rgb in colours) > 10


# ------------------------------------------------------------------ recordings and their replay


def test_a_recording_stands_before_any_model_is_there(
    loading: str, visit: Any, tmp_path: Path
) -> None:
    one = visit(loading, before=WATCH_LANES)
    page = one.page
    lanes_at, loaded_at = page.evaluate(
        "[window.lanesAt, performance.getEntriesByType('navigation')[0].loadEventEnd]"
    )
    assert loaded_at > 0
    assert lanes_at - loaded_at < 2000
    page.get_by_text("fetching weights 34 %").first.wait_for()
    recording = Gallery().get("")
    assert recording is not None
    traces = recording.traces()
    for index, trace in enumerate(traces.values()):
        assert one.answer(index) == trace.text
    origin = page.inner_text(".mtad-run-origin")
    first = next(iter(traces.values()))
    assert origin.startswith(f"Recorded {first.started_at[:10]}")
    assert first.versions["hardware"] in origin
    assert EXAMPLES[0] in origin

    # Its files are those that were recorded.
    board = page.locator("#mtad-board")
    file = saved(page, board.get_by_role("button", name="Trace (JSON)").nth(2), tmp_path)
    assert Trace.from_json(file.read_bytes()) == traces["mtad"]
    file = saved(page, board.get_by_role("button", name="Table (CSV)"), tmp_path)
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [int(row["tokens"]) for row in rows] == [t.summary.tokens for t in traces.values()]

    # Another recording, of another machine, and back.
    choice = page.get_by_label("Recorded comparisons")
    choice.select_option("h200-smollm2")
    page.get_by_text("NVIDIA H200", exact=False).first.wait_for()
    other = Gallery().get("h200-smollm2")
    assert other is not None
    assert [one.answer(k) for k in range(4)] == [t.text for t in other.traces().values()]
    choice.select_option("cpu-smollm2")
    page.wait_for_function("text => document.body.innerText.includes(text)", arg=origin[:20])

    # Run says what it waits for, and Stop takes it out of the wait.
    one.run()
    page.wait_for_function(
        "document.querySelector('.mtad-status').textContent.includes('fetching weights 34 %')"
    )
    assert one.states() == ["waiting"] * 3
    assert page.locator("#mtad-board .mtad-race").is_hidden()
    assert choice.is_disabled()
    page.click("#mtad-stop")
    one.wait(20)
    page.wait_for_selector("#mtad-run:enabled")


def test_the_replay_shows_each_moment_of_the_recorded_runs(loading: str, visit: Any) -> None:
    one = visit(loading)
    page = one.page
    recording = Gallery().get("")
    assert recording is not None
    steps = [trace.steps for trace in recording.traces().values()]
    whole = [len(each) for each in steps]
    length = max(each[-1].seconds for each in steps)
    board = page.locator("#mtad-board")
    assert page.evaluate(SEEN) == whole

    for share in (0.0, 0.3, 0.7):
        scrub(page, share)
        page.wait_for_timeout(300)
        # The slider has 500 places.
        at = float(board.locator(".mtad-scrub").input_value())
        assert abs(at - share * length) <= length / 400
        shown = [sum(step.seconds <= at for step in each) for each in steps]
        assert page.evaluate(SEEN) == shown
        assert page.inner_text(CLOCK) == f"{at:.2f} of {length:.2f} s"
        lane = board.locator(".mtad-lane").nth(1)
        passes = lane.locator("[data-meter=passes] .mtad-value").inner_text()
        assert passes == (str(shown[1]) if shown[1] else "–")
        assert board.locator(".mtad-cursor").first.evaluate("line => line.style.display") == ""

    # It plays at the speed that was chosen, and stands where it was paused.
    scrub(page, 0)
    speeds = board.get_by_label("Speed of the replay")
    options = speeds.locator("option").all_inner_texts()
    assert options == ["0.25×", "0.5×", "1×", "2×", "4×"]
    speeds.select_option("0.25")
    play = board.get_by_role("button", name=re.compile("Replay|Pause"))
    play.focus()
    began = time.monotonic()
    page.keyboard.press("Enter")
    page.wait_for_timeout(700)
    page.keyboard.press("Enter")
    took = time.monotonic() - began
    page.wait_for_timeout(100)
    paused = clock(page)
    # A busy machine may lose frames, which stop the clock; it never runs ahead.
    assert 0.02 < paused <= 0.25 * took + 0.06
    assert 0 < sum(page.evaluate(SEEN)) < sum(whole)
    page.wait_for_timeout(300)
    assert clock(page) == paused
    speeds.select_option("4")
    play.click()
    page.wait_for_function(
        "text => document.querySelector('[aria-live=polite]').textContent === text",
        arg="The replay has ended.",
    )
    assert page.evaluate(SEEN) == whole
    for index, each in enumerate(steps):
        state = board.locator(".mtad-state").nth(index).inner_text()
        assert state == f"done at {each[-1].seconds:.2f} s"
    # The slider takes keys, and the blocks that are not there yet cannot be walked to.
    board.locator(".mtad-scrub").focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(300)
    assert page.evaluate(SEEN) == [0, 0, 0]
    page.keyboard.press("End")
    page.wait_for_timeout(300)
    assert page.evaluate(SEEN) == whole


def test_who_asks_for_less_motion_moves_the_slider(loading: str, visit: Any) -> None:
    one = visit(loading, motion="reduce")
    page = one.page
    board = page.locator("#mtad-board")
    assert board.get_by_role("button", name="Replay").is_disabled()
    assert "Your system asks for less motion" in board.locator(".mtad-race-note").inner_text()
    scrub(page, 0.5)
    page.wait_for_timeout(300)
    seen = page.evaluate(SEEN)
    assert all(count > 0 for count in seen)
    page.wait_for_timeout(500)
    assert page.evaluate(SEEN) == seen, "nothing moves by itself"


def test_a_recording_fits_and_can_be_read_everywhere(loading: str, visit: Any) -> None:
    for scheme, width in (("light", 360), ("dark", 768), ("light", 1440)):
        one = visit(loading, width=width, scheme=scheme)
        page = one.page
        scrub(page, 0.5)
        page.locator(".mtad-chart-data summary").first.click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        texts, faint = page.evaluate(CONTRAST, 4.5)
        assert texts > 150
        assert faint == []


def test_a_replay_of_thousands_of_blocks_is_smooth(race: str, visit: Any, tmp_path: Path) -> None:
    one = visit(race)
    page = one.page
    page.get_by_label("MTAD tree").check()
    one.run()
    one.wait(120)
    board = page.locator("#mtad-board")
    assert page.evaluate(SEEN) == [2000] * 4
    assert page.inner_text(CLOCK) == "10.00 of 10.00 s"
    board.get_by_label("Speed of the replay").select_option("4")
    page.wait_for_timeout(1500)
    tools = page.context.new_cdp_session(page)

    def heap() -> float:
        tools.send("HeapProfiler.collectGarbage")
        return float(tools.send("Runtime.getHeapUsage")["usedSize"])

    before = heap()
    page.evaluate(
        "() => { window.longest = 0; window.watcher = new PerformanceObserver(list => {"
        " for (const task of list.getEntries()) window.longest = Math.max(window.longest,"
        " task.duration); }); window.watcher.observe({ entryTypes: ['longtask'] }); }"
    )
    nodes = "document.querySelectorAll('*').length"
    many = page.evaluate(nodes)
    tasks: list[float] = []
    # The first replay lays out 50,000 nodes anew. Of those behind it the best of three counts: the
    # cores are shared with the server and other work.
    for _ in range(4):
        page.evaluate(
            "() => { window.longest = 0;"
            " document.querySelector('[aria-live=polite]').textContent = ''; }"
        )
        # By class: to find it by its role Playwright itself walks 50,000 nodes in one long task.
        board.locator(".mtad-play").evaluate("button => button.click()")
        page.wait_for_function(
            "text => document.querySelector('[aria-live=polite]').textContent === text",
            arg="The replay has ended.",
            timeout=60_000,
        )
        for share in (0.0, 1.0, 0.5):
            scrub(page, share)
            page.wait_for_function(
                "([seen, count]) => eval(seen)().every(shown => shown === count)",
                arg=[SEEN, round(2000 * share)],
            )
        tasks.append(page.evaluate("window.longest"))
        if len(tasks) > 1 and tasks[-1] < LONGEST_TASK_MS:
            break
    print(f"longest tasks of the replays: {tasks} ms; heap {before:.0f} -> {heap():.0f}")
    assert tasks[0] < 2 * LONGEST_TASK_MS and min(tasks[1:]) < LONGEST_TASK_MS, tasks
    assert page.evaluate(nodes) == many
    assert heap() < 1.2 * before + 2e6

    # What a sensor measured is drawn, and told in the table.
    watts = board.locator(".mtad-chart").nth(1)
    assert watts.is_visible()
    watts.locator("summary").click()
    assert "250.0" in watts.locator("table").inner_text()
    check_picture(saved(page, board.get_by_role("button", name="Watts (PNG)"), tmp_path))
    joules = board.locator(".mtad-table tbody tr").last.locator("td").last.inner_text()
    assert float(joules) > 0


# ------------------------------------------------------------------ a run of the real pair


def test_run_replaces_the_recording_and_its_files_parse(
    app: str, visit: Any, tmp_path: Path
) -> None:
    one = visit(app)
    page = one.page
    assert page.locator(".mtad-recorded").count() == 1
    one.wait_for_pair()
    clicked = time.monotonic()
    one.run()
    page.wait_for_selector("#mtad-board .mtad-block")
    first = time.monotonic() - clicked
    one.wait(60)
    whole = time.monotonic() - clicked
    print(f"first token after {first:.2f} s, the default comparison after {whole:.2f} s")
    assert one.states() == ["done", "done", "done"]
    assert first < 2
    assert whole < 30
    assert page.locator(".mtad-recorded").count() == 0
    assert page.input_value("select.mtad-gallery") == ""

    board = page.locator("#mtad-board")
    traces = []
    for index in range(3):
        button = board.get_by_role("button", name="Trace (JSON)").nth(index)
        traces.append(Trace.from_json(saved(page, button, tmp_path).read_bytes()))
        assert one.answer(index) == traces[-1].text
    assert [trace.method for trace in traces] == ["autoregressive", "speculative", "mtad"]
    file = saved(page, board.get_by_role("button", name="Table (CSV)"), tmp_path)
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    for row, trace in zip(rows, traces, strict=True):
        assert float(row["perplexity"]) == trace.summary.perplexity
        assert float(row["tokens_per_second"]) == trace.summary.tokens_per_second
    check_picture(saved(page, board.get_by_role("button", name="Chart (PNG)"), tmp_path))

    # The table of the chart ends with what each method had written.
    page.locator(".mtad-chart-data summary").first.click()
    page.locator(".mtad-chart-data tbody tr").first.wait_for()
    last = page.locator(".mtad-chart-data table").first.locator("tr").last.locator("td")
    assert last.all_inner_texts() == [str(trace.summary.tokens) for trace in traces]
    # Its replay is there, and its link is in the address bar.
    assert board.locator(".mtad-race").is_visible()
    assert "methods=autoregressive%2Cspeculative%2Cmtad" in page.url


def test_auto_is_chosen_from_the_page_and_measured_by_the_runner(
    app: str, visit: Any, tmp_path: Path
) -> None:
    parts = {
        "prompt": "Hello",
        "methods": "speculative,mtad",
        "num_draft_tokens": "auto",
        "max_new_tokens": 8,
    }
    one = visit(f"{app}?{urlencode(parts)}")
    page = one.page
    page.wait_for_function("document.querySelector('#mtad-prompt textarea').value === 'Hello'")
    one.run()
    one.wait(60)
    button = page.locator("#mtad-board").get_by_role("button", name="Trace (JSON)").last
    trace = Trace.from_json(saved(page, button, tmp_path).read_bytes())
    assert trace.config.num_draft_tokens == "auto"
    assert trace.config.iteration_costs is not None


# ------------------------------------------------------------------ form, links, restarts


def test_a_link_fills_the_form_and_runs_nothing(hostile: str, visit: Any) -> None:
    prompt = "".join(text for text in HOSTILE if text != "\n")
    parts = {
        "prompt": prompt,
        "methods": "mtad,specinfer",
        "num_draft_tokens": "auto",
        "accept_threshold": "0.25",
        "k_config": "3, 2",
        "replacement": "false",
        "max_new_tokens": "17",
        "iteration_costs": "1,2",
        "utm_source": "elsewhere",
    }
    one = visit(f"{hostile}?{urlencode(parts)}")
    page = one.page
    page.wait_for_function(
        "text => document.querySelector('#mtad-prompt textarea').value === text", arg=prompt
    )
    # The drawer is closed; what it holds is shown for the chosen methods only.
    drawer = page.get_by_role("button", name="Parameters")
    assert not page.get_by_label("max_new_tokens").is_visible()
    drawer.click()
    page.get_by_label("k_config").wait_for()
    assert page.locator("#mtad-methods input:checked").count() == 2
    values = {"max_new_tokens": "17", "k_config": "3, 2", "num_draft_tokens": "auto"}
    for name, value in values.items():
        assert page.get_by_label(name).first.input_value() == value
    assert page.get_by_label("number input for accept_threshold").input_value() == "0.25"
    assert not page.get_by_label("replacement").is_checked()
    assert not page.get_by_label("fallback_threshold").is_visible()
    assert "fallback_threshold, rollback_threshold (BiLD)" in page.inner_text(".mtad-unread")
    assert page.get_by_text("iteration_costs").count() == 0
    assert page.locator(".mtad-recorded").count() == 1, "nothing has run"

    page.get_by_label("BiLD").check()
    page.get_by_label("fallback_threshold").wait_for()
    page.click("#mtad-copy")
    page.wait_for_selector(".mtad-share-link:visible")
    link = page.input_value(".mtad-share-link")
    assert link.startswith(hostile)
    two = visit(link)
    two.page.wait_for_function(
        "text => document.querySelector('#mtad-prompt textarea').value === text", arg=prompt
    )
    assert two.page.locator("#mtad-methods input:checked").count() == 3
    assert two.page.locator(".mtad-recorded").count() == 1


def test_a_link_that_cannot_be_used_says_why(hostile: str, visit: Any) -> None:
    one = visit(f"{hostile}?{urlencode({'prompt': 'x', 'top_k': '<img src=x>'})}")
    one.page.wait_for_selector(".mtad-share.mtad-share-error")
    said = one.page.inner_text(NOTE)
    assert "top_k is '<img src=x>', but must be a number" in said
    assert one.page.input_value("#mtad-prompt textarea") == EXAMPLES[0]
    one.page.get_by_role("button", name="Dismiss").click()
    assert one.page.locator("#mtad-share").is_hidden()


def test_a_restarted_server_loses_no_prompt(visit: Any) -> None:
    port = free_port()
    with server("-m", "tests.browser", "hostile", port=port) as address:
        one = visit(address)
        page = one.page
        page.fill("#mtad-prompt textarea", "keep <me> & this")
        page.get_by_label("MTAD tree").check()
        one.set(max_new_tokens=17)
    page.click("#mtad-run")
    page.get_by_text("Connection to the server was lost").first.wait_for()
    assert page.input_value("#mtad-prompt textarea") == "keep <me> & this"
    with server("-m", "tests.browser", "hostile", port=port):
        page.wait_for_function(
            "document.querySelector('#mtad-share')?.innerText.includes('started again')",
            timeout=60_000,
        )
        assert page.input_value("#mtad-prompt textarea") == "keep <me> & this"
        assert page.locator("#mtad-methods input:checked").count() == 4
        one.drawer_open = False
        page.get_by_role("button", name="Parameters").click()
        field = page.get_by_label("max_new_tokens").first
        field.wait_for(state="visible")
        page.wait_for_timeout(1000)
        assert field.input_value() == "17"
        one.run()
        one.wait(60)
        assert one.states() == ["done"] * 4
        page.close()
    # A server that is gone cannot be reached: nothing else has gone wrong.
    expected = re.compile("console: Failed to load resource: net::ERR_")
    one.problems[:] = [text for text in one.problems if not expected.match(text)]
