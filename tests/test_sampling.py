"""Warping, draws and residuals against plain references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtad.config import DecodeConfig
from mtad.sampling import (
    Uniforms,
    Warped,
    draw,
    draw_distinct,
    residual,
    score,
    token_logprobs,
    top_alternatives,
    unwarped,
    warp,
)


def reference_warp(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> list[float]:
    """The same definition, written with loops: temperature, top-k, top-p, renormalise."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[:top_k] if 0 < top_k < len(logits) else order
    weights = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
    total = sum(weights.values())
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    if top_p == 1.0:
        nucleus = kept
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.15, 0.5, 0.9, 1.0]),
)
def test_warp_equals_the_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    config = DecodeConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    got = warp(torch.tensor(logits), config).dense().exp()
    expected = torch.tensor(reference_warp(logits, temperature, top_k, top_p))
    # A mass that meets top_p to the last bit may fall on either side of the line.
    if int((got > 0).sum()) == int((expected > 0).sum()):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    else:
        assert top_p < 1.0
        masses = sorted(reference_warp(logits, temperature, top_k, 1.0), reverse=True)
        sums = torch.tensor(masses).cumsum(0)
        assert (sums - top_p).abs().min() < 1e-5


def test_the_token_that_crosses_the_line_is_kept() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    kept = warp(logits, DecodeConfig(top_k=0, top_p=0.6)).dense() > -torch.inf
    assert kept.tolist() == [True, True, False]


def test_temperature_zero_is_a_one_hot_at_the_lowest_of_tied_ids() -> None:
    row = warp(torch.tensor([1.0, 3.0, 3.0, 0.0]), DecodeConfig(temperature=0.0))
    assert row.dense().tolist() == [-torch.inf, 0.0, -torch.inf, -torch.inf]


def test_a_tiny_temperature_does_not_overflow() -> None:
    row = warp(torch.tensor([900.0, -900.0, 899.0]), DecodeConfig(temperature=0.001, top_k=0))
    assert row.dense().exp().tolist() == [1.0, 0.0, 0.0]


def test_low_precision_logits_are_warped_in_float32() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    config = DecodeConfig(top_k=0, top_p=1.0)
    got = warp(logits, config).logprobs
    assert got.dtype == torch.float32
    assert torch.equal(got, warp(logits.float(), config).logprobs)


def test_joint_methods_score_unfiltered_at_temperature_zero() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    scored = score(logits, DecodeConfig(temperature=0.0, top_k=2, top_p=0.5))
    torch.testing.assert_close(scored.dense(), logits.log_softmax(-1))
    warm = DecodeConfig(temperature=0.7, top_k=2, top_p=0.5)
    assert torch.equal(score(logits, warm).dense(), warp(logits, warm).dense())


def test_logprob_of_is_minus_infinity_outside_the_support() -> None:
    row = Warped(torch.tensor([[4, 1]]), torch.tensor([[-0.5, -1.0]]), 6)
    assert row.logprob_of(torch.tensor([1])).tolist() == [-1.0]
    assert row.logprob_of(torch.tensor([0])).tolist() == [-torch.inf]


def test_entropy_ignores_what_was_filtered_out() -> None:
    row = Warped(torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.5, 0.0]).log(), 3)
    assert float(row.entropy()) == pytest.approx(math.log(2))


def test_draw_inverts_the_cumulative_mass() -> None:
    row = Warped(torch.tensor([7, 2, 5]), torch.tensor([0.5, 0.0, 0.5]).log(), 8)
    drawn = [int(draw(row, torch.tensor(u, dtype=torch.float64))) for u in (0.0, 0.49, 0.5, 0.99)]
    assert drawn == [7, 7, 5, 5]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_draw_never_gives_a_token_of_probability_zero(masses: list[float], u: float) -> None:
    if sum(masses) < 1e-6:
        masses = [*masses, 1.0]
    probabilities = torch.tensor(masses) / sum(masses)
    row = Warped(torch.arange(len(masses)), probabilities.log(), len(masses))
    token = int(draw(row, torch.tensor(u, dtype=torch.float64)))
    assert probabilities[token] > 0


def test_distinct_draws_have_the_law_of_drawing_without_replacement() -> None:
    """Chi-square over the 12 ordered pairs of 4 weights, 6,000 draws.

    The bound is the 1 − 1e-9 quantile of chi-square with 11 degrees of freedom (65.5): the
    seed is fixed, and a fresh seed would fail once in 1e9.
    """
    weights = torch.tensor([0.5, 0.25, 0.2, 0.05])
    generator = torch.Generator().manual_seed(0)
    trials = 6000
    counts: dict[tuple[int, int], int] = {}
    for uniform in torch.rand(trials, 4, generator=generator, dtype=torch.float64):
        first, second = draw_distinct(weights.log(), uniform, 2).tolist()
        counts[first, second] = counts.get((first, second), 0) + 1
    chi_square = 0.0
    for i in range(4):
        for j in range(4):
            if i != j:
                probability = float(weights[i] * weights[j] / (1 - weights[i]))
                expected = trials * probability
                chi_square += (counts.get((i, j), 0) - expected) ** 2 / expected
    assert chi_square < 65.5


def test_distinct_draws_put_zero_probability_last_even_for_a_zero_uniform() -> None:
    logprobs = torch.tensor([-torch.inf, -3.0, -torch.inf, -0.1])
    for uniform in (torch.zeros(4), torch.full((4,), 1 - 2**-53, dtype=torch.float64)):
        assert set(draw_distinct(logprobs, uniform, 2).tolist()) == {1, 3}


def test_residual_is_the_normalised_positive_part() -> None:
    target = Warped(torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.3, 0.2]).log(), 4)
    draft = Warped(torch.tensor([3, 1, 0]), torch.tensor([0.4, 0.5, 0.1]).log(), 4)
    got = residual(target, draft).dense().exp()
    expected = torch.tensor([0.4 / 0.6, 0.0, 0.2 / 0.6, 0.0], dtype=got.dtype)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_a_residual_without_mass_is_the_target() -> None:
    row = Warped(torch.tensor([0, 1]), torch.tensor([0.5, 0.5]).log(), 2)
    torch.testing.assert_close(residual(row, row).dense().exp().float(), row.dense().exp())


def test_token_logprobs_and_alternatives_are_unwarped() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(3))
    reference = logits.log_softmax(-1)
    tokens = torch.tensor([1, 5, 9])
    torch.testing.assert_close(token_logprobs(logits, tokens), reference[torch.arange(3), tokens])
    ids, logprobs = top_alternatives(logits, 4)
    values, indices = reference.topk(4)
    assert torch.equal(ids, indices)
    torch.testing.assert_close(logprobs, values)
    torch.testing.assert_close(unwarped(logits).dense(), reference)


@pytest.mark.parametrize("top_p", [1e-300, 7e-46, 1e-9])
def test_a_top_p_that_float32_rounds_to_zero_keeps_the_best_token(top_p: float) -> None:
    logits = torch.tensor([[0.3, 2.0, 1.0], [5.0, -1.0, 0.0]])
    for top_k in (0, 2):
        row = warp(logits, DecodeConfig(top_k=top_k, top_p=top_p))
        assert row.dense().exp().tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_uniforms_are_those_of_single_calls_whatever_is_asked_for_at_a_time() -> None:
    counts = [1, 0, 3, 700, 400, 1, 2000, 5]
    uniforms = Uniforms(torch.Generator().manual_seed(5))
    found = [uniforms(count) for count in counts]
    assert [one.shape[0] for one in found] == counts
    generator = torch.Generator().manual_seed(5)
    single = [torch.rand(1, generator=generator, dtype=torch.float64) for _ in range(sum(counts))]
    assert torch.equal(torch.cat(found), torch.cat(single))
