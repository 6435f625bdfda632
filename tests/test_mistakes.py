"""Ten mistakes of published implementations: each check passes here and fails on the mistake."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mtad
from mtad.config import DecodeConfig
from mtad.decoders import common, load_decoder, specinfer, speculative
from mtad.decoders.beams import Beams, grow_beams
from mtad.draft import LMDrafter
from mtad.errors import MtadError
from mtad.growth import beam_weights
from mtad.lm import CachedLM
from mtad.sampling import Uniforms, Warped, draw_distinct, warp
from mtad.text import encode_prompt
from tests.models import tiny
from tests.tables import TableLM


def never(tokens: Tensor) -> Tensor:
    return torch.zeros_like(tokens, dtype=torch.bool)


def noisy(model: Any, distance: float) -> Any:
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * distance * parameter.std())
    return draft


TARGET = tiny("llama", vocab_size=24, seed=1)
DRAFT = noisy(TARGET, 0.2)
PAIR = mtad.ModelPair(target=TARGET, draft=DRAFT)
PROMPT = [3, 4, 5]


def tokens_of(method: str, pair: mtad.ModelPair = PAIR, **parameters: Any) -> tuple[int, ...]:
    config = DecodeConfig(**{"max_new_tokens": 24, **parameters})
    return mtad.run(method, pair, prompt_ids=PROMPT, config=config).token_ids


# 1. Beam weights through a softmax of probabilities.


def check_weights_are_the_probabilities(weights: Callable[[Tensor], Tensor]) -> None:
    probabilities = torch.tensor([0.97, 0.02, 0.005, 0.005])
    torch.testing.assert_close(weights(probabilities.log()).exp(), probabilities)


def test_1_beam_weights() -> None:
    check_weights_are_the_probabilities(beam_weights)
    with pytest.raises(AssertionError):
        check_weights_are_the_probabilities(lambda joint: joint.exp().log_softmax(-1))


# 2. Draft log-probabilities read by beam slot instead of by ancestry.


def check_logprobs_follow_the_ancestry(read: Callable[[list[Beams], Tensor], Tensor]) -> None:
    lm = TableLM(6, seed=3)
    for seed in range(5):
        lm.prefill(torch.tensor([0]))
        history = grow_beams(
            lm.next_logits,
            torch.tensor([1]),
            4,
            DecodeConfig(beam_width=4, top_k=0, top_p=1.0),
            Uniforms(torch.Generator().manual_seed(seed)),
            never,
        )
        best = history[-1].best()
        tokens = history[-1].token_ids[best][0].tolist()
        expected = [
            float(lm.logits_after([0, 1, *tokens[:i]]).log_softmax(-1)[token])
            for i, token in enumerate(tokens)
        ]
        torch.testing.assert_close(read(history, best), torch.tensor(expected))


def test_2_draft_logprobs_by_ancestry() -> None:
    def by_ancestry(history: list[Beams], best: Tensor) -> Tensor:
        return history[-1].logprobs[best][0]

    def by_slot(history: list[Beams], best: Tensor) -> Tensor:
        return torch.stack([beams.logprobs[best][0, -1] for beams in history])

    check_logprobs_follow_the_ancestry(by_ancestry)
    with pytest.raises(AssertionError):
        check_logprobs_follow_the_ancestry(by_slot)


# 3. multinomial without replacement with too few non-zero entries.


def check_only_possible_tokens_are_drawn(draw: Callable[[Tensor, int], list[int]]) -> None:
    probabilities = torch.tensor([0.0, 0.7, 0.0, 0.3, 0.0])
    drawn = draw(probabilities, 4)
    assert all(probabilities[index] > 0 for index in drawn)
    assert sorted(drawn) == [1, 3]


def test_3_zero_probability_draws() -> None:
    def race(probabilities: Tensor, count: int) -> list[int]:
        chance = Uniforms(torch.Generator().manual_seed(0))(5)
        picked = draw_distinct(probabilities.log(), chance, count)
        return [int(i) for i in picked if probabilities[i] > 0]  # a slot of −∞ is dead

    def multinomial(probabilities: Tensor, count: int) -> list[int]:
        picked: list[int] = torch.multinomial(probabilities, count, replacement=False).tolist()
        return picked

    check_only_possible_tokens_are_drawn(race)
    # CUDA raises where the CPU silently returns impossible tokens; both are the mistake.
    with pytest.raises((AssertionError, RuntimeError)):
        check_only_possible_tokens_are_drawn(multinomial)


# 4. End-of-sequence looked for in the last γ tokens although γ + 1 are appended.


def check_the_end_is_the_end(
    collect: Callable[[Sequence[Sequence[int]], int, int, int], list[int]],
) -> None:
    eos, limit, gamma = 9, 8, 4
    blocks = [[1, 2, 3, 4, 5], [eos, 6, 7, 8, 1], [2, 2, 2, 2, 2]]
    out = collect(blocks, eos, limit, gamma)
    assert len(out) <= limit
    assert eos in out and out.index(eos) == len(out) - 1


def test_4_end_of_sequence() -> None:
    """Ours: the real loop on a target that writes the same blocks token by token."""

    class Scripted(TableLM):
        script = [1, 2, 3, 4, 5, 9, 6, 7, 8, 1, 2, 2, 2, 2, 2]

        def logits_after(self, context: Sequence[int]) -> Tensor:
            row = torch.full((10,), -30.0)
            row[self.script[len(context) - 1]] = 30.0
            return row

    def ours(blocks: Sequence[Sequence[int]], eos: int, limit: int, gamma: int) -> list[int]:
        config = DecodeConfig(max_new_tokens=limit, num_draft_tokens=gamma)
        decisions = load_decoder("mtad")(
            Scripted(10, 0), Scripted(10, 0), [0], config, torch.Generator(), eos_token_ids=[eos]
        )
        return [token for decision in decisions for token in decision.emitted]

    def mistaken(blocks: Sequence[Sequence[int]], eos: int, limit: int, gamma: int) -> list[int]:
        out: list[int] = []
        for block in blocks:
            out += block
            if eos in out[-gamma:] or len(out) >= limit:
                return out
        return out

    check_the_end_is_the_end(ours)
    with pytest.raises(AssertionError):
        check_the_end_is_the_end(mistaken)


# 5. Prompts cut on the right, so that the question itself is lost.


def check_the_question_survives(prepare: Callable[[list[int]], list[int]]) -> None:
    question = [7, 8, 9]
    try:
        prepared = prepare([1] * 600 + question)
    except MtadError as error:
        assert "too many" in str(error)
    else:
        assert prepared[-3:] == question


def test_5_long_prompts() -> None:
    def ours(ids: list[int]) -> list[int]:
        encoded = encode_prompt(None, prompt_ids=ids)
        config = DecodeConfig(max_new_tokens=1)
        return list(mtad.run("autoregressive", PAIR, prompt_ids=encoded, config=config).prompt_ids)

    check_the_question_survives(ours)
    with pytest.raises(AssertionError):
        check_the_question_survives(lambda ids: ids[: PAIR.context_length - 1])


# 6. The generator re-seeded inside the acceptance loop.


def check_every_position_has_its_own_uniform() -> None:
    config = DecodeConfig(max_new_tokens=24, num_draft_tokens=4)
    trace = mtad.run("speculative", PAIR, prompt_ids=PROMPT, config=config)
    drawn = [u for step in trace.steps for u in step.decision.tree.thresholds]
    assert len(drawn) > 20
    assert len(set(drawn)) == len(drawn)


def test_6_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    check_every_position_has_its_own_uniform()

    class Reseeded(Uniforms):
        def __call__(self, count: int) -> Tensor:
            each = [Uniforms(torch.Generator().manual_seed(0))(1) for _ in range(count)]
            return torch.cat(each) if each else torch.empty(0)

    monkeypatch.setattr(common, "Uniforms", Reseeded)
    with pytest.raises(AssertionError):
        check_every_position_has_its_own_uniform()


# 7. "Greedy" speculative decoding that accepts with probability p/q.


def check_greedy_is_lossless(method: str) -> None:
    for seed in range(6):
        expected = tokens_of("autoregressive", temperature=0.0, seed=seed)
        assert tokens_of(method, temperature=0.0, seed=seed) == expected


def test_7_greedy_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    check_greedy_is_lossless("speculative")
    check_greedy_is_lossless("specinfer")

    def soft_ratios(target_logprobs: Tensor, draft_logprobs: Tensor) -> Tensor:
        """As if both models' soft probabilities decided: an unlikely argmax may pass."""
        return torch.where(target_logprobs == -torch.inf, 0.6, 1.0).double()

    monkeypatch.setattr(speculative, "rejection_ratios", soft_ratios)
    with pytest.raises(AssertionError):
        check_greedy_is_lossless("speculative")
    monkeypatch.undo()

    def soft_walk(
        candidates: Any, rows: Warped, chance: Tensor, config: DecodeConfig
    ) -> specinfer.Walk:
        walk = specinfer_walk(candidates, rows, chance, config)
        if not walk.verdict.accepted and candidates.proposal.token_ids.shape[0]:
            # Takes the draft's favourite although the target would not.
            walk.verdict.path = torch.zeros(candidates.proposal.levels, dtype=torch.int64)
            walk.verdict.accepted = torch.tensor(1)
        return walk

    specinfer_walk = specinfer.walk_down
    monkeypatch.setattr(specinfer, "walk_down", soft_walk)
    with pytest.raises(AssertionError):
        check_greedy_is_lossless("specinfer")


# 8. Baselines timed on a slower path than the method that is being sold.


def check_every_method_runs_on_the_same_path(
    pair_for: Callable[[str], mtad.ModelPair],
) -> None:
    paths = set()
    for info in mtad.methods():
        pair = pair_for(info.id)
        seen: list[tuple[str, str, int]] = []
        hook = pair.target.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(
                (str(module.dtype), module.config._attn_implementation, id(module))
            )
        )
        config = DecodeConfig(max_new_tokens=6)
        trace = mtad.run(info.id, pair, prompt_ids=PROMPT, config=config)
        hook.remove()
        assert seen
        paths |= {(*call, trace.dtype, trace.engine, trace.device) for call in seen}
    assert len(paths) == 1


def test_8_the_same_engine_for_every_method() -> None:
    slow = mtad.ModelPair(
        target=copy.deepcopy(TARGET).double(), draft=copy.deepcopy(DRAFT).double()
    )
    check_every_method_runs_on_the_same_path(lambda method: PAIR)
    with pytest.raises(AssertionError):
        check_every_method_runs_on_the_same_path(
            lambda method: slow if method == "autoregressive" else PAIR
        )


# 9. Vocabularies padded to different sizes.


def padded_draft() -> Any:
    """Eight rows more than the target, and a liking for them."""
    model = tiny("gpt2", vocab_size=32, seed=2, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[24:] *= 4.0
    return model


def check_only_common_tokens_are_drafted(pair: mtad.ModelPair) -> None:
    for method in ("speculative", "mtad", "mtad_tree", "specinfer", "bild", "typical"):
        trace = mtad.run(method, pair, prompt_ids=PROMPT, config=DecodeConfig(max_new_tokens=16))
        drafted = [t for step in trace.steps for t in step.decision.tree.token_ids]
        assert drafted and max(drafted) < 24
        assert max(trace.token_ids) < 24


def test_9_padded_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = mtad.ModelPair(target=TARGET, draft=padded_draft())
    assert pair.vocab_size == 24
    check_only_common_tokens_are_drafted(pair)

    class Uncut(CachedLM):
        def __init__(self, model: Any, vocab_size: int | None = None, **kwargs: Any) -> None:
            super().__init__(model, None, **kwargs)

    def next_logits(self: Any, token_ids: Tensor, parents: Tensor | None = None) -> Tensor:
        logits: Tensor = self.drafter.next_logits(token_ids, parents)
        return logits

    monkeypatch.setattr("mtad.pairs.CachedLM", Uncut)
    monkeypatch.setattr("mtad.draft.RecordedDrafter.next_logits", next_logits)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_only_common_tokens_are_drafted(pair)


# 10. Cache left one token short after full acceptance; positions off by one after a rollback.


def check_the_caches_are_never_short() -> None:
    """log q and log p of every drafted token against a forward pass without any cache."""
    whole_blocks = 0
    for method in ("speculative", "mtad", "bild"):
        config = DecodeConfig(max_new_tokens=32, num_draft_tokens=3, accept_threshold=0.1)
        trace = mtad.run(method, PAIR, prompt_ids=PROMPT, config=config)
        context = list(PROMPT)
        for step in trace.steps:
            tree = step.decision.tree
            for node, token in enumerate(tree.token_ids):
                ids = torch.tensor([[*context, *tree.token_ids[:node]]])
                with torch.no_grad():
                    rows = [warp(m(ids).logits[0, -1], config) for m in (DRAFT, TARGET)]
                recorded = (tree.draft_logprobs[node], tree.target_logprobs[node])
                for row, value in zip(rows, recorded, strict=True):
                    expected = float(row.logprob_of(torch.tensor(token)))
                    assert value == pytest.approx(expected, abs=1e-4)
            whole_blocks += bool(tree.token_ids) and len(step.decision.path) == tree.depth
            context += step.decision.emitted
    assert whole_blocks > 3  # the case occurs


def test_10_caches_after_full_acceptance_and_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    check_the_caches_are_never_short()
    advance = common.State._advance

    def forgetful(self: common.State, *args: Any) -> None:
        advance(self, *args)
        self.draft_pending = self.draft_pending[-1:]

    monkeypatch.setattr(common.State, "_advance", forgetful)
    with pytest.raises(AssertionError):
        check_the_caches_are_never_short()
    monkeypatch.undo()
    keep = CachedLM.keep

    def one_too_many(self: CachedLM, path: Tensor | int) -> None:
        left = self.nodes - (path if isinstance(path, int) else path.shape[0])
        keep(self, path + 1 if isinstance(path, int) and left > 0 else path)

    monkeypatch.setattr(CachedLM, "keep", one_too_many)
    with pytest.raises(AssertionError):
        check_the_caches_are_never_short()


def test_the_drafter_used_above_is_the_real_one() -> None:
    assert isinstance(LMDrafter(CachedLM(DRAFT)), mtad.Drafter)
