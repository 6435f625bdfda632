"""The Trade-off tab in a real browser, on the real pair."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mtad.trace import Trace
from tests.browser import CONTRAST

pytestmark = pytest.mark.timeout(600)

DONE = "() => document.querySelector('.mtad-sweep-bar')?.value ?? -1"


def open_tab(page: Any) -> None:
    page.get_by_role("tab", name="Trade-off").click()
    page.wait_for_selector("#mtad-sweep .mtad-hint")
    page.wait_for_selector(".mtad-plan:not(:empty)")


def fill(page: Any, **fields: object) -> None:
    """Types values; gradio fills in a field's own some moments after it has appeared."""
    for name, value in fields.items():
        number = name in ("compare", "held_out")
        box = page.locator(f"#mtad-sweep-{name} {'input[type=number]' if number else ''}".strip())
        if not number:
            box = box.locator("input, textarea").first
        for _ in range(20):
            box.fill(str(value))
            box.press("Tab")
            page.wait_for_timeout(400)
            if box.input_value() == str(value):
                break
        assert box.input_value() == str(value)


def choose(page: Any, *titles: str) -> None:
    boxes = page.locator("#mtad-sweep-methods label")
    for index in range(boxes.count()):
        label = boxes.nth(index)
        label.locator("input").set_checked(label.inner_text().strip() in titles)


def over(page: Any, seconds: float = 240) -> None:
    page.wait_for_selector(".mtad-sweep-over", timeout=seconds * 1000)


def count(page: Any) -> int:
    return int(page.evaluate(DONE))


def test_a_sweep_is_stopped_goes_on_and_opens_its_traces(
    app: str, visit: Any, tmp_path: Path
) -> None:
    other = visit(app)
    other.set(max_new_tokens=4)
    one = visit(app)
    page = one.page
    open_tab(page)
    fill(page, tau="0.3, 0.9", compare=6, tokens=16)
    page.wait_for_function(
        "document.querySelector('.mtad-plan').textContent.startsWith('4 × 6 = 24 runs')"
    )
    page.click("#mtad-sweep-run")
    page.wait_for_function(f"({DONE})() >= 2", timeout=120_000)

    # Another visitor's comparison is served before the sweep is over.
    before = count(page)
    other.run()
    other.wait(120)
    assert other.states() == ["done", "done", "done"]
    between = count(page)
    assert not page.locator(".mtad-sweep-over").count() and between < 24
    # It waited for the run that was on and for those that had been in line: not for the sweep.
    assert between - before <= 8

    page.wait_for_function(f"({DONE})() > {between}", timeout=60_000)
    assert re.search(r"about \d+ (s|min) left", page.inner_text(".mtad-remaining"))
    assert page.locator(".mtad-point").count() == 4
    page.click("#mtad-sweep-stop")
    over(page, 20)
    kept = count(page)
    assert between < kept < 24
    status = page.inner_text(".mtad-sweep .mtad-status")
    assert status.startswith(f"Stopped: {kept} of 24 runs are kept.")
    page.wait_for_selector("#mtad-sweep-run:enabled")
    made = page.locator(".mtad-sweep-table tbody tr td:last-child").all_inner_texts()
    assert sum(int(text.split()[0]) for text in made) == kept
    page.wait_for_function(
        "kept => document.querySelector('.mtad-plan').textContent"
        ".includes(`${kept} of them made already`)",
        arg=kept,
    )
    # A stopped sweep leaves the device to others, and asks for no further run.
    page.wait_for_timeout(1500)
    assert count(page) == kept

    page.click("#mtad-sweep-run")
    page.wait_for_selector(".mtad-sweep:not(.mtad-sweep-over)")
    assert count(page) >= kept
    over(page)
    assert page.inner_text(".mtad-sweep .mtad-status") == (
        "Finished: 24 runs, 4 settings on 6 prompts."
    )
    assert "Finished: 24 runs" in page.text_content(".mtad-sweep [aria-live=polite]")
    assert page.locator(".mtad-sweep-table tbody tr").count() == 4
    shown = page.locator(".mtad-sweep-table tbody tr").nth(0).locator("td").nth(2)
    assert shown.locator(".mtad-figure").inner_text() == "1.00"

    # Click opens the runs of a point; they are those of its setting.
    mark = page.locator("#mtad-point-4 .mtad-mark")
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".mtad-runs:visible")
    assert "τ 0.9" in page.inner_text(".mtad-runs .mtad-title")
    assert page.locator(".mtad-runs tbody tr").count() == 6
    with page.expect_download() as download:
        page.locator(".mtad-runs tbody tr").nth(0).get_by_role("button", name="as JSON").click()
    download.value.save_as(tmp_path / "trace.json")
    trace = Trace.from_json((tmp_path / "trace.json").read_bytes())
    assert (trace.method, trace.config.accept_threshold) == ("mtad", 0.9)
    cells = page.locator(".mtad-runs tbody tr").nth(0).locator("td").all_inner_texts()
    assert cells[0] == str(trace.summary.tokens)
    assert cells[3] == f"{trace.summary.perplexity:.2f}"

    # The keyboard does the same: arrows on the chart, Enter on a row.
    page.locator(".mtad-plot").focus()
    page.keyboard.press("Home")
    left = page.get_attribute(".mtad-plot", "aria-activedescendant")
    page.keyboard.press("ArrowRight")
    right = page.get_attribute(".mtad-plot", "aria-activedescendant")
    assert left != right
    page.keyboard.press("Enter")
    opened = page.locator(f"#{right}").get_attribute("aria-label").split(":")[0]
    page.wait_for_function(
        # That list may have been open before: only the focus says that it has come again.
        "name => document.activeElement.matches('.mtad-runs .mtad-title')"
        " && document.activeElement.textContent.replaceAll(',', '')"
        " === name.replaceAll(',', '').trim()",
        arg=opened,
    )
    page.locator(".mtad-setting").nth(1).focus()
    page.keyboard.press("Enter")
    # The focus goes to the list, whose heading names the setting.
    page.wait_for_function(
        "document.activeElement.matches('.mtad-runs .mtad-title')"
        " && document.activeElement.textContent === 'Speculative decoding, γ 4'"
    )
    page.get_by_role("button", name="Close").click()
    assert page.locator(".mtad-runs:visible").count() == 0

    for name, file in (("Table (CSV)", "table.csv"), ("All runs (JSON)", "runs.json")):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        download.value.save_as(tmp_path / file)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [line["method"] for line in lines] == ["autoregressive", "speculative", "mtad", "mtad"]
    assert all(float(line["tokens_per_second"]) > 0 for line in lines)
    whole = json.loads((tmp_path / "runs.json").read_text())
    assert len(whole["runs"]) == 24 and len(whole["settings"]) == 4
    rates = [row["tokens_per_second"] for row in whole["settings"]]
    assert rates == [float(line["tokens_per_second"]) for line in lines]

    # A reason stands where energy is not measured, and Clear begins anew.
    if page.locator(".mtad-sweep-axis input").nth(1).is_disabled():
        assert len(page.inner_text(".mtad-why")) > 10
    page.click("#mtad-sweep-clear")
    page.wait_for_selector("#mtad-sweep .mtad-hint:visible")
    page.wait_for_function(
        "document.querySelector('.mtad-plan').textContent.endsWith('(settings × prompts).')"
    )


def test_the_sweep_of_a_closed_tab_ends(app: str, visit: Any) -> None:
    other = visit(app)
    other.set(max_new_tokens=4)
    one = visit(app)
    open_tab(one.page)
    fill(one.page, compare=16, tokens=512)
    one.page.click("#mtad-sweep-run")
    one.page.wait_for_function(
        "/ \\d+ tokens$/.test(document.querySelector('.mtad-sweep .mtad-status').textContent)",
        timeout=120_000,
    )
    other.run()
    one.page.close()
    other.wait(60)
    assert other.states() == ["done", "done", "done"]
    # Nobody is in line any more: the next comparison starts at once.
    other.run()
    other.page.wait_for_selector(".mtad-board:not(.mtad-over)")
    other.wait(60)


def test_bad_input_is_answered(app: str, visit: Any) -> None:
    one = visit(app)
    page = one.page
    open_tab(page)
    for fields, message in (
        ({"tau": "0.3, <b>x</b>"}, "τ holds '<b>x</b>', which is not a number."),
        ({"tau": "-1"}, "accept_threshold is -1.0, but must be a number greater than 0"),
        ({"tau": "0.5", "gamma": "99"}, "num_draft_tokens is 99, but must be a whole number"),
        ({"gamma": "4", "compare": 0}, "The prompt set is empty"),
        (
            {"compare": 16, "held_out": 70, "tau": "0.1, 0.2, 0.3, 0.4"},
            "6 settings × 86 prompts are 516 runs, but a sweep takes at most 400",
        ),
        ({"held_out": 0, "tokens": 9999}, "max_new_tokens is 9,999, but must be at most 512"),
    ):
        fill(page, **fields)
        # What is wrong is said before anyone runs it, and again when it is run.
        page.wait_for_function(
            "text => document.querySelector('.mtad-plan').textContent.includes(text)", arg=message
        )
        page.click("#mtad-sweep-run")
        page.wait_for_function(
            "text => document.querySelector('.mtad-sweep .mtad-error').textContent.includes(text)",
            arg=message,
        )
        assert page.is_enabled("#mtad-sweep-run") and page.is_disabled("#mtad-sweep-stop")
    assert page.locator("#mtad-sweep b, .mtad-plan b").count() == 0
    fill(page, tokens=4)
    choose(page)
    page.wait_for_function(
        "document.querySelector('.mtad-plan').textContent.startsWith('No method is chosen')"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_legible(app: str, visit: Any, scheme: str) -> None:
    one = visit(app, width=360, scheme=scheme)
    page = one.page
    open_tab(page)
    choose(page, "Single-token sampling", "Speculative decoding")
    fill(page, compare=2, tokens=4)
    page.click("#mtad-sweep-run")
    over(page)
    page.locator(".mtad-setting").nth(0).click()
    page.wait_for_selector(".mtad-runs:visible")
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator(".mtad-point").count() == 2
    # On a small chart a point is named by the number of its row.
    assert page.locator(".mtad-label").all_text_contents() in (["1", "2"], ["2", "1"])
    texts, faint = page.evaluate(CONTRAST, 4.5)
    assert texts > 50
    assert faint == []
