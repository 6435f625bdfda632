"""A target with ballast: the function of the small model in float32, the price of the large one."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import mtad
from mtad import inspection, loading
from mtad.ballast import SHAPES, BallastShape, ballast
from mtad.ballast_pair import NarrowDrafter, with_ballast
from mtad.copy_drafter import CopyDrafter
from mtad.draft import Drafter
from mtad.errors import ConfigError, PairError
from mtad.hidden_draft import HiddenDraft, HiddenDraftConfig
from mtad.lm import CachedLM
from mtad.native import library
from mtad.pairs import ModelPair, as_drafter
from tests.models import tiny

WIDTH, LAYERS, VOCABULARY = 16, 3, 40

# Fields after the id: layers, width, heads, key-value heads, size of a head, MLP.
EQUAL = BallastShape("equal", LAYERS, WIDTH, 4, 2, 4, 32)
WIDER = BallastShape("wider", LAYERS, 40, 8, 4, 4, 50)
DEEPER = BallastShape("deeper", 5, 36, 12, 3, 4, 33)
LARGER_HEADS = BallastShape("larger heads", 7, 40, 8, 4, 8, 64)
THREEFOLD_HEADS = BallastShape("threefold heads", 4, 42, 6, 6, 12, 40)
SHAPES_HERE = (EQUAL, WIDER, DEEPER, LARGER_HEADS, THREEFOLD_HEADS)


def target(**overrides: Any) -> LlamaForCausalLM:
    """A small target whose norms and biases are as random as the rest."""
    values = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "initializer_range": 0.3}
    model = tiny(**{**values, **overrides})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                base = 1.0 if "norm" in name else 0.0
                weight.copy_(base + 0.3 * torch.randn(weight.shape, generator=generator))
    assert isinstance(model, LlamaForCausalLM)
    return model


def text(length: int = 30, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, token_ids: Tensor) -> Tensor:
    found: Tensor = model(token_ids.unsqueeze(0)).logits[0]
    return found


def assert_same_function(small: Any, large: Any) -> None:
    expected = logits(small, text())
    # Sharp enough to show what is wrong: the logits are far from each other and from zero.
    assert expected.std() > 1
    torch.testing.assert_close(logits(large, text()), expected, atol=1e-4, rtol=0)


# The function.


@pytest.mark.parametrize(
    ("shape", "kv_heads"),
    # Four key-value heads need as many seats, which two of the shapes do not have.
    [pair for pair in itertools.product(SHAPES_HERE, (1, 2, 4)) if pair[0].kv_heads >= pair[1]],
    ids=lambda value: getattr(value, "id", value),
)
def test_the_logits_stay(shape: BallastShape, kv_heads: int) -> None:
    small = target(num_key_value_heads=kv_heads)
    large = ballast(small, shape)
    assert_same_function(small, large)
    assert (large.config.num_hidden_layers, large.config.hidden_size) == (shape.layers, shape.width)


@pytest.mark.parametrize("shape", [WIDER, DEEPER, THREEFOLD_HEADS], ids=lambda shape: shape.id)
def test_groups_of_three_queries_stay(shape: BallastShape) -> None:
    """In groups of two, of four and of one; and the heads are wider than the stream."""
    small = target(hidden_size=18, num_attention_heads=6, num_key_value_heads=2, head_dim=4)
    assert_same_function(small, ballast(small, shape))


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rms_norm_eps": 0.5},
        {"attn_implementation": "eager"},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ],
    ids=["tied", "biases", "epsilon", "eager", "linear", "llama3"],
)
def test_what_a_llama_may_have_stays(overrides: dict[str, Any]) -> None:
    small = target(**overrides)
    large = ballast(small, LARGER_HEADS)
    assert_same_function(small, large)
    tied = large.get_input_embeddings().weight is large.get_output_embeddings().weight
    assert tied is small.config.tie_word_embeddings
    assert large.config._attn_implementation == small.config._attn_implementation


@pytest.mark.parametrize("shape", SHAPES_HERE, ids=lambda shape: shape.id)
@torch.no_grad()
def test_the_states_stand_in_the_first_columns(shape: BallastShape) -> None:
    """Layers beyond the target's come last, so that only the last state has another number."""
    small = target()
    ours = small(text().unsqueeze(0), output_hidden_states=True).hidden_states
    theirs = ballast(small, shape)(text().unsqueeze(0), output_hidden_states=True).hidden_states
    assert len(theirs) == shape.layers + 1
    for index, state in enumerate(theirs):
        assert not state[..., WIDTH:].any()
        if index < LAYERS:
            torch.testing.assert_close(state[..., :WIDTH], ours[index], atol=1e-4, rtol=1e-4)
        elif LAYERS < index < shape.layers:
            assert torch.equal(state, theirs[LAYERS]), "a layer of ballast changed the stream"
    torch.testing.assert_close(theirs[-1][..., :WIDTH], ours[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES_HERE, ids=lambda shape: shape.id)
def test_chain_and_tree_through_the_cache_stay(shape: BallastShape) -> None:
    small = target()
    ours, theirs = CachedLM(small), CachedLM(ballast(small, shape))
    parents = torch.tensor([-1, 0, 0, 1, 2, 2, -1])
    path = torch.tensor([0, 2, 5])

    def walk(lm: CachedLM) -> list[Tensor]:
        lm.prefill(text(9))
        chain = lm.forward(text(4, seed=2)).logits
        lm.keep(3)
        tree = lm.forward(text(7, seed=3), parents, levels=3).logits
        lm.keep(path)
        return [chain, tree, lm.forward(text(2, seed=4)).logits]

    for expected, found in zip(walk(ours), walk(theirs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES_HERE, ids=lambda shape: shape.id)
def test_the_greedy_tokens_stay(shape: BallastShape) -> None:
    pair = ModelPair(target())
    config = mtad.DecodeConfig(max_new_tokens=40, temperature=0.0)
    runs = [
        mtad.run("autoregressive", either, prompt_ids=[1, 2, 3], config=config).token_ids
        for either in (pair, with_ballast(pair, shape))
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 3


def test_ballast_on_ballast_changes_nothing_either() -> None:
    small = target()
    once = ballast(small, WIDER)
    assert_same_function(small, ballast(once, BallastShape("again", 5, 96, 16, 8, 8, 70), seed=1))


# The price.


def test_every_shape_costs_what_its_note_says() -> None:
    found = {}
    for shape in SHAPES.values():
        attention = shape.width * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
        layer = attention + 3 * shape.width * shape.mlp + 2 * shape.width
        found[shape.id] = layer * shape.layers
        assert f"{found[shape.id] / 1e9:.2f} billion parameters" in shape.note
    assert list(found) == ["1b", "8b", "13b"]


def test_a_pass_reads_the_bytes_of_the_shape() -> None:
    shape = LARGER_HEADS
    layer = shape.width * (shape.head_dim * 2 * (shape.heads + shape.kv_heads) + 3 * shape.mlp + 2)
    beside = VOCABULARY * shape.width + shape.width
    for tied in (True, False):
        large = ballast(target(tie_word_embeddings=tied), shape)
        assert inspection.weight_bytes(large) == 4 * (layer * shape.layers + beside)


def test_the_ballast_is_noise_and_not_zeros() -> None:
    """Zeros would cost the same bytes, but fewer bits would move: joules would be too low."""
    shape = BallastShape("wide", 5, 160, 20, 5, 8, 320)
    for index, layer in enumerate(ballast(target(), shape).model.layers):
        for name, weight in layer.named_parameters():
            if weight.dim() == 2:
                assert weight.isfinite().all() and weight.abs().max() < 5
                share = float((weight == 0).float().mean())
                # Of a carried layer: the rows of o and down behind the target's width, at the
                # columns where something arrives.
                assert share < (0.2 if index < LAYERS else 0.11), f"{index} {name}: {share}"


def test_the_seed_decides_the_noise() -> None:
    small = target()
    one, same, other = (ballast(small, DEEPER, seed=seed) for seed in (1, 1, 2))
    for ours, theirs in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(
        one.model.layers[0].mlp.gate_proj.weight, other.model.layers[0].mlp.gate_proj.weight
    )
    gates = [layer.mlp.gate_proj.weight for layer in one.model.layers]
    assert not any(torch.equal(a[WIDTH:], b[WIDTH:]) for a, b in itertools.combinations(gates, 2))


def test_nothing_else_is_touched() -> None:
    small = target()
    before = {name: weight.clone() for name, weight in small.state_dict().items()}
    settings, state = small.config.to_dict(), torch.random.get_rng_state()
    large = ballast(small, DEEPER)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert small.config.to_dict() == settings
    assert all(torch.equal(weight, before[name]) for name, weight in small.state_dict().items())
    assert not large.training and not any(weight.requires_grad for weight in large.parameters())


@torch.no_grad()
def test_another_dtype() -> None:
    small = target()
    large = ballast(small, LARGER_HEADS, dtype="bfloat16")
    assert {weight.dtype for weight in large.parameters()} == {torch.bfloat16}
    assert large.dtype is torch.bfloat16 and large.config.dtype is torch.bfloat16
    # Frequencies in bfloat16 would turn far positions by the wrong angle.
    assert large.model.rotary_emb.inv_freq.dtype is torch.float32
    expected, found = logits(small, text()), logits(large, text()).float()
    assert (found - expected).abs().mean() < 0.05 * expected.std()


def test_the_ends_of_an_answer_stay() -> None:
    small = target(eos_token_id=5)
    small.generation_config.eos_token_id = [5, 7]
    assert inspection.eos_token_ids(ballast(small, WIDER), None) == (5, 7)


def test_progress_goes_from_nothing_to_all_bytes() -> None:
    seen: list[tuple[str, int, int]] = []
    large = ballast(target(), DEEPER, progress=lambda *step: seen.append(step))
    total = sum(weight.numel() * 4 for weight in large.parameters())
    assert seen[0] == ("ballast", 0, total) and seen[-1] == ("ballast", total, total)
    done = [step[1] for step in seen]
    assert done == sorted(done) and len(set(done)) >= DEEPER.layers


# Pairs.


def hidden_draft(copy_weights: tuple[float, ...] = ()) -> HiddenDraft:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = HiddenDraftConfig(
            WIDTH, (0, 1, LAYERS), 2, 4, 2, mlp_size=32, copy_weights=copy_weights
        )
        draft = HiddenDraft(config, torch.arange(0, VOCABULARY, 2))
    return draft.eval().requires_grad_(False)


class OwnDrafter:
    """A user's own drafter, around one of ours."""

    def __init__(self, drafter: Drafter, context_length: int) -> None:
        self.vocab_size, self.target_layers = drafter.vocab_size, drafter.target_layers
        self.context_length = context_length
        self.prefill, self.next_logits, self.keep = (
            drafter.prefill,
            drafter.next_logits,
            drafter.keep,
        )


def pairs() -> dict[str, ModelPair]:
    small = target()
    hidden = ModelPair(small, hidden_draft())
    return {
        "model": ModelPair(small, tiny(vocab_size=VOCABULARY, seed=4)),
        "hidden": hidden,
        "copying": ModelPair(small, hidden_draft((0.1, 0.3))),
        "own": ModelPair(small, OwnDrafter(as_drafter(hidden), 500)),
    }


@pytest.mark.parametrize("method", ["speculative", "mtad", "mtad_tree"])
@pytest.mark.parametrize("draft", ["model", "hidden", "copying", "own"])
def test_a_pair_decides_as_before(method: str, draft: str) -> None:
    """Same blocks, same verdicts, same log q and log p, twice in a row with one draft object."""
    pair = pairs()[draft]
    heavy = with_ballast(pair, LARGER_HEADS)
    config = mtad.DecodeConfig(max_new_tokens=24, temperature=1.0, top_k=0, top_p=1.0, seed=1)
    expected = mtad.run(method, pair, prompt_ids=[1, 2, 3, 1, 2], config=config)
    for _ in range(2):
        found = mtad.run(method, heavy, prompt_ids=[1, 2, 3, 1, 2], config=config)
        for ours, theirs in zip(expected.steps, found.steps, strict=True):
            one, other = ours.decision, theirs.decision
            assert one.emitted == other.emitted and one.tree.token_ids == other.tree.token_ids
            assert other.tree.draft_logprobs == pytest.approx(one.tree.draft_logprobs, abs=1e-3)
            assert other.tree.target_logprobs == pytest.approx(one.tree.target_logprobs, abs=1e-3)


def test_the_names_say_what_it_is() -> None:
    pair = dataclasses.replace(
        pairs()["hidden"],
        name="both",
        target_name="Small",
        target_revision="r1",
        target_note="Old.",
    )
    heavy = with_ballast(pair, dataclasses.replace(WIDER, id="8b"))
    info = heavy.target_info
    assert (heavy.name, info.name) == (
        "both in an 8B shape (ballast)",
        "Small in an 8B shape (ballast)",
    )
    assert info.revision == "r1"
    assert info.note.startswith("Ballast: writes what Small writes, at the price of a model of ")
    assert info.note.endswith(" billion parameters. Old.")
    assert info.weight_bytes == inspection.weight_bytes(heavy.target)
    assert inspection.model_info(ballast(target(), WIDER)).name.endswith(
        "in a WIDER shape (ballast)"
    )


def test_a_draft_on_hidden_states_keeps_its_size() -> None:
    pair = pairs()["copying"]
    before = pair.draft_info
    heavy = with_ballast(pair, LARGER_HEADS)
    assert isinstance(heavy.draft, NarrowDrafter)
    assert heavy.draft.target_layers == (0, 1, LARGER_HEADS.layers)
    after = heavy.draft_info
    assert before is not None and after is not None
    assert (after.parameters, after.weight_bytes) == (before.parameters, before.weight_bytes)
    assert "Keeps its own size" in after.note


def test_a_draft_moves_to_the_dtype_and_the_pair_given_stays() -> None:
    config = mtad.DecodeConfig(max_new_tokens=8)
    for name in ("model", "hidden"):
        pair = pairs()[name]
        heavy = with_ballast(pair, WIDER, dtype="bfloat16")
        assert heavy.dtype is torch.bfloat16 and pair.dtype is torch.float32
        assert heavy.draft_info is not None and pair.draft_info is not None
        assert 2 * heavy.draft_info.weight_bytes == pair.draft_info.weight_bytes
        for either in (heavy, pair):
            assert len(mtad.run("mtad", either, prompt_ids=[1, 2], config=config).token_ids) == 8


def test_a_draft_that_is_in_place_is_not_copied() -> None:
    both = pairs()
    model, own = both["model"], both["own"]
    assert with_ballast(model, WIDER).draft is model.draft
    assert with_ballast(own, WIDER).context_length == 500
    assert with_ballast(ModelPair(target()), WIDER).draft is None
    blind = OwnDrafter(as_drafter(model), 500)
    assert with_ballast(ModelPair(target(), blind), WIDER).draft is blind


def test_a_copying_draft_goes_on_copying() -> None:
    heavy = with_ballast(pairs()["copying"], WIDER)
    assert isinstance(heavy.draft, NarrowDrafter)
    assert isinstance(heavy.draft._drafter, CopyDrafter)


# Refusals.


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("layers", 2, "a whole number from 3 to 65536"),
        ("width", 8, "a whole number from 16 to 65536"),
        ("mlp", 31, "a whole number from 32 to 65536"),
        ("head_dim", 2, "a multiple of 4, the target's"),
        ("head_dim", 6, "a multiple of 4, the target's"),
        ("kv_heads", 1, "at least 2: one of the target's 2 serves 2 queries, one of the shape's 8"),
        ("layers", 0, "a whole number from 1 to 65536"),
        ("width", 65_537, "a whole number from 1 to 65536"),
        ("mlp", 1.5, "a whole number from 1 to 65536"),
        ("kv_heads", True, "a whole number from 1 to 65536"),
        ("heads", 7, r"a divisor of width \(40\)"),
        ("kv_heads", 3, r"a divisor of heads \(8\)"),
        ("head_dim", 5, "even"),
    ],
)
def test_a_shape_that_does_not_hold_the_target(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"^shape.{field} is .*must be {allowed}"):
        ballast(target(), dataclasses.replace(WIDER, **{field: value}))


def test_too_few_key_value_heads_of_few_queries() -> None:
    shape = dataclasses.replace(WIDER, heads=2, kv_heads=2)
    with pytest.raises(ConfigError, match="kv_heads is 2, but must be at least 4: .* 2 times"):
        ballast(target(), shape)


def test_rotary_positions_that_depend_on_the_size_of_a_head() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    small = target(rope_parameters=dynamic, max_position_embeddings=16)
    assert_same_function(small, ballast(small, WIDER))
    with pytest.raises(PairError, match="rope_type is 'dynamic', but must be .* head_dim=4"):
        ballast(small, LARGER_HEADS)


def test_what_cannot_be_given_ballast() -> None:
    with pytest.raises(PairError, match="is a Qwen2ForCausalLM, but must be a LlamaForCausalLM"):
        ballast(tiny("qwen2"), WIDER)
    with pytest.raises(ConfigError, match='shape is \'2b\', but must be one of "1b", "8b", '):
        with_ballast(ModelPair(target()), "2b")
    with pytest.raises(ConfigError, match="dtype is 'int8', but must be one of"):
        ballast(target(), WIDER, dtype="int8")


def test_too_little_memory_is_said_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda device: 20_000_000_000)
    with pytest.raises(PairError, match=r"'13b' needs 50\.\d GB in float32, but cpu has 20\.0 GB"):
        ballast(target(), "13b")


# Engines.


def packable() -> ModelPair:
    """A pair of the sizes that the native engine takes."""
    small = target(vocab_size=48, hidden_size=64, head_dim=16, intermediate_size=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = HiddenDraftConfig(64, (0, 1, LAYERS), 1, 4, 2, mlp_size=64)
        draft = HiddenDraft(config, torch.arange(0, VOCABULARY, 2))
    return ModelPair(small, draft.eval().requires_grad_(False))


@pytest.mark.skipif(library.unavailable_reason() is not None, reason="no native engine here")
@pytest.mark.parametrize("engine", ["native-float32", "native"])
def test_a_native_engine_runs_both_models(engine: str) -> None:
    pair = packable()
    heavy = with_ballast(pair, BallastShape("x", 4, 96, 6, 3, 32, 96), engine=engine)
    config = mtad.DecodeConfig(max_new_tokens=24, temperature=0.0, accept_threshold=0.05)
    found = mtad.run("mtad", heavy, prompt_ids=[1, 2, 3], config=config)
    assert found.engine == engine and found.draft is not None
    assert ("Rounded to 8 bits" in found.target.note) == (engine == "native")
    if engine == "native":
        assert pair.draft_info is not None
        assert found.draft.weight_bytes < pair.draft_info.weight_bytes / 2
        return
    expected = mtad.run("mtad", pair, prompt_ids=[1, 2, 3], config=config)
    assert found.token_ids == expected.token_ids
    assert found.summary.acceptance_rate == expected.summary.acceptance_rate > 0


# The real pair.


def test_the_real_pair(smollm2: ModelPair) -> None:
    """The same logits and the same run, in a shape with more and larger heads and more layers."""
    pair = dataclasses.replace(smollm2, engine="eager")
    heavy = with_ballast(smollm2, BallastShape("280m", 31, 768, 12, 4, 128, 2048))
    assert heavy.engine == "eager" and heavy.tokenizer is smollm2.tokenizer
    assert heavy.target_info.name == "SmolLM2-135M-Instruct in a 280M shape (ballast)"
    assert heavy.target_info.weight_bytes > 2 * pair.target_info.weight_bytes
    token_ids = torch.tensor(heavy.tokenizer.encode("The sky is blue because the light of the sun"))
    difference = logits(heavy.target, token_ids) - logits(pair.target, token_ids)
    # The target's own logits differ by as much between a text read at once and token by token.
    assert difference.abs().max() < 3e-4
    config = mtad.DecodeConfig(max_new_tokens=16, temperature=0.0)
    one, other = (
        mtad.run("mtad", either, prompt="Why is the sky blue?", config=config)
        for either in (pair, heavy)
    )
    assert [step.decision.emitted for step in one.steps] == [
        step.decision.emitted for step in other.steps
    ]
    assert one.summary.block_efficiency > 1.3
