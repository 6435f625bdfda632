"""Pairs: what is refused and why, what a pair says of itself, presets, loading, the real one."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import Whitespace

from mtad import inspection, loading, pairs
from mtad.draft_files import FILE_NAME, load_draft
from mtad.errors import ConfigError, PairError
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.pairs import ModelPair, as_drafter, load_pair, load_preset
from mtad.presets import Preset, find_preset, presets
from mtad.trace import ModelInfo
from tests.models import FAMILIES, tiny

ROOT = Path(__file__).resolve().parents[1]


def make_tokenizer(words: list[str], eos: str | None = None) -> Any:
    """A tokenizer whose words have the ids 0, 1, 2, …"""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=words[0], eos_token=eos
    )


class ArrayDrafter:
    """A draft that is no model."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.target_layers: tuple[int, ...] = ()

    def prefill(self, token_ids: torch.Tensor, target_hidden: torch.Tensor | None) -> None:
        pass

    def next_logits(
        self, token_ids: torch.Tensor, parents: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.zeros(len(token_ids), self.vocab_size)

    def keep(self, path: torch.Tensor | int, target_hidden: torch.Tensor | None = None) -> None:
        pass


# What a pair accepts and says of itself.


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_of_every_family_are_pairs(family: str) -> None:
    pair = ModelPair(tiny(family), tiny(family, seed=1))
    assert pair.vocab_size == 32 and pair.context_length == 512
    assert pair.eos_token_ids == ()
    assert pair.device == torch.device("cpu") and pair.dtype == torch.float32
    assert pair.target_info.name == type(pair.target).__name__
    assert pair.target_info.parameters == pair.target.num_parameters()


def test_tiny_models_are_seeded_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_models_are_put_into_eval_mode() -> None:
    model = tiny("gpt2").train()
    ModelPair(model, model)
    assert not any(module.training for module in model.modules())


def test_common_vocabulary_and_context_are_the_smaller_ones() -> None:
    pair = ModelPair(tiny(vocab_size=40), tiny(vocab_size=36, max_position_embeddings=64, seed=1))
    assert pair.vocab_size == 36 and pair.context_length == 64
    assert ModelPair(pair.target).context_length == 512


def test_drafter_object_and_no_draft() -> None:
    pair = ModelPair(tiny(vocab_size=40), ArrayDrafter(36))
    assert pair.vocab_size == 36
    assert pair.draft_info == ModelInfo(name="ArrayDrafter")
    drafter = ArrayDrafter(40)
    drafter.info = ModelInfo(name="copy", parameters=3)  # type: ignore[attr-defined]
    drafter.context_length = 100  # type: ignore[attr-defined]
    pair = ModelPair(tiny(vocab_size=40), drafter)
    assert pair.draft_info == ModelInfo(name="copy", parameters=3)
    assert pair.context_length == 100
    assert ModelPair(tiny()).draft_info is None


@pytest.mark.parametrize(
    ("generation", "config", "eos", "expected"),
    [
        ([3, 4], 9, "e", (3, 4, 5)),
        (5, None, "e", (5,)),
        (None, 7, None, (7,)),
        (None, None, "e", (5,)),
    ],
)
def test_eos_tokens_of_generation_config_and_tokenizer(
    generation: Any, config: int | None, eos: str | None, expected: tuple[int, ...]
) -> None:
    model = tiny()
    model.generation_config.eos_token_id = generation
    model.config.eos_token_id = config
    pair = ModelPair(model, tokenizer=make_tokenizer(list("uabcde"), eos))
    assert pair.eos_token_ids == expected


def test_weight_bytes_leave_out_what_is_only_looked_up() -> None:
    untied = tiny(tie_word_embeddings=False)
    tied = tiny(tie_word_embeddings=True)
    rows = 4 * 32 * 16
    every = 4 * sum(p.numel() for p in untied.parameters())
    assert inspection.weight_bytes(untied) == every - rows
    assert inspection.weight_bytes(tied) == every - rows, "the tied matrix is read once"
    opt = tiny("opt")
    positions = opt.model.decoder.embed_positions.weight
    assert inspection.weight_bytes(opt) == 4 * (opt.num_parameters() - positions.numel())


def test_names_of_local_folders_do_not_leak_paths(tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "my-model"
    tiny().save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert ModelPair(model).target_info.name == "my-model"


# What a pair refuses.


def test_refuses_encoder_decoder() -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(PairError, match="target T5ForConditionalGeneration is an encoder-decoder"):
        ModelPair(model)
    with pytest.raises(PairError, match="draft T5ForConditionalGeneration is an encoder-decoder"):
        ModelPair(tiny(), model)


def test_refuses_recurrent_models() -> None:
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2
        )
    )
    with pytest.raises(PairError, match="MambaForCausalLM has .*cannot roll back"):
        ModelPair(mamba, tiny())


def test_refuses_hybrid_models() -> None:
    model = tiny("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(PairError, match="layers of kind linear_attention.*cannot roll back"):
        ModelPair(model, tiny())


def test_refuses_models_without_position_ids() -> None:
    config = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(PairError, match="BloomForCausalLM takes no position_ids"):
        ModelPair(transformers.BloomForCausalLM(config))


def test_refuses_models_without_a_head() -> None:
    with pytest.raises(PairError, match="LlamaModel has no language-model head.*AutoModelFor"):
        ModelPair(tiny().model)


@pytest.mark.parametrize("thing", ["gpt2", 3, torch.nn.Linear(2, 2)])
def test_refuses_what_is_no_model(thing: Any) -> None:
    with pytest.raises(PairError, match="must be a Hugging Face causal language model"):
        ModelPair(thing)
    with pytest.raises(PairError, match="The draft is a .*prefill, next_logits, keep"):
        ModelPair(tiny(), thing)


def test_refuses_models_without_weights() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny().config)
    with pytest.raises(PairError, match="has no weights"):
        ModelPair(model)


@pytest.mark.parametrize(
    ("target", "draft", "fits"), [(32, 288, True), (32, 289, False), (50_000, 50_500, True)]
)
def test_vocabulary_sizes_may_differ_by_padding(target: int, draft: int, fits: bool) -> None:
    if fits:
        inspection.check_vocabularies(target, draft)
        inspection.check_vocabularies(draft, target)
        return
    with pytest.raises(PairError, match="vocabulary of 32 tokens.*289.*at most 256"):
        inspection.check_vocabularies(target, draft)
    with pytest.raises(PairError, match="vocabulary of 32 tokens"):
        ModelPair(tiny(), ArrayDrafter(draft))


def test_refuses_a_tokenizer_that_exceeds_the_common_vocabulary() -> None:
    words = [f"w{i}" for i in range(34)]
    with pytest.raises(PairError, match="ids up to 33.*only 32"):
        ModelPair(tiny(vocab_size=40), tiny(vocab_size=32), tokenizer=make_tokenizer(words))
    pair = ModelPair(tiny(vocab_size=40), tiny(vocab_size=34), tokenizer=make_tokenizer(words))
    assert pair.vocab_size == 34


def test_refuses_tokenizers_that_disagree() -> None:
    ours, theirs = make_tokenizer(list("uabcde")), make_tokenizer(list("uabdce"))
    with pytest.raises(PairError, match="token 3 is 'c' for the target and 'd' for the draft"):
        ModelPair(tiny(), tiny(), tokenizer=ours, draft_tokenizer=theirs)
    longer = make_tokenizer(list("uabcdefg"))
    assert ModelPair(tiny(), tiny(), tokenizer=ours, draft_tokenizer=longer).vocab_size == 32


def test_refuses_unknown_engine() -> None:
    with pytest.raises(ConfigError, match="engine is 'warp'.*\"eager\""):
        ModelPair(tiny(), engine="warp")


# Presets, devices, dtypes.


def test_presets_are_complete_and_need_no_torch() -> None:
    ids = [preset.id for preset in presets()]
    assert ids[0] == "smollm2" and len(set(ids)) == len(ids)
    for preset in presets():
        assert preset.title and preset.license and preset.target
        assert preset.embedded == (preset.draft == "")
        assert preset.memory_bytes("float32") == pytest.approx(2 * preset.memory_bytes(), rel=1e-6)
        assert preset.memory_bytes() > 2 * preset.target_parameters
    code = "import sys, mtad.presets; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0


def test_parameter_counts_of_presets_are_right_for_known_shapes() -> None:
    shapes = {
        "JackFram/llama-68m": dict(
            vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=2
        ),
        "meta-llama/Llama-2-13b-hf": dict(
            vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40
        ),
    }
    counts = {}
    for name, shape in shapes.items():
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        counts[name] = model.num_parameters()
    preset = find_preset("llama-2-13b")
    assert (preset.target_parameters, preset.draft_parameters) == (
        counts[preset.target],
        counts[preset.draft],
    )


def test_unknown_preset_is_answered_with_a_suggestion_and_the_list() -> None:
    with pytest.raises(PairError, match='Did you mean "opt-13b"') as caught:
        load_pair("opt13b")
    assert all(preset.id in str(caught.value) for preset in presets())
    for name in ("../../etc/passwd", "https://example.org/model", "gpt2", "", "SmolLM2\n"):
        with pytest.raises(PairError, match="There is no pair"):
            load_pair(name)


def test_device_is_checked() -> None:
    assert loading.resolve_device("cpu") == torch.device("cpu")
    assert loading.resolve_device("auto") == loading.resolve_device(None)
    for wrong in ("tpu", "cuda:x", "meta", ""):
        with pytest.raises(ConfigError, match='device is .*"cpu", "cuda"'):
            loading.resolve_device(wrong)
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=f'device is "{absent}", but torch sees'):
        loading.resolve_device(absent)


def test_dtype_is_checked() -> None:
    cpu = torch.device("cpu")
    assert loading.resolve_dtype(None, cpu) == torch.float32
    assert loading.resolve_dtype("bfloat16", cpu) == torch.bfloat16
    assert loading.resolve_dtype(torch.float16, cpu) == torch.float16
    for wrong in ("int8", "float64", "nonsense", torch.int64):
        with pytest.raises(ConfigError, match="dtype is .*float32, bfloat16, float16"):
            loading.resolve_dtype(wrong, cpu)


def test_the_engine_of_gpus_is_refused_on_another_device() -> None:
    said = 'engine is "cuda", but the device is cpu. Choose the device cuda, or another engine.'
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_pair("smollm2", device="cpu", engine="cuda")


def test_unknown_engine_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="engine is 'turbo'"):
        load_pair("opt-66b", engine="turbo")


# Loading from folders that stand for repositories.


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = make_tokenizer(list("uabcde"), "e")
    for name, size, seed in (("target", 40, 0), ("draft", 32, 1)):
        tiny(vocab_size=size, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return Preset(
        "local", "Local", str(folder / "target"), str(folder / "draft"), 10_000, 10_000, "none"
    )


def test_pair_of_two_repositories(preset: Preset) -> None:
    seen: list[tuple[str, int, int]] = []
    pair = load_preset(preset, device="cpu", progress=lambda *args: seen.append(args))
    assert pair.name == "local" and pair.engine == "eager"
    assert pair.vocab_size == 32 and pair.eos_token_ids == (5,)
    assert pair.dtype == torch.float32 and pair.draft.dtype == torch.float32
    assert pair.target_info.name == "target" and pair.draft_info is not None
    assert pair.draft_info.name == "draft"
    assert torch.equal(pair.target.lm_head.weight, tiny(vocab_size=40).lm_head.weight)
    assert seen == [("load", 0, 80_000), ("load", 40_000, 80_000), ("load", 80_000, 80_000)]


def test_dtype_reaches_both_models(preset: Preset) -> None:
    gc.freeze()
    pair = load_preset(preset, device="cpu", dtype="bfloat16")
    assert not gc.get_freeze_count()  # so that what an earlier pair has left can go
    assert pair.dtype == pair.draft.dtype == torch.bfloat16


def test_repository_with_other_tokens_is_refused(preset: Preset, tmp_path: Path) -> None:
    tiny(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer(list("ubacde"), "e").save_pretrained(tmp_path / "other")
    with pytest.raises(PairError, match="token 1 is 'a' for the target and 'b' for the draft"):
        load_preset(dataclasses.replace(preset, draft=str(tmp_path / "other")), device="cpu")


def test_code_of_a_repository_is_never_run(preset: Preset, tmp_path: Path) -> None:
    folder, mark = tmp_path / "evil", tmp_path / "ran"
    tiny().save_pretrained(folder)
    text = (folder / "config.json").read_text()
    auto = '"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},'
    text = text.replace("{", "{" + auto, 1).replace('"llama"', '"evil"')
    (folder / "config.json").write_text(text)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises(PairError, match="evil could not be loaded"):
        load_preset(dataclasses.replace(preset, target=str(folder)), device="cpu")
    assert not mark.exists()


def test_damaged_weights_are_an_error(preset: Preset, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    tiny().save_pretrained(folder)
    make_tokenizer(list("uabcde")).save_pretrained(folder)
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(PairError, match="damaged could not be loaded"):
        load_preset(dataclasses.replace(preset, target=str(folder)), device="cpu")


def test_too_little_memory_is_said_before_loading(
    preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = dataclasses.replace(preset, target_parameters=65_000_000_000, target="absent")
    monkeypatch.setattr(loading, "free_bytes", lambda device: 8_000_000_000)
    said = '"local" needs about 286.0 GB in float32, but cpu has 8.0 GB free'
    assert pairs.unavailable_reason(big, "cpu") == said
    assert pairs.unavailable_reason(preset, "cpu") is None
    with pytest.raises(PairError, match=said):
        load_preset(big, device="cpu")
    monkeypatch.setattr(loading, "free_bytes", lambda device: None)
    assert pairs.unavailable_reason(big, "cpu") is None


def test_free_memory_is_plausible() -> None:
    free = loading.free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError()])
def test_out_of_memory_while_loading(error: Exception) -> None:
    with (
        pytest.raises(PairError, match="org/model does not fit into the memory of cpu in float16"),
        loading.explained("org/model", torch.device("cpu"), torch.float16),
    ):
        raise error


# A stand-in for the hub: /gated answers as for a licence that was not accepted, all else as for
# a repository that does not exist. Then it is switched off.
HUB = """
import http.server, threading, os, sys
class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        gated = "/gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_GET
    do_POST = do_GET
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from mtad.errors import PairError
from mtad.pairs import load_preset
from mtad.presets import Preset
def attempt(name):
    try:
        load_preset(Preset("x", "X", name, name, 1000, 1000, "none"), device="cpu")
    except PairError as error:
        print(str(error).replace(chr(10), " "))
attempt("org/gated")
attempt("org/absent")
server.shutdown(); server.server_close()
attempt("org/gated")
"""


def test_gated_absent_and_unreachable_repositories(tmp_path: Path) -> None:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        env={**keep, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    gated, absent, offline = done.stdout.splitlines()
    assert "org/gated is gated" in gated and "hf auth login" in gated
    assert "has no org/absent" in absent
    assert "org/gated is not in the local cache" in offline and "hf download" in offline


# A draft made of the target's own layers.


# The embedded pair.


def test_real_pair_says_what_it_is(smollm2: ModelPair) -> None:
    assert smollm2.name == "smollm2" and smollm2.vocab_size == 49_152
    assert smollm2.context_length == 8192
    assert smollm2.target_info.name == "SmolLM2-135M-Instruct"
    assert smollm2.target_info.parameters == find_preset("smollm2").target_parameters
    assert "b179c9523d0e" in smollm2.target_info.revision
    assert smollm2.draft_info is not None and smollm2.draft_info.name == "smollm2-draft"
    assert smollm2.draft_info.weight_bytes < 0.16 * smollm2.target_info.weight_bytes


def test_real_tokenizer_has_template_and_end_and_plain_special_text(smollm2: ModelPair) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    assert smollm2.eos_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),) == (2,)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    typed = tokenizer.encode("<|im_end|>", add_special_tokens=False, split_special_tokens=True)
    assert 2 not in typed and tokenizer.decode(typed) == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [2]


def test_real_target_knows_something(smollm2: ModelPair) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = smollm2.target(ids.to(smollm2.device)).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"


@torch.no_grad()
def test_real_draft_overlaps_with_the_target(smollm2: ModelPair) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    text = (
        "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nThe sky is"
        " blue because the molecules of the air scatter blue light from the sun more than they"
        " scatter red light."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids[0].to(smollm2.device)
    draft = as_drafter(smollm2)
    hidden = CachedLM(smollm2.target).prefill(ids, draft.target_layers)
    assert hidden is not None
    draft.prefill(ids[:1], hidden[:1])
    draft.keep(0, hidden[1:-1])  # every token is read with the target's state before it
    p = smollm2.target(ids[None]).logits[0, 1:].float().softmax(-1)
    q = Logits.of(draft.next_logits(ids[1:])).dense().softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)[10:].mean().item()
    # A wrong layer, position or scale gives less than 0.1.
    assert 0.3 < overlap < 0.95


def test_real_draft_is_small_and_loads_fast(smollm2: ModelPair) -> None:
    file = pairs.SMOLLM2_DRAFT / FILE_NAME
    assert file.stat().st_size < 10_000_000
    start = time.perf_counter()
    load_draft(pairs.SMOLLM2_DRAFT, smollm2.target, smollm2.device, smollm2.dtype)
    assert time.perf_counter() - start < 1


def test_real_pair_loads_fast(smollm2: ModelPair) -> None:
    start = time.perf_counter()
    load_pair("smollm2", device="cpu")
    assert time.perf_counter() - start < 5
