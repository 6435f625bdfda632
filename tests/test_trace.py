"""Traces as JSON: what is written comes back, what comes from anywhere is checked.

Everything here is made by hand, so that no model is needed; traces of real runs go through the
same checks in test_invariants.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad import trace as trace_module
from mtad.config import DecodeConfig
from mtad.errors import MtadError, TraceError
from mtad.trace import (
    MAX_NODES,
    MAX_TRACE_BYTES,
    SCHEMA_VERSION,
    Alternative,
    Bound,
    Decision,
    DraftTree,
    EnergyReading,
    ModelInfo,
    Step,
    Summary,
    Trace,
    replace_emitted,
)

HOSTILE = (
    "${alert(1)} `x` \\u0041 <img src=x onerror=alert(1)> </script> \u202e\u200b\u2028\u2029"
    ' "quoted" \\ \x00\x1f\x7f \r\n\t NaN Infinity 👩\u200d🚀 日本'
)
TREE = DraftTree(
    token_ids=(5, 6, 7, 8),
    parents=(-1, 0, 0, 1),
    draft_logprobs=(-0.1, -math.inf, -0.3, -1e-30),
    target_logprobs=(-0.2, -math.inf, -0.7, -math.inf),
    scores=(1.5, None, 0.25, 0.0),
    thresholds=(0.5, None, 0.75, 1e-17),
)
DECISION = Decision(
    tree=TREE,
    reference_logprobs=(-0.1, -0.3, -math.inf),
    path=(0, 2),
    emitted=(5, 7, 9),
    emitted_logprobs=(-0.2, -0.7, -math.inf),
    final_kind="corrected",
    alternatives=(
        (Alternative(5, -0.2, HOSTILE), Alternative(4, -math.inf, "")),
        (Alternative(7, -0.7, "b"),),
        (),
    ),
    target_positions=5,
    draft_passes=2,
)
NO_ENERGY = EnergyReading(None, 1.25, "none", "nothing", None, "No sensor.")


def trace_of(*decisions: Decision, text: str = HOSTILE, **changes: Any) -> Trace:
    steps = tuple(
        Step(
            index=index,
            decision=decision,
            emitted_texts=(text,) * len(decision.emitted),
            node_texts=(text,) * len(decision.tree.token_ids),
            draft_seconds=0.1,
            verify_seconds=1 / 3,
            seconds=0.5 * (index + 1),
            joules=None,
        )
        for index, decision in enumerate(decisions)
    )
    summary = Summary(
        tokens=sum(len(decision.emitted) for decision in decisions),
        target_passes=len(decisions),
        decode_seconds=1.25,
        prefill_seconds=0.0,
        time_to_first_token_seconds=None,
        end_to_end_seconds=1.25,
        tokens_per_second=2.4,
        block_efficiency=3.0,
        acceptance_rate=2 / 3,
        perplexity=None,
        distinct_4=None,
        repeated_4gram_share=None,
        joules=None,
        joules_per_token=None,
        watts=None,
        end_to_end_joules=None,
        weight_bytes_per_token=1e15,
        draft_seconds=0.1,
        verify_seconds=1 / 3,
        other_seconds=0.8166666666666667,
    )
    values: dict[str, Any] = {
        "method": "specinfer",
        "config": DecodeConfig(stop=("</s>", HOSTILE), num_draft_tokens="auto"),
        "target": ModelInfo("target", "abc", 2**40, 2**41, HOSTILE),
        "draft": None,
        "device": "cpu",
        "dtype": "float32",
        "engine": "eager",
        "versions": {"mtad": "0.1.0", HOSTILE: HOSTILE},
        "prompt": HOSTILE,
        "prompt_ids": (1, 2, 3),
        "started_at": "2025-01-01T00:00:00+00:00",
        "text": "".join(step.text for step in steps),
        "stop_reason": "length",
        "steps": steps,
        "energy": NO_ENERGY,
        "end_to_end_energy": EnergyReading(12.5, 1.5, "replay", "made up", 0.1),
        "summary": summary,
        "notes": ("a note",),
    }
    return Trace(**{**values, **changes})


@pytest.fixture
def plain() -> dict[str, Any]:
    """A good trace as what JSON holds, to be spoilt."""
    loaded: dict[str, Any] = json.loads(trace_of(DECISION, Decision(emitted=(1,), **ONE)).to_json())
    return loaded


ONE: dict[str, Any] = {"emitted_logprobs": (-0.5,), "final_kind": "sampled"}


def read(value: Any) -> Trace:
    return Trace.from_json(json.dumps(value))


# Out and in again


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_trace_comes_back_equal(indent: int | None) -> None:
    trace = trace_of(DECISION, Decision(emitted=(1,), **ONE))
    text = trace.to_json(indent=indent)
    assert Trace.from_json(text) == trace
    assert Trace.from_json(text.encode()) == trace
    assert Trace.from_json(text).to_json(indent=indent) == text


def test_minus_infinity_is_written_as_null_and_comes_back() -> None:
    trace = trace_of(DECISION)
    plain = json.loads(trace.to_json())["steps"][0]["decision"]
    assert plain["tree"]["target_logprobs"] == [-0.2, None, -0.7, None]
    assert plain["tree"]["draft_logprobs"][1] is None
    assert plain["emitted_logprobs"][2] is None
    assert plain["reference_logprobs"][2] is None
    assert plain["alternatives"][0][1]["logprob"] is None
    decision = Trace.from_json(trace.to_json()).steps[0].decision
    assert decision.tree.target_logprobs[1] == -math.inf
    assert decision.emitted_logprobs[2] == -math.inf
    assert decision.tree.scores[1] is None  # here null means: not tested


def test_the_text_is_strict_json_for_a_browser_that_knows_no_infinity() -> None:
    """`parse_constant` is called for exactly the three tokens that JSON does not have."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} stands in the JSON")

    json.loads(trace_of(DECISION).to_json(), parse_constant=refuse)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_trace_survives_a_browsers_json_parser() -> None:
    """JSON.parse reads it, and what JSON.stringify writes of it is still the same trace."""
    trace = trace_of(DECISION, Decision(emitted=(1,), **ONE))
    program = (
        "const t = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "if (t.steps[0].decision.tree.target_logprobs[1] !== null) throw new Error('not null');"
        "process.stdout.write(JSON.stringify(t));"
    )
    done = subprocess.run(
        ["node", "-e", program],
        input=trace.to_json().encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert Trace.from_json(done.stdout) == trace


FINITE = st.floats(allow_nan=False, allow_infinity=False)
LOGPROBS = st.one_of(st.floats(max_value=0.0, allow_nan=False), st.just(-math.inf))
TOKENS = st.integers(0, 2**31 - 1)


@st.composite
def decisions(draw: st.DrawFn) -> Decision:
    size = draw(st.integers(0, 6))

    def column(values: st.SearchStrategy[Any], count: int = size) -> tuple[Any, ...]:
        return tuple(draw(st.lists(values, min_size=count, max_size=count)))

    scored = draw(st.booleans())
    tree = DraftTree(
        token_ids=column(TOKENS),
        parents=tuple(draw(st.integers(-1, node - 1)) for node in range(size)),
        draft_logprobs=column(LOGPROBS),
        target_logprobs=column(LOGPROBS),
        scores=column(st.none() | FINITE) if scored else (),
        thresholds=column(st.none() | FINITE) if scored else (),
    )
    path = tree.path_to(draw(st.integers(-1, size - 1)))
    emitted = tuple(tree.token_ids[node] for node in path) + column(TOKENS, 1)
    emitted = emitted[: draw(st.integers(0, len(emitted)))]
    alternative = st.builds(Alternative, TOKENS, LOGPROBS, st.text(max_size=3))
    return Decision(
        tree=tree,
        reference_logprobs=column(LOGPROBS, tree.depth),
        path=path,
        emitted=emitted,
        emitted_logprobs=column(LOGPROBS, len(emitted)),
        final_kind=draw(st.sampled_from([None, "bonus", "corrected", "sampled"])),
        alternatives=column(st.lists(alternative, max_size=2).map(tuple), len(emitted)),
        target_passes=draw(st.integers(0, 2**53 - 1)),
    )


@given(st.lists(decisions(), max_size=3), st.text(max_size=5))
def test_any_trace_comes_back_equal(made: list[Decision], text: str) -> None:
    trace = trace_of(*made, text=text)
    assert Trace.from_json(trace.to_json()) == trace


def test_a_bound_comes_back() -> None:
    trace = trace_of(DECISION)
    bound = Bound(-0.2, 0.69, 0.1, None, None, (5, 7), "y is outside the draft's support")
    steps = (dataclasses.replace(trace.steps[0], bound=bound),)
    bounded = dataclasses.replace(trace, steps=steps)
    assert Trace.from_json(bounded.to_json()) == bounded


# What cannot be written


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda trace, x: dataclasses.replace(
            trace, summary=dataclasses.replace(trace.summary, joules=x)
        ),
        lambda trace, x: dataclasses.replace(
            trace, energy=dataclasses.replace(trace.energy, seconds=x)
        ),
        lambda trace, x: dataclasses.replace(
            trace, steps=(dataclasses.replace(trace.steps[0], seconds=x),)
        ),
    ],
)
def test_a_figure_that_is_no_number_is_never_written_as_if_it_were_missing(
    spoil: Callable[[Trace, float], Trace], value: float
) -> None:
    with pytest.raises(TraceError, match="cannot be written"):
        spoil(trace_of(DECISION), value).to_json()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_log_probability_that_is_none_is_refused_at_once(value: float) -> None:
    with pytest.raises(ValueError, match="a log-probability is finite or -inf"):
        DraftTree((1,), (-1,), (value,), (-1.0,))
    with pytest.raises(ValueError, match="a log-probability is finite or -inf"):
        DraftTree((1,), (-1,), (-1.0,), (value,))
    with pytest.raises(ValueError, match="a log-probability is finite or -inf"):
        Decision(emitted=(1,), emitted_logprobs=(value,))
    with pytest.raises(ValueError, match="a log-probability is finite or -inf"):
        Decision(reference_logprobs=(value,))
    with pytest.raises(ValueError, match="a log-probability is finite or -inf"):
        Alternative(1, value)


# Files that are no trace


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "This is not a trace: Invalid JSON"),
        ("nope", "This is not a trace: Invalid JSON"),
        ("{", "This is not a trace: Invalid JSON"),
        ("{'method': 'mtad'}", "This is not a trace: Invalid JSON"),
        ('{"method": "mtad",}', "This is not a trace: Invalid JSON"),
        (b"\xff\xfe\x00", "This is not a trace: Invalid JSON"),
        (b"\x89PNG\r\n\x1a\n", "This is not a trace: Invalid JSON"),
        ('"\\ud800"', "This is not a trace: Invalid JSON"),
        ("\ud800", "at the file: Input should be a valid string"),
        ("null", "at the file: Input should be an object"),
        ("[]", "at the file: Input should be an object"),
        ('"text"', "at the file: Input should be an object"),
        ("3", "at the file: Input should be an object"),
        ("NaN", "at the file: Input should be an object"),
        ("{}", "at method: Field required"),
        ("9" * 10_000, "This is not a trace"),
    ],
)
def test_what_is_no_trace_is_refused_with_one_line(text: str | bytes, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        Trace.from_json(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert ".." not in str(caught.value)
    assert isinstance(caught.value, MtadError)


@pytest.mark.parametrize("text", ["[" * 1_000_000, '{"steps":' * 500_000, '[{"a":' * 300_000])
def test_deep_nesting_does_not_overflow_the_stack(text: str) -> None:
    with pytest.raises(TraceError, match="recursion limit exceeded"):
        Trace.from_json(text)


def test_a_file_over_the_size_limit_is_refused_before_it_is_parsed() -> None:
    started = time.perf_counter()
    with pytest.raises(TraceError, match="has 67,108,865 bytes; a trace may have at most 67,108,8"):
        Trace.from_json(b"[" * (MAX_TRACE_BYTES + 1))
    assert time.perf_counter() - started < 10


def test_the_size_limit_counts_bytes_and_not_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MAX_TRACE_BYTES", 100)
    with pytest.raises(TraceError, match="has 102 bytes; a trace may have at most 100"):
        Trace.from_json('"' + "é" * 50 + '"')
    with pytest.raises(TraceError, match="Input should be an object"):
        Trace.from_json('"' + "é" * 49 + '"')


@pytest.mark.parametrize("place", ["steps", "prompt_ids", "emitted", "parents", "alternatives"])
def test_a_million_mistakes_cost_no_more_than_one(plain: dict[str, Any], place: str) -> None:
    """Collecting them all took seconds and gigabytes."""
    decision = plain["steps"][0]["decision"]
    owner = {"steps": plain, "prompt_ids": plain, "parents": decision["tree"]}.get(place, decision)
    owner[place] = ["@"]
    text = json.dumps(plain).replace('"@"', '"",' * 1_000_000 + '""')
    started = time.process_time()
    with pytest.raises(TraceError, match=f"{place}.0: Input should be"):
        Trace.from_json(text)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("version", [0, 2, "1", 1.5, None, [], -1])
def test_another_schema_version_is_named(plain: dict[str, Any], version: object) -> None:
    plain["schema_version"] = version
    with pytest.raises(TraceError) as caught:
        read(plain)
    assert f"schema version {version!r}, but this program reads {SCHEMA_VERSION}" in str(
        caught.value
    )


FIELDS = [field.name for field in dataclasses.fields(Trace)]


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("notes", "schema_version")])
def test_a_missing_field_is_named(plain: dict[str, Any], name: str) -> None:
    del plain[name]
    with pytest.raises(TraceError, match=f"at {name}: Field required"):
        read(plain)


@pytest.mark.parametrize("name", [n for n in FIELDS if n != "schema_version"])
@pytest.mark.parametrize("value", [True, 1.5, [[]], {"a": 1}])
def test_a_wrong_type_is_refused_at_its_place(
    plain: dict[str, Any], name: str, value: object
) -> None:
    if name == "versions" and isinstance(value, dict):
        value = {"a": "b", "c": 3}
    plain[name] = value
    with pytest.raises(TraceError, match=name):
        read(plain)


def at(plain: dict[str, Any], place: str) -> tuple[Any, Any]:
    """The container of a dotted place, and the key in it."""
    *outer, last = [int(part) if part.lstrip("-").isdigit() else part for part in place.split(".")]
    container: Any = plain
    for part in outer:
        container = container[part]
    return container, last


STEP = "steps.0"
NODE = "steps.0.decision.tree"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("method", 3),
        ("stop_reason", "tired"),
        ("started_at", None),
        ("prompt_ids.0", "1"),
        ("prompt_ids.0", -1),
        ("prompt_ids.0", 2**31),
        ("prompt_ids.0", 10**400),
        ("prompt_ids.0", 1.5),
        ("steps.0.index", -1),
        ("steps.0.decision.emitted.0", True),
        ("steps.0.decision.emitted.0", 10**30),
        ("steps.0.decision.target_passes", -1),
        ("steps.0.decision.target_passes", 10**400),
        ("steps.0.decision.draft_passes", 2**53),
        ("steps.0.decision.final_kind", "guessed"),
        ("steps.0.decision.provisional", 1),
        ("steps.0.decision.tree.draft_logprobs.0", "-0.1"),
        ("steps.0.decision.tree.scores.0", "1"),
        ("steps.0.emitted_texts.0", None),
        ("steps.0.joules", "3"),
        ("steps.0.seconds", None),
        ("summary.tokens", -1),
        ("summary.tokens", 3.5),
        ("summary.perplexity", "low"),
        ("target.parameters", -5),
        ("energy.joules", {}),
        ("config.temperature", "1"),
        ("config.temperature", -1.0),
        ("config.seed", 10**30),
        ("config.stop", "END"),
        ("config.k_config", [99]),
        ("config.search", "depth"),
    ],
)
def test_a_wrong_value_is_refused(plain: dict[str, Any], place: str, value: object) -> None:
    container, key = at(plain, place)
    assert container[key] is not ...  # the place exists
    container[key] = value
    with pytest.raises(TraceError, match="This is not a trace that can be read: at "):
        read(plain)


@pytest.mark.parametrize(
    "place",
    [
        *["", "config", "target", "energy", "summary", STEP, f"{STEP}.decision", NODE],
        f"{STEP}.decision.alternatives.0.0",
    ],
)
def test_an_extra_field_is_refused(plain: dict[str, Any], place: str) -> None:
    container, key = at(plain, f"{place}.__class__".lstrip("."))
    container[key] = "x"
    with pytest.raises(TraceError, match="__class__: Unexpected keyword argument"):
        read(plain)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1" * 400])
@pytest.mark.parametrize(
    "place", [f"{STEP}.seconds", "summary.decode_seconds", "energy.seconds", f"{NODE}.scores.0"]
)
def test_a_figure_that_is_not_finite_is_refused(
    plain: dict[str, Any], place: str, number: str
) -> None:
    container, key = at(plain, place)
    container[key] = "@"
    with pytest.raises(TraceError, match="finite number"):
        Trace.from_json(json.dumps(plain).replace('"@"', number))


@pytest.mark.parametrize("number", ["1e999", "NaN", "Infinity"])
@pytest.mark.parametrize(
    "place",
    [
        *[f"{NODE}.draft_logprobs.0", f"{NODE}.target_logprobs.0"],
        *[f"{STEP}.decision.{name}.0" for name in ("emitted_logprobs", "reference_logprobs")],
        f"{STEP}.decision.alternatives.0.0.logprob",
    ],
)
def test_a_log_probability_is_finite_or_minus_infinity(
    plain: dict[str, Any], place: str, number: str
) -> None:
    container, key = at(plain, place)
    container[key] = "@"
    with pytest.raises(TraceError, match="a log-probability is finite or -inf"):
        Trace.from_json(json.dumps(plain).replace('"@"', number))


# Files that contradict themselves


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.update(path=[1]), "path is not connected at node 1"),
        (lambda d, t: d.update(path=[0, 3]), "path is not connected at node 3"),
        (lambda d, t: d.update(path=[2, 0]), "path is not connected at node 2"),
        (lambda d, t: d.update(path=[0, 4]), "path names node 4, not in the tree"),
        (lambda d, t: d.update(path=[-1]), "path names node -1, not in the tree"),
        (lambda d, t: d.update(path=[0, 1]), "the accepted tokens must be emitted first"),
        (lambda d, t: d.update(emitted=[7, 5, 9]), "the accepted tokens must be emitted first"),
        (lambda d, t: d.update(emitted=[5, 7]), "one log-probability a token"),
        (lambda d, t: d.update(alternatives=[[]]), "alternatives for every token or none"),
        (lambda d, t: t.update(parents=[-1, 0, 3, 1]), "node 2 has parent 3, which is not before"),
        (lambda d, t: t.update(parents=[0, 0, 0, 1]), "node 0 has parent 0, which is not before"),
        (lambda d, t: t.update(parents=[-2, 0, 0, 1]), "node 0 has parent -2, which is not before"),
        (lambda d, t: t.update(parents=[-1, 0, 0]), "parents must have one entry a node \\(4\\)"),
        (lambda d, t: t.update(draft_logprobs=[-1.0]), "draft_logprobs must have one entry a node"),
        (lambda d, t: t.update(target_logprobs=[]), "target_logprobs must have one entry a node"),
        (lambda d, t: t.update(scores=[0.5]), "scores must be empty or have 4"),
        (lambda d, t: t.update(thresholds=[0.5] * 5), "thresholds must be empty or have 4"),
        (lambda d, t: d.update(provisional=True), "step 0 is provisional"),
    ],
)
def test_a_decision_that_contradicts_itself_is_refused(
    plain: dict[str, Any],
    change: Callable[[dict[str, Any], dict[str, Any]], object],
    message: str,
) -> None:
    decision = plain["steps"][0]["decision"]
    change(decision, decision["tree"])
    with pytest.raises(TraceError, match=message):
        read(plain)


def test_steps_that_are_not_numbered_in_order_are_refused(plain: dict[str, Any]) -> None:
    plain["steps"].reverse()
    with pytest.raises(TraceError, match="step 0 has index 1"):
        read(plain)


@pytest.mark.parametrize(
    ("name", "message"),
    [("emitted_texts", "one text an emitted token"), ("node_texts", "one text a node")],
)
def test_every_token_has_one_text(plain: dict[str, Any], name: str, message: str) -> None:
    plain["steps"][0][name].pop()
    with pytest.raises(TraceError, match=message):
        read(plain)


def test_a_tree_of_too_many_nodes_is_refused(plain: dict[str, Any]) -> None:
    size = MAX_NODES + 1
    plain["steps"][0]["decision"]["tree"] = {
        "token_ids": [1] * size,
        "parents": [-1] * size,
        "draft_logprobs": [-1.0] * size,
        "target_logprobs": [-1.0] * size,
    }
    with pytest.raises(TraceError, match="token_ids: Tuple should have at most 4096 items"):
        read(plain)


@given(st.data())
def test_a_spoilt_file_is_refused_or_read_but_never_anything_else(data: st.DataObject) -> None:
    """Any value anywhere: the only exception is TraceError, and what is read can be written."""
    spoilt = copy.deepcopy(GOOD)
    container: Any = spoilt
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = data.draw(st.sampled_from(keys))
        inner = container[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        container = inner
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    container[key] = data.draw(
        st.recursive(junk, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x))
    )
    try:
        trace = Trace.from_json(json.dumps(spoilt))
    except TraceError:
        return
    assert Trace.from_json(trace.to_json()) == trace


GOOD = json.loads(trace_of(DECISION, Decision(emitted=(1,), **ONE), text="a").to_json())


# Small parts


def test_a_tree_knows_its_depths_and_paths() -> None:
    assert TREE.depths == (1, 2, 2, 3)
    assert TREE.depth == 3
    assert TREE.path_to(3) == (0, 1, 3)
    assert TREE.path_to(-1) == ()
    assert DraftTree().depth == 0


def test_tokens_know_where_they_come_from() -> None:
    assert DECISION.kinds == ("accepted", "accepted", "corrected")
    assert DECISION.accepted_length == 2
    trace = trace_of(DECISION, Decision(emitted=(1,), **ONE), text="x")
    assert trace.token_ids == (5, 7, 9, 1)
    assert trace.decisions() == (DECISION, trace.steps[1].decision)
    assert trace.steps[0].text == "xxx"


@pytest.mark.parametrize(
    ("count", "kinds"),
    [
        (3, ("accepted", "accepted", "corrected")),
        (2, ("accepted", "accepted")),
        (1, ("accepted",)),
        (0, ()),
    ],
)
def test_a_cut_decision_stays_consistent(count: int, kinds: tuple[str, ...]) -> None:
    cut = replace_emitted(DECISION, count)
    assert cut.emitted == DECISION.emitted[:count]
    assert cut.kinds == kinds
    assert (cut.tree, cut.path) == (DECISION.tree, DECISION.path)
    assert cut.final_kind == ("corrected" if count == 3 else None)


def test_an_energy_reading_says_how_sure_it_is() -> None:
    reading = EnergyReading(50.0, 20.0, "nvml-counter", "board", 0.1)
    assert reading.relative_error == pytest.approx(0.005)
    assert not reading.estimated
    assert EnergyReading(1.0, 1.0, "estimate", "").estimated
    assert NO_ENERGY.relative_error is None
    assert dataclasses.replace(reading, seconds=0.0).relative_error is None
