"""What a user would run instead: transformers' own `generate`, alone and with an assistant.

The sampling is that of the config and of nothing else: what a model brings along of its own
(penalties, other filters) is put aside for the run. Transformers says neither seconds nor passes,
so both models are watched from outside, by hooks around their forward passes.

The first pass of the target reads the whole prompt, and there is no moment before it at which
the prefill is over. So the timed window opens at its end, and the tokens that it gave stay out.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as remarks

from mtad import inspection
from mtad.acceptance.records import Record, Setting, Task
from mtad.bench.records import Run
from mtad.bench.roofline import Shape
from mtad.bench.shapes import shape_of
from mtad.config import DecodeConfig
from mtad.errors import Cancelled, MtadError
from mtad.lm import CachedLM, clock_for
from mtad.loading import dtype_name
from mtad.metrics import NGRAM
from mtad.pairs import ModelPair
from mtad.recording import Timing, meter_for, synchronize
from mtad.runner import device_lock
from mtad.sampling import token_logprobs
from mtad.trace import StopReason

ENGINE = "transformers"
_SCORE_CHUNK_TOKENS = 64


class BenchError(MtadError):
    """A row of the bench cannot be measured."""


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself if it has that dtype, else a copy whose weights do.

    Buffers stay as they are, as `from_pretrained` leaves them: rotary frequencies in bfloat16
    would be another model.
    """
    if model.dtype == dtype:
        return model
    copied = copy.deepcopy(model)
    for weight in copied.parameters():
        weight.data = weight.data.to(dtype)
    copied.config.dtype = dtype
    return copied


@dataclass(frozen=True)
class Transformers:
    """One way to call `generate`.

    Attributes:
        setting: the row.
        pair: whose vocabulary and ends hold; a plain one.
        target: the model that generates, in the dtype of the row.
        assistant: drafts for it; None without assisted generation.
    """

    setting: Setting
    pair: ModelPair
    target: PreTrainedModel
    assistant: PreTrainedModel | None = None

    def shapes(self) -> tuple[Shape | None, Shape | None]:
        """Of both models, for their limits."""
        assistant = None if self.assistant is None else shape_of(self.assistant)
        return shape_of(self.target), assistant

    def run(
        self,
        task: Task,
        prompt_ids: Sequence[int],
        config: DecodeConfig,
        repeat: int,
        cancel: threading.Event | None,
    ) -> Run | None:
        """One answer, measured. None if it was stopped.

        Raises:
            BenchError: transformers failed; the message says how.
        """
        try:
            with device_lock(self.pair.device):
                return self._run(task, prompt_ids, config, repeat, cancel or threading.Event())
        except Cancelled:
            return None
        except MtadError:
            raise
        # Whatever a library raises that is not ours: it costs this row and no other.
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            raise BenchError(f"transformers: {type(error).__name__}: {said[0][:300]}") from error

    def _run(
        self,
        task: Task,
        prompt_ids: Sequence[int],
        config: DecodeConfig,
        repeat: int,
        cancel: threading.Event,
    ) -> Run:
        pair, device = self.pair, self.pair.device
        budget = min(config.max_new_tokens, pair.context_length - len(prompt_ids))
        timing = Timing(device, meter_for(self.target, device))
        watch = _Watch(device, timing, cancel)
        given = torch.tensor([list(prompt_ids)], dtype=torch.int64, device=device)
        boards = [device] if device.type == "cuda" else []
        assisted: dict[str, Any] = {}
        if self.assistant is not None:
            assisted["assistant_model"] = self.assistant
        if config.stop:
            assisted["tokenizer"] = pair.tokenizer
        with (
            _hushed(),
            torch.random.fork_rng(devices=boards),
            _defaults(self.target, GenerationConfig()),
            _defaults(self.assistant, _assistant_config(config)),
            watch.on(self.target, self.assistant),
        ):
            torch.manual_seed(config.seed)
            timing.begin()
            try:
                sequence = self.target.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    generation_config=_generation_config(config, budget, pair.eos_token_ids),
                    streamer=watch,
                    **assisted,
                )
            finally:
                windows = timing.end()
        answer: list[int] = sequence[0, given.shape[1] :].tolist()
        record = self._record(task, prompt_ids, answer, watch, config)
        return Run(
            record=dataclasses.replace(record, decode_seconds=timing.decode_seconds),
            repeat=repeat,
            engine=ENGINE,
            dtype=dtype_name(self.target.dtype),
            prompt_tokens=len(prompt_ids),
            timed_tokens=len(answer) - watch.first_tokens,
            timed_passes=watch.target.timed_passes,
            timed_draft_passes=watch.draft.timed_passes,
            timed_draft_positions=watch.draft.timed_rows,
            energy=windows.decode,
        )

    def _record(
        self,
        task: Task,
        prompt_ids: Sequence[int],
        answer: list[int],
        watch: _Watch,
        config: DecodeConfig,
    ) -> Record:
        room = self.pair.context_length - len(prompt_ids)
        reason: StopReason = "length"
        if answer[-1] in self.pair.eos_token_ids and not config.ignore_eos:
            reason = "eos"
        elif len(answer) < min(config.max_new_tokens, room):
            reason = "stop"
        elif room < config.max_new_tokens:
            reason = "context"
        passes = watch.target.passes
        # The prefill is counted as a pass over the last token of the prompt and the draft.
        positions = watch.target.rows - (len(prompt_ids) - 1)
        grams = [tuple(answer[i : i + NGRAM]) for i in range(len(answer) - NGRAM + 1)]
        return Record(
            setting=self.setting,
            task_id=task.id,
            task_digest=task.digest,
            tokens=len(answer),
            target_passes=passes,
            target_positions=positions,
            draft_passes=watch.draft.passes,
            accepted=len(answer) - passes,
            offered=positions - passes,
            nll=score(self.target, self.pair.vocab_size, prompt_ids, answer),
            ngrams=len(grams),
            distinct_ngrams=len(set(grams)),
            decode_seconds=0.0,
            draft_seconds=watch.draft.seconds,
            verify_seconds=watch.target.seconds,
            stop_reason=reason,
        )


@dataclass
class _Passes:
    """Of one model; the seconds are those of the timed passes."""

    passes: int = 0
    rows: int = 0
    timed_passes: int = 0
    timed_rows: int = 0
    seconds: float = 0.0
    marks: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)


class _Watch:
    """Counts and times forward passes, opens the timed window, ends a run that was stopped.

    It is the streamer of a run, which is told of the tokens of every pass.

    Attributes:
        target: what it saw of the target.
        draft: and of the draft.
        first_tokens: how many tokens the target's first pass gave.
    """

    def __init__(self, device: torch.device, timing: Timing, cancel: threading.Event) -> None:
        self.target, self.draft = _Passes(), _Passes()
        self.first_tokens = 0
        self._clock = clock_for(device)
        self._device = device
        self._timing = timing
        self._cancel = cancel
        self._decoding = False
        self._puts = 0

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with the tokens of each pass."""
        if self._cancel.is_set():
            raise Cancelled("The run was stopped.")
        self._puts += 1
        if self._puts == 2:
            self.first_tokens = value.numel()

    def end(self) -> None:
        """Called once, at the end of the answer."""

    @contextlib.contextmanager
    def on(self, target: nn.Module, draft: nn.Module | None) -> Iterator[None]:
        """Watches the two models inside."""
        watched = [(target, self.target), *([(draft, self.draft)] if draft is not None else [])]
        hooks = []
        for model, seen in watched:
            hooks += self._hooks(model, seen)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        synchronize(self._device)
        for _, seen in watched:
            seen.seconds = sum(self._clock.seconds(start, end) for start, end in seen.marks)

    def _hooks(self, model: nn.Module, seen: _Passes) -> list[Any]:
        started: list[Any] = []

        def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            seen.passes += 1
            seen.rows += given.shape[1]
            if self._decoding:
                seen.timed_passes += 1
                seen.timed_rows += given.shape[1]
            started.append(self._clock.mark())

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            start = started.pop()
            if self._decoding:
                seen.marks.append((start, self._clock.mark()))
            elif seen is self.target:
                self._decoding = True
                self._timing.begin_decoding()

        return [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]


def _generation_config(
    config: DecodeConfig, budget: int, eos_token_ids: Sequence[int]
) -> GenerationConfig:
    """The sampling of a config in transformers' words."""
    options: dict[str, Any] = {"max_new_tokens": budget, "do_sample": config.temperature > 0}
    if config.temperature > 0:
        options |= {
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
        }
    if eos_token_ids and not config.ignore_eos:
        options |= {"eos_token_id": list(eos_token_ids), "pad_token_id": eos_token_ids[0]}
    if config.stop:
        options["stop_strings"] = list(config.stop)
    return GenerationConfig(**options)


def _assistant_config(config: DecodeConfig) -> GenerationConfig:
    """Drafts of γ tokens, whatever the draft thinks of them."""
    length = config.num_draft_tokens
    return GenerationConfig(
        num_assistant_tokens=length if isinstance(length, int) else 4,
        num_assistant_tokens_schedule="heuristic" if length == "auto" else "constant",
        assistant_confidence_threshold=0.0,
    )


@contextlib.contextmanager
def _defaults(model: PreTrainedModel | None, config: GenerationConfig) -> Iterator[None]:
    """Gives a model other defaults for its answers, and its own ones back."""
    if model is None:
        yield
        return
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without transformers' remarks: its assisted generation calls itself as it advises against."""
    level = remarks.get_verbosity()
    remarks.set_verbosity_error()
    try:
        yield
    finally:
        remarks.set_verbosity(level)


@torch.inference_mode()
def score(
    model: PreTrainedModel, vocab_size: int, prompt_ids: Sequence[int], answer: Sequence[int]
) -> float | None:
    """−log p of an answer in nats, at temperature 1, unwarped. None if a token has p = 0."""
    lm = CachedLM(model, vocab_size)
    device = inspection.device_of(model)
    lm.prefill(torch.tensor(prompt_ids[:-1], dtype=torch.int64, device=device))
    text = torch.tensor([prompt_ids[-1], *answer], dtype=torch.int64, device=device)
    total = 0.0
    for start in range(0, len(answer), _SCORE_CHUNK_TOKENS):
        stop = min(start + _SCORE_CHUNK_TOKENS, len(answer))
        logits = lm.forward(text[start:stop]).logits
        found = token_logprobs(logits, text[start + 1 : stop + 1]).double().sum().item()
        lm.keep(stop - start)
        total -= found
    return total if total < float("inf") else None
