"""Exactness without sampling: every branch of a decoder, weighed by its probability."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders import common, load_decoder, specinfer, speculative
from mtad.decoders.exact import search_exact
from mtad.lm import CachedLM
from mtad.sampling import Warped, warp
from tests.models import tiny
from tests.tables import TableLM

VOCAB = 3
PROMPT = [0, 1]


class Branches:
    """Depth-first enumeration of a program that asks for choices.

    `choose` is called with the probabilities of the possible outcomes. `explore` replays the
    program once for every sequence of outcomes that has a positive probability.
    """

    def __init__(self) -> None:
        self._script: list[int] = []
        self._open: list[list[int]] = []
        self._step = 0
        self.probability = 1.0

    def choose(self, probabilities: Sequence[float]) -> int:
        if self._step == len(self._script):
            options = [i for i, p in enumerate(probabilities) if p > 0.0]
            self._script.append(options[0])
            self._open.append(options[1:])
        outcome = self._script[self._step]
        self._step += 1
        self.probability *= probabilities[outcome]
        return outcome

    def explore(self, program: Callable[[], Any]) -> dict[Any, float]:
        law: dict[Any, float] = defaultdict(float)
        while True:
            self._step, self.probability = 0, 1.0
            law[program()] += self.probability
            while self._open and not self._open[-1]:
                self._open.pop()
                self._script.pop()
            if not self._open:
                return law
            self._script[-1] = self._open[-1].pop(0)


class LazyUniform(float):
    """A uniform that is decided when it is compared: below the ratio or not."""

    branches: Branches

    def __lt__(self, ratio: float) -> bool:
        accepts = min(1.0, ratio)
        return self.branches.choose([accepts, 1.0 - accepts]) == 0


class LazyColumn:
    """Stands for a tensor of uniforms."""

    def __init__(self, branches: Branches, count: int) -> None:
        self.branches, self.count = branches, count

    def tolist(self) -> list[LazyUniform]:
        lazy = [LazyUniform(0.5) for _ in range(self.count)]
        for uniform in lazy:
            uniform.branches = self.branches
        return lazy

    def __getitem__(self, index: int | slice) -> LazyColumn:
        count = len(range(self.count)[index]) if isinstance(index, slice) else 1
        return LazyColumn(self.branches, count)

    def flatten(self) -> Tensor:
        """What goes into the trace; nobody reads it here."""
        return torch.zeros(self.count)

    def __lt__(self, ratios: Tensor) -> Tensor:
        """`chance < ratios` of speculative decoding: decided up to the first rejection."""
        verdicts = [False] * ratios.shape[0]
        for i, ratio in enumerate(ratios.tolist()):
            accepts = min(1.0, ratio)
            verdicts[i] = self.branches.choose([accepts, 1.0 - accepts]) == 0
            if not verdicts[i]:
                break
        return torch.tensor(verdicts, dtype=torch.bool)

    def cpu(self) -> LazyColumn:
        return self

    def view(self, *shape: int) -> LazyColumn:
        return self


class LazyUniforms:
    """Stands for `Uniforms`."""

    def __init__(self, branches: Branches) -> None:
        self._branches = branches

    def __call__(self, count: int) -> LazyColumn:
        return LazyColumn(self._branches, count)

    def give_back(self, count: int) -> None:
        """Nothing was drawn for them."""


def enumerating(branches: Branches, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what a decoder draws with by choices; the rules stay the real ones."""

    def draw(distribution: Warped, uniform: Any) -> Tensor:
        masses = distribution.logprobs.exp()
        if masses.ndim == 1:
            return distribution.token_ids[branches.choose(masses.tolist())]
        picked = [branches.choose(row.tolist()) for row in masses]
        return distribution.token_ids[torch.arange(len(picked)), torch.tensor(picked)]

    def draw_distinct(logprobs: Tensor, uniform: Any, count: int) -> Tensor:
        left = logprobs.exp().tolist()
        picked: list[int] = []
        for _ in range(count):
            total = sum(left)
            if total <= 0.0:  # the support ends: what comes back has probability 0
                picked.append(next(i for i in range(len(left)) if i not in picked))
                continue
            picked.append(branches.choose([mass / total for mass in left]))
            left[picked[-1]] = 0.0
        return torch.tensor(picked)

    # The draft's, and those that a rule gets.
    monkeypatch.setattr(common, "Uniforms", lambda _: LazyUniforms(branches))
    monkeypatch.setattr(module, "draw", draw)
    if hasattr(module, "draw_distinct"):
        monkeypatch.setattr(module, "draw_distinct", draw_distinct)


def target_law(target: TableLM, length: int, config: DecodeConfig) -> dict[tuple[int, ...], float]:
    law = {}
    for tokens in itertools.product(range(VOCAB), repeat=length):
        probability = 1.0
        for i, token in enumerate(tokens):
            row = warp(target.logits_after([*PROMPT, *tokens[:i]]), config)
            probability *= float(row.logprob_of(torch.tensor(token)).exp())
        law[tokens] = probability
    return law


@pytest.mark.parametrize("filters", [{"top_k": 0, "top_p": 1.0}, {"top_k": 2, "top_p": 0.9}])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("speculative", {"num_draft_tokens": 2}),
        # A block ends where its joint q is below 0.5, in one case behind every first token.
        ("speculative", {"num_draft_tokens": "auto", "iteration_costs": (1.0, 1.3, 1.67)}),
        ("speculative", {"num_draft_tokens": "auto", "iteration_costs": (1.0, 1.3, 1.9)}),
        ("specinfer", {"k_config": (2, 1), "replacement": True}),
        ("specinfer", {"k_config": (2, 1), "replacement": False}),
        ("specinfer", {"k_config": (3, 1), "replacement": False}),
        ("specinfer", {"k_config": (1, 2), "replacement": True}),
        ("specinfer", {"k_config": (1, 1), "replacement": True}),
    ],
)
def test_the_joint_law_of_the_next_tokens_is_the_targets(
    method: str,
    parameters: dict[str, Any],
    filters: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """γ = 2 over 3 tokens: the law of the next γ + 1 tokens, to 1e-6."""
    config = DecodeConfig(max_new_tokens=3, **parameters, **filters)
    target, draft = TableLM(VOCAB, seed=1), TableLM(VOCAB, seed=2)
    branches = Branches()
    for module in (speculative, specinfer):  # whose lines are blocks of the first
        enumerating(branches, module, monkeypatch)

    def program() -> tuple[int, ...]:
        models = target.fresh(), draft.fresh()
        outcomes = load_decoder(method)(*models, PROMPT, config, torch.Generator())
        return tuple(token for outcome in outcomes for token in outcome.decision.emitted)

    law = branches.explore(program)
    expected = target_law(target, 3, config)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    assert set(law) <= set(expected)
    for tokens, probability in expected.items():
        assert law.get(tokens, 0.0) == pytest.approx(probability, abs=1e-6), tokens


def test_the_enumeration_notices_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check fails if the correction is drawn from p instead of the residual."""
    config = DecodeConfig(max_new_tokens=3, num_draft_tokens=2, top_k=0, top_p=1.0)
    target, draft = TableLM(VOCAB, seed=1), TableLM(VOCAB, seed=2)
    branches = Branches()
    enumerating(branches, speculative, monkeypatch)
    monkeypatch.setattr(speculative, "corrected_or_bonus", lambda target, draft, accepted: target)

    def program() -> tuple[int, ...]:
        decode = load_decoder("speculative")
        outcomes = decode(target.fresh(), draft.fresh(), PROMPT, config, torch.Generator())
        return tuple(token for outcome in outcomes for token in outcome.decision.emitted)

    law = branches.explore(program)
    expected = target_law(target, 3, config)
    assert max(abs(law.get(t, 0.0) - p) for t, p in expected.items()) > 1e-2


@torch.no_grad()
def all_logprobs(model: Any, ids: Tensor) -> Tensor:
    logprobs: Tensor = model(ids).logits.log_softmax(-1)
    return logprobs


@torch.no_grad()
def logits_after(model: Any, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([list(ids)])).logits[0, -1]
    return logits


@pytest.mark.parametrize("filters", [{"top_k": 0, "top_p": 1.0}, {"top_k": 3, "top_p": 0.8}])
def test_exact_mtjd_at_joint_temperature_1_is_sequential_sampling(filters: dict[str, Any]) -> None:
    config = DecodeConfig(num_draft_tokens=3, search="exact", **filters)
    model = tiny("llama", vocab_size=5, seed=3)
    target = CachedLM(model)
    target.prefill(torch.tensor([1, 2]))
    blocks = search_exact(
        target, torch.tensor([3]), 3, config, lambda t: torch.zeros_like(t, dtype=torch.bool)
    )
    weights = blocks.joint.softmax(-1)  # T_J = 1
    law = {blocks.block(i).token_ids: float(w) for i, w in enumerate(weights)}
    rows = {
        before: warp(logits_after(model, [1, 2, 3, *before]), config).dense().exp()
        for length in range(3)
        for before in itertools.product(range(5), repeat=length)
    }
    for tokens in itertools.product(range(5), repeat=3):
        probability = 1.0
        for i, token in enumerate(tokens):
            probability *= float(rows[tokens[:i]][token])
        assert law.get(tokens, 0.0) == pytest.approx(probability, abs=1e-6), tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exact_mtjd_at_joint_temperature_0_is_the_brute_force_argmax(temperature: float) -> None:
    config = DecodeConfig(
        max_new_tokens=3,
        num_draft_tokens=3,
        search="exact",
        joint_temperature=0.0,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
    )
    model = tiny("llama", vocab_size=5, seed=4)
    decide = load_decoder("mtjd")
    (decision,) = decide(CachedLM(model), None, [1, 2, 3], config, torch.Generator())
    joints = {}
    every = torch.tensor([[1, 2, 3, *t] for t in itertools.product(range(5), repeat=3)])
    for tokens, logprobs in zip(every.tolist(), all_logprobs(model, every), strict=True):
        joints[tuple(tokens[3:])] = sum(float(logprobs[2 + i, tokens[3 + i]]) for i in range(3))
    assert decision.emitted == max(joints, key=lambda tokens: joints[tokens])
