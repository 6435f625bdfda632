"""What the Inspect tab shows, without a browser: strip, what-if, passes, files, the gap's job."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from mtad.catalogue import methods
from mtad.errors import BudgetError, Cancelled, ConfigError, MtadError, TraceError
from mtad.trace import Bound, Decision, DraftTree, Step, Trace
from mtad.ui import collection as files
from mtad.ui.about import question
from mtad.ui.board import encode
from mtad.ui.collection import Collection, Recorded, read_file
from mtad.ui.gap import GapJob, GapJobs, measure_gap, why_no_gap
from mtad.ui.passes import MAX_DRAWN, bound_view, layout, pass_view, shown, trace_view
from mtad.ui.shelf import Shelf
from mtad.ui.what_if import (
    disagreeing,
    slider_thresholds,
    strip_view,
    what_if_at,
    what_if_view,
)
from mtad.whatif import accepted_length_at, node_ratios, threshold_curve
from tests.samples import trace as sample
from tests.test_ui import HOSTILE, ReadyPair, handmade_steps, handmade_trace
from tests.test_whatif import joint_decisions, trees

HALF = math.log(0.5)


def as_step(decision: Decision, index: int = 0) -> Step:
    emitted = tuple(f" t{token}" for token in decision.emitted)
    nodes = tuple(f" n{token}" for token in decision.tree.token_ids)
    return Step(index, decision, emitted, nodes, 0.0, 0.0, 0.0)


def joint_trace(*decisions: Decision, threshold: float = 0.5, method: str = "mtad_tree") -> Trace:
    steps = [as_step(d, k) for k, d in enumerate(decisions)]
    trace = handmade_trace(method, steps)
    config = dataclasses.replace(trace.config, accept_threshold=threshold)
    return dataclasses.replace(trace, config=config)


def block(target: tuple[float, ...], draft: tuple[float, ...], path: int) -> Decision:
    """A block of `mtad` whose first `path` tokens were accepted, and a bonus."""
    size = len(target)
    ids = tuple(range(size))
    tree = DraftTree(ids, tuple(range(-1, size - 1)), draft, target)
    return Decision(
        tree=tree,
        reference_logprobs=draft,
        path=ids[:path],
        emitted=(*ids[:path], 99),
        emitted_logprobs=(-0.5,) * (path + 1),
        final_kind="bonus",
    )


RESCUE = block((-1.0, -1.0, -0.1, -3.0), (-0.8, -0.3, -0.6, -0.1), 3)


# ------------------------------------------------------------------ what if


def lengths_of(view: dict[str, Any], index: int) -> list[int]:
    """As the script counts them."""
    return [sum(rank > index for rank in ranks) for ranks in view["ranks"]]


@given(joint_decisions(), joint_decisions())
def test_every_slider_value_agrees_with_the_library(one: Decision, two: Decision) -> None:
    trace = joint_trace(one, two)
    view = what_if_view(trace)
    taus = slider_thresholds(0.5)
    for index, tau in enumerate(taus):
        expected = [accepted_length_at(step.decision, tau) for step in trace.steps]
        assert lengths_of(view, index) == expected
    assert view["expected"] == threshold_curve(trace.steps, taus)


def test_the_slider_is_strict_where_a_ratio_equals_log_tau() -> None:
    on_the_line = block((math.log(0.5),), (0.0,), 0)
    assert node_ratios(on_the_line) == [HALF]
    view = what_if_view(joint_trace(on_the_line))
    at = view["recorded"]
    assert view["taus"][at] == "0.5"
    assert lengths_of(view, at) == [0]
    assert lengths_of(view, at - 1) == [1]


def test_the_slider_goes_from_a_hundredth_to_one_and_holds_the_recorded_tau() -> None:
    taus = slider_thresholds(0.123456)
    assert (taus[0], taus[-1]) == (0.01, 1.0)
    assert 0.123456 in taus
    assert taus == sorted(set(taus))
    assert slider_thresholds(2.5)[-1] == 2.5, "a recorded τ outside widens the slider"
    view = what_if_view(joint_trace(RESCUE, threshold=0.123456))
    assert view["taus"][view["recorded"]] == "0.123456"
    assert view["x"][0] == 0.0 and view["x"][-1] == 1.0


def test_a_typed_tau_is_the_library_s_own_answer() -> None:
    trace = joint_trace(RESCUE, block((-5.0,), (-0.1,), 0))
    view = what_if_at(trace, 0.007)
    assert view["lengths"] == [accepted_length_at(s.decision, 0.007) for s in trace.steps]
    assert [view["expected"]] == threshold_curve(trace.steps, [0.007])
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="must be a number greater than 0"):
            what_if_at(trace, bad)


def test_methods_without_a_threshold_say_so() -> None:
    for info in methods():
        steps = list(handmade_steps(info.id, ("a", " b"), 3, 0))
        if info.id == "mtad_tree":
            continue
        why = what_if_view(handmade_trace(info.id, steps))["why"]
        assert (why == "") == (info.id == "mtad")
        if why:
            assert info.title in why
            assert ("drafts nothing" in why) == (not info.uses_draft)


# ------------------------------------------------------------------ strip


def test_the_strip_counts_tokens_and_marks_rescues() -> None:
    plain = block((-0.1, -9.0), (-0.2, -0.2), 1)
    strip = strip_view(joint_trace(plain, RESCUE, method="mtad"))
    assert strip["emitted"] == [2, 4]
    assert strip["accepted"] == [1, 3]
    assert strip["offered"] == [2, 4]
    assert strip["kinds"] == "bb"
    assert strip["rescued"] == [1]
    assert strip["start"] == 1
    assert strip["top"] == 5, "room for the outline of a block that is accepted whole"


def test_a_strip_of_thousands_of_passes_is_a_short_message() -> None:
    steps = list(handmade_steps("mtad", ("word",) * 7, 2000, 0))
    trace = handmade_trace("mtad", steps)
    started_at = time.perf_counter()
    size = len(encode({"strip": strip_view(trace), "what_if": what_if_view(trace)}))
    assert size < 120_000
    assert time.perf_counter() - started_at < 5


def test_a_path_that_its_own_figures_deny_is_noted() -> None:
    wrong = block((-9.0, -9.0), (-0.1, -0.1), 2)
    trace = joint_trace(wrong, RESCUE, method="mtad")
    assert disagreeing(trace) == 1
    assert "In 1 of 2 passes the accepted path is not" in trace_view(trace, "x")["notes"][-1]
    assert disagreeing(sample()) == 0


# ------------------------------------------------------------------ passes


def test_a_rescued_dip_is_told_and_marked() -> None:
    trace = joint_trace(RESCUE, method="mtad")
    view = pass_view(trace, 0)
    assert view["title"] == "Pass 1 of 1: accepted 3 of 4 offered, 1 bonus"
    assert view["chart"]["dips"] == [2]
    assert view["chart"]["end"] == 3
    assert view["chart"]["log_tau"] == round(HALF, 4)
    assert [row["v"] for row in view["rows"]] == [True, False, True, False]
    assert [row["s"] for row in view["rows"]] == ["accepted"] * 3 + ["rejected"]
    assert view["rows"][1]["w"] == "✗ no, a later one passes"
    assert "An early dip, rescued" in view["verdict"]
    assert "−0.90 at depth 2" in view["verdict"]
    assert view["final"] == [["b", shown(trace.steps[0].emitted_texts[-1]), "bonus", "−0.50"]]


def test_figures_that_would_read_as_log_tau_get_more_digits() -> None:
    close = block((HALF + 0.001,), (0.0,), 1)
    assert pass_view(joint_trace(close, method="mtad"), 0)["chart"]["labels"] == ["−0.6921"]


def test_nothing_accepted_and_all_accepted_are_told() -> None:
    nothing = pass_view(joint_trace(block((-9.0,), (-0.1,), 0), method="mtad"), 0)
    assert nothing["chart"]["end_text"] == "no prefix passes"
    assert "the best reaches −8.90" in nothing["verdict"]
    whole = pass_view(joint_trace(block((-0.1,), (-0.2,), 1), method="mtad"), 0)
    assert whole["verdict"].startswith("Accepted to its whole depth: the joint ratio 0.10")


def test_infinities_reach_the_drawing_as_words() -> None:
    forbidden = block((-0.1, -math.inf, -0.1), (-0.1, -0.2, -0.2), 1)
    view = pass_view(joint_trace(forbidden, method="mtad"), 0)
    assert view["chart"]["values"] == [0.0, "-inf", "-inf"]
    assert view["rows"][2]["c"][2] == "−∞"
    assert math.isfinite(view["chart"]["low"])
    encode(view)


def test_absurd_figures_of_a_file_stay_short_and_can_be_sent() -> None:
    absurd = block((-1e300, 1e308), (1e308, 1e308), 0)
    view = pass_view(joint_trace(absurd, method="mtad"), 0)
    text = encode(view)
    assert len(text) < 4000
    assert "−1.0e+300" in json.loads(text)["rows"][0]["c"][0]


@given(joint_decisions())
def test_any_joint_decision_can_be_drawn(decision: Decision) -> None:
    trace = joint_trace(decision)
    view = json.loads(encode(pass_view(trace, 0)))
    assert len(view["rows"]) == len(decision.tree.token_ids)
    for row in view["rows"]:
        assert len(row["c"]) == len(view["columns"]) - 1


@given(trees())
def test_the_layout_keeps_the_path_straight_and_nodes_apart(tree: DraftTree) -> None:
    leaves = set(range(len(tree.token_ids))) - set(tree.parents)
    path = tree.path_to(max(leaves, default=-1))[:2]
    lines = layout(tree, path, range(len(tree.token_ids)))
    assert set(lines) == set(range(len(tree.token_ids)))
    assert all(lines[node] == 0 for node in path)
    places = [(lines[node], tree.depths[node]) for node in lines]
    # The target's own token goes on in the line of the path.
    places += [(0, len(path) + 1)]
    assert len(set(places)) == len(places)
    # No branch runs through the boxes of another: within a line depths are one stretch.
    for line in set(lines.values()):
        depths = sorted(tree.depths[node] for node in lines if lines[node] == line)
        assert depths == list(range(depths[0], depths[0] + len(depths)))


def test_a_huge_tree_is_cut_and_says_so() -> None:
    size = MAX_DRAWN + 100
    flat = DraftTree((1,) * size, (-1,) * size, (-1.0,) * size, (-1.0,) * size)
    decision = Decision(
        tree=flat,
        reference_logprobs=(-1.0,),
        path=(size - 1,),
        emitted=(1, 2),
        emitted_logprobs=(-1.0, -1.0),
        final_kind="bonus",
    )
    view = pass_view(joint_trace(decision), 0)
    assert len(view["rows"]) == MAX_DRAWN + 1
    assert view["hidden"] == 99
    assert view["rows"][-1]["s"] == "accepted"


def judged(
    method: str,
    scores: tuple[float | None, ...],
    thresholds: tuple[float | None, ...],
    path: int,
    parents: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    size = len(scores)
    ids = tuple(range(size))
    chain = tuple(range(-1, size - 1))
    tree = DraftTree(ids, parents or chain, (-0.5,) * size, (-0.7,) * size, scores, thresholds)
    decision = Decision(
        tree=tree,
        path=ids[:path],
        emitted=(*ids[:path], 99),
        emitted_logprobs=(-0.5,) * (path + 1),
        final_kind="corrected",
    )
    trace = handmade_trace(method, [as_step(decision)])
    view = pass_view(trace, 0)
    encode(view)
    return view


def test_a_rejection_test_is_drawn_as_it_was_made() -> None:
    view = judged("speculative", (1.7, 0.31, 0.9), (0.6, 0.82, 0.1), 1)
    assert "Rejected at depth 2: p/q is 0.31, not above the drawn u of 0.82" in view["verdict"]
    chart = view["chart"]
    assert (chart["kind"], chart["low"], chart["high"], chart["bars"]) == ("tests", 0.0, 1.0, True)
    assert [item["v"] for item in chart["items"]] == [True, False, True]
    assert [item["st"] for item in chart["items"]] == ["1.70", "0.31", "0.90"]
    assert view["rows"][2]["w"] == "✓ yes, but after a rejection"
    assert view["bound"]["why"].startswith("– (no bound is needed")


def test_candidates_of_a_tree_are_drawn_in_the_order_of_their_tests() -> None:
    view = judged("specinfer", (0.2, 0.4, None), (0.5, 0.9, None), 0, (-1, -1, 0))
    assert "at depth 1 all 2 tests fail" in view["verdict"]
    assert [item["row"] for item in view["chart"]["items"]] == [0, 1], "untested ones are left out"
    assert view["rows"][2]["w"] == "not tested"


def test_typical_and_rollback_have_axes_of_their_own() -> None:
    typical = judged("typical", (0.5, 0.0), (0.09, 0.09), 1)
    assert typical["chart"]["items"][1]["score"] == "-inf"
    assert "p is 0.00, not above the threshold 0.09" in typical["verdict"]
    assert [text for _, text in typical["chart"]["ticks"]] == ["0.01", "0.1", "1"]
    bild = judged("bild", (-1.0, -7.5), (-5.0, -5.0), 1)
    assert "Rolled back at depth 2: log p is −7.50, under the limit −5.00" in bild["verdict"]
    assert bild["chart"]["low"] < -7.5


def test_every_method_has_a_view_and_those_without_a_draft_say_so() -> None:
    for info in methods():
        if info.id == "mtad_tree":
            continue
        trace = handmade_trace(info.id, list(handmade_steps(info.id, HOSTILE, 4, 1)))
        for index in range(4):
            view = pass_view(trace, index)
            encode(view)
            assert view["verdict"]
            assert (
                "drafts nothing" in view["verdict"] or "Nothing is drafted" in view["verdict"]
            ) == (not info.uses_draft)


def test_tokens_that_cannot_be_seen_are_spelled_out() -> None:
    assert shown(" sky ") == "␣sky␣"
    assert shown("\n") == "↵"
    assert shown("") == "▯"
    assert shown("a\u200bb") == "a⟨200B⟩b"
    assert shown("\u202eabc") == "⟨202E⟩abc"
    assert shown("   ") == "␣␣␣"
    assert shown("<img onerror>`${x}`") == "<img onerror>`${x}`"


def test_an_emitted_token_outside_the_list_stands_below_it() -> None:
    view = pass_view(sample(), 0)
    assert [entry["list"][-1][3] for entry in view["alternatives"]] == [True, True, True]
    assert view["alternatives"][0]["list"][-1][2] == "0.607"


# ------------------------------------------------------------------ bound


def test_the_bound_prints_what_is_known() -> None:
    trace = joint_trace(RESCUE, method="mtad")
    view = bound_view(trace, trace.steps[0])
    assert view["certified"] == "−0.400"
    assert (view["gap"], view["terms"], view["measurable"]) == ("–", [], True)
    other = bound_view(trace, trace.steps[0], None, "it is another's")
    assert (other["reason"], other["measurable"]) == ("it is another's", False)
    known = Bound(-0.4, math.log(2), 0.3, 0.2, -0.1, (7, 8), None)
    step = dataclasses.replace(trace.steps[0], bound=known)
    view = bound_view(trace, step, lambda ids: [f" t{k}" for k in ids])
    assert [row[2] for row in view["terms"]] == ["0.200", "−0.100", "0.693"]
    assert (view["limit"], view["gap"], view["best"]) == ("0.793", "0.300", ["␣t7", "␣t8"])
    outside = dataclasses.replace(
        known, draft_error=None, search_gap=None, reason="no bound: y is outside"
    )
    view = bound_view(trace, dataclasses.replace(step, bound=outside))
    assert (view["limit"], view["reason"]) == ("–", "no bound: y is outside")
    rejected = joint_trace(block((-9.0,), (-0.1,), 0), method="mtad")
    assert "nothing to bound" in bound_view(rejected, rejected.steps[0])["why"]


class Pair(ReadyPair):
    vocab_size, context_length = 1000, 1000


def measurable() -> tuple[Collection, str, Trace]:
    base = joint_trace(RESCUE, method="mtad")
    trace = dataclasses.replace(base, engine="none", prompt_ids=(1,))
    shelf = Shelf()
    return Collection(shelf), shelf.put("me", "mine", trace), trace


def test_only_the_pair_that_made_a_trace_can_measure_it() -> None:
    _, _, trace = measurable()
    assert why_no_gap(trace, Pair()) == ""
    assert why_no_gap(trace, None) == "", "not known before the models are loaded"
    change = dataclasses.replace
    for other, why in (
        (change(trace, target=change(trace.target, name="X-70B")), "target is X-70B"),
        (change(trace, draft=None), "draft is none, the loaded one hand-made draft"),
        (change(trace, dtype="bfloat16"), "recorded on cpu in bfloat16"),
        (change(trace, prompt_ids=(5000,)), "prompt is none of this pair"),
        (change(trace, prompt_ids=(1,) * 1000), "longer than the context"),
        (change(trace, method="speculative"), "MTAD and multi-candidate MTAD only"),
    ):
        assert why in why_no_gap(other, Pair())


def test_jobs_are_checked_when_they_are_asked_for() -> None:
    collection, key, _ = measurable()
    jobs = GapJobs()
    job = jobs.open(collection, Pair(), key, 0)
    assert jobs.get(job.job_id) is job
    assert jobs.get(["no"]) is None
    for bad_key, index, message in (
        ("gone", 0, "no longer keeps this trace"),
        (None, 0, "no longer keeps this trace"),
        (key, 1, "step is 1, but must be from 0 to 0"),
        (key, "../0", "must be from 0 to 0"),
        (key, True, "must be from 0 to 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            jobs.open(collection, Pair(), bad_key, index)


def test_a_measured_bound_is_kept_in_the_trace() -> None:
    collection, key, trace = measurable()
    bound = Bound(-0.4, math.log(2), 0.3, 0.2, -0.1, (7, 8), None)
    budgets = []

    def measure(pair: Any, asked: Trace, index: int, check: Any) -> Bound:
        budgets.append(asked.config.node_budget)
        check()
        return bound

    messages = list(measure_gap(GapJob("j", key, 0), collection, Pair(), measure))
    assert [m["gap"]["state"] for m in messages][-1] == "done"
    found = collection.get(key)
    assert found is not None
    assert found[1].steps[0].bound == bound
    assert dataclasses.replace(found[1], steps=trace.steps) == trace
    assert budgets == [4096]


def test_a_search_stops_between_two_passes() -> None:
    collection, key, _ = measurable()
    job = GapJob("j", key, 0)
    began = threading.Event()

    def endless(pair: Any, asked: Trace, index: int, check: Any) -> Bound:
        while True:
            check()
            began.set()
            time.sleep(0.01)

    messages = measure_gap(job, collection, Pair(), endless)
    running = next(messages)["gap"]
    assert running["state"] == "running"
    assert "target passes" in running["text"]
    job.cancel.set()
    assert [m["gap"]["state"] for m in messages][-1] == "stopped"
    # A closed tab closes the generator: the search ends as well.
    closed = GapJob("k", key, 0)
    generator = measure_gap(closed, collection, Pair(), endless)
    next(generator)
    generator.close()
    assert closed.cancel.is_set()
    deadline = time.monotonic() + 10
    while any(thread.name == "mtad-gap" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stopped = GapJob("l", key, 0)
    stopped.cancel.set()
    states = [m["gap"]["state"] for m in measure_gap(stopped, collection, Pair(), endless)]
    assert states == ["stopped"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BudgetError("node_budget is 9. Lower γ."), "node_budget is 9. Lower γ."),
        (Cancelled("x"), "Stopped."),
        (RuntimeError("secret"), "The search failed (RuntimeError); the server's log says more."),
    ],
)
def test_a_failed_search_says_why(error: Exception, text: str) -> None:
    collection, key, _ = measurable()

    def fail(pair: Any, asked: Trace, index: int, check: Any) -> Bound:
        raise error

    last = list(measure_gap(GapJob("j", key, 0), collection, Pair(), fail))[-1]["gap"]
    assert last["text"] == text


def test_a_trace_that_has_gone_is_told() -> None:
    collection, _, _ = measurable()
    last = list(measure_gap(GapJob("j", "gone", 0), collection, Pair()))[-1]["gap"]
    assert (last["state"], last["text"][:32]) == ("failed", "The server no longer keeps this ")


# ------------------------------------------------------------------ traces and files


def test_recorded_traces_are_all_readable_and_can_be_drawn() -> None:
    recorded = Recorded().all()
    assert recorded
    for key, (label, trace) in recorded.items():
        assert key.startswith("recorded:")
        assert label
        encode(trace_view(trace, label))
        encode(what_if_view(trace))
        for index in range(len(trace.steps)):
            encode(pass_view(trace, index))
        assert disagreeing(trace) == 0, key


def test_a_listing_prefers_the_visit_and_a_trace_that_tells_most(tmp_path: Path) -> None:
    lines = [
        joint_trace(block((-9.0,), (-0.1,), 0), method="mtad"),
        joint_trace(RESCUE, method="mtad"),
    ]
    text = "\n".join([*(each.to_json() for each in lines), '{"method": "broken"}'])
    (tmp_path / "some.jsonl").write_text(text, encoding="utf-8")
    shelf = Shelf()
    collection = Collection(shelf, Recorded(tmp_path))
    listing = collection.listing("me")
    assert [title for title, _ in listing["groups"]] == ["Recorded"]
    assert [key for key, _ in listing["groups"][0][1]] == ["recorded:some:0", "recorded:some:1"]
    assert (listing["prefer"], listing["own"]) == ("recorded:some:1", False)
    mine = shelf.put("me", "mine", joint_trace(RESCUE))
    shelf.put("me", "plain", handmade_trace("autoregressive", []))
    shelf.put("other", "theirs", joint_trace(RESCUE))
    listing = collection.listing("me")
    assert (listing["prefer"], listing["own"]) == (mine, True)
    assert len(listing["groups"][0][1]) == 2
    assert collection.get("recorded:some:0") is not None
    for key in ("recorded:some:9", "../some.jsonl", "", None, 3, ["recorded:some:0"]):
        assert collection.get(key) is None


def test_a_file_may_hold_one_trace_a_list_or_lines() -> None:
    one, two = sample(), sample("mtad", text=" four")
    for text, found in (
        (one.to_json(), [one]),
        (one.to_json(indent=1), [one]),
        (f"{one.to_json()}\n{two.to_json()}\n", [one, two]),
        (f"[{one.to_json()}, {two.to_json(indent=1)}]", [one, two]),
    ):
        assert [trace for _, trace in read_file("x.json", text)] == found
    assert read_file("x" * 99, one.to_json())[0][0].startswith("x" * 39 + "…: Multi-token")


def test_files_that_are_no_traces_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = json.loads(sample().to_json())

    def changed(**fields: Any) -> str:
        return json.dumps({**good, **fields})

    no_reference = json.loads(sample().to_json())
    for step in no_reference["steps"]:
        step["decision"]["reference_logprobs"] = []
    for text, message in (
        ("", "not a trace"),
        ("{", "not a trace"),
        ("[" * 100_000, "not a trace"),
        ("[]", "the list is empty"),
        ("[1]", "not a trace"),
        ('{"a": NaN}', "not a trace"),
        (changed(schema_version=7), "schema version 7"),
        (changed(method="magic"), "no method 'magic'"),
        (changed(surprise=1), "surprise"),
        (json.dumps(no_reference), "reference_logprobs has 0 entries"),
        ("[" + ",".join(["1"] * 17) + "]", "at most 16 are read"),
        (None, "the file is no text"),
        ("\ud800", "not a trace"),
    ):
        with pytest.raises(MtadError, match=message):
            read_file("x.json", text)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    with pytest.raises(TraceError, match="reads at most 10"):
        read_file("x.json", "12345678901")
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10**6)
    monkeypatch.setattr(files, "MAX_PASSES", 1)
    with pytest.raises(TraceError, match="has 2 passes, but this page draws at most 1"):
        read_file("x.json", sample().to_json())


def test_the_question_is_found_in_chat_markup() -> None:
    chatml = (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    llama = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert question(chatml) == question(llama) == "Why?"
    assert question("Once upon") == "Once upon"
    assert question("") == ""


def test_config_and_machine_stand_in_the_header() -> None:
    view = trace_view(sample(), "label")
    assert dict(view["config"])["accept_threshold"] == "0.3"
    assert dict(view["machine"])["target"] == "big"
    assert view["notes"] == ["a stand-in"]
    assert view["meters"][1]["value"] == "2.00"
    assert isinstance(sample().steps[0], Step)
