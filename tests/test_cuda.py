"""The engine for GPUs: against transformers and against the walks on any device.

Without a GPU everything runs as it would there, kernel by kernel and once more from a tape: like a
graph, that does the same operations on the same tensors, whatever Python would now do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import mtad
from mtad import inspection, pairs
from mtad.ballast import BallastShape
from mtad.ballast_pair import with_ballast
from mtad.copy_drafter import CopyDrafter
from mtad.cuda import arena, graphs
from mtad.cuda.draft import CudaDraft
from mtad.cuda.drafter import CudaDrafter
from mtad.cuda.fused import Fused, Plain, kernels
from mtad.cuda.llama import CudaLlama, unsupported_reason
from mtad.cuda.stack import fused
from mtad.decoders import load_decoder, readback
from mtad.draft import Drafter
from mtad.errors import PairError
from mtad.hidden_draft import Ends
from mtad.hidden_drafter import EagerDraft, HiddenDrafter
from mtad.lm import CachedLM
from mtad.pairs import ModelPair, as_drafter
from tests.models import tiny
from tests.test_hidden_draft import LAYERS, VOCABULARY, Reference, make_draft
from tests.test_invariants import every_form
from tests.test_lm import OPERATIONS
from tests.test_syncs import SyncCounter
from tests.walks import logq, walk_side_by_side

WEIGHTS = (0.1, 0.4, 0.7)


class Tape(TorchDispatchMode):
    """Records operations; a replay puts their results where the recorded ones are."""

    def __init__(self, compute: Any) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        with self:
            self.output = compute()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = any(value.alias_info for value in func._schema.returns)
        if func._schema.is_mutable or not views:
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


def run_from_tape(self: graphs.Graphs, key: Any, compute: Any, *tensors: Tensor) -> Any:
    """As `Graphs.run` on a GPU."""
    recorded: dict[Any, Any] = self._recorded
    key = key, *((tensor.shape, tensor.dtype) for tensor in tensors)
    with graphs.ordinary_tensors():
        if key not in recorded:
            inputs = [tensor.clone() for tensor in tensors]
            compute(*inputs)
            recorded[key] = inputs, Tape(lambda: compute(*inputs))
        inputs, tape = recorded[key]
        if tensors:
            torch._foreach_copy_(inputs, tensors)
        tape.replay()
    return tape.output


@pytest.fixture(params=["cpu", "replayed", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if request.param == "replayed":
        monkeypatch.setattr(graphs.Graphs, "run", run_from_tape)
    return "cuda" if request.param == "cuda" else "cpu"


def mild(device: str = "cpu", **overrides: Any) -> PreTrainedModel:
    """A tiny Llama whose attention is not so sharp that it blows float32 noise up."""
    sizes = {"initializer_range": 0.3, "max_position_embeddings": 4096, **overrides}
    return tiny("llama", vocab_size=VOCABULARY, seed=5, **sizes).to(device)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that begin so small that every test makes them grow."""
    monkeypatch.setattr("mtad.cuda.arena.FIRST_SLOTS", 8)
    monkeypatch.setattr("mtad.cuda.arena.FIRST_BUCKET", 8)
    monkeypatch.setattr("mtad.cuda.draft._FIRST_ENTRIES", 4)
    monkeypatch.setattr("mtad.cuda.draft._FIRST_TEXT", 4)
    monkeypatch.setattr("mtad.cuda.drafter._FIRST_TEXT_BUCKET", 4)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


# Passes of a target


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 2048,
            }
        },
    ],
    ids=lambda changes: str(changes)[:60],
)
@pytest.mark.parametrize("rows", [1, 3, 37, 90])
def test_logits_and_states_are_those_of_transformers(
    rows: int, changes: dict[str, Any], device: str
) -> None:
    model = mild(device, **changes)
    ids = torch.randint(VOCABULARY, (rows,)).to(device)
    with torch.inference_mode():
        expected = model(ids[None], output_hidden_states=True)
        found = CachedLM(CudaLlama(model)).forward(ids, layers=LAYERS)
        again = CachedLM(model).forward(ids, layers=LAYERS)
    states = torch.cat([expected.hidden_states[layer][0] for layer in LAYERS], -1)
    torch.testing.assert_close(found.logits, expected.logits[0], atol=1e-5, rtol=1e-5)
    assert found.hidden is not None
    torch.testing.assert_close(found.hidden, states, atol=1e-5, rtol=1e-5)
    # The model itself goes on with views of the fused weights.
    torch.testing.assert_close(again.logits, expected.logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.usefixtures("small")
def test_any_sequence_of_verbs_is_that_of_transformers(inference: bool, device: str) -> None:
    """Also with caches that were another run's before, and that grow in the middle of one."""
    model = mild(device)
    llama = CudaLlama(model)

    @settings(max_examples=40)
    @given(operations=OPERATIONS)
    def walk(operations: list[tuple[str, int, int]]) -> None:
        lms = CachedLM(model), CachedLM(llama)
        for lm in lms:
            lm.prefill(torch.tensor([3, 1, 2], device=device))
        for verb, size, seed in operations:
            generator = torch.Generator().manual_seed(seed)
            nodes = lms[0].nodes
            if verb in ("block", "tree"):
                ids = torch.randint(VOCABULARY, (size,), generator=generator).to(device)
                above: Tensor | None = None
                if verb == "tree":
                    drawn = [
                        int(torch.randint(-1, nodes + i, (), generator=generator))
                        for i in range(size)
                    ]
                    above = torch.tensor(drawn, device=device)
                outputs = [lm.forward(ids, above, levels=size, layers=(0, 2)) for lm in lms]
                for expected, found in zip(outputs[0][:2], outputs[1][:2], strict=True):
                    assert expected is not None and found is not None
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            elif verb == "retain":
                for lm in lms:
                    lm.retain(range(nodes // 2))
            elif verb == "rollback":
                length = int(torch.randint(lms[0].length + 1, (), generator=generator))
                for lm in lms:
                    lm.rollback(length)
            elif nodes:
                node = int(torch.randint(nodes, (), generator=generator))
                ancestors = lms[0]._ancestors
                row = torch.arange(nodes) <= node if ancestors is None else ancestors[node]
                for lm in lms:
                    lm.keep(row.nonzero().squeeze(1).to(device))

    with torch.inference_mode(inference):
        walk()
    assert len(llama._arenas._free) == 1


def test_two_runs_at_once_have_a_cache_each(device: str) -> None:
    llama = CudaLlama(mild(device))
    texts = torch.randint(VOCABULARY, (2, 12)).to(device)
    alone = [CachedLM(llama).forward(text).logits for text in texts]
    both = CachedLM(llama), CachedLM(llama)
    for place in range(12):
        for lm, text, expected in zip(both, texts, alone, strict=True):
            found = lm.forward(text[place : place + 1]).logits[0]
            torch.testing.assert_close(found, expected[place], atol=1e-5, rtol=1e-5)


def test_what_a_broken_run_left_behind_is_not_seen(device: str) -> None:
    """Zero times NaN is NaN: what no row sees must still be finite."""
    model = mild(device)
    llama = CudaLlama(model)
    ids = torch.arange(5, device=device)
    expected = CachedLM(llama).forward(ids).logits
    with torch.no_grad():
        kept = model.model.norm.weight.clone(), model.model.embed_tokens.weight.clone()
        model.model.embed_tokens.weight.fill_(torch.nan)
        assert CachedLM(llama).forward(ids).logits.isnan().all()
        model.model.embed_tokens.weight.copy_(kept[1])
    torch.testing.assert_close(CachedLM(llama).forward(ids).logits, expected)


def test_results_outlive_the_next_pass() -> None:
    lm = CachedLM(CudaLlama(mild()))
    first = lm.forward(torch.tensor([1]), layers=(0,))
    assert first.hidden is not None
    kept = first.logits.clone(), first.hidden.clone()
    lm.forward(torch.tensor([2]), layers=(0,))
    assert torch.equal(first.logits, kept[0]) and torch.equal(first.hidden, kept[1])


def test_there_is_one_copy_of_the_weights() -> None:
    model = mild()
    before = inspection.weight_bytes(model)
    llama = CudaLlama(model)
    joined = llama.stack.layers[0].qkv
    attention = model.model.layers[0].self_attn
    assert attention.v_proj.weight.untyped_storage().data_ptr() == joined.data_ptr()
    assert CudaLlama(model).stack.layers[0].qkv.data_ptr() == joined.data_ptr()
    assert inspection.weight_bytes(model) == before


def test_only_rows_beside_each_other_are_taken_as_fused() -> None:
    whole = torch.randn(6, 4)
    one, other = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
    for first, second in ((0, 2), (2, 0), (0, 4)):
        one.weight.data, other.weight.data = whole[first : first + 2], whole[second : second + 2]
        expected = torch.cat([one.weight, other.weight]).detach()
        assert torch.equal(fused([one, other]), expected)
        assert torch.equal(torch.cat([one.weight, other.weight]), expected)


# Steps of a draft


@pytest.mark.parametrize("weights", [(), WEIGHTS, (0.5,)], ids=["plain", "copies", "one token"])
@pytest.mark.usefixtures("small")
@torch.no_grad()
def test_any_walk_is_that_of_the_drafter_on_any_device(
    weights: tuple[float, ...], device: str
) -> None:
    """Random prompts, trees, kept paths and tokens accepted beyond the draft's cache.

    Of five tokens only, so that there is something to copy.
    """
    target = mild(device)
    draft = make_draft(copy_weights=weights).to(device)
    ends = Ends.of(target, draft.token_ids)
    made = CudaDraft(draft, ends)

    def drafters() -> tuple[Drafter, Drafter]:
        plain = HiddenDrafter(EagerDraft(draft, ends), VOCABULARY)
        return CopyDrafter(plain, weights) if weights else plain, CudaDrafter(made, VOCABULARY)

    walk_side_by_side(target, drafters, device)


@torch.no_grad()
def test_parents_below_tokens_that_are_not_read_yet() -> None:
    """The first call after a kept block may be of a tree."""
    target, draft = mild(), make_draft(copy_weights=WEIGHTS)
    ends = Ends.of(target, draft.token_ids)
    reference = Reference(target, draft, begins_empty=False)
    results = []
    for drafter in (
        CopyDrafter(HiddenDrafter(EagerDraft(draft, ends), VOCABULARY), WEIGHTS),
        CudaDrafter(CudaDraft(draft, ends), VOCABULARY),
    ):
        drafter.prefill(torch.tensor([1, 2, 3]), reference.hidden([1, 2, 3]))
        drafter.next_logits(torch.tensor([4]))
        drafter.next_logits(torch.tensor([5, 6]), torch.tensor([0, 0]))
        states = reference.hidden([1, 2, 3, 4, 6])
        assert states is not None
        drafter.keep(torch.tensor([0, 2]), states[3:])
        results.append(logq(drafter.next_logits(torch.tensor([7, 8]), torch.tensor([-1, -1]))))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_long_prompt_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = mild(), make_draft(copy_weights=WEIGHTS)
    made = CudaDraft(draft, Ends.of(target, draft.token_ids))
    text = [(7 * i) % VOCABULARY for i in range(30)]
    hidden = Reference(target, draft, False).hidden(text)

    def logits() -> Tensor:
        drafter = CudaDrafter(made, VOCABULARY)
        drafter.prefill(torch.tensor(text), hidden)
        return logq(drafter.next_logits(torch.tensor([3])))

    whole = logits()
    monkeypatch.setattr("mtad.cuda.drafter._CHUNK_TOKENS", 7)
    torch.testing.assert_close(logits(), whole, atol=2e-5, rtol=1e-4)


def test_states_that_are_missing_are_asked_for() -> None:
    target, draft = mild(), make_draft()
    drafter = CudaDrafter(CudaDraft(draft, Ends.of(target, draft.token_ids)), VOCABULARY)
    with pytest.raises(PairError, match="was given none.*target_layers to prefill and keep"):
        drafter.prefill(torch.tensor([1, 2]), None)


# Whole runs


def pair_of(kind: str, engine: str, device: str) -> ModelPair:
    target = mild(device)
    draft: Any = tiny("llama", vocab_size=VOCABULARY, seed=2).to(device)
    if kind == "hidden":
        draft = make_draft(copy_weights=WEIGHTS).to(device)
    return ModelPair(target, draft, engine=engine)


@pytest.mark.parametrize("kind", ["model", "hidden"])
@every_form
def test_every_method_writes_what_it_writes_on_the_eager_engine(
    method: str, form: dict[str, Any], kind: str, device: str
) -> None:
    """At temperature 0 and above: the draws are the same ones."""
    for temperature in (0.0, 1.0):
        config = mtad.DecodeConfig(
            max_new_tokens=30, num_draft_tokens=3, temperature=temperature, top_k=5, **form
        )
        eager, ours, again = (
            mtad.run(method, pair_of(kind, engine, device), prompt_ids=[1, 2, 3], config=config)
            for engine in ("eager", "cuda", "cuda")
        )
        assert ours.engine == "cuda" and ours.dtype == "float32"
        assert ours.token_ids == eager.token_ids
        assert ours.decisions() == again.decisions()


@pytest.mark.parametrize("engine", ["eager", "cuda"])
def test_a_target_with_ballast(engine: str) -> None:
    shape = BallastShape("test", layers=3, width=32, heads=4, kv_heads=2, head_dim=8, mlp=64)
    pair = pair_of("hidden", "eager", "cpu")
    config = mtad.DecodeConfig(max_new_tokens=24, temperature=0.0)
    plain, ours = (
        mtad.run("mtad", one, prompt_ids=[1, 2, 3], config=config)
        for one in (pair, with_ballast(pair, shape, engine=engine))
    )
    assert ours.token_ids == plain.token_ids and ours.engine == engine
    assert ours.summary.block_efficiency == plain.summary.block_efficiency


def test_weights_and_sizes_of_a_pair() -> None:
    eager, ours = (pair_of("hidden", engine, "cpu") for engine in ("eager", "cuda"))
    assert ours.target_info == eager.target_info and ours.draft_info == eager.draft_info
    assert ours.weights == "float32"


@pytest.mark.parametrize("kind", ["model", "hidden"])
@pytest.mark.parametrize("method", ["autoregressive", "speculative", "mtad", "mtad_tree"])
def test_one_read_per_target_pass(
    method: str, kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readback, "_on_host", lambda tensor: False)  # as on a device
    pair = pair_of(kind, "cuda", device)
    lm = CachedLM(pair.engine_target)
    generator = torch.Generator(device).manual_seed(0)
    config = mtad.DecodeConfig(max_new_tokens=100)
    with torch.inference_mode():
        decisions = load_decoder(method)(lm, as_drafter(pair), [1, 2, 3], config, generator)
        for _ in range(6):
            next(decisions)
        before = lm.passes
        with SyncCounter().watching() as counter:
            for _ in range(6):
                next(decisions)
        assert counter.reads == ["tolist"] * 6
        if device == "cpu":
            return
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing CUDA operation") as caught:
                for _ in range(6):
                    next(decisions)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # What is recorded only now waits for the device as well.
    syncs = [one for one in caught if "graphs.py" not in one.filename]
    assert len(syncs) <= 6 and lm.passes == before + 12


# What cannot be run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "SiLU"),
        ({"attention_bias": True}, "no biases"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
    ],
    ids=str,
)
def test_a_model_that_the_engine_does_not_know_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    model = mild(**changes)
    assert said in str(unsupported_reason(model))
    with pytest.raises(PairError, match=f"{said}.*"):
        CudaLlama(model)
    with pytest.raises(PairError, match=f'{said}.*Choose engine="eager"'):
        ModelPair(model, engine="cuda")
    assert pairs.engine_reason(ModelPair(mild(), model), "cuda")


def test_other_families_other_layers_and_spread_models_are_refused() -> None:
    assert "Qwen2ForCausalLM" in str(unsupported_reason(tiny("qwen2")))
    spread = mild()
    spread.model.layers[0].to("meta")
    assert "spread over cpu, meta" in str(unsupported_reason(spread))

    class Packed(nn.Linear):
        pass

    packed = mild()
    packed.model.layers[1].mlp.up_proj = Packed(16, 32, bias=False)
    assert "has Packed layers" in str(unsupported_reason(packed))


def test_the_engine_is_chosen_on_gpus_and_where_not_the_pair_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class There:
        type = "cuda"

    monkeypatch.setattr(ModelPair, "device", property(lambda pair: There()))
    monkeypatch.setattr(ModelPair, "_check_device", lambda pair, there: None)
    assert pairs.fastest_engine(ModelPair(mild(), mild())) == "cuda"
    assert pairs.fastest_engine(ModelPair(mild(), make_draft())) == "cuda"
    assert pairs.fastest_engine(ModelPair(tiny("qwen2"))) == "eager"


# Graphs


def test_a_tape_does_not_see_what_python_changes() -> None:
    """Otherwise it would prove nothing."""
    values, number = torch.zeros(2), 1

    def compute() -> tuple[Tensor]:
        return ((values + number).mul_(2),)

    tape = Tape(compute)
    values.fill_(3)
    number = 5
    tape.replay()
    assert tape.output[0].tolist() == [8, 8]


def test_few_numbers_of_rows_are_computed() -> None:
    assert [arena.padded(count) for count in (1, 2, 5, 8, 9, 17, 64)] == [1, 8, 8, 8, 16, 24, 64]


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device on this machine"
)


@needs_cuda
def test_a_replay_gives_what_the_kernels_give(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv(graphs.GRAPHS_VARIABLE, switch)
        pair = pair_of("hidden", "cuda", "cuda")
        config = mtad.DecodeConfig(max_new_tokens=40)
        found.append(mtad.run("mtad_tree", pair, prompt_ids=[1, 2, 3], config=config))
    assert found[0].decisions() == found[1].decisions()


@needs_cuda
def test_the_oldest_graph_makes_room() -> None:
    values = torch.zeros(1, device="cuda")
    recorded = graphs.Graphs(values.device, most=2)
    for key in (1, 2, 1, 3, 1, 2):
        values.fill_(key)
        (found,) = recorded.run(key, lambda key=key: (values * key,))  # type: ignore[misc]
        assert found.item() == key * key
    assert list(recorded._recorded) == [1, 2]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "width"), [(9, 3, 64, 1536), (4, 4, 48, 5)])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_fused_kernels_do_what_plain_operations_do(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, width: int, rows: int
) -> None:
    if not isinstance(kernels(torch.device("cuda")), Fused):
        pytest.skip("Triton compiles nothing here")
    random = torch.Generator("cuda").manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=random)

    joined = some(rows, heads + 2 * kv_heads, size).to(dtype)
    turns = some(rows, size // 2)
    slots = torch.randperm(20, device="cuda", generator=random)[:rows]
    caches = [torch.zeros(2 * kv_heads, 20, size, device="cuda", dtype=dtype) for _ in range(2)]
    queries = [
        each.turn(joined, (turns.cos(), turns.sin()), slots, cache)
        for each, cache in zip((Plain(), Fused()), caches, strict=True)
    ]
    torch.testing.assert_close(queries[1], queries[0])
    torch.testing.assert_close(caches[1], caches[0])
    assert bool(caches[1].any()), "something was written"
    both = some(rows, 2 * width).to(dtype)
    torch.testing.assert_close(Fused().gated(both), Plain().gated(both))
