"""The rules recomputed from recorded columns, against a brute force that tries every node."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtad.catalogue import methods
from mtad.config import DecodeConfig
from mtad.errors import ConfigError, TraceError
from mtad.trace import Decision, DraftTree, Step
from mtad.whatif import (
    accepted_length_at,
    accepted_path,
    joint_ratios,
    node_ratios,
    threshold_curve,
)

CONFIG = DecodeConfig()
# The machine may be busy: neither a slow example nor a slow draw says anything about the code.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# A coarse grid makes ties and exact meetings of the threshold (log 1 = 0) likely.
GRID = [0.0, -0.25, -0.5, -1.0, -2.0]
FINITE = st.one_of(st.sampled_from(GRID), st.floats(-12.0, 0.0, width=32))
LOGPROBS = st.one_of(FINITE, st.just(-math.inf))
TESTS = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 2.0))
THRESHOLDS = st.one_of(st.sampled_from([0.01, 0.5, 1.0]), st.floats(1e-6, 4.0))


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 12) -> DraftTree:
    size = draw(st.integers(0, max_nodes))

    def column(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(values, min_size=size, max_size=size)))

    return DraftTree(
        token_ids=tuple(range(size)),
        parents=tuple(draw(st.integers(-1, node - 1)) for node in range(size)),
        draft_logprobs=column(FINITE),
        target_logprobs=column(LOGPROBS),
        scores=column(TESTS),
        thresholds=column(TESTS),
    )


@st.composite
def joint_decisions(draw: st.DrawFn, max_nodes: int = 12) -> Decision:
    tree = draw(trees(max_nodes))
    length = tree.depth + draw(st.integers(0, 2))
    return Decision(tree=tree, reference_logprobs=tuple(draw(FINITE) for _ in range(length)))


def block(
    target: Sequence[float],
    draft: Sequence[float],
    scores: Sequence[float | None] = (),
    thresholds: Sequence[float | None] = (),
) -> Decision:
    size = len(target)
    parents = tuple(range(-1, size - 1))
    tree = DraftTree(
        tuple(range(size)), parents, tuple(draft), tuple(target), tuple(scores), tuple(thresholds)
    )
    return Decision(tree=tree, reference_logprobs=tuple(draft))


def as_step(decision: Decision) -> Step:
    return Step(0, decision, (), ("",) * len(decision.tree.token_ids), 0.0, 0.0, 0.0)


def left_sum(values: Sequence[float]) -> float:
    return functools.reduce(operator.add, values)


def brute_force_ratio(decision: Decision, node: int) -> float | None:
    """The ratio of one node from its own path; None if the target forbids the path."""
    path = decision.tree.path_to(node)
    target = left_sum([decision.tree.target_logprobs[step] for step in path])
    if target == -math.inf:
        return None
    return target - left_sum(decision.reference_logprobs[: len(path)])


def brute_force_joint(decision: Decision, threshold: float) -> tuple[int, ...]:
    tree = decision.tree
    passing = []
    for node in range(len(tree.token_ids)):
        ratio = brute_force_ratio(decision, node)
        if ratio is not None and ratio > math.log(threshold):
            path = tree.path_to(node)
            target = left_sum([tree.target_logprobs[step] for step in path])
            passing.append((-len(path), -target, node))
    return tree.path_to(min(passing)[2]) if passing else ()


# The joint rule


@unhurried
@given(joint_decisions(), THRESHOLDS)
def test_the_joint_rule_equals_brute_force(decision: Decision, threshold: float) -> None:
    expected = brute_force_joint(decision, threshold)
    config = DecodeConfig(accept_threshold=threshold)
    for method in ("mtad", "mtad_tree"):
        assert accepted_path(decision, method, config) == expected
    assert accepted_length_at(decision, threshold) == len(expected)


@unhurried
@given(joint_decisions())
def test_node_ratios_equal_brute_force_to_the_bit(decision: Decision) -> None:
    for node, ratio in enumerate(node_ratios(decision)):
        expected = brute_force_ratio(decision, node)
        assert ratio == (-math.inf if expected is None else expected)


@unhurried
@given(joint_decisions(), THRESHOLDS, THRESHOLDS)
def test_a_higher_threshold_never_accepts_more(decision: Decision, a: float, b: float) -> None:
    assert accepted_length_at(decision, min(a, b)) >= accepted_length_at(decision, max(a, b))


@unhurried
@given(
    st.lists(st.tuples(LOGPROBS, FINITE), min_size=1, max_size=8),
    THRESHOLDS,
)
@example([(-1.0, -1.0)], 1.0)
@example([(-0.1, -0.1), (-0.2, -0.1), (-0.3, -0.5)], 1.0)
def test_a_block_agrees_with_the_decoders_own_rule(
    columns: list[tuple[float, float]], threshold: float
) -> None:
    verify = pytest.importorskip("mtad.verify")
    target, draft = [p for p, _ in columns], [q for _, q in columns]
    expected = verify.joint_accept_length(target, draft, threshold)
    assert accepted_length_at(block(target, draft), threshold) == expected


def test_a_later_token_rescues_an_earlier_dip() -> None:
    decision = block(target=(-0.5, -3.0, -0.1, -9.0), draft=(-0.5, -0.5, -3.0, -0.5))
    # ratios 0, −2.5, 0.4, −8.1
    assert accepted_path(decision, "mtad", CONFIG) == (0, 1, 2)
    assert accepted_length_at(decision, 1.45) == 3  # log 1.45 = 0.37
    assert accepted_length_at(decision, 1.5) == 0  # log 1.5 = 0.41: nothing passes


def test_the_comparison_is_strict() -> None:
    decision = block(target=(-1.0,), draft=(-1.0,))
    assert accepted_length_at(decision, 1.0) == 0
    assert accepted_length_at(decision, math.nextafter(1.0, 0.0)) == 1


def test_a_token_that_the_target_forbids_never_passes_and_nothing_after_it() -> None:
    decision = block(target=(-0.1, -math.inf, 0.0), draft=(-0.1, -9.0, -9.0))
    assert accepted_length_at(decision, 1e-300) == 1
    both = block(target=(-math.inf,), draft=(-math.inf,))
    assert accepted_length_at(both, 0.5) == 0
    assert joint_ratios(both) == [[-math.inf]]  # and not NaN


def test_the_deepest_depth_wins_and_there_the_largest_target_then_the_first() -> None:
    tree = DraftTree(
        token_ids=(1, 2, 3, 4, 5),
        parents=(-1, -1, 0, 0, 1),
        draft_logprobs=(-1.0,) * 5,
        target_logprobs=(-0.5, -0.1, -0.5, -0.5, -0.9),  # sums at depth 2: −1, −1, −1
    )
    decision = Decision(tree=tree, reference_logprobs=(-1.0, -1.0))
    assert accepted_path(decision, "mtad_tree", CONFIG) == (0, 2)


def test_a_reference_shorter_than_the_tree_is_refused() -> None:
    tree = DraftTree((1, 2), (-1, 0), (-1.0, -1.0), (-1.0, -1.0))
    decision = Decision(tree=tree, reference_logprobs=(-1.0,))
    message = "has 1 entries, but the draft is 2 tokens deep"
    with pytest.raises(TraceError, match=message):
        accepted_path(decision, "mtad", CONFIG)
    with pytest.raises(TraceError, match=message):
        accepted_length_at(decision, 0.5)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_thresholds_out_of_range_are_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=f"accept_threshold is {threshold}, but must be"):
        accepted_length_at(block((-1.0,), (-1.0,)), threshold)
    with pytest.raises(ConfigError):
        threshold_curve([], [threshold])


# The rules that were recorded as tests


def brute_force_chain(tree: DraftTree, or_equal: bool) -> tuple[int, ...]:
    path: tuple[int, ...] = ()
    while True:
        at = path[-1] if path else -1
        children = [node for node, parent in enumerate(tree.parents) if parent == at]
        if not children:
            return path
        score, threshold = tree.scores[children[0]], tree.thresholds[children[0]]
        if score is None or threshold is None:
            return path
        if not (score >= threshold if or_equal else score > threshold):
            return path
        path += (children[0],)


def brute_force_specinfer(tree: DraftTree, at: int = -1) -> tuple[int, ...]:
    for node, parent in enumerate(tree.parents):
        score, threshold = tree.scores[node], tree.thresholds[node]
        if parent == at and score is not None and threshold is not None and score > threshold:
            return (node, *brute_force_specinfer(tree, node))
    return ()


@unhurried
@given(trees())
def test_the_tested_methods_equal_brute_force(tree: DraftTree) -> None:
    decision = Decision(tree=tree)
    assert accepted_path(decision, "speculative", CONFIG) == brute_force_chain(tree, False)
    assert accepted_path(decision, "typical", CONFIG) == brute_force_chain(tree, False)
    assert accepted_path(decision, "bild", CONFIG) == brute_force_chain(tree, True)
    assert accepted_path(decision, "specinfer", CONFIG) == brute_force_specinfer(tree)


@pytest.mark.parametrize(
    ("method", "expected"), [("speculative", (0,)), ("typical", (0,)), ("bild", (0, 1))]
)
def test_equality_passes_only_for_bild(method: str, expected: tuple[int, ...]) -> None:
    decision = block((-1.0,) * 3, (-1.0,) * 3, (0.9, 0.5, None), (0.1, 0.5, None))
    assert accepted_path(decision, method, CONFIG) == expected


def test_specinfer_takes_the_first_child_that_passes() -> None:
    tree = DraftTree(
        token_ids=(1, 2, 3, 4, 5),
        parents=(-1, -1, -1, 1, 1),
        draft_logprobs=(-1.0,) * 5,
        target_logprobs=(-1.0,) * 5,
        scores=(0.2, 0.9, None, 0.1, 0.8),
        thresholds=(0.7, 0.3, None, 0.4, 0.4),
    )
    assert accepted_path(Decision(tree=tree), "specinfer", CONFIG) == (1, 4)


def test_a_method_without_a_rule_accepts_nothing() -> None:
    decision = block((-0.1,), (-0.1,), (1.0,), (0.0,))
    for method in ("autoregressive", "beam", "mtjd"):
        assert accepted_path(decision, method, CONFIG) == ()


def test_every_method_can_be_asked_about_an_empty_draft() -> None:
    for info in methods():
        assert accepted_path(Decision(), info.id, CONFIG) == ()


def test_columns_that_were_not_recorded_accept_nothing() -> None:
    decision = block((-0.1,), (-0.1,))
    for method in ("speculative", "typical", "bild", "specinfer"):
        assert accepted_path(decision, method, CONFIG) == ()


# Curves and pictures


@unhurried
@given(
    st.lists(joint_decisions(max_nodes=6), min_size=1, max_size=5),
    st.lists(THRESHOLDS, max_size=5),
)
def test_the_curve_is_the_mean_of_accepted_plus_one(
    decisions: list[Decision], thresholds: list[float]
) -> None:
    curve = threshold_curve([as_step(decision) for decision in decisions], thresholds)
    expected = [
        sum(len(brute_force_joint(decision, tau)) + 1 for decision in decisions) / len(decisions)
        for tau in thresholds
    ]
    assert curve == expected


def test_no_steps_give_no_curve() -> None:
    assert threshold_curve([], [0.1, 0.5]) == []


@unhurried
@given(joint_decisions())
def test_joint_ratios_hold_each_leaf_and_the_ratios_of_its_path(decision: Decision) -> None:
    ratios = node_ratios(decision)
    paths = [decision.tree.path_to(node) for node in range(len(ratios))]
    leaves = [p for p in paths if not any(other[:-1] == p for other in paths)]
    if decision.reference_logprobs:
        assert joint_ratios(decision) == [[ratios[node] for node in path] for path in leaves]


def test_without_a_reference_the_drafts_own_path_is_drawn() -> None:
    tree = DraftTree((1, 2, 3), (-1, 0, 0), (-1.0, -2.0, -4.0), (-0.5, -3.0, -math.inf))
    assert joint_ratios(Decision(tree=tree)) == [[0.5, -0.5], [0.5, -math.inf]]
    assert joint_ratios(Decision()) == []
