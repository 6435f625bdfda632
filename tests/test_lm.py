"""CachedLM: trees, rollbacks and windows against recomputation from scratch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from mtad import tree
from mtad.errors import PairError
from mtad.lm import CachedLM, Recorder
from tests.models import FAMILIES, tiny


def mild(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model whose attention is not so sharp that it blows float32 noise up."""
    spread = "init_std" if family == "opt" else "initializer_range"
    return tiny(family, vocab_size=24, seed=5, **{spread: 0.3, **overrides})


MODELS = {family: mild(family) for family in FAMILIES}
MODELS["gemma3-window"] = mild("gemma3", sliding_window=6)
MODELS["gemma3-mixed"] = mild(
    "gemma3", sliding_window=6, layer_types=["sliding_attention", "full_attention"]
)
MODELS["qwen2-window"] = mild(
    "qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=0
)
MODELS["llama-eager"] = mild("llama", attn_implementation="eager")


@torch.no_grad()
def from_scratch(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """[V] logits after a sequence, without any cache."""
    logits: Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
    return logits


def random_tree(generator: torch.Generator, size: int) -> list[int]:
    """Parents of `size` nodes, each after its own."""
    return [
        int(torch.randint(-1, node, (1,), generator=generator)) if node else -1
        for node in range(size)
    ]


def path_tokens(tokens: list[int], parents: list[int], node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.append(tokens[node])
        node = parents[node]
    return path[::-1]


@pytest.mark.parametrize("name", MODELS)
def test_tree_logits_equal_path_by_path_logits(name: str) -> None:
    model = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    for trial in range(3):
        prompt = torch.randint(2, 24, (9,), generator=generator)
        tokens = torch.randint(2, 24, (10,), generator=generator).tolist()
        parents = random_tree(generator, 10)
        lm = CachedLM(model)
        lm.prefill(prompt)
        logits = lm.forward(torch.tensor(tokens), torch.tensor(parents), levels=10).logits
        for node in range(10):
            expected = from_scratch(model, prompt.tolist() + path_tokens(tokens, parents, node))
            torch.testing.assert_close(logits[node], expected, atol=1e-5, rtol=0)
        assert lm.nodes == 10 and lm.length == 9, trial


@pytest.mark.parametrize("name", MODELS)
def test_a_tree_grown_level_by_level_equals_one_pass(name: str) -> None:
    model = MODELS[name]
    prompt = torch.tensor([3, 4, 5, 6, 7])
    tokens, parents = [8, 9, 10, 11, 12, 13, 14], [-1, -1, 0, 0, 1, 3, 4]
    whole = CachedLM(model)
    whole.prefill(prompt)
    expected = whole.forward(torch.tensor(tokens), torch.tensor(parents), levels=3).logits
    grown = CachedLM(model)
    grown.prefill(prompt)
    rows = [
        grown.forward(torch.tensor(tokens[a:b]), torch.tensor(parents[a:b])).logits
        for a, b in ((0, 2), (2, 5), (5, 7))
    ]
    torch.testing.assert_close(torch.cat(rows), expected, atol=1e-5, rtol=0)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("block"), st.integers(1, 5), st.integers(0, 10**6)),
        st.tuples(st.just("tree"), st.integers(1, 6), st.integers(0, 10**6)),
        st.tuples(st.just("retain"), st.integers(0, 0), st.integers(0, 10**6)),
        st.tuples(st.just("keep"), st.integers(0, 0), st.integers(0, 10**6)),
        st.tuples(st.just("rollback"), st.integers(0, 0), st.integers(0, 10**6)),
    ),
    max_size=7,
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12)
@given(operations=OPERATIONS)
def test_any_sequence_of_verbs_equals_recomputation(
    name: str, operations: list[tuple[str, int, int]]
) -> None:
    """A model of the cache in plain lists is kept beside it and decides what must come out."""
    model = MODELS[name]
    lm = CachedLM(model)
    prefix = [3, 1, 2]
    lm.prefill(torch.tensor(prefix))
    tokens: list[int] = []
    parents: list[int] = []
    for verb, size, seed in operations:
        generator = torch.Generator().manual_seed(seed)
        if verb in ("block", "tree"):
            new = torch.randint(2, 24, (size,), generator=generator).tolist()
            first = len(tokens)
            if verb == "block":
                above = list(range(first - 1, first - 1 + size))
                given_parents = None
            else:
                above = [
                    int(torch.randint(-1, first + i, (1,), generator=generator))
                    if first + i
                    else -1
                    for i in range(size)
                ]
                given_parents = torch.tensor(above)
            tokens, parents = tokens + new, parents + above
            logits = lm.forward(torch.tensor(new), given_parents, levels=size).logits
            for row, node in enumerate(range(first, first + size)):
                expected = from_scratch(model, prefix + path_tokens(tokens, parents, node))
                torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=0)
        elif not tokens and verb != "rollback":
            continue
        elif verb == "retain":
            leaf = int(torch.randint(0, len(tokens), (1,), generator=generator))
            live = {0}
            while leaf >= 0:
                live.add(leaf)
                leaf = parents[leaf]
            kept = sorted(n for n in live if parents[n] < 0 or parents[n] in live)
            lm.retain(kept)
            tokens = [tokens[n] for n in kept]
            parents = [kept.index(parents[n]) if parents[n] >= 0 else -1 for n in kept]
        elif verb == "keep":
            leaf = int(torch.randint(-1, len(tokens), (1,), generator=generator))
            path = []
            while leaf >= 0:
                path.append(leaf)
                leaf = parents[leaf]
            path.reverse()
            lm.keep(len(path) if path == list(range(len(path))) else torch.tensor(path))
            prefix, tokens, parents = prefix + [tokens[n] for n in path], [], []
        else:
            length = int(torch.randint(1, len(prefix) + 1, (1,), generator=generator))
            lm.rollback(length)
            prefix, tokens, parents = prefix[:length], [], []
    assert lm.length == len(prefix) and lm.nodes == len(tokens)
    last = lm.forward(torch.tensor([7]), torch.tensor([-1])).logits[0]
    torch.testing.assert_close(last, from_scratch(model, [*prefix, 7]), atol=1e-5, rtol=0)


def test_prefill_in_chunks_is_the_same_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"]
    prompt = torch.randint(2, 24, (23,), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("mtad.lm.PREFILL_CHUNK_TOKENS", 5)
    lm = CachedLM(model)
    lm.prefill(prompt)
    assert (lm.length, lm.passes, lm.positions) == (23, 0, 0)
    logits = lm.forward(torch.tensor([4])).logits[0]
    torch.testing.assert_close(
        logits, from_scratch(model, [*prompt.tolist(), 4]), atol=1e-5, rtol=0
    )


def test_passes_and_spans_are_counted() -> None:
    ticks = iter(range(100))

    class StepClock:
        def mark(self) -> float:
            return float(next(ticks))

        def seconds(self, start: float, end: float) -> float:
            return end - start

    began: list[int] = []
    recorder = Recorder(StepClock(), on_decode=lambda: began.append(1))
    lm = CachedLM(MODELS["llama"], recorder=recorder)
    lm.prefill(torch.tensor([1, 2, 3]))
    assert not began
    lm.forward(torch.tensor([4, 5]))
    lm.forward(torch.tensor([6]))
    assert began == [1]
    assert (lm.passes, lm.positions) == (2, 3)
    assert recorder.take() == {"prefill": 1.0, "verify": 2.0}
    assert recorder.take() == {}


def test_hidden_states_come_on_request() -> None:
    lm = CachedLM(MODELS["llama"])
    lm.prefill(torch.tensor([1]))
    output = lm.forward(torch.tensor([2, 3]), layers=(0, -1))
    assert output.hidden is not None and output.hidden.shape == (2, 32)
    embedded, last = output.hidden.chunk(2, -1)
    assert torch.equal(embedded, MODELS["llama"].get_input_embeddings()(torch.tensor([2, 3])))
    head = MODELS["llama"].get_output_embeddings()(last)
    torch.testing.assert_close(head, output.logits, atol=1e-5, rtol=0)


def test_logits_are_cut_to_the_common_vocabulary() -> None:
    lm = CachedLM(MODELS["llama"], vocab_size=20)
    lm.prefill(torch.tensor([1]))
    assert lm.forward(torch.tensor([2])).logits.shape == (1, 20)


def test_a_check_that_raises_leaves_the_cache_as_it_was() -> None:
    stop = False

    def check() -> None:
        if stop:
            raise KeyboardInterrupt

    model = MODELS["llama"]
    lm = CachedLM(model, check=check)
    lm.prefill(torch.tensor([1, 2]))
    stop = True
    with pytest.raises(KeyboardInterrupt):
        lm.forward(torch.tensor([3]))
    stop = False
    logits = lm.forward(torch.tensor([3])).logits[0]
    torch.testing.assert_close(logits, from_scratch(model, [1, 2, 3]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [-1, 4])
def test_rollback_outside_the_prefix_is_refused(length: int) -> None:
    lm = CachedLM(MODELS["llama"])
    lm.prefill(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=f"length is {length}, but must be from 0 to 3"):
        lm.rollback(length)


def test_a_boolean_style_mask_would_be_noticed() -> None:
    """The mask is additive: 0 where a node may look, the type's minimum elsewhere."""
    ancestors = tree.extend_ancestors(None, torch.tensor([-1, -1, 0]), levels=2)
    assert ancestors.tolist() == [[True, False, False], [False, True, False], [True, False, True]]
    mask = tree.additive_mask(ancestors, 2, 3, torch.float32)
    low = torch.finfo(torch.float32).min
    assert mask.shape == (1, 1, 3, 5)
    assert mask[0, 0].tolist() == [
        [0, 0, 0, low, low],
        [0, 0, low, 0, low],
        [0, 0, 0, low, 0],
    ]


def test_a_window_hides_what_is_too_far() -> None:
    ancestors = tree.chain_ancestors(2, torch.device("cpu"))
    mask = tree.additive_mask(ancestors, 3, 2, torch.float32, window=2)
    assert (mask[0, 0] == 0).tolist() == [
        [False, False, True, True, False],
        [False, False, False, True, True],
    ]


def test_layers_whose_cache_cannot_roll_back_are_refused() -> None:
    model = tiny("llama", vocab_size=24)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(PairError, match="linear_attention"):
        CachedLM(model)
