"""The acceptance rules against hand-written tables and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mtad
from mtad.errors import ConfigError
from mtad.sampling import Warped
from mtad.verify import (
    joint_accept_length,
    joint_accept_lengths,
    joint_log_ratios,
    joint_tree_path,
    leading_run,
    multi_candidate,
    rejection_ratios,
    rollback_keeps,
    typical_thresholds,
)

INF = math.inf
LOGPROB = st.floats(-6, 0, width=32)
TARGET_LOGPROB = st.one_of(LOGPROB, st.just(-INF))


def oracle_length(target: list[float], draft: list[float], threshold: float) -> int:
    """max{ i : Σ log p − Σ log q > log τ }, 0 if there is none, by trying every prefix."""
    lengths = [0]
    for i in range(1, len(target) + 1):
        joint_target = 0.0
        for value in target[:i]:
            joint_target += value
        joint_draft = 0.0
        for value in draft[:i]:
            joint_draft += value
        if joint_target - joint_draft > math.log(threshold):
            lengths.append(i)
    return max(lengths)


@given(
    blocks=st.integers(1, 8).flatmap(
        lambda size: st.lists(
            st.tuples(
                st.lists(TARGET_LOGPROB, min_size=size, max_size=size),
                st.lists(LOGPROB, min_size=size, max_size=size),
            ),
            min_size=1,
            max_size=4,
        )
    ),
    threshold=st.sampled_from([1e-30, 0.01, 0.3, 0.5, 0.9, 1.0, 7.0, 1e30]),
)
def test_joint_accept_length_equals_the_oracle(
    blocks: list[tuple[list[float], list[float]]], threshold: float
) -> None:
    target = torch.tensor([block[0] for block in blocks])
    draft = torch.tensor([block[1] for block in blocks])
    expected = [
        oracle_length(p, q, threshold) for p, q in zip(target.tolist(), draft.tolist(), strict=True)
    ]
    got = joint_accept_lengths(target, draft, threshold)
    assert got.dtype == torch.int64 and got.tolist() == expected
    for kept in range(target.shape[1] + 1):  # what is padding is not accepted
        real = torch.arange(target.shape[1]).expand_as(target) < kept
        cut = [
            oracle_length(p[:kept], q[:kept], threshold)
            for p, q in zip(target.tolist(), draft.tolist(), strict=True)
        ]
        assert joint_accept_lengths(target, draft, threshold, real).tolist() == cut
        pairs = zip(target, draft, strict=True)
        alone = [joint_accept_lengths(p, q, threshold, real[0]) for p, q in pairs]
        assert [int(one) for one in alone] == cut
    assert [joint_accept_length(p, q, threshold) for p, q in blocks] == expected


def test_an_early_dip_is_rescued_by_a_later_token() -> None:
    target = [math.log(0.1), math.log(0.9), math.log(0.9)]
    draft = [math.log(0.9), math.log(0.3), math.log(0.2)]
    ratios = joint_log_ratios(torch.tensor([target]), torch.tensor([draft]))[0].exp().tolist()
    assert ratios == pytest.approx([1 / 9, 1 / 3, 1.5])
    assert mtad.verify.joint_accept_length(target, draft, 0.5) == 3
    assert mtad.verify.joint_accept_length(target[:2], draft[:2], 0.5) == 0


def test_nothing_after_a_token_of_probability_zero_is_accepted() -> None:
    target = [-0.1, -0.2, -INF, 0.0]
    draft = [-0.1, -0.2, -5.0, -5.0]
    assert joint_accept_length(target, draft, 1e-300) == 2


def test_the_threshold_is_strict() -> None:
    assert joint_accept_length([-0.5], [-0.5], 1.0) == 0
    assert joint_accept_length([-0.5], [-0.5], math.nextafter(1.0, 0.0)) == 1


@pytest.mark.parametrize("threshold", [0.0, -1.0, INF, math.nan])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="accept_threshold is .* greater than 0"):
        joint_accept_length([-0.5], [-0.5], threshold)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(1, 2\).*\(1, 3\).*same \[..., γ\]"):
        joint_accept_lengths(torch.zeros(1, 2), torch.zeros(1, 3), 0.5)


def test_sums_are_taken_in_order_in_float64() -> None:
    """Values for which another order of summation gives other bits."""
    generator = torch.Generator().manual_seed(0)
    target = -torch.rand(1, 12, generator=generator) * 30
    draft = -torch.rand(1, 12, generator=generator) * 1e-3
    joint_target = joint_draft = 0.0
    for i, (p, q) in enumerate(zip(target[0].tolist(), draft[0].tolist(), strict=True)):
        joint_target += p
        joint_draft += q
        assert joint_log_ratios(target, draft)[0, i].item() == joint_target - joint_draft


def tree_oracle(
    parents: list[int], target: list[float], reference: list[float], real: list[bool], tau: float
) -> tuple[int, ...]:
    best: tuple[int, float, tuple[int, ...]] = (0, -INF, ())
    for node in range(len(parents)):
        path: list[int] = []
        up = node
        while up >= 0:
            path.append(up)
            up = parents[up]
        path.reverse()
        joint_target = joint_draft = 0.0
        for depth, step in enumerate(path):
            joint_target += target[step]
            joint_draft += reference[depth]
        passes = real[node] and joint_target - joint_draft > math.log(tau)
        if passes and (len(path), joint_target) > best[:2]:
            best = (len(path), joint_target, tuple(path))
    return best[2]


@given(st.data())
def test_joint_tree_path_equals_the_oracle(data: st.DataObject) -> None:
    width, depth = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    parents: list[int] = []
    for level in range(depth):
        for _ in range(width):
            slot = data.draw(st.integers(0, width - 1))
            parents.append(-1 if level == 0 else (level - 1) * width + slot)
    size = width * depth
    target = data.draw(st.lists(TARGET_LOGPROB, min_size=size, max_size=size))
    reference = data.draw(st.lists(LOGPROB, min_size=depth, max_size=depth))
    real = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    tau = data.draw(st.sampled_from([0.01, 0.3, 0.9, 3.0]))
    paths = torch.full((size, depth), -1)
    for node in range(size):
        path: list[int] = []
        up = node
        while up >= 0:
            path.append(up)
            up = parents[up]
        paths[node, : len(path)] = torch.tensor(path[::-1])
    accepted, path_tensor = joint_tree_path(
        torch.tensor(target), torch.tensor(reference), paths, torch.tensor(real), tau
    )
    expected = tree_oracle(parents, target, reference, real, tau)
    assert tuple(path_tensor[: int(accepted)].tolist()) == expected


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [([], 0), ([False, True], 0), ([True, False, True], 1), ([True, True], 2)],
)
def test_leading_run(verdicts: list[bool], expected: int) -> None:
    alone = torch.tensor(verdicts, dtype=torch.bool)
    assert int(leading_run(alone)) == expected
    assert leading_run(torch.stack([alone, ~alone]))[0] == expected


def test_rejection_never_keeps_a_token_of_probability_zero() -> None:
    ratios = rejection_ratios(torch.tensor([-INF, -1.0]), torch.tensor([-0.1, -1.0]))
    assert ratios.tolist() == [0.0, 1.0]
    assert (torch.zeros(2) < ratios).tolist() == [False, True]  # u may be exactly 0


def test_typical_threshold_is_the_smaller_of_epsilon_and_the_entropy_term() -> None:
    flat = Warped(torch.arange(4).expand(1, 4), torch.full((1, 4), 0.25).log(), 4)
    sharp = Warped(torch.arange(2).expand(1, 2), torch.tensor([[1.0, 0.0]]).log(), 4)
    assert typical_thresholds(flat, 0.09, 0.3).tolist() == pytest.approx([0.3 / 4])
    assert typical_thresholds(sharp, 0.09, 0.3).tolist() == pytest.approx([0.09])


def test_rollback_keeps_a_token_exactly_on_the_line() -> None:
    keeps = rollback_keeps(torch.tensor([-5.0, -5.0001, -INF, -0.1]), 5.0)
    assert keeps.tolist() == [True, False, False, True]


def candidates_law(p: list[float], q: list[float], k: int, replacement: bool) -> list[float]:
    """Law of the emitted token, over all draws of k children and all verdicts."""
    size = len(p)
    target = Warped(torch.arange(size), torch.tensor(p, dtype=torch.float64).log(), size)
    draft = Warped(torch.arange(size), torch.tensor(q, dtype=torch.float64).log(), size)
    law = [0.0] * size

    def visit(tokens: list[int], left: list[float], weight: float) -> None:
        if len(tokens) < k and sum(left) > 0:
            for token in range(size):
                share = left[token] / sum(left)
                if share > 0:
                    rest = left if replacement else [m * (i != token) for i, m in enumerate(left)]
                    visit([*tokens, token], rest, weight * share)
            return
        rejected = weight
        for index in range(len(tokens)):
            # All before it rejected by an infinite u; this one tested with u = 0.
            chances = [INF] * index + [0.0]
            *_, ratios = multi_candidate(target, draft, tokens[: index + 1], chances, replacement)
            accepts = min(1.0, ratios[index])
            law[tokens[index]] += rejected * accepts
            rejected *= 1.0 - accepts
        if rejected > 0:
            _, final, _ = multi_candidate(target, draft, tokens, [INF] * len(tokens), replacement)
            for token, mass in zip(
                final.token_ids.tolist(), final.logprobs.exp().tolist(), strict=True
            ):
                law[token] += rejected * mass

    visit([], q, 1.0)
    return law


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3]),
        ([0.0, 0.4, 0.6], [0.9, 0.1, 0.0]),
        ([0.3, 0.3, 0.4], [0.3, 0.3, 0.4]),
        ([1.0, 0.0, 0.0], [0.0, 0.5, 0.5]),
    ],
)
def test_multi_candidate_emits_the_targets_law(
    p: list[float], q: list[float], k: int, replacement: bool
) -> None:
    assert candidates_law(p, q, k, replacement) == pytest.approx(p, abs=1e-9)
