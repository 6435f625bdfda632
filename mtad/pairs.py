"""Pairs of a target and a draft: made by hand, or loaded by the name of a preset.

A `ModelPair` is checked when it is made, so that a decoder can rely on it: both models are
decoder-only, their caches roll back, their vocabularies mean the same tokens, and they stand on
one device.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtad import inspection, loading
from mtad.copy_drafter import CopyDrafter
from mtad.cuda import llama as cuda_llama
from mtad.cuda.draft import CudaDraft
from mtad.cuda.drafter import CudaDrafter
from mtad.cuda.llama import CudaLlama
from mtad.draft import Drafter, LMDrafter
from mtad.draft_files import check_draft, load_draft
from mtad.errors import ConfigError, PairError
from mtad.fetch import SMOLLM2, fetch, quiet
from mtad.hidden_draft import Ends, HiddenDraft
from mtad.hidden_drafter import EagerDraft, HiddenDrafter, RunnableDraft
from mtad.lm import CachedLM
from mtad.native import library
from mtad.native.draft import NativeDraft, unsupported_draft
from mtad.native.drafter import NativeDrafter
from mtad.native.llama import NativeLlama, unsupported_reason
from mtad.presets import DTYPE_BYTES, Preset, find_preset, presets
from mtad.shipped import ASSETS
from mtad.trace import ModelInfo
from mtad.wheel import Progress

__all__ = [
    "ENGINES",
    "ModelPair",
    "as_drafter",
    "load_pair",
    "load_preset",
    "presets",
    "unavailable_reason",
]

# Engines that a pair can be run on. "native" has 4 or 8 bits a weight, "native-float32" all 32.
EAGER, NATIVE, NATIVE_FLOAT32, CUDA = ENGINES = ("eager", "native", "native-float32", "cuda")

# The embedded pair's draft, made by `python -m mtad distill`; see its card beside it.
SMOLLM2_DRAFT = ASSETS / "smollm2-draft"


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A target, a draft, and what they have in common.

    Both models are put into eval mode: with dropout the same seed would not give the same text.

    Attributes:
        target: a Hugging Face causal model.
        draft: another of the same vocabulary; or a `HiddenDraft` that was made for this target;
            or any `Drafter`; or None, for methods that run on the target alone.
        tokenizer: the target's; None for pairs that are run with `prompt_ids` only.
        name: of the pair.
        engine: how the models are run; one of `ENGINES`.
        draft_tokenizer: the draft's own tokenizer. It is only compared with the target's.
        target_name: shown instead of the name that the target was loaded under.
        target_revision: shown instead of the commit that the target was loaded from.
        target_note: what a reader must know of the target.
        draft_name: shown instead of the name that the draft was loaded under.
        draft_revision: shown instead of the commit that the draft was loaded from.
        draft_note: what a reader must know of the draft.
        notes: what a reader of any result of this pair must know.

    Raises:
        PairError: the models cannot work together; the message names the reason.
        ConfigError: there is no such engine.
    """

    target: PreTrainedModel
    draft: PreTrainedModel | HiddenDraft | Drafter | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    name: str = "custom"
    engine: str = "eager"
    draft_tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    target_name: str = ""
    target_revision: str = ""
    target_note: str = ""
    draft_name: str = ""
    draft_revision: str = ""
    draft_note: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_engine(self.engine)
        inspection.check_model("target", self.target)
        self.target.eval()
        if isinstance(self.draft, PreTrainedModel):
            inspection.check_model("draft", self.draft)
            self.draft.eval()
            self._check_device(inspection.device_of(self.draft))
        elif isinstance(self.draft, HiddenDraft):
            check_draft(self.draft, self.target)
            self.draft.eval()
            self._check_device(self.draft.norm.device)
            if self.draft.norm.dtype != self.dtype:
                raise PairError(
                    f"The target is in {loading.dtype_name(self.dtype)}, the draft in"
                    f" {loading.dtype_name(self.draft.norm.dtype)}. Move the draft to the target's"
                    " dtype: draft.to(target.dtype)."
                )
        elif self.draft is not None and not isinstance(self.draft, Drafter):
            raise PairError(
                f"The draft is a {type(self.draft).__name__}, but must be a Hugging Face causal"
                " language model, a HiddenDraft, an object with prefill, next_logits, keep,"
                " vocab_size and target_layers, or None."
            )
        if self.draft is not None:
            inspection.check_vocabularies(
                inspection.vocab_size(self.target), self._draft_vocab_size()
            )
        if self.engine != EAGER:
            reason = engine_reason(self, self.engine)
            if reason:
                raise PairError(f'{reason} Choose engine="{EAGER}".')
        if self.tokenizer is not None:
            inspection.check_tokenizer(self.tokenizer, self.vocab_size)
            if self.draft_tokenizer is not None:
                inspection.check_same_tokens(self.tokenizer, self.draft_tokenizer, self.vocab_size)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Size of the common vocabulary, to which both models' logits are cut."""
        sizes = [inspection.vocab_size(self.target)]
        if self.draft is not None:
            sizes.append(self._draft_vocab_size())
        return min(sizes)

    @functools.cached_property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together that both models can hold."""
        lengths = [inspection.context_length(self.target)]
        if isinstance(self.draft, PreTrainedModel):
            lengths.append(inspection.context_length(self.draft))
        own = getattr(self.draft, "context_length", None)
        if isinstance(own, int):
            lengths.append(own)
        return min(lengths)

    @functools.cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; empty if there are none."""
        return inspection.eos_token_ids(self.target, self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return inspection.device_of(self.target)

    @property
    def dtype(self) -> torch.dtype:
        """Of the target's weights."""
        dtype: torch.dtype = self.target.dtype
        return dtype

    @property
    def weights(self) -> str:
        """How the target's weights are held: "float32", "bfloat16", …, or "int4" or "int8"."""
        if isinstance(self.engine_target, NativeLlama):
            return self.engine_target.model.weights
        return loading.dtype_name(self.dtype)

    @functools.cached_property
    def engine_target(self) -> PreTrainedModel | NativeLlama | CudaLlama:
        """The target as the engine runs it."""
        return self._ready(self.target)

    @functools.cached_property
    def engine_draft(
        self,
    ) -> (
        PreTrainedModel
        | NativeLlama
        | CudaLlama
        | RunnableDraft
        | NativeDraft
        | CudaDraft
        | Drafter
        | None
    ):
        """The draft as the engine runs it."""
        if isinstance(self.draft, PreTrainedModel):
            return self._ready(self.draft)
        if isinstance(self.draft, HiddenDraft):
            positions = inspection.context_length(self.target)
            return ready_draft(self.draft, self.draft_ends, positions, self.engine)
        return self.draft

    def _ready(self, model: PreTrainedModel) -> PreTrainedModel | NativeLlama | CudaLlama:
        if self.engine == EAGER:
            return model
        if self.engine == CUDA:
            return CudaLlama(model)
        return NativeLlama(model, exact=self.engine == NATIVE_FLOAT32)

    @functools.cached_property
    def target_info(self) -> ModelInfo:
        """Name, revision, sizes and note of the target."""
        info = inspection.model_info(
            self.target, self.target_name, self.target_revision, self.target_note
        )
        if isinstance(self.engine_target, NativeLlama):
            info = dataclasses.replace(info, weight_bytes=self.engine_target.model.weight_bytes)
        return info

    @functools.cached_property
    def draft_info(self) -> ModelInfo | None:
        """The same of the draft; a `Drafter` may bring its own as `info`. None without a draft."""
        if self.draft is None:
            return None
        if isinstance(self.draft, PreTrainedModel):
            info = inspection.model_info(
                self.draft, self.draft_name, self.draft_revision, self.draft_note
            )
            if isinstance(self.engine_draft, NativeLlama):
                info = dataclasses.replace(info, weight_bytes=self.engine_draft.model.weight_bytes)
            return info
        if isinstance(self.draft, HiddenDraft):
            return self._hidden_draft_info(self.draft)
        own = getattr(self.draft, "info", None)
        if isinstance(own, ModelInfo):
            return own
        name = self.draft_name or type(self.draft).__name__
        return ModelInfo(name=name, revision=self.draft_revision, note=self.draft_note)

    @functools.cached_property
    def draft_ends(self) -> Ends:
        """The target's embedding and the rows of its head that a `HiddenDraft` needs."""
        assert isinstance(self.draft, HiddenDraft)
        return Ends.of(self.target, self.draft.token_ids)

    def _hidden_draft_info(self, draft: HiddenDraft) -> ModelInfo:
        """Its own layers, and in the bytes of a pass the rows of the target's head as well."""
        runnable = self.engine_draft
        assert isinstance(runnable, (EagerDraft, NativeDraft, CudaDraft))
        return ModelInfo(
            name=self.draft_name or f"hidden-state draft of {self.target_info.name}",
            revision=self.draft_revision,
            parameters=sum(weight.numel() for weight in draft.parameters()),
            weight_bytes=runnable.weight_bytes,
            note=self.draft_note,
        )

    def _check_device(self, there: torch.device) -> None:
        if self.device != there:
            raise PairError(
                f"The target is on {self.device}, the draft on {there}. Move both to one device."
            )

    def _draft_vocab_size(self) -> int:
        if isinstance(self.draft, PreTrainedModel):
            return inspection.vocab_size(self.draft)
        if isinstance(self.draft, HiddenDraft):
            return inspection.vocab_size(self.target)
        assert self.draft is not None
        return int(self.draft.vocab_size)


def as_drafter(pair: ModelPair) -> Drafter:
    """The pair's draft behind the seam that decoders know, with an empty cache.

    Raises:
        PairError: the pair has no draft.
    """
    if pair.draft is None:
        raise PairError("This pair has no draft model. Add one.")
    runnable = pair.engine_draft
    if isinstance(runnable, (PreTrainedModel, NativeLlama, CudaLlama)):
        return LMDrafter(CachedLM(runnable, pair.vocab_size))
    if isinstance(runnable, (EagerDraft, NativeDraft, CudaDraft)):
        return hidden_drafter(runnable, pair.vocab_size)
    assert isinstance(pair.draft, Drafter)
    return pair.draft


def ready_draft(
    draft: HiddenDraft, ends: Ends, positions: int, engine: str
) -> EagerDraft | NativeDraft | CudaDraft:
    """A draft between a target's ends as an engine runs it, for texts of up to `positions`."""
    if engine == EAGER:
        return EagerDraft(draft, ends)
    if engine == CUDA:
        return CudaDraft(draft, ends)
    return NativeDraft(draft, ends, positions, exact=engine == NATIVE_FLOAT32)


def hidden_drafter(runnable: RunnableDraft | NativeDraft | CudaDraft, vocab_size: int) -> Drafter:
    """The walk along a tree, with the copy distribution that the draft asks for."""
    if isinstance(runnable, CudaDraft):
        return CudaDrafter(runnable, vocab_size)
    if isinstance(runnable, NativeDraft):
        return NativeDrafter(runnable, vocab_size)
    weights = runnable.draft.config.copy_weights
    drafter = HiddenDrafter(runnable, vocab_size)
    return CopyDrafter(drafter, weights) if weights else drafter


def engine_reason(pair: ModelPair, engine: str) -> str | None:
    """Why a pair cannot be run on an engine other than eager; None if it can."""
    if engine != CUDA:
        return native_reason(pair)
    reason = cuda_llama.unsupported_reason(pair.target)
    if isinstance(pair.draft, PreTrainedModel):
        reason = reason or cuda_llama.unsupported_reason(pair.draft)
    return reason


def native_reason(pair: ModelPair) -> str | None:
    """Why a pair cannot be run on the native engine; None if it can."""
    reason = unsupported_reason(pair.target)
    if isinstance(pair.draft, PreTrainedModel):
        reason = reason or unsupported_reason(pair.draft)
    elif isinstance(pair.draft, HiddenDraft):
        reason = reason or unsupported_draft(pair.draft)
    return reason or library.unavailable_reason()


def check_engine(engine: str, device: torch.device | None = None) -> str:
    """The engine's name.

    Args:
        engine: one of `ENGINES`.
        device: that models are to be loaded on.

    Raises:
        ConfigError: there is no such engine, or it is for devices of another kind.
    """
    if engine not in ENGINES:
        allowed = ", ".join(f'"{name}"' for name in ENGINES)
        raise ConfigError(f"engine is {str(engine)[:60]!r}, but must be one of {allowed}.")
    if engine == CUDA and device is not None and device.type != "cuda":
        raise ConfigError(
            f'engine is "{CUDA}", but the device is {device.type}. Choose the device cuda, or'
            " another engine."
        )
    return engine


def load_pair(
    name: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> ModelPair:
    """Loads a pair of `presets()`; fetches its weights first if they are not there.

    Args:
        name: id of a preset, such as "smollm2".
        device: "cpu", "cuda", "cuda:1", "mps"; None chooses CUDA, else MPS (untested), else CPU.
        dtype: "float32", "bfloat16" or "float16"; None chooses float32 on CPU and MPS, bfloat16
            on CUDA (float16 where the board has no bfloat16).
        engine: one of `ENGINES`; None takes the fastest that can run the pair in this dtype:
            on a CPU "native", or "native-float32" where float32 was asked for; on a GPU "cuda".
        progress: called with a stage, the bytes done and the bytes in all (0 where unknown).

    Raises:
        PairError: no such pair, a licence not accepted, no network, not enough memory.
        FetchError: the embedded weights could not be fetched.
        ConfigError: device, dtype or engine is not one of the allowed.
    """
    return load_preset(find_preset(name), device, dtype, engine, progress)


def unavailable_reason(
    preset: Preset,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> str | None:
    """Why this machine cannot hold a preset's models, None if it can (or nobody can tell)."""
    chosen = loading.resolve_device(device)
    return loading.too_big(preset, chosen, loading.resolve_dtype(dtype, chosen))


def load_preset(
    preset: Preset,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> ModelPair:
    """As `load_pair`, of any preset. Its repositories may be folders; take none from a visitor."""
    place = loading.resolve_device(device)
    if engine is not None:
        check_engine(engine, place)
    kind = loading.resolve_dtype(dtype, place)
    reason = loading.too_big(preset, place, kind)
    if reason:
        raise PairError(f"{reason}. Choose a smaller pair, another device, or a smaller dtype.")
    notes = ("MPS is untested: compare a short answer with the CPU.",) * (place.type == "mps")
    if preset.embedded:
        pair = _load_embedded(preset, place, kind, progress)
    else:
        pair = _load_hub(preset, place, kind, progress)
    chosen = engine or fastest_engine(pair, dtype)
    if engine is None and place.type == "cuda" and chosen == EAGER:
        notes += (f"Runs through transformers, which is slower. {engine_reason(pair, CUDA)}",)
    pair = dataclasses.replace(pair, engine=chosen, notes=notes + pair.notes)
    _ = pair.engine_target, pair.engine_draft  # packed now, while a reader waits for loading
    gc.unfreeze()  # what an earlier pair has left goes at the first run of this one: mtad.runner
    return pair


def fastest_engine(pair: ModelPair, dtype: str | torch.dtype | None = None) -> str:
    """The engine for a pair whose weights were asked for in this dtype."""
    if pair.device.type == "cuda":
        return EAGER if engine_reason(pair, CUDA) else CUDA
    if pair.device.type != "cpu" or pair.dtype != torch.float32 or native_reason(pair):
        return EAGER
    return NATIVE if dtype in (None, "auto") else NATIVE_FLOAT32


def _load_embedded(
    preset: Preset, device: torch.device, dtype: torch.dtype, progress: Progress | None
) -> ModelPair:
    folder = fetch(progress=progress)
    if progress is not None:
        progress("load", 0, SMOLLM2.folder_bytes)
    with quiet():
        target = loading.load_repository(folder, device, dtype, spread=False)
    draft = load_draft(SMOLLM2_DRAFT, target.model, device, dtype)
    if progress is not None:
        progress("load", SMOLLM2.folder_bytes, SMOLLM2.folder_bytes)
    return ModelPair(
        target.model,
        draft,
        target.tokenizer,
        name=preset.id,
        target_name=preset.target,
        target_revision=f"{SMOLLM2.requirement}, {SMOLLM2.payload_sha256[:12]}",
        target_note="Dequantised from the 4-bit Q4_1 file.",
        draft_name="smollm2-draft",
        draft_note="Reads the target's hidden states; made by mtad distill.",
    )


def _load_hub(
    preset: Preset, device: torch.device, dtype: torch.dtype, progress: Progress | None
) -> ModelPair:
    size = DTYPE_BYTES[loading.dtype_name(dtype)]
    total = (preset.target_parameters + preset.draft_parameters) * size
    spread = loading.must_spread(preset.memory_bytes(loading.dtype_name(dtype)), device)
    if progress is not None:
        progress("load", 0, total)
    target = loading.load_repository(preset.target, device, dtype, spread=spread)
    if progress is not None:
        progress("load", preset.target_parameters * size, total)
    # The draft stands where the target takes its token ids in.
    there = inspection.device_of(target.model)
    draft = loading.load_repository(preset.draft, there, dtype, spread=False)
    if progress is not None:
        progress("load", total, total)
    return ModelPair(
        target.model,
        draft.model,
        target.tokenizer,
        name=preset.id,
        draft_tokenizer=draft.tokenizer,
    )
