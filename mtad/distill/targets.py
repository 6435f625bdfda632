"""The model that a draft is made for: loaded, recognised again, and compared with the recipe."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mtad import inspection, loading
from mtad.distill.recipe import Recipe
from mtad.distill.steps import Step, native_steps, torch_steps
from mtad.errors import ConfigError, PairError
from mtad.fetch import fetch, quiet
from mtad.hidden_draft import HiddenDraftConfig
from mtad.native import library
from mtad.native.llama import NativeLlama, unsupported_reason
from mtad.presets import find_preset, presets
from mtad.processor import cpu_flags, cpu_name
from mtad.wheel import Progress

# Values of each parameter that go into the digest: all layers count, and it takes no time.
_DIGEST_VALUES = 64
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True, eq=False)
class Target:
    """A model that writes, and that a draft is made for.

    Attributes:
        model: any decoder-only Hugging Face model.
        tokenizer: None for one that has none; it then writes plain streams of tokens.
        name: for the model card.
        license: of its weights, "" if unknown.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    name: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        inspection.check_model("target", self.model)
        head = self.model.get_output_embeddings().weight
        embedding = self.model.get_input_embeddings().weight
        if head.shape[1] != self.hidden_size or embedding.shape[1] != self.hidden_size:
            raise PairError(
                f"The target {type(self.model).__name__} projects its embeddings or its head from"
                f" another width than its hidden states' {self.hidden_size}, which a draft on its"
                " hidden states cannot follow. Choose another target."
            )
        self.model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it stands."""
        return inspection.device_of(self.model)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def num_layers(self) -> int:
        """Its layers; also the index of its last hidden state."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """V, columns of its logits."""
        return inspection.vocab_size(self.model)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(inspection.eos_token_ids(self.model, self.tokenizer))

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits: sizes, and some values of each weight, rounded to bfloat16."""
        values = [
            parameter.detach().flatten()[:_DIGEST_VALUES].bfloat16().cpu()
            for parameter in self.model.parameters()
        ]
        sizes = (self.vocab_size, self.hidden_size, self.num_layers)
        digest = hashlib.sha256(repr(sizes).encode())
        digest.update(torch.cat(values).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def native(self) -> NativeLlama | None:
        """It on the CPU's own kernels; None where they cannot run it."""
        if self.model.dtype != torch.float32 or unsupported_reason(self.model):
            return None
        return None if library.unavailable_reason() else NativeLlama(self.model)

    def steps(self, rows: int, capacity: int, target_layers: Sequence[int]) -> Step:
        """Passes that write `rows` texts of up to `capacity` tokens side by side."""
        if self.native is None:
            return torch_steps(self.model, capacity, target_layers)
        return native_steps(self.native, rows, capacity, target_layers)

    @torch.no_grad()
    def hidden_states(self, token_ids: Tensor, layers: Sequence[int]) -> Tensor:
        """[B, L] whole rows → [B, L, F·H], the states of these layers one after the other."""
        model = self.model.base_model
        states = model(token_ids.long(), use_cache=False, output_hidden_states=True).hidden_states
        return torch.cat([states[layer] for layer in layers], -1)

    def check(self, recipe: Recipe) -> None:
        """Compares the recipe's numbers with this model's.

        Raises:
            ConfigError: names the field, the value and the allowed range.
        """
        shape, writing = recipe.draft, recipe.writing
        if shape.target_layers[-1] != self.num_layers:
            raise ConfigError(
                f"draft.target_layers is {list(shape.target_layers)}, but must end with"
                f" {self.num_layers}, the last hidden state of {self.name or 'this target'}."
            )
        for name, value, limit, what in (
            ("draft.head_tokens", shape.head_tokens, self.vocab_size, "the target's vocabulary"),
            ("writing.top", writing.top, self.vocab_size, "the target's vocabulary"),
            (
                "writing.row_tokens",
                writing.row_tokens,
                inspection.context_length(self.model),
                "the target's context",
            ),
        ):
            if value > limit:
                raise ConfigError(f"{name} is {value}, but must be at most {limit}, {what}.")
        self.draft_config(recipe)  # which is checked when it is made

    def draft_config(self, recipe: Recipe) -> HiddenDraftConfig:
        """The recipe's shape, with heads and rotary base as in the target."""
        config = self.model.config.get_text_config()
        heads = int(config.num_attention_heads)
        if self.hidden_size % (2 * heads):
            raise PairError(
                f"The target's width {self.hidden_size} does not divide into {heads} heads of an"
                " even size, which the draft takes over. Choose another target."
            )
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope.get("full_attention") or rope  # some families keep one set a kind of layer
        return HiddenDraftConfig(
            hidden_size=self.hidden_size,
            target_layers=recipe.draft.target_layers,
            num_layers=recipe.draft.num_layers,
            num_heads=heads,
            num_key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            mlp_size=recipe.draft.mlp_size,
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
            copy_weights=recipe.draft.copy_weights,
            weight_bits=recipe.draft.weight_bits,
        )


def load_target(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    local: bool = False,
    progress: Progress | None = None,
) -> Target:
    """The target of a preset; with `local` also a folder or a repository of the hub.

    Raises:
        PairError, FetchError: it does not exist or cannot be loaded; the message says why.
    """
    if local and name not in {preset.id for preset in presets()}:
        if Path(name).is_dir() and not any((Path(name) / f).exists() for f in _TOKENIZER_FILES):
            with loading.explained(name, device, dtype), quiet():
                model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
            return Target(model, None, inspection.model_info(model).name)
        with quiet():
            loaded = loading.load_repository(name, device, dtype, spread=False)
        return Target(loaded.model, loaded.tokenizer, inspection.model_info(loaded.model).name)
    preset = find_preset(name)
    repository = fetch(progress=progress) if preset.embedded else preset.target
    with quiet():
        loaded = loading.load_repository(repository, device, dtype, spread=False)
    return Target(loaded.model, loaded.tokenizer, preset.target, preset.license)


def fast_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """What this device computes fastest in without loss worth mentioning, and why.

    On a CPU that is bfloat16 only where it has instructions for it: elsewhere it is emulated,
    and large batches are slower than in float32.
    """
    if device.type == "cuda":
        dtype = loading.resolve_dtype(None, device)
        return dtype, f"{torch.cuda.get_device_name(device)} computes in it"
    if device.type == "cpu":
        found = sorted({"amx_bf16", "avx512_bf16"} & cpu_flags())
        if found:
            return torch.bfloat16, f"this CPU has {found[0]}"
        return torch.float32, "no bfloat16 instructions known of this CPU"
    return torch.float32, f"bfloat16 is untested on {device.type}"


def writing_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """What a target is loaded in to write its text fast, and why.

    On a CPU with kernels of our own that is float32, from which they make 4 or 8 bits.
    """
    if device.type == "cpu" and library.unavailable_reason() is None:
        return torch.float32, f"a Llama writes through {library.description()}"
    return fast_dtype(device)


def hardware(device: torch.device) -> str:
    """One line for the model card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name() or device.type}, {torch.get_num_threads()} threads"
