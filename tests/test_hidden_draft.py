"""The draft on the target's hidden states: the walk along a tree, the file, and whole runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import mtad
from mtad.copy_drafter import CopyDrafter
from mtad.draft import Drafter, RecordedDrafter
from mtad.draft_files import FILE_NAME, load_draft, save_draft
from mtad.errors import ConfigError, PairError
from mtad.four_bits import FourBits
from mtad.hidden_draft import Ends, HiddenDraft, HiddenDraftConfig
from mtad.hidden_drafter import EagerDraft, HiddenDrafter
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.native import library
from mtad.native.draft import NativeDraft
from mtad.native.drafter import NativeDrafter
from mtad.native.packing import CODES4, pack
from mtad.pairs import ModelPair
from mtad.sampling import Uniforms
from tests.models import FAMILIES, tiny
from tests.walks import walk_side_by_side

VOCABULARY = 40
needs_a_compiler = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason="no C compiler on this machine"
)
LAYERS = (0, 1, 2)
CPU = torch.device("cpu")


def make_draft(seed: int = 0, hidden_size: int = 16, **shape: Any) -> HiddenDraft:
    """A random draft for a `tiny` target that proposes the even tokens only."""
    values = {
        "target_layers": LAYERS,
        "num_layers": 2,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "mlp_size": 32,
        **shape,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = HiddenDraft(
            HiddenDraftConfig(hidden_size, **values), torch.arange(0, VOCABULARY, 2)
        )
    return draft.eval().requires_grad_(False)


class Reference:
    """The same draft without caches or trees: reads a whole text anew, token by token."""

    def __init__(self, target: Any, draft: HiddenDraft, begins_empty: bool) -> None:
        self.target, self.draft = target, draft
        self.first = 0 if begins_empty else 1

    def hidden(self, text: list[int]) -> Tensor | None:
        return CachedLM(self.target).prefill(torch.tensor(text), LAYERS) if text else None

    def logits_after(self, text: list[int], known: int, committed: int) -> Tensor:
        """[V] what follows a text of whose tokens the target has read the first `known`.

        −∞ for odd tokens that do not stand among the first `committed`.
        """
        hidden = self.hidden(text[:known])
        own: Tensor | None = None
        past = None
        for place in range(self.first, len(text)):
            if place == 0:
                state = torch.zeros(self.draft.config.hidden_size)
            elif place <= known:
                assert hidden is not None
                state = self.draft.read_target(hidden[place - 1])
            else:
                assert own is not None
                state = own
            embedded = self.target.get_input_embeddings()(torch.tensor([[text[place]]]))
            out, past = self.draft(
                embedded, state.view(1, 1, -1), torch.tensor([place]), None, past
            )
            own = out[0, 0]
        assert own is not None
        logits = F.linear(
            self.draft.head_input(own), self.target.get_output_embeddings().weight.detach()
        )
        proposed = {*self.draft.token_ids.tolist(), *text[:committed]}
        absent = [token for token in range(VOCABULARY) if token not in proposed]
        logits[absent] = -torch.inf
        return logits


def native_sizes(family: str = "llama") -> tuple[PreTrainedModel, HiddenDraft]:
    """A target and a draft as large as the kernels ask for."""
    target = tiny(family, vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4)
    return target, make_draft(hidden_size=64)


def eager_walk(draft: HiddenDraft, ends: Ends) -> Drafter:
    return HiddenDrafter(EagerDraft(draft, ends), VOCABULARY)


def native_walk(draft: HiddenDraft, ends: Ends) -> Drafter:
    return NativeDrafter(NativeDraft(draft, ends, 512, exact=True), VOCABULARY)


WALKS = [
    eager_walk,
    pytest.param(native_walk, marks=needs_a_compiler),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_walk_over_any_family_gives_what_reading_anew_gives(family: str) -> None:
    walk_at_random(tiny(family, vocab_size=VOCABULARY), make_draft(), eager_walk)


@pytest.mark.parametrize("walk", WALKS)
def test_any_walk_gives_what_reading_anew_gives(walk: Any) -> None:
    walk_at_random(*native_sizes(), walk)


@torch.no_grad()
def walk_at_random(target: PreTrainedModel, draft: HiddenDraft, walk: Any) -> None:
    """Random prompts, trees, kept paths and tokens accepted beyond the draft's cache."""
    ends = Ends.of(target, draft.token_ids)
    generator = torch.Generator().manual_seed(1)

    def pick(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    compared = rare = 0
    for _ in range(6):
        text = [pick(VOCABULARY) for _ in range(1 + pick(5))]
        reference = Reference(target, draft, begins_empty=len(text) == 1)
        drafter = walk(draft, ends)
        known, pending = len(text) - 1, 1
        drafter.prefill(torch.tensor(text[:-1], dtype=torch.int64), reference.hidden(text[:-1]))

        for _ in range(4):
            before = text[: len(text) - pending]
            nodes = [text[len(before) : len(before) + i + 1] for i in range(pending)]
            given = [drafter.next_logits(torch.tensor(text[-pending:])).dense()]
            leaves = [pending - 1]
            for _ in range(pick(3)):
                parents = [leaves[pick(len(leaves))] for _ in range(1 + pick(3))]
                tokens = [pick(VOCABULARY) for _ in parents]
                below = drafter.next_logits(torch.tensor(tokens), torch.tensor(parents))
                given.append(below.dense())
                leaves = list(range(len(nodes), len(nodes) + len(tokens)))
                nodes += [
                    [*nodes[parent], token] for parent, token in zip(parents, tokens, strict=True)
                ]
            for node, logits in zip(nodes, torch.cat(given), strict=True):
                there = [*before, *node]
                expected = reference.logits_after(there, min(known, len(there) - 1), len(before))
                torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
                rare += int((logits[1::2] > -torch.inf).sum())
                compared += 1
            kept = nodes[pending - 1 + pick(len(nodes) - pending + 1)]
            path = [nodes.index(kept[: i + 1]) for i in range(len(kept))]
            further = [pick(VOCABULARY) for _ in range(pick(2))]
            text = [*before, *kept, *further]
            hidden = reference.hidden(text)
            assert hidden is not None
            linear = path == list(range(len(path)))
            drafter.keep(len(path) if linear and pick(2) else torch.tensor(path), hidden[known:])
            known, pending = len(text), 1 + len(further)
            text.append(pick(VOCABULARY))
    assert compared > 60
    assert rare > 60


@needs_a_compiler
@pytest.mark.parametrize("weights", [(), (0.1, 0.4, 0.7), (0.5,)], ids=["plain", "copies", "one"])
@pytest.mark.parametrize("tokens", [5, VOCABULARY])
def test_the_kernels_walk_as_the_drafter_on_any_device(
    weights: tuple[float, ...], tokens: int
) -> None:
    target, _ = native_sizes()
    draft = make_draft(hidden_size=64, copy_weights=weights)
    ends = Ends.of(target, draft.token_ids)
    native = NativeDraft(draft, ends, 512, exact=True)

    def drafters() -> tuple[Drafter, Drafter]:
        plain = HiddenDrafter(EagerDraft(draft, ends), VOCABULARY)
        copying = CopyDrafter(plain, weights) if weights else plain
        return copying, NativeDrafter(native, VOCABULARY)

    walk_side_by_side(target, drafters, tokens_below=tokens)


@pytest.mark.parametrize("walk", WALKS)
@torch.no_grad()
def test_a_chain_beyond_the_target_is_read_one_by_one(walk: Any) -> None:
    target, draft = native_sizes()
    reference = Reference(target, draft, begins_empty=False)
    drafter = walk(draft, Ends.of(target, draft.token_ids))
    drafter.prefill(torch.tensor([1, 2]), reference.hidden([1, 2]))
    logits = drafter.next_logits(torch.tensor([3, 4, 5])).dense()
    for end in range(3):
        expected = reference.logits_after([1, 2, 3, 4, 5][: 3 + end], 2, 2)
        torch.testing.assert_close(logits[end], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("walk", WALKS)
@torch.no_grad()
def test_a_long_prompt_is_read_in_chunks(walk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = native_sizes()
    text = [(7 * i) % VOCABULARY for i in range(30)]
    hidden = Reference(target, draft, False).hidden(text)

    def logits() -> Tensor:
        drafter = walk(draft, Ends.of(target, draft.token_ids))
        drafter.prefill(torch.tensor(text), hidden)
        return drafter.next_logits(torch.tensor([3])).dense()[:, ::2]

    whole = logits()
    monkeypatch.setattr("mtad.hidden_drafter.PREFILL_CHUNK_TOKENS", 7)
    monkeypatch.setattr("mtad.native.drafter._CHUNK_TOKENS", 7)
    torch.testing.assert_close(logits(), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("walk", WALKS)
def test_states_that_are_missing_are_asked_for(walk: Any) -> None:
    target, draft = native_sizes()
    drafter = walk(draft, Ends.of(target, draft.token_ids))
    with pytest.raises(PairError, match="was given none.*target_layers to prefill and keep"):
        drafter.prefill(torch.tensor([1, 2]), None)


# Whole runs.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["speculative", "specinfer"])
def test_lossless_methods_stay_lossless(family: str, method: str) -> None:
    pair = ModelPair(tiny(family, vocab_size=VOCABULARY), make_draft())
    config = mtad.DecodeConfig(max_new_tokens=24, temperature=0.0)
    ours = mtad.run(method, pair, prompt_ids=[1, 2, 3], config=config)
    plain = mtad.run("autoregressive", pair, prompt_ids=[1, 2, 3], config=config)
    assert ours.token_ids == plain.token_ids


@pytest.mark.parametrize("method", ["speculative", "typical", "bild", "mtad", "mtad_tree"])
@pytest.mark.parametrize("prompt", [[5], [1, 2, 3, 4]])
@torch.no_grad()
def test_every_method_drafts_what_the_reference_would(method: str, prompt: list[int]) -> None:
    """The log q of a trace are those of reading every prefix anew."""
    target, draft = tiny(vocab_size=VOCABULARY), make_draft()
    pair = ModelPair(target, draft)
    config = mtad.DecodeConfig(
        max_new_tokens=20, temperature=1.0, top_k=0, top_p=1.0, fallback_threshold=0.01
    )
    trace = mtad.run(method, pair, prompt_ids=prompt, config=config)
    reference = Reference(target, draft, begins_empty=len(prompt) == 1)
    text = list(prompt)
    for step in trace.steps:
        nodes = step.decision.tree
        paths: list[list[int]] = []
        for node, parent in enumerate(nodes.parents):
            above = paths[parent] if parent >= 0 else []
            logits = reference.logits_after([*text, *above], len(text) - 1, len(text) - 1)
            expected = logits.log_softmax(-1)[nodes.token_ids[node]]
            assert nodes.draft_logprobs[node] == pytest.approx(float(expected), abs=1e-4)
            paths.append([*above, nodes.token_ids[node]])
        text += step.decision.emitted
    assert any(step.decision.tree.token_ids for step in trace.steps)


@needs_a_compiler
@pytest.mark.parametrize("method", ["speculative", "typical", "mtad", "mtad_tree"])
@pytest.mark.parametrize("weights", [(), (0.1, 0.4, 0.7)], ids=["plain", "copies"])
def test_a_block_at_once_is_the_block_step_by_step(
    method: str, weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same decisions to the bit, with ends of sequences and rare tokens in the blocks."""
    sizes = {"vocab_size": 48, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    target = tiny(**sizes, eos_token_id=[7, 8, 30])
    draft = make_draft(hidden_size=64, copy_weights=weights)
    pair = ModelPair(target, draft, engine="native-float32")
    blocks = 0

    def counted(name: str) -> None:
        plain = getattr(NativeDrafter, name)

        def draft_block(self: NativeDrafter, *arguments: Any) -> Any:
            nonlocal blocks
            blocks += 1
            return plain(self, *arguments)

        monkeypatch.setattr(NativeDrafter, name, draft_block)

    counted("draft_line")
    counted("draft_beams")
    passes = accepted = 0
    early = {"end": 0, "floor": 0}
    for seed in range(16):
        config = mtad.DecodeConfig(
            max_new_tokens=40,
            top_k=9,
            top_p=0.95,
            temperature=1.5,
            seed=seed,
            accept_threshold=0.05,
        )
        config = dataclasses.replace(config, num_draft_tokens=1 + seed % 6, beam_width=1 + seed % 6)
        if seed > 5:
            costs = tuple(1.0 + 0.01 * length for length in range(9))
            config = dataclasses.replace(config, num_draft_tokens="auto", iteration_costs=costs)
        at_once = mtad.run(method, pair, prompt_ids=[1, 3, 5], config=config)
        with monkeypatch.context() as patched:
            patched.setattr(RecordedDrafter, "draft_line", lambda *_: None)
            patched.setattr(RecordedDrafter, "draft_beams", lambda *_: None)
            before = blocks
            by_step = mtad.run(method, pair, prompt_ids=[1, 3, 5], config=config)
            assert blocks == before
        assert at_once.decisions() == by_step.decisions()
        passes += at_once.summary.target_passes
        accepted += sum(len(step.decision.path) for step in at_once.steps)
        for step in at_once.steps[:-8] if seed > 5 else ():
            tree = step.decision.tree
            if 0 < tree.depth < 8:
                early["end" if tree.token_ids[-1] in (7, 8, 30) else "floor"] += 1
    assert blocks > passes / 2
    assert all(early.values()) or method == "mtad_tree"
    assert accepted > 5


@needs_a_compiler
def test_tokens_of_a_head_may_be_a_strided_tensor() -> None:
    sizes = {"vocab_size": 48, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    target, config = tiny(**sizes), mtad.DecodeConfig(max_new_tokens=20, top_k=3, seed=1)
    draft = make_draft(hidden_size=64)
    draft.token_ids = torch.arange(48)[::3]
    pair = ModelPair(target, draft, engine="native-float32")
    trace = mtad.run("speculative", pair, prompt_ids=[0, 3], config=config)
    rare = {token for step in trace.steps for token in step.decision.tree.token_ids} - {0}
    said = {0, 3, *trace.token_ids}
    assert rare and all(token % 3 == 0 or token in said for token in rare)


@needs_a_compiler
def test_a_draft_of_a_larger_vocabulary_is_asked_step_by_step() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    large, draft = tiny(vocab_size=48, **sizes), make_draft(hidden_size=64)
    own = NativeDrafter(NativeDraft(draft, Ends.of(large, draft.token_ids), 512), 48)
    pair = ModelPair(tiny(vocab_size=32, **sizes), own)
    for method in ("speculative", "mtad"):
        trace = mtad.run(method, pair, prompt_ids=[1, 2], config=mtad.DecodeConfig(top_k=3))
        nodes = [token for step in trace.steps for token in step.decision.tree.token_ids]
        assert nodes and max(nodes) < 32


@needs_a_compiler
@pytest.mark.parametrize("path", [[2], [0, -1], [0, 1, 2]])
def test_a_path_that_names_no_node_is_refused_and_changes_nothing(path: list[int]) -> None:
    target, draft = native_sizes()
    drafter = NativeDrafter(NativeDraft(draft, Ends.of(target, draft.token_ids), 512), VOCABULARY)
    hidden = torch.randn(3, draft.config.hidden_size * len(draft.config.target_layers))
    drafter.prefill(torch.tensor([3, 4, 5]), hidden)
    drafter.next_logits(torch.tensor([6, 7]))
    for _ in range(2):
        with pytest.raises(IndexError, match="names a node that is none of 2"):
            drafter.keep(torch.tensor(path), hidden[:2])
    drafter.keep(torch.tensor([0, 1], dtype=torch.int32), hidden[:2])
    assert drafter.save() is not None


@needs_a_compiler
def test_more_choices_than_the_kernels_hold_are_drafted_step_by_step() -> None:
    target, draft = native_sizes()
    drafter = NativeDrafter(NativeDraft(draft, Ends.of(target, draft.token_ids), 512), VOCABULARY)
    config = mtad.DecodeConfig(top_k=513)
    logits = Logits(torch.zeros(1, 600))

    never, none = Uniforms(torch.Generator()), torch.empty(0, dtype=torch.int64)
    assert drafter.draft_line(logits, config, torch.zeros(3), none) is None
    assert drafter.draft_beams(logits, config, 3, never, none) is None
    assert never._used == 0


def test_a_pair_says_what_its_draft_weighs() -> None:
    draft = make_draft()
    info = ModelPair(tiny(vocab_size=VOCABULARY), draft).draft_info
    assert info is not None and info.name == "hidden-state draft of LlamaForCausalLM"
    own = sum(weight.numel() for weight in draft.parameters())
    assert info.parameters == own
    assert info.weight_bytes == 4 * (own + 20 * 16)  # 20 rows of the target's head


# The file.


def test_a_file_gives_back_the_draft_to_the_precision_of_8_bits(tmp_path: Path) -> None:
    target, draft = tiny(vocab_size=VOCABULARY), make_draft()
    file = save_draft(draft, tmp_path / "made", "tiny", "a note")
    assert save_draft(draft, tmp_path / "again", "tiny", "a note").read_bytes() == file.read_bytes()
    read = load_draft(tmp_path / "made", target, CPU, torch.float32)
    assert read.config == draft.config and torch.equal(read.token_ids, draft.token_ids)
    assert not read.training and not any(weight.requires_grad for weight in read.parameters())
    for (name, ours), theirs in zip(draft.named_parameters(), read.parameters(), strict=True):
        limit = ours.abs().amax(-1, keepdim=True) / 254 + 1e-7 if ours.dim() == 2 else 0.0
        assert ((ours - theirs).abs() <= limit).all(), name
    assert [path.name for path in (tmp_path / "made").iterdir()] == [FILE_NAME]
    stored = load_file(file)
    assert not any("embed" in name or "head" in name for name in stored)
    assert all(t.dtype == torch.int8 for n, t in stored.items() if t.dim() == 2)


def test_a_file_of_4_bits_gives_back_what_it_was_rounded_to(tmp_path: Path) -> None:
    """And the kernels take its matrices for what they are."""
    shape = {"hidden_size": 64, "mlp_size": 96, "weight_bits": 4}
    target, draft = tiny(vocab_size=VOCABULARY, hidden_size=64), make_draft(**shape)
    with torch.no_grad():
        draft.join.weight[0, :32] = 0.25  # a group of a single value
    file = save_draft(draft, tmp_path, "tiny")
    read = load_draft(tmp_path, target, CPU, torch.float32)
    assert read.config.weight_bits == 4
    for (name, ours), theirs in zip(draft.named_parameters(), read.parameters(), strict=True):
        if ours.dim() == 1:
            assert torch.equal(ours, theirs)
            continue
        assert torch.equal(FourBits.nearest(ours).values(), theirs), name
        groups = ours.view(ours.shape[0], -1, 32)
        step = (groups.amax(-1) - groups.amin(-1)) / 15
        missed = (ours - theirs).abs().view_as(groups).amax(-1)
        assert (missed <= 0.51 * step + 1e-4).all(), name
        assert pack(theirs).kind == CODES4, name
        assert torch.equal(FourBits.nearest(theirs).values(), theirs), "rounded twice"
    stored = load_file(file)
    assert stored["join.weight"].dtype == torch.uint8 and stored["join.weight"].shape == (64, 64)
    about = {"config": dataclasses.asdict(draft.config)}
    low = stored["join.weight.low"]
    large = {name: torch.full_like(low, 65504) for name in ("join.weight.low", "join.weight.step")}
    save_file(stored | large, file, {"mtad hidden draft 1": json.dumps(about)})
    with pytest.raises(PairError, match="join.weight has values that are not finite in float16"):
        load_draft(tmp_path, target, CPU, torch.float16)
    del stored["join.weight.low"]
    save_file(stored, file, {"mtad hidden draft 1": json.dumps(about)})
    with pytest.raises(PairError, match=r"weight.low is absent, but must be float16 of .64, 4"):
        load_draft(tmp_path, target, CPU, torch.float32)


def test_4_bits_are_for_widths_that_are_groups_of_32() -> None:
    with pytest.raises(ConfigError, match=r"weight_bits is 4, but must be 8 where .* of 32"):
        make_draft(hidden_size=48, weight_bits=4)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["OSError", "SafetensorError"],
)
def test_a_save_that_fails_leaves_the_old_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_draft(make_draft(), tmp_path, "tiny").read_bytes()

    def full(*args: Any) -> None:
        raise error

    monkeypatch.setattr("mtad.draft_files.save_file", full)
    with pytest.raises(PairError, match=r"draft\.safetensors cannot be written: .*No space left"):
        save_draft(make_draft(seed=1), tmp_path, "tiny")
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_what_is_no_draft_is_refused(tmp_path: Path) -> None:
    target = tiny(vocab_size=VOCABULARY)

    def refused() -> str:
        with pytest.raises(PairError) as caught:
            load_draft(tmp_path, target, CPU, torch.float32)
        return str(caught.value)

    assert "There is no draft.safetensors" in refused() and "mtad distill" in refused()
    file = tmp_path / FILE_NAME
    file.write_bytes(b"not safetensors at all")
    assert "cannot be read as a draft: SafetensorError" in refused()
    save_file({"weight": torch.zeros(2)}, file)
    assert "its header has no 'mtad hidden draft 1'" in refused()
    whole = save_draft(make_draft(), tmp_path, "tiny").read_bytes()
    file.write_bytes(whole[:-100])
    assert "cannot be read as a draft" in refused()
    tensors = load_file(save_draft(make_draft(), tmp_path, "tiny"))
    del tensors["join.weight"]
    config = dataclasses.asdict(make_draft().config)
    save_file(tensors, file, {"mtad hidden draft 1": json.dumps({"config": config})})
    assert "join.weight" in refused()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "16"),
        ("hidden_size", 2**62),
        ("num_layers", 0),
        ("num_layers", 17),
        ("num_layers", True),
        ("num_layers", 1.0),
        ("num_heads", 0),
        ("num_heads", 3),
        ("num_heads", 16),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("mlp_size", 0),
        ("target_layers", []),
        ("target_layers", [2, 1]),
        ("target_layers", [2, 2]),
        ("target_layers", [-1, 2]),
        ("target_layers", [1.0]),
        ("target_layers", 5),
        ("rope_theta", float("nan")),
        ("rope_theta", 0),
        ("rope_theta", 10**400),
        ("rope_theta", "a"),
        ("copy_weights", [1.0]),
        ("copy_weights", [-0.1]),
        ("copy_weights", [float("nan")]),
        ("copy_weights", ["0"]),
        ("copy_weights", [0.1] * 17),
        ("copy_weights", "00"),
        ("weight_bits", 5),
        ("weight_bits", 8.0),
        ("weight_bits", 4),
    ],
)
def test_a_shape_that_no_draft_has_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{field} is .*, but must be "):
        dataclasses.replace(make_draft().config, **{field: value})
    tensors = load_file(save_draft(make_draft(), tmp_path, "tiny"))
    config = dataclasses.asdict(make_draft().config) | {field: value}
    save_file(
        tensors, tmp_path / FILE_NAME, {"mtad hidden draft 1": json.dumps({"config": config})}
    )
    with pytest.raises(
        PairError, match=f"cannot be read as a draft: ConfigError: {field} is .*[^.]\\. Copy"
    ):
        load_draft(tmp_path, tiny(vocab_size=VOCABULARY), CPU, torch.float32)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm", torch.full((16,), torch.nan), "norm has values that are not finite"),
        ("norm", torch.ones(16).cfloat(), "norm is complex64 of .16., but must be float32"),
        ("norm", torch.ones(15), "norm is float32 of .15."),
        ("join.weight.scale", None, "join.weight.scale is absent"),
        ("join.weight.scale", torch.ones(1), "join.weight.scale is float32 of .1."),
        ("join.weight.scale", torch.tensor(1.0), "join.weight.scale is float32 of .."),
        ("join.weight.scale", torch.full((16,), torch.inf), "join.weight.scale has values"),
        ("stray.scale", torch.ones(1), "stray.scale is float32 of .1., but must be absent"),
        ("token_ids", None, "token_ids is absent"),
        ("token_ids", torch.tensor([1.5, 2.5]), "token_ids is float32"),
        ("token_ids.scale", torch.ones(1), "token_ids.scale is float32"),
        ("token_ids", torch.zeros(0, dtype=torch.int32), "token_ids are int64 of .0."),
        ("token_ids", torch.zeros(2, 2, dtype=torch.int32), "must be one row"),
        ("token_ids", torch.tensor(3, dtype=torch.int32), "must be one row"),
        ("token_ids", torch.tensor([1, 1, 2], dtype=torch.int32), "ascending"),
        ("token_ids", torch.tensor([2, 1], dtype=torch.int32), "ascending"),
        ("token_ids", torch.tensor([-2, 1], dtype=torch.int32), "proposes token -2"),
        ("token_ids", torch.tensor([1, 40], dtype=torch.int32), "token 40, but .* has 40, from 0"),
    ],
)
def test_a_file_with_a_wrong_tensor_is_refused(
    name: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    file = save_draft(make_draft(), tmp_path, "tiny")
    tensors = load_file(file)
    tensors.pop(name, None)
    tensors |= {} if tensor is None else {name: tensor}
    about = {"config": dataclasses.asdict(make_draft().config)}
    save_file(tensors, file, {"mtad hidden draft 1": json.dumps(about)})
    with pytest.raises(PairError, match=message):
        load_draft(tmp_path, tiny(vocab_size=VOCABULARY), CPU, torch.float32)


@pytest.mark.parametrize(
    "header", ["", "null", "[]", '{"config": []}', '{"config": {}}', "[" * 9000, "1" * 6000]
)
def test_a_file_with_a_wrong_header_is_refused(header: str, tmp_path: Path) -> None:
    tensors = load_file(save_draft(make_draft(), tmp_path, "tiny"))
    save_file(tensors, tmp_path / FILE_NAME, {"mtad hidden draft 1": header})
    with pytest.raises(PairError, match="cannot be read as a draft"):
        load_draft(tmp_path, tiny(vocab_size=VOCABULARY), CPU, torch.float32)


def test_a_header_that_is_too_long_is_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_draft(make_draft(), tmp_path, "tiny").read_bytes()
    with pytest.raises(PairError, match="at most 10,000. Shorten the note"):
        save_draft(make_draft(seed=1), tmp_path, "tiny", "n" * 10_000)
    assert (tmp_path / FILE_NAME).read_bytes() == before
    monkeypatch.setattr("mtad.draft_files._MAX_HEADER_CHARACTERS", 100)
    with pytest.raises(PairError, match="its header is too long"):
        load_draft(tmp_path, tiny(vocab_size=VOCABULARY), CPU, torch.float32)


def test_a_draft_in_another_dtype_than_the_target_is_refused() -> None:
    target = tiny(vocab_size=VOCABULARY)
    with pytest.raises(PairError, match="target is in float32, the draft in bfloat16. Move"):
        ModelPair(target, make_draft().to(torch.bfloat16))
    ModelPair(target.to(torch.bfloat16), make_draft().to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_token_ids_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    draft = HiddenDraft(make_draft().config, torch.arange(4, dtype=dtype))
    with pytest.raises(PairError, match="must be one row of at least one int64"):
        ModelPair(tiny(vocab_size=VOCABULARY), draft)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (tiny(vocab_size=VOCABULARY, hidden_size=32), "hidden states of 16, the target of 32"),
        (tiny(vocab_size=VOCABULARY, num_hidden_layers=1), "reads layer 2 .* which has 1"),
        (tiny(vocab_size=32), "proposes token 38, but the target's vocabulary has 32"),
    ],
)
def test_a_draft_of_another_target_is_refused(target: Any, message: str) -> None:
    with pytest.raises(PairError, match=message):
        ModelPair(target, make_draft())
