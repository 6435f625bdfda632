"""Lossless methods end to end: exact at temperature 0, in distribution above it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import mtad
from mtad.decoders import load_decoder
from mtad.draft import LMDrafter
from mtad.lm import CachedLM
from mtad.sampling import warp
from tests.models import FAMILIES, tiny

LOSSLESS = [
    ("speculative", {"num_draft_tokens": 3}),
    ("speculative", {"num_draft_tokens": "auto"}),
    ("specinfer", {"k_config": (3, 2), "replacement": True}),
    ("specinfer", {"k_config": (3, 2), "replacement": False}),
]


def close_draft(family: str, vocab_size: int, distance: float) -> Any:
    """The target of `family` with noise on its weights: a draft that is often right."""
    model = tiny(family, vocab_size=vocab_size, seed=1)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * distance * parameter.std())
    return model


def test_the_lossless_methods_are_these() -> None:
    """A method that is added or changes its claim must come by here."""
    lossless = {info.id for info in mtad.methods() if info.lossless}
    assert lossless == {"autoregressive", "speculative", "specinfer"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "parameters"), LOSSLESS)
def test_temperature_zero_emits_the_autoregressive_tokens(
    family: str, method: str, parameters: dict[str, Any]
) -> None:
    target = tiny(family, vocab_size=24, seed=1)
    pair = mtad.ModelPair(target=target, draft=close_draft(family, 24, 0.2))
    for seed, prompt in enumerate(([3], [4, 5, 6, 7], [9] * 12)):
        common = {"max_new_tokens": 30, "temperature": 0.0, "seed": seed}
        expected = mtad.run(
            "autoregressive", pair, prompt_ids=prompt, config=mtad.DecodeConfig(**common)
        )
        got = mtad.run(
            method, pair, prompt_ids=prompt, config=mtad.DecodeConfig(**common, **parameters)
        )
        assert got.token_ids == expected.token_ids
        assert len(got.token_ids) == 30


@pytest.mark.parametrize(("method", "parameters"), LOSSLESS)
def test_temperature_zero_on_the_real_pair(
    smollm2: Any, method: str, parameters: dict[str, Any]
) -> None:
    common = {"max_new_tokens": 24, "temperature": 0.0}
    prompt = "Name three rivers in Europe."
    expected = mtad.run("autoregressive", smollm2, prompt, config=mtad.DecodeConfig(**common))
    got = mtad.run(method, smollm2, prompt, config=mtad.DecodeConfig(**common, **parameters))
    assert got.token_ids == expected.token_ids
    assert got.summary.block_efficiency is not None
    assert got.summary.block_efficiency > 1.0


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("autoregressive", {}),
        *[case for case in LOSSLESS if case[1].get("num_draft_tokens") != "auto"],
        ("speculative", {"num_draft_tokens": "auto", "iteration_costs": (1.0, 1.3, 1.565)}),
    ],
)
def test_the_distribution_of_three_tokens_is_the_targets(
    method: str, parameters: dict[str, Any]
) -> None:
    """Chi-square over all 27 sequences of 3 tokens, 1,000 runs with the seeds 0 … 999.

    The bound is the 1 − 1e-9 quantile of chi-square with 26 degrees of freedom (97.6; cells
    under an expected count of 5 are pooled, which only lowers it): with fresh seeds a correct
    method would fail once in 1e9.
    """
    vocab, runs = 3, 1000
    target = tiny("llama", vocab_size=vocab, seed=1, initializer_range=0.3)
    draft = tiny("llama", vocab_size=vocab, seed=2, initializer_range=0.3)
    config = mtad.DecodeConfig(max_new_tokens=3, top_k=0, top_p=1.0, **parameters)
    prompt = [1, 2]
    target_lm, drafter = CachedLM(target), LMDrafter(CachedLM(draft))
    counts: dict[tuple[int, ...], int] = {}
    depths = set()  # with γ "auto" a block ends early where its first token was not likely
    decode = load_decoder(method)
    with torch.inference_mode():
        for seed in range(runs):
            target_lm.rollback(0)
            generator = torch.Generator().manual_seed(seed)
            outcomes = decode(target_lm, drafter, prompt, config, generator)
            decisions = [outcome.decision for outcome in outcomes]
            depths.add(decisions[0].tree.depth)
            tokens = tuple(token for decision in decisions for token in decision.emitted)
            counts[tokens] = counts.get(tokens, 0) + 1
        law = {}
        for tokens in itertools.product(range(vocab), repeat=3):
            logits = target(torch.tensor([[*prompt, *tokens]])).logits[0]
            rows = warp(logits[1:4], config).dense().exp()
            law[tokens] = float(rows[0, tokens[0]] * rows[1, tokens[1]] * rows[2, tokens[2]])
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-5)
    chi_square, pooled_count, pooled_expected = 0.0, 0, 0.0
    for tokens, probability in law.items():
        if probability * runs < 5:
            pooled_count += counts.get(tokens, 0)
            pooled_expected += probability * runs
        else:
            expected = probability * runs
            chi_square += (counts.get(tokens, 0) - expected) ** 2 / expected
    if pooled_expected > 0:
        chi_square += (pooled_count - pooled_expected) ** 2 / pooled_expected
    assert chi_square < 97.6
    assert len(depths) == 1 or config.num_draft_tokens == "auto"
    assert depths == {1, 2} or config.num_draft_tokens != "auto"
