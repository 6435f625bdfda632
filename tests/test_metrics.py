"""Every measure against a hand-made run whose figures can be counted on paper."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtad.metrics import summarize
from mtad.trace import Decision, DraftTree, EnergyReading, Step, Summary

ENERGY = EnergyReading(joules=60.0, seconds=2.0, method="replay", scope="test")
WHOLE = EnergyReading(joules=80.0, seconds=2.5, method="replay", scope="test")
NONE = EnergyReading(joules=None, seconds=2.0, method="none", scope="nothing", reason="no sensor")


def step(
    emitted: tuple[int, ...],
    logprobs: tuple[float, ...] | None = None,
    *,
    offered: int = 0,
    accepted: int = 0,
    passes: int = 1,
    provisional: bool = False,
) -> Step:
    """One step whose draft is a chain of `offered` tokens with `accepted` of them emitted."""
    chain = (emitted[:accepted] + (7,) * offered)[:offered]
    tree = DraftTree(chain, tuple(range(-1, offered - 1)), (-1.0,) * offered, (-1.0,) * offered)
    decision = Decision(
        tree=tree,
        path=tuple(range(accepted)),
        emitted=emitted,
        emitted_logprobs=(-1.0,) * len(emitted) if logprobs is None else logprobs,
        final_kind="bonus",
        target_passes=passes,
        draft_passes=offered,
        provisional=provisional,
    )
    return Step(0, decision, ("x",) * len(emitted), ("x",) * offered, 0.25, 0.5, 1.0)


def summary(*steps: Step, **changes: Any) -> Summary:
    arguments: dict[str, Any] = {
        "decode_seconds": 2.0,
        "prefill_seconds": 0.5,
        "time_to_first_token_seconds": 0.75,
        "energy": ENERGY,
        "end_to_end_energy": WHOLE,
        "target_weight_bytes": 1000,
        "draft_weight_bytes": 10,
    }
    return summarize(steps, **(arguments | changes))


def test_a_run_counted_by_hand() -> None:
    result = summary(
        step((1, 2, 3), (-1.0, -2.0, -3.0), offered=4, accepted=2),
        step((4,), (-2.0,), offered=4, accepted=0),
        step((5, 6), (-1.5, -2.5), offered=1, accepted=1),
        step((7,), (-4.0,)),
    )
    assert result == Summary(
        tokens=7,
        target_passes=4,
        decode_seconds=2.0,
        prefill_seconds=0.5,
        time_to_first_token_seconds=0.75,
        end_to_end_seconds=2.5,
        tokens_per_second=3.5,
        block_efficiency=7 / 4,
        acceptance_rate=3 / 9,
        perplexity=math.exp(16.0 / 7),
        distinct_4=1.0,
        repeated_4gram_share=0.0,
        joules=60.0,
        joules_per_token=60.0 / 7,
        watts=30.0,
        end_to_end_joules=80.0,
        weight_bytes_per_token=(4 * 1000 + 9 * 10) / 7,
        draft_seconds=1.0,
        verify_seconds=2.0,
        other_seconds=0.0,  # the spans sum to more than the wall clock; never negative
    )


def test_passes_are_counted_and_not_steps() -> None:
    result = summary(step((1, 2, 3, 4), passes=5))
    assert result.block_efficiency == 4 / 5
    assert result.other_seconds == 2.0 - 0.75


def test_the_depth_of_a_tree_is_offered_and_not_its_nodes() -> None:
    tree = DraftTree((1, 2, 3, 4), (-1, -1, 0, 1), (-1.0,) * 4, (-1.0,) * 4)
    decision = Decision(tree=tree, path=(1,), emitted=(2, 9), emitted_logprobs=(-1.0, -1.0))
    result = summary(Step(0, decision, ("", ""), ("",) * 4, 0.0, 0.0, 0.0))
    assert result.acceptance_rate == 1 / 2


def test_accepted_tokens_that_a_stop_string_cut_off_still_count_as_accepted() -> None:
    cut = dataclasses.replace(
        step((1, 2, 3), offered=4, accepted=3).decision, emitted=(1,), emitted_logprobs=(-1.0,)
    )
    result = summary(Step(0, cut, ("x",), ("x",) * 4, 0.0, 0.0, 0.0))
    assert (result.tokens, result.acceptance_rate) == (1, 3 / 4)


def test_without_a_draft_there_is_no_acceptance_rate() -> None:
    result = summary(step((1,)), draft_weight_bytes=0)
    assert result.acceptance_rate is None
    assert result.weight_bytes_per_token == 1000.0


def test_repetition_is_seen() -> None:
    result = summary(step((1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3)))  # 8 4-grams, 4 of them new
    assert (result.distinct_4, result.repeated_4gram_share) == (0.5, 0.5)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_under_four_tokens_there_is_no_4gram(length: int) -> None:
    result = summary(step(tuple(range(length))))
    assert result.distinct_4 is None and result.repeated_4gram_share is None


def test_4grams_span_steps() -> None:
    assert summary(step((1, 2)), step((3, 4))).distinct_4 == 1.0


def test_a_token_without_probability_leaves_no_perplexity() -> None:
    assert summary(step((1, 2), (-1.0, -math.inf))).perplexity is None
    assert summary(step((1,), (-1e6,))).perplexity is None  # exp overflows


def test_a_sure_text_has_perplexity_one() -> None:
    assert summary(step((1, 2), (0.0, 0.0))).perplexity == 1.0


def test_what_was_not_measured_is_none() -> None:
    result = summary(step((1,)), energy=NONE, end_to_end_energy=NONE)
    assert result.joules is None and result.end_to_end_joules is None
    assert result.joules_per_token is None and result.watts is None


@pytest.mark.parametrize("unknown", ["target_weight_bytes", "draft_weight_bytes"])
def test_unknown_weights_leave_the_proxy_out(unknown: str) -> None:
    result = summary(step((1, 2), offered=2, accepted=1), **{unknown: 0})
    assert result.weight_bytes_per_token is None


def test_a_run_that_emitted_nothing_divides_by_nothing() -> None:
    result = summary(decode_seconds=0.0, time_to_first_token_seconds=None)
    assert result.tokens == 0
    undefined = {name for name, value in dataclasses.asdict(result).items() if value is None}
    assert undefined == {
        "time_to_first_token_seconds",
        "tokens_per_second",
        "block_efficiency",
        "acceptance_rate",
        "perplexity",
        "distinct_4",
        "repeated_4gram_share",
        "joules_per_token",
        "watts",
        "weight_bytes_per_token",
    }


def test_a_provisional_step_is_refused() -> None:
    with pytest.raises(ValueError, match="Step 0 is provisional"):
        summary(step((1,), provisional=True))


@pytest.mark.parametrize(
    "name", ["decode_seconds", "prefill_seconds", "time_to_first_token_seconds"]
)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_durations_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be"):
        summary(step((1,)), **{name: value})


LOGPROBS = st.one_of(st.floats(max_value=0.0, allow_nan=False), st.just(-math.inf))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), LOGPROBS), max_size=5), max_size=6))
def test_a_summary_can_always_be_written(run: list[list[tuple[int, float]]]) -> None:
    steps = [step(tuple(t for t, _ in part), tuple(p for _, p in part)) for part in run]
    result = summary(*steps)
    json.dumps(dataclasses.asdict(result), allow_nan=False)  # raises for NaN and infinities
    assert result.tokens == sum(map(len, run))
    if result.distinct_4 is not None and result.repeated_4gram_share is not None:
        assert result.distinct_4 + result.repeated_4gram_share == pytest.approx(1.0)
    if result.perplexity is not None:
        assert result.perplexity >= 1.0
