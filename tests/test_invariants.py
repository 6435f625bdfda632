"""What holds for every run of every method, whatever the parameters: on tiny models, seeded.

Each example is a whole run through the public interface; every property below is checked on
the trace that came back from JSON, so that the page, which sees nothing else, can rely on it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import operator
import shutil
import subprocess
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mtad
from mtad import iteration_costs
from mtad.config import MAX_SEED
from mtad.errors import ConfigError
from mtad.pace import AUTO_TREES, AUTO_WIDTHS, FloorPace, Pace, TreePace, WidthPace, nodes
from mtad.session import Session
from mtad.trace import Decision, Trace
from mtad.whatif import accepted_length_at, accepted_path
from tests.models import tiny

VOCAB = 32
PROMPT = [1, 2, 3, 4, 5]
# method, and what sets one form of it apart from another
FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("autoregressive", {}),
    ("beam", {}),
    ("speculative", {}),
    ("mtjd", {"search": "beam"}),
    ("mtjd", {"search": "exact"}),
    ("mtad", {}),
    ("mtad_tree", {}),
    ("specinfer", {"replacement": True}),
    ("specinfer", {"replacement": False}),
    ("bild", {}),
    ("typical", {}),
)
BLOCK_METHODS = ("speculative", "mtad", "mtad_tree", "specinfer", "bild", "typical")
every_form = pytest.mark.parametrize(
    ("method", "form"), FORMS, ids=["-".join([m, *map(str, f.values())]) for m, f in FORMS]
)


@functools.cache
def models(kind: str) -> tuple[Any, Any]:
    if kind == "strangers":
        return tiny("llama", VOCAB, seed=1), tiny("llama", VOCAB, seed=2)
    if kind == "twins":  # the draft is always right
        return tiny("llama", VOCAB, seed=1), tiny("llama", VOCAB, seed=1)
    if kind == "small":  # a position beyond 24 is an error here, not only a bad idea
        target = tiny("gpt2", VOCAB, seed=3, n_positions=24)
        return target, tiny("opt", VOCAB, seed=4, max_position_embeddings=40)
    raise ValueError(kind)


def pair_of(kind: str, eos: int | list[int] | None = None) -> mtad.ModelPair:
    target, draft = models(kind)
    target.generation_config.eos_token_id = eos
    pair = mtad.ModelPair(target=target, draft=draft)
    assert pair.eos_token_ids == tuple([eos] if isinstance(eos, int) else eos or ())
    return pair


def options(method: str, form: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Values of the fields that the method reads."""
    lengths = st.sampled_from([1, 2, 3, 5, "auto", None])
    if form.get("search") == "exact":
        lengths = st.sampled_from([1, 2])
    filters = st.sampled_from([(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.9), (10, 0.9), (0, 0.5)])
    return st.fixed_dictionaries(
        {
            "max_new_tokens": st.integers(1, 36),
            "num_draft_tokens": lengths,
            "beam_width": st.integers(1, 5),
            "accept_threshold": st.sampled_from([1e-3, 0.1, 0.5, 1.0, 2.0]),
            "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
            "filters": filters,
            "seed": st.integers(0, MAX_SEED),
            "k_config": st.sampled_from([(1,), (2, 2), (4, 2, 2), (3, 1, 1, 1), (16,), "auto"]),
            "fallback_threshold": st.sampled_from([0.0, 0.2, 0.6, 1.0]),
            "rollback_threshold": st.sampled_from([0.0, 0.7, 2.1, 5.0]),
            "typical_epsilon": st.sampled_from([0.01, 0.3, 1.0]),
            "typical_delta": st.sampled_from([0.1, 1.0]),
            "joint_temperature": st.sampled_from([0.0, 0.5, 1.0]),
            "ignore_eos": st.booleans(),
        }
    )


def config_of(values: dict[str, Any], form: dict[str, Any]) -> mtad.DecodeConfig:
    top_k, top_p = values["filters"]
    rest = {name: value for name, value in values.items() if name != "filters"}
    return mtad.DecodeConfig(**rest, top_k=top_k, top_p=top_p, **form)


KINDS = st.sampled_from(["strangers", "strangers", "twins", "small"])
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)
EOS = st.one_of(st.none(), st.integers(0, VOCAB - 1), st.just([3, 7, 11, 20, 25, 30]))


@every_form
@given(data=st.data())
@settings(max_examples=18)
def test_a_run_keeps_every_promise(method: str, form: dict[str, Any], data: st.DataObject) -> None:
    config = config_of(data.draw(options(method, form)), form)
    pair = pair_of(data.draw(KINDS), data.draw(EOS))
    prompt = data.draw(PROMPTS)
    made = mtad.run(method, pair, prompt_ids=prompt, config=config)
    trace = Trace.from_json(made.to_json())
    assert trace == made
    json.loads(made.to_json(), parse_constant=pytest.fail)
    check_ends(trace, pair)
    check_sums(trace)
    for decision in trace.decisions():
        check_decision(decision, trace, pair)
    check_against_a_fresh_pass(trace, pair)
    again = mtad.run(method, pair, prompt_ids=prompt, config=config)
    assert again.decisions() == made.decisions()


def check_ends(trace: Trace, pair: mtad.ModelPair) -> None:
    """Nothing after an end-of-sequence, and never more than is allowed."""
    tokens, config = trace.token_ids, trace.config
    ends = () if config.ignore_eos else pair.eos_token_ids
    room = pair.context_length - len(trace.prompt_ids)
    allowed = min(room, config.max_new_tokens)
    assert 1 <= len(tokens) <= allowed
    assert all(0 <= token < VOCAB for token in tokens)
    assert not set(tokens[:-1]) & set(ends)
    if tokens[-1] in ends:
        assert trace.stop_reason == "eos"
    else:
        assert len(tokens) == allowed
        assert trace.stop_reason == ("context" if room < config.max_new_tokens else "length")


def check_sums(trace: Trace) -> None:
    decisions, summary, config = trace.decisions(), trace.summary, trace.config
    assert summary.tokens == sum(len(d.emitted) for d in decisions) == len(trace.token_ids)
    passes = sum(decision.target_passes for decision in decisions)
    assert summary.target_passes == passes
    assert summary.block_efficiency == summary.tokens / passes
    longest = {"auto": 16}.get(str(config.num_draft_tokens), config.num_draft_tokens)
    if trace.method in ("autoregressive", "beam", "mtjd"):
        longest = 0  # no draft: never more than one token a pass
    elif trace.method == "specinfer":
        longest = 5 if config.k_config == "auto" else len(config.k_config)
    assert isinstance(longest, int)
    assert summary.block_efficiency <= longest + 1
    assert max(decision.tree.depth for decision in decisions) <= longest
    if trace.method not in ("beam", "mtjd"):
        assert {decision.target_passes for decision in decisions} == {1}
    if trace.method == "autoregressive":
        assert summary.block_efficiency == 1.0
    assert summary.acceptance_rate is None or 0.0 <= summary.acceptance_rate <= 1.0
    assert [step.index for step in trace.steps] == list(range(len(trace.steps)))
    assert trace.text == "".join(f"{token} " for token in trace.token_ids)


def check_decision(decision: Decision, trace: Trace, pair: mtad.ModelPair) -> None:
    tree, config = decision.tree, trace.config
    ends = () if config.ignore_eos else pair.eos_token_ids
    assert not decision.provisional
    # The rule, recomputed from what the JSON holds, takes the same path to the bit.
    assert accepted_path(decision, trace.method, config) == decision.path
    if trace.method in ("mtad", "mtad_tree"):
        assert accepted_length_at(decision, config.accept_threshold) == decision.accepted_length
    # A draft never holds a token that it could not draw, and nothing below an end-of-sequence.
    assert -math.inf not in tree.draft_logprobs
    assert not any(p >= 0 and tree.token_ids[p] in ends for p in tree.parents)
    if trace.method != "bild":  # whose threshold looks at the unwarped target
        assert all(tree.target_logprobs[node] > -math.inf for node in decision.path)
    if trace.method == "bild" and tree.thresholds:
        assert set(tree.thresholds) == {-config.rollback_threshold}
    if trace.method in BLOCK_METHODS:
        assert len(decision.emitted) == len(decision.path) + (decision.final_kind is not None)
        leaf_ends = decision.path and tree.token_ids[decision.path[-1]] in ends
        assert (decision.final_kind is None) == bool(leaf_ends)
        assert decision.target_positions >= 1 + len(tree.token_ids)
        assert (decision.final_kind == "sampled") == (not tree.token_ids)
        if trace.method in ("mtad", "mtad_tree", "typical"):
            assert decision.final_kind != "corrected"
    else:
        assert tree.token_ids == decision.path == ()
        assert set(decision.kinds) == {"sampled"}


@torch.no_grad()
def check_against_a_fresh_pass(trace: Trace, pair: mtad.ModelPair) -> None:
    """Perplexity, log-probabilities and alternatives are those of one plain pass over the text."""
    ids = torch.tensor([[*trace.prompt_ids, *trace.token_ids]])
    rows = pair.target(ids).logits[0].float().log_softmax(-1)[len(trace.prompt_ids) - 1 : -1]
    expected = rows.gather(-1, torch.tensor(trace.token_ids).unsqueeze(-1)).squeeze(-1)
    decisions = trace.decisions()
    logprobs = [value for decision in decisions for value in decision.emitted_logprobs]
    assert logprobs == pytest.approx(expected.tolist(), abs=2e-4)
    assert trace.summary.perplexity == pytest.approx(
        math.exp(-expected.double().mean().item()), rel=1e-4
    )
    alternatives = [entry for decision in decisions for entry in decision.alternatives]
    assert len(alternatives) == len(trace.token_ids)
    greedy = trace.config.temperature == 0.0 and trace.method in (
        *("autoregressive", "speculative", "specinfer"),
    )
    for row, entry, token, logprob in zip(
        rows, alternatives, trace.token_ids, logprobs, strict=True
    ):
        values = [alternative.logprob for alternative in entry]
        assert values == pytest.approx(row.topk(5).values.tolist(), abs=2e-4)
        assert values == sorted(values, reverse=True)
        assert len({alternative.token_id for alternative in entry}) == 5
        assert logprob <= values[0] + 1e-5
        named = {alternative.token_id: alternative.logprob for alternative in entry}
        assert logprob == pytest.approx(named.get(token, logprob), abs=1e-5)
        if greedy:
            assert logprob >= values[0] - 1e-4


@every_form
def test_the_seed_decides(method: str, form: dict[str, Any]) -> None:
    """Six seeds, both ends of the range among them, give six texts.

    They hold 16 tokens drawn at temperature 2 from flat distributions; that two of them agree by
    chance is less likely than 1e-6. The seeds are fixed, so that the outcome always is the same.
    """
    pair = pair_of("strangers")
    texts = set()
    seeds = (0, 1, 2, 3, 2**31, MAX_SEED)
    for seed in seeds:
        config = mtad.DecodeConfig(
            max_new_tokens=16,
            num_draft_tokens=2,
            temperature=2.0,
            top_k=0,
            top_p=1.0,
            seed=seed,
            **form,
        )
        texts.add(mtad.run(method, pair, prompt_ids=PROMPT, config=config).token_ids)
    assert len(texts) == len(seeds)


@every_form
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_context_limit_ends_a_run(
    method: str, form: dict[str, Any], temperature: float
) -> None:
    """The target knows 24 positions and fails at the 25th; the draft knows 40."""
    pair = pair_of("small")
    assert pair.context_length == 24
    shape = {"num_draft_tokens": 2, "temperature": temperature, "top_k": 5, **form}
    for asked, reason in ((400, "context"), (20, "context"), (19, "length"), (18, "length")):
        config = mtad.DecodeConfig(max_new_tokens=asked, **shape)
        trace = mtad.run(method, pair, prompt_ids=PROMPT, config=config)
        assert (len(trace.token_ids), trace.stop_reason) == (min(asked, 19), reason)
        assert trace.config.max_new_tokens == asked


@every_form
def test_the_shorter_context_of_the_two_models_counts(method: str, form: dict[str, Any]) -> None:
    """The draft fails at the 25th position, the target at the 41st."""
    target, draft = models("small")[1], models("small")[0]
    pair = mtad.ModelPair(target=target, draft=draft)
    config = mtad.DecodeConfig(max_new_tokens=100, num_draft_tokens=2, top_k=5, **form)
    trace = mtad.run(method, pair, prompt_ids=PROMPT, config=config)
    assert (len(trace.token_ids), trace.stop_reason) == (19, "context")


@every_form
def test_an_end_of_sequence_really_ends_the_run(method: str, form: dict[str, Any]) -> None:
    """Where every token is one, the first ends the run, accepted or not."""
    pair = pair_of("twins", eos=list(range(VOCAB)))
    for temperature in (0.0, 1.0):
        config = mtad.DecodeConfig(num_draft_tokens=2, temperature=temperature, top_k=5, **form)
        trace = mtad.run(method, pair, prompt_ids=PROMPT, config=config)
        assert (len(trace.token_ids), trace.stop_reason) == (1, "eos")


@every_form
def test_an_ignored_end_of_sequence_is_a_token_like_any_other(
    method: str, form: dict[str, Any]
) -> None:
    config = mtad.DecodeConfig(
        max_new_tokens=16, num_draft_tokens=2, top_k=5, ignore_eos=True, **form
    )
    ignoring = mtad.run(method, pair_of("strangers", [3, 7]), prompt_ids=PROMPT, config=config)
    without = mtad.run(method, pair_of("strangers"), prompt_ids=PROMPT, config=config)
    assert ignoring.decisions() == without.decisions()
    assert ignoring.stop_reason == "length"


@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_a_perfect_draft_is_accepted_whole(method: str) -> None:
    """The draft is the target: all but bild's own fallback keeps γ + 1 tokens a pass."""
    config = mtad.DecodeConfig(
        max_new_tokens=24,
        num_draft_tokens=3,
        k_config=(1, 1, 1),
        typical_epsilon=1e-6,
        fallback_threshold=0.0,
        rollback_threshold=1e6,
    )
    trace = mtad.run(method, pair_of("twins"), prompt_ids=PROMPT, config=config)
    assert trace.summary.block_efficiency == 4.0
    assert trace.summary.acceptance_rate == 1.0


@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_a_block_that_is_accepted_whole_does_not_overshoot(method: str) -> None:
    """Neither max_new_tokens nor the context: γ is cut so that the bonus still fits."""
    shape: dict[str, Any] = {
        "num_draft_tokens": 3,
        "k_config": (1, 1, 1),
        "typical_epsilon": 1e-6,
        "fallback_threshold": 0.0,
        "rollback_threshold": 1e6,
    }
    for asked in range(1, 9):
        config = mtad.DecodeConfig(max_new_tokens=asked, **shape)
        trace = mtad.run(method, pair_of("twins"), prompt_ids=PROMPT, config=config)
        assert (len(trace.token_ids), trace.stop_reason) == (asked, "length")
    target = models("small")[0]
    narrow = mtad.ModelPair(target=target, draft=target)
    for size in range(16, 24):
        config = mtad.DecodeConfig(max_new_tokens=100, **shape)
        trace = mtad.run(method, narrow, prompt_ids=[1] * size, config=config)
        assert (len(trace.token_ids), trace.stop_reason) == (24 - size, "context")


@pytest.mark.parametrize("method", ["speculative", "typical", "mtad"])
def test_an_automatic_block_ends_where_the_draft_is_unsure(method: str) -> None:
    """Each block ends where `FloorPace` says after the iterations before it, and not before."""
    costs = tuple(1 + 0.15 * length for length in range(13))
    config = mtad.DecodeConfig(
        max_new_tokens=120, num_draft_tokens="auto", iteration_costs=costs, top_k=4, seed=3
    )
    for kind in ("twins", "strangers"):
        trace = mtad.run(method, pair_of(kind), prompt_ids=PROMPT, config=config)
        pace, left, depths = FloorPace(costs), 120, set()
        for decision in trace.decisions():
            joints = list(itertools.accumulate(decision.tree.draft_logprobs))
            depth, most = len(joints), min(pace.length, left - 1)
            depths.add(depth)
            if 0 < depth < most:
                assert joints[-1] < pace.floors[depth - 1]
            if method != "mtad":  # there another hypothesis may have been the likeliest
                assert all(map(operator.ge, joints[:-1], pace.floors))
            left -= len(decision.emitted)
            if depth:
                pace.observe(decision.accepted_length, decision.tree.draft_logprobs, depth)
        assert len(depths) > 2, kind


def test_an_automatic_draft_length_follows_what_is_accepted() -> None:
    """Each draft has the length that `Pace` chooses after the iterations before it."""
    costs = tuple(1 + 0.1 * length for length in range(13))
    config = mtad.DecodeConfig(
        max_new_tokens=120, num_draft_tokens="auto", iteration_costs=costs, accept_threshold=0.9
    )
    lengths = {}
    for kind in ("twins", "strangers"):
        trace = mtad.run("mtad_tree", pair_of(kind), prompt_ids=PROMPT, config=config)
        pace, left = Pace(costs), 120
        for decision in trace.decisions():
            depth = decision.tree.depth
            assert depth == min(pace.length, left - 1)
            left -= len(decision.emitted)
            pace.observe(decision.accepted_length, depth)
        lengths[kind] = [decision.tree.depth for decision in trace.decisions()]
    assert max(lengths["twins"]) == 12
    assert min(lengths["strangers"][:-1]) < lengths["strangers"][0] < 12


def test_an_automatic_width_follows_what_is_accepted() -> None:
    """Each draft has the shape that `WidthPace` chooses after the iterations before it."""
    costs = tuple(
        tuple(1 + (0.1 + 0.02 * width) * length for length in range(7)) for width in AUTO_WIDTHS
    )
    config = mtad.DecodeConfig(
        max_new_tokens=120, num_draft_tokens="auto", beam_width="auto", iteration_costs=costs
    )
    trace = mtad.run("mtad_tree", pair_of("strangers"), prompt_ids=PROMPT, config=config)
    pace, left, roots = WidthPace(costs), 120, dict[int, int]()
    for decision in trace.decisions():
        depth = decision.tree.depth
        assert depth <= min(pace.length, left - 1)  # less where all hypotheses have ended
        if depth:
            # Fewer where the draft's support ends.
            roots[pace.width] = max(roots.get(pace.width, 0), decision.tree.parents.count(-1))
        left -= len(decision.emitted)
        if depth:
            pace.observe(decision.accepted_length, depth)
    assert len(roots) > 1 and all(most == width for width, most in roots.items())
    assert mtad.Trace.from_json(trace.to_json()).config == config


@pytest.mark.parametrize("size", [10, 24, 60])
def test_what_iterations_cost_is_measured_within_the_context(size: int) -> None:
    """A position beyond the context is an error of this family."""
    target, draft = (tiny("gpt2", n_positions=size, seed=seed) for seed in (1, 2))
    pair = mtad.ModelPair(target, draft)
    assert pair.context_length == size
    for method in ("speculative", "mtad", "mtad_tree"):
        config = mtad.DecodeConfig(num_draft_tokens="auto")
        costs = mtad.run(method, pair, prompt_ids=[1], config=config).config.iteration_costs
        assert costs is not None and len(costs) >= 2 and costs[0] == 1.0


def test_keeping_a_text_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    keep = Session.end

    def end(self: Session, *arguments: Any) -> None:
        kept.append(len(looks))
        keep(self, *arguments)

    def perf_counter() -> float:
        looks.append(time.perf_counter())
        return looks[-1]

    looks: list[float] = []
    monkeypatch.setattr(Session, "end", end)
    monkeypatch.setattr(iteration_costs, "BURST_SECONDS", math.inf)
    monkeypatch.setattr(iteration_costs, "time", SimpleNamespace(perf_counter=perf_counter))
    config = mtad.DecodeConfig(num_draft_tokens="auto")
    mtad.run("speculative", pair_of("twins"), prompt_ids=PROMPT, config=config)
    # In the first iteration of a burst, between the two looks at the clock that do not count.
    burst = 2 * (1 + iteration_costs.ROUNDS)
    assert len(kept) > 4 and {place % burst for place in kept} == {1}


def test_what_widths_cost_is_measured_once_and_told() -> None:
    pair = pair_of("twins")
    config = mtad.DecodeConfig(max_new_tokens=40, num_draft_tokens="auto", beam_width="auto")
    first, second = (mtad.run("mtad", pair, prompt_ids=PROMPT, config=config) for _ in "12")
    costs = first.config.iteration_costs
    assert costs is not None and len(costs) == len(AUTO_WIDTHS)
    assert all(isinstance(row, tuple) and row[0] == 1.0 for row in costs)
    assert second.config == first.config and second.decisions() == first.decisions()
    # Other methods take of it what they read, also of what was measured.
    for method in ("autoregressive", "beam", "mtjd", "speculative", "specinfer", "bild"):
        assert mtad.run(method, pair, prompt_ids=PROMPT, config=first.config).token_ids


def siblings_tested(decision: Decision) -> list[tuple[int, bool]]:
    """Of each depth that `specinfer` came to: how many nodes it tested, and if the last passed."""
    tree, found = decision.tree, []
    for depth, parent in enumerate((-1, *decision.path)):
        siblings = [node for node, above in enumerate(tree.parents) if above == parent]
        tested = sum(tree.scores[node] is not None for node in siblings)
        if tested:
            found.append((tested, depth < len(decision.path)))
    return found


def test_an_automatic_tree_follows_what_is_accepted() -> None:
    """Each tree has the shape that `TreePace` chooses after the iterations before it."""
    costs = (1.0, *(1 + 0.03 * nodes(tree) + 0.05 * len(tree) for tree in AUTO_TREES))
    config = mtad.DecodeConfig(max_new_tokens=120, k_config="auto", tree_costs=costs)
    shapes = {}
    for kind in ("twins", "strangers"):
        trace = mtad.run("specinfer", pair_of(kind), prompt_ids=PROMPT, config=config)
        pace, left = TreePace(costs), 120
        for decision in trace.decisions():
            shape = pace.tree[: left - 1]
            assert len(decision.tree.token_ids) == nodes(shape)
            assert decision.tree.depth == len(shape)
            left -= len(decision.emitted)
            pace.observe(siblings_tested(decision))
        shapes[kind] = [len(decision.tree.token_ids) for decision in trace.decisions()]
    assert trace.config.tree_costs == costs
    assert shapes["twins"][-2] > shapes["strangers"][-2]


def test_what_trees_cost_is_measured_once_and_told() -> None:
    pair = pair_of("twins")
    config = mtad.DecodeConfig(max_new_tokens=40, k_config="auto")
    first, second = (mtad.run("specinfer", pair, prompt_ids=PROMPT, config=config) for _ in "12")
    costs = first.config.tree_costs
    assert costs is not None and costs[0] == 1.0 and len(costs) == 1 + len(AUTO_TREES)
    assert second.config == first.config and second.decisions() == first.decisions()
    assert mtad.Trace.from_json(first.to_json()).config == first.config
    with pytest.raises(ConfigError, match="tree_costs"):
        wrong = dataclasses.replace(config, tree_costs=(1, 2))
        mtad.run("specinfer", pair, prompt_ids=PROMPT, config=wrong)


def test_what_iterations_cost_is_measured_once_and_told() -> None:
    pair = pair_of("twins")
    config = mtad.DecodeConfig(max_new_tokens=40, num_draft_tokens="auto")
    first, second = (mtad.run("mtad", pair, prompt_ids=PROMPT, config=config) for _ in range(2))
    costs = first.config.iteration_costs
    assert costs is not None and costs[0] == 1.0 and len(costs) > 2
    assert list(costs) == sorted(costs)
    assert second.config == first.config
    assert second.decisions() == first.decisions()
    # Told them, another pair of the same models decides the same.
    other = pair_of("twins")
    assert mtad.run("mtad", other, prompt_ids=PROMPT, config=first.config).decisions() == (
        first.decisions()
    )
    plain = mtad.run("autoregressive", pair, prompt_ids=PROMPT, config=config)
    assert plain.config.iteration_costs is None
    told = mtad.run(
        "mtad", pair, prompt_ids=PROMPT, config=dataclasses.replace(config, iteration_costs=(1, 2))
    )
    assert {decision.tree.depth for decision in told.decisions()[:-1]} == {1}


def traces_with_impossible_tokens() -> list[Trace]:
    """Filters so narrow that each model forbids most of what the other one likes."""
    config = mtad.DecodeConfig(max_new_tokens=20, num_draft_tokens=3, top_k=2, temperature=1.5)
    pair = pair_of("strangers")
    return [mtad.run(method, pair, prompt_ids=PROMPT, config=config) for method in BLOCK_METHODS]


def test_minus_infinity_goes_through_json() -> None:
    for trace in traces_with_impossible_tokens():
        columns = [decision.tree.target_logprobs for decision in trace.decisions()]
        assert any(-math.inf in column for column in columns), trace.method
        text = trace.to_json()
        assert "Infinity" not in text and "NaN" not in text
        loaded = Trace.from_json(text)
        assert loaded == trace
        for decision in loaded.decisions():
            assert accepted_path(decision, trace.method, trace.config) == decision.path


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_browser_reads_real_traces_without_a_loss() -> None:
    traces = traces_with_impossible_tokens()
    done = subprocess.run(
        [
            "node",
            "-e",
            "for (const line of require('fs').readFileSync(0, 'utf8').trim().split('\\n'))"
            " console.log(JSON.stringify(JSON.parse(line)));",
        ],
        input="\n".join(trace.to_json() for trace in traces),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [Trace.from_json(line) for line in done.stdout.splitlines()] == traces
