"""MTAD and its tree form: what the paper and docs say of them, on real (tiny) models."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mtad
from mtad import bound
from mtad.config import DecodeConfig
from mtad.decoders import load_decoder
from mtad.decoders import mtad as mtad_decoder
from mtad.decoders.beams import Beams, grow_beams
from mtad.decoders.common import Proposal
from mtad.decoders.mtad import longest_prefix
from mtad.draft import LMDrafter
from mtad.errors import BudgetError, Cancelled, ConfigError, PairError
from mtad.growth import beam_weights
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.sampling import Uniforms, score, warp
from tests.models import tiny
from tests.tables import TableLM


def never(tokens: Tensor) -> Tensor:
    return torch.zeros_like(tokens, dtype=torch.bool)


def tiny_pair(vocab_size: int = 24, **overrides: Any) -> mtad.ModelPair:
    target = tiny("llama", vocab_size=vocab_size, seed=1, initializer_range=0.4, **overrides)
    draft = tiny("llama", vocab_size=vocab_size, seed=1, initializer_range=0.4, **overrides)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.3 * parameter.std())
    return mtad.ModelPair(target=target, draft=draft)


PAIR = tiny_pair()
SAME = mtad.ModelPair(
    target=tiny("llama", vocab_size=24, seed=1), draft=tiny("llama", vocab_size=24, seed=1)
)


def run(method: str, pair: mtad.ModelPair, **parameters: Any) -> mtad.Trace:
    config = DecodeConfig(**{"max_new_tokens": 24, **parameters})
    return mtad.run(method, pair, prompt_ids=[3, 4, 5], config=config)


def test_padding_behind_an_end_of_sequence_is_not_accepted() -> None:
    """Its log q is 0, and p finds it likely: without `real` the block would pass as a whole."""
    eos = 2
    tokens, logprobs = torch.tensor([1, eos, eos]), torch.tensor([-0.1, -0.1, 0.0])
    real = torch.tensor([True, True, False])
    logits = torch.full((4, 5), -8.0)
    logits[torch.arange(4), torch.tensor([1, eos, eos, 4])] = 8.0
    config = DecodeConfig(accept_threshold=0.5, top_k=0, top_p=1.0)
    for kept, expected in ((real, 2), (torch.ones_like(real), 3)):
        block = Proposal.block(tokens, logprobs, cached_depth=2, real=kept)
        chance = torch.tensor([0.5], dtype=torch.float64)
        verdict = longest_prefix(config, block, Logits(logits), chance)
        assert int(verdict.accepted) == expected
        assert int(verdict.final_token) == (eos, 4)[expected - 2]


@pytest.mark.parametrize("method", ["mtad", "mtad_tree"])
def test_identical_models_at_temperature_zero_accept_every_block(method: str) -> None:
    trace = run(method, SAME, temperature=0.0, accept_threshold=0.99, max_new_tokens=25)
    assert [step.decision.accepted_length for step in trace.steps] == [4] * 5
    assert trace.summary.acceptance_rate == 1.0
    assert trace.summary.block_efficiency == 5.0


@pytest.mark.parametrize("method", ["mtad", "mtad_tree"])
def test_a_vanishing_threshold_accepts_everything_without_filters(method: str) -> None:
    trace = run(method, PAIR, accept_threshold=1e-300, top_k=0, top_p=1.0, max_new_tokens=25)
    assert [step.decision.accepted_length for step in trace.steps] == [4] * 5


def test_a_vanishing_threshold_accepts_up_to_the_first_zero_probability() -> None:
    blocked = 0
    for seed in range(12):
        trace = run("mtad", PAIR, accept_threshold=1e-300, top_k=4, top_p=0.9, seed=seed)
        for step in trace.steps:
            target = step.decision.tree.target_logprobs
            zeros = [i for i, value in enumerate(target) if value == -math.inf]
            expected = zeros[0] if zeros else len(target)
            assert step.decision.accepted_length == expected
            blocked += bool(zeros)
    assert blocked > 10  # the case occurs


def test_a_huge_threshold_is_plain_sampling_of_the_target() -> None:
    """Nothing is accepted, every token is a bonus drawn from p: the law of two tokens.

    Chi-square over the 9 sequences of 2 tokens, 1,500 runs with the seeds 0 … 1499, against the
    1 − 1e-9 quantile with 8 degrees of freedom (58.9): false-failure probability 1e-9.
    """
    target, draft = TableLM(3, seed=1), TableLM(3, seed=2)
    config = DecodeConfig(
        max_new_tokens=2, accept_threshold=1e300, top_k=0, top_p=1.0, beam_width=2
    )
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(1500):
        generator = torch.Generator().manual_seed(seed)
        outcomes = load_decoder("mtad")(target.fresh(), draft.fresh(), [0], config, generator)
        decisions = [outcome.decision for outcome in outcomes]
        assert [decision.accepted_length for decision in decisions] == [0, 0]
        tokens = tuple(token for decision in decisions for token in decision.emitted)
        counts[tokens] = counts.get(tokens, 0) + 1
    chi_square = 0.0
    for tokens in itertools.product(range(3), repeat=2):
        first = warp(target.logits_after([0]), config).dense()[tokens[0]]
        second = warp(target.logits_after([0, tokens[0]]), config).dense()[tokens[1]]
        expected = 1500 * float((first + second).exp())
        chi_square += (counts.get(tokens, 0) - expected) ** 2 / expected
    assert chi_square < 58.9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_tree_of_width_one_is_a_block(temperature: float, seed: int) -> None:
    parameters = {"beam_width": 1, "temperature": temperature, "seed": seed, "max_new_tokens": 40}
    block, tree = run("mtad", PAIR, **parameters), run("mtad_tree", PAIR, **parameters)
    assert block.token_ids == tree.token_ids
    for ours, theirs in zip(block.steps, tree.steps, strict=True):
        assert ours.decision.path == theirs.decision.path
        assert ours.decision.tree.token_ids == theirs.decision.tree.token_ids


def test_the_tree_accepts_at_least_as_much_as_its_best_beam() -> None:
    """Same draft, same context: the block of `mtad` is one of the tree's paths."""
    for seed in range(10):
        block = run("mtad", PAIR, seed=seed).steps[0].decision
        tree = run("mtad_tree", PAIR, seed=seed).steps[0].decision
        assert tree.accepted_length >= block.accepted_length
        assert tree.reference_logprobs == block.tree.draft_logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_draft_logprobs_are_those_of_the_blocks_own_ancestry(temperature: float) -> None:
    """log q of every node equals the draft's warped conditional on the path to it."""
    assert isinstance(PAIR.draft, torch.nn.Module)
    for method in ("mtad", "mtad_tree"):
        trace = run(method, PAIR, temperature=temperature, top_k=6)
        context = list(trace.prompt_ids)
        for step in trace.steps:
            tree = step.decision.tree
            for node in range(len(tree.token_ids)):
                path = tree.path_to(node)
                ids = context + [tree.token_ids[n] for n in path[:-1]]
                with torch.no_grad():
                    draft_logits = PAIR.draft(torch.tensor([ids])).logits[0, -1]
                    target_logits = PAIR.target(torch.tensor([ids])).logits[0, -1]
                token = torch.tensor(tree.token_ids[node])
                for logits, recorded in (
                    (draft_logits, tree.draft_logprobs[node]),
                    (target_logits, tree.target_logprobs[node]),
                ):
                    expected = float(score(logits, trace.config).logprob_of(token))
                    assert recorded == pytest.approx(expected, abs=2e-5)
            context += step.decision.emitted


def test_beam_weights_are_renormalised_probabilities() -> None:
    joint = torch.tensor([0.97, 0.02, 0.005, 0.005]).mul(0.3).log()
    expected = torch.tensor([0.97, 0.02, 0.005, 0.005])
    torch.testing.assert_close(beam_weights(joint).exp(), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_hypotheses_are_distinct_and_their_joints_are_sums(temperature: float) -> None:
    lm = TableLM(5, seed=3)
    lm.prefill(torch.tensor([0]))
    config = DecodeConfig(beam_width=4, temperature=temperature, top_k=0, top_p=1.0)
    generator = torch.Generator().manual_seed(1)
    history = grow_beams(lm.next_logits, torch.tensor([1]), 4, config, Uniforms(generator), never)
    for beams in history:
        sequences = [tuple(row) for row in beams.token_ids.tolist()]
        assert len(set(sequences)) == 4
        torch.testing.assert_close(beams.joint, beams.logprobs.double().sum(-1))
        for sequence, logprobs in zip(sequences, beams.logprobs.tolist(), strict=True):
            for i, token in enumerate(sequence):
                row = lm.logits_after([0, 1, *sequence[:i]]).log_softmax(-1)
                assert logprobs[i] == pytest.approx(float(row[token]), abs=1e-6)


def test_beam_search_at_temperature_zero_takes_the_largest() -> None:
    """With W = V the first step keeps every token; the second takes the V best of V²."""
    lm = TableLM(4, seed=5)
    lm.prefill(torch.tensor([0]))
    config = DecodeConfig(beam_width=4, temperature=0.0)
    uniforms = Uniforms(torch.Generator())
    history = grow_beams(lm.next_logits, torch.tensor([1]), 2, config, uniforms, never)
    joints = {}
    for a, b in itertools.product(range(4), repeat=2):
        first = lm.logits_after([0, 1]).log_softmax(-1)[a]
        joints[a, b] = float(first + lm.logits_after([0, 1, a]).log_softmax(-1)[b])
    best = sorted(joints, key=lambda pair: -joints[pair])[:4]
    assert [tuple(row) for row in history[1].token_ids.tolist()] == best


def test_one_step_of_beam_sampling_has_its_law() -> None:
    """The second step from two beams of known joints: which continuations are drawn first.

    Chi-square over 6 continuations, 4,000 draws, against the 1 − 1e-9 quantile with 5 degrees
    of freedom (51.2): false-failure probability 1e-9.
    """
    root = Beams.root(torch.device("cpu"))
    joint = torch.tensor([0.6, 0.1], dtype=torch.float64).log()
    two = dataclasses.replace(
        root,
        token_ids=torch.tensor([[0], [1]]),
        logprobs=joint.float().unsqueeze(-1),
        nodes=torch.tensor([[0], [1]]),
        real=torch.ones(2, 1, dtype=torch.bool),
        joint=joint,
        finished=torch.zeros(2, dtype=torch.bool),
    )
    conditionals = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    weights = (joint.exp().unsqueeze(-1) * conditionals).flatten()
    law = weights / weights.sum()
    config = DecodeConfig(top_k=0, top_p=1.0)
    uniforms = Uniforms(torch.Generator().manual_seed(0))
    counts = torch.zeros(6, dtype=torch.float64)
    for _ in range(4000):
        grown = two.grow(conditionals.log(), 2, config, uniforms, never)
        counts[3 * int(grown.came_from[0]) + int(grown.token_ids[0, 1])] += 1
    chi_square = float(((counts - 4000 * law) ** 2 / (4000 * law)).sum())
    assert chi_square < 51.2


def test_a_finished_hypothesis_competes_by_its_joint_and_spends_no_node() -> None:
    lm = TableLM(4, seed=8)
    lm.prefill(torch.tensor([0]))
    eos = int(lm.logits_after([0, 1]).argmax())
    config = DecodeConfig(beam_width=3, temperature=0.0)
    history = grow_beams(
        lm.next_logits,
        torch.tensor([1]),
        4,
        config,
        Uniforms(torch.Generator()),
        lambda t: t == eos,
    )
    final = history[-1]
    ended = final.token_ids[:, 0] == eos
    assert int(ended.sum()) == 1
    slot = int(ended.nonzero()[0, 0])
    first = float(lm.logits_after([0, 1]).log_softmax(-1)[eos])
    assert float(final.joint[slot]) == pytest.approx(first)
    assert final.real[slot].tolist() == [True, False, False, False]
    assert final.logprobs[slot, 1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("method", ["mtad", "mtad_tree"])
def test_nothing_is_offered_below_an_end_of_sequence(method: str) -> None:
    ends = 0
    for eos in range(24):
        pair = mtad.ModelPair(
            target=tiny("llama", vocab_size=24, seed=1, eos_token_id=eos),
            draft=tiny("llama", vocab_size=24, seed=1, eos_token_id=eos),
        )
        trace = run(method, pair, seed=eos)
        for step in trace.steps:
            tree = step.decision.tree
            parents = {tree.token_ids[parent] for parent in tree.parents if parent >= 0}
            assert eos not in parents
            ends += eos in tree.token_ids
    assert ends > 5  # the case occurs


def test_a_zero_probability_token_is_never_drawn() -> None:
    """top_k = 2 under W = 4: the first step has only two continuations; width grows back."""
    widths = set()
    for seed in range(6):
        trace = run("mtad_tree", PAIR, top_k=2, top_p=1.0, beam_width=4, seed=seed)
        for step in trace.steps:
            tree = step.decision.tree
            assert min(tree.draft_logprobs, default=0.0) > -math.inf
            if tree.depth >= 2:
                widths.add((tree.depths.count(1), tree.depths.count(2)))
    assert widths == {(2, 4)}


@pytest.mark.parametrize("method", ["mtad", "mtad_tree"])
@pytest.mark.parametrize("threshold", [0.05, 0.5])
def test_the_bound_holds_against_exact_search(method: str, threshold: float) -> None:
    checked = outside = 0
    for seed in range(5):
        trace = run(
            method, PAIR, accept_threshold=threshold, top_k=4, num_draft_tokens=3, seed=seed
        )
        for step in trace.steps:
            if not step.decision.accepted_length:
                continue
            result = bound.measure(PAIR, trace, step.index)
            assert result.certified > math.log(threshold)
            assert result.gap >= -1e-5  # x cannot beat the best block of its length
            if result.limit is None:
                outside += 1
                assert result.reason == "no bound: y is outside the draft's support"
            else:
                checked += 1
                assert result.gap < result.limit
                terms = (result.draft_error, result.search_gap, result.slack)
                assert result.limit == pytest.approx(sum(t for t in terms if t is not None))
    assert checked > 5


def test_the_best_block_of_the_bound_is_the_brute_force_one() -> None:
    pair = tiny_pair(vocab_size=6)
    trace = run("mtad", pair, top_k=3, top_p=1.0, num_draft_tokens=3, accept_threshold=0.01)
    step = next(step for step in trace.steps if step.decision.accepted_length == 3)
    context = list(trace.prompt_ids)
    for earlier in trace.steps[: step.index]:
        context += earlier.decision.emitted
    joints = {}
    with torch.no_grad():
        for tokens in itertools.product(range(6), repeat=3):
            logits = pair.target(torch.tensor([[*context, *tokens]])).logits[0]
            rows = warp(logits[len(context) - 1 : -1], trace.config)
            joints[tokens] = float(rows.logprob_of(torch.tensor(tokens)).double().sum())
    result = bound.measure(pair, trace, step.index)
    assert result.best_token_ids == max(joints, key=lambda tokens: joints[tokens])
    accepted = tuple(step.decision.tree.token_ids)
    assert result.gap == pytest.approx(max(joints.values()) - joints[accepted], abs=1e-5)
    kept = dataclasses.replace(
        trace, steps=tuple(dataclasses.replace(s, bound=result) for s in trace.steps)
    )
    assert mtad.Trace.from_json(kept.to_json()) == kept


def test_there_is_no_bound_for_other_methods_or_empty_steps() -> None:
    with pytest.raises(ConfigError, match="no bound for speculative"):
        bound.measure(PAIR, run("speculative", PAIR), 0)
    rejected = run("mtad", PAIR, accept_threshold=1e300)
    with pytest.raises(ConfigError, match="Step 0 accepted no draft token"):
        bound.measure(PAIR, rejected, 0)
    with pytest.raises(ConfigError, match="step is 99, but must be from 0 to"):
        bound.measure(PAIR, rejected, 99)


def test_the_search_of_the_bound_stops_before_a_pass() -> None:
    trace = run("mtad", PAIR, accept_threshold=0.05, top_k=4, num_draft_tokens=3)
    index = next(step.index for step in trace.steps if step.decision.accepted_length > 1)
    passes = 0

    def check() -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        bound.measure(PAIR, trace, index, check=check)
    assert passes == 2


def test_the_bound_of_a_draft_that_reads_the_targets_states(smollm2: Any) -> None:
    """Its q of the accepted block, asked for again as that of a best block, is the recorded one."""
    config = mtad.DecodeConfig(max_new_tokens=32, seed=3)
    trace = mtad.run("mtad", smollm2, prompt="Why is the sky blue?", config=config)
    found = 0
    for step in trace.steps:
        decision = step.decision
        if not decision.accepted_length:
            continue
        result = bound.measure(smollm2, trace, step.index)
        assert result.gap >= -1e-2
        accepted = tuple(decision.tree.token_ids[node] for node in decision.path)
        if result.best_token_ids == accepted and result.search_gap is not None:
            found += 1
            assert result.search_gap == pytest.approx(0.0, abs=0.05)
    assert found > 0


def test_mtjd_beam_commits_the_most_probable_final_beam() -> None:
    """The procedure that MTAD copies: with q = p the committed blocks are MTAD's blocks."""
    target = tiny("llama", vocab_size=24, seed=1)
    config = DecodeConfig(max_new_tokens=4, num_draft_tokens=4, beam_width=3, seed=2)
    (outcome,) = load_decoder("mtjd")(
        CachedLM(target), None, [3, 4, 5], config, torch.Generator().manual_seed(2)
    )
    state = mtad_decoder.State.begin(
        CachedLM(target),
        LMDrafter(CachedLM(target)),
        [3, 4, 5],
        config,
        torch.Generator().manual_seed(2),
        (),
    )
    block = mtad_decoder.draft_block(state, 4)
    assert outcome.emitted == tuple(block.token_ids.tolist())
    assert outcome.decision.target_passes == 4


class OddDrafter:
    """A drafter that answers whatever it was told to."""

    vocab_size = 24
    target_layers = ()

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        pass

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Any:
        return self.logits(token_ids.shape[0])

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        pass


@pytest.mark.parametrize(
    "logits",
    [
        lambda rows: torch.zeros(rows, 20),
        lambda rows: torch.zeros(rows + 1, 24),
        lambda rows: torch.zeros(24),
        lambda rows: None,
    ],
)
@pytest.mark.parametrize("method", ["speculative", "specinfer", "mtad", "mtad_tree", "bild"])
def test_a_drafter_that_breaks_its_contract_is_named(method: str, logits: Any) -> None:
    pair = mtad.ModelPair(target=PAIR.target, draft=OddDrafter(logits))
    with pytest.raises(PairError, match=r"OddDrafter\) gave logits of shape .* 24 columns"):
        run(method, pair)


@pytest.mark.parametrize("method", ["speculative", "specinfer", "mtad", "mtad_tree", "bild"])
def test_a_draft_of_nan_is_refused_by_every_method(method: str) -> None:
    broken = OddDrafter(lambda rows: torch.full((rows, 24), torch.nan))
    with pytest.raises(PairError, match="draft's logits are not numbers"):
        run(method, mtad.ModelPair(target=PAIR.target, draft=broken))


def test_exact_search_counts_before_it_builds() -> None:
    wide_pair = mtad.ModelPair(target=tiny("llama", vocab_size=3000, seed=1))
    exact = {"search": "exact", "top_k": 0, "top_p": 1.0, "node_budget": 65_536}
    with pytest.raises(BudgetError, match=r"9,000,000 blocks|blocks at depth 2 of 2"):
        run("mtjd", wide_pair, num_draft_tokens=2, **exact)
    with pytest.raises(BudgetError, match="At temperature 0 nothing is filtered"):
        run("mtjd", wide_pair, temperature=0.0, num_draft_tokens=2, search="exact")
    with pytest.raises(BudgetError, match=r"Lower num_draft_tokens .* or top_k \(now 10\)"):
        run("mtjd", PAIR, num_draft_tokens=4, search="exact", top_p=1.0, node_budget=100)
