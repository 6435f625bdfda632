"""The runner: one run of one method on one pair, from a prompt to a Trace.

It owns what decoders must not know: the worker thread, the lock on the device, the warm-up,
cancellation and the deadline; `mtad.recording` adds clock, meter and texts. Two runs on the same
device follow each other; no two runs share state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import math
import platform
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from mtad.catalogue import MethodInfo, method_info
from mtad.config import DecodeConfig
from mtad.decoders import load_decoder
from mtad.draft import RecordedDrafter
from mtad.energy import EnergyWindows, Meter
from mtad.errors import Cancelled, ConfigError, DeadlineExceeded, PairError, PromptError
from mtad.hidden_draft import HiddenDraft
from mtad.iteration_costs import measure_iterations
from mtad.lm import CachedLM, Recorder, clock_for
from mtad.metrics import summarize
from mtad.native.threads import lent_threads
from mtad.pace import AUTO_WIDTHS
from mtad.pairs import EAGER, ModelPair, as_drafter
from mtad.processor import cpu_name
from mtad.recording import Scribe, Timing, meter_for, synchronize
from mtad.session import Session
from mtad.text import encode_prompt
from mtad.trace import Outcome, Step, StopReason, Trace
from mtad.version import __version__

# For `interval_seconds` where a person reads: nobody sees more, and waking up for every step costs
# a fast decoder several per cent.
READER_SECONDS = 0.05
_LOCK_POLL_SECONDS = 0.05

_locks: dict[str, threading.Lock] = {}
_locks_guard = threading.Lock()
_warmed: weakref.WeakSet[ModelPair] = weakref.WeakSet()
# By pair, then by method and beam width. Only read and written by the run that holds the device.
_costs: weakref.WeakKeyDictionary[ModelPair, dict[tuple[str, int | str], Any]] = (
    weakref.WeakKeyDictionary()
)


def device_lock(device: torch.device) -> threading.Lock:
    """The lock that a run holds while it uses a device."""
    with _locks_guard:
        return _locks.setdefault(str(device), threading.Lock())


@contextlib.contextmanager
def decoding(pair: ModelPair) -> Iterator[None]:
    """What holds for the calling thread while it decodes."""
    lent = contextlib.nullcontext() if pair.engine == EAGER else lent_threads()
    with torch.inference_mode(), lent:
        yield


def stream(
    method: str,
    pair: ModelPair,
    prompt: str | None = None,
    *,
    messages: Sequence[Mapping[str, str]] | None = None,
    raw_prompt: str | None = None,
    prompt_ids: Sequence[int] | None = None,
    config: DecodeConfig | None = None,
    cancel: threading.Event | None = None,
    deadline_seconds: float | None = None,
    meter: Meter | None = None,
    session: Session | None = None,
    interval_seconds: float = 0.0,
) -> Iterator[Step | Trace]:
    """Decodes in a worker thread and yields Steps as they happen, the Trace last.

    A Step whose decision is provisional shows a hypothesis that the next Step replaces. Closing
    the iterator stops the run within one target pass.

    Args:
        method: an id of `mtad.methods()`.
        pair: the models.
        prompt: one user turn; the chat template is applied if there is one.
        messages: a conversation instead of a prompt.
        raw_prompt: text without template instead of a prompt; special tokens in it are special.
        prompt_ids: token ids instead of a prompt.
        config: parameters; the defaults of `DecodeConfig` if None.
        cancel: set it to end the run within one target pass; the Trace then holds what was
            decoded and says "cancelled".
        deadline_seconds: likewise after this many seconds, waiting for the device included.
        meter: measures energy; by default the best one for the device.
        session: of a conversation: what it has of the prompt is not read again. The tokens are
            those of a run without it.
        interval_seconds: Steps after the first are handed over in bunches, not more often than
            this. A reader who wakes for every one of them takes time from a fast decoder.

    Raises:
        ConfigError, PromptError, PairError, BudgetError: with a message for the user, before
            the first Step where possible.
        Cancelled, DeadlineExceeded: it ended while waiting for the device, so that there is no
            run to make a Trace of.
    """
    run = _Run(
        method_info(method),
        pair,
        encode_prompt(
            pair.tokenizer,
            prompt=prompt,
            messages=messages,
            raw_prompt=raw_prompt,
            prompt_ids=prompt_ids,
        ),
        config or DecodeConfig(),
        cancel or threading.Event(),
        deadline_seconds,
        meter,
        session,
        interval_seconds,
    )
    return run.events()


def run(
    method: str,
    pair: ModelPair,
    prompt: str | None = None,
    *,
    messages: Sequence[Mapping[str, str]] | None = None,
    raw_prompt: str | None = None,
    prompt_ids: Sequence[int] | None = None,
    config: DecodeConfig | None = None,
    cancel: threading.Event | None = None,
    deadline_seconds: float | None = None,
    meter: Meter | None = None,
    session: Session | None = None,
) -> Trace:
    """`stream`, drained: returns the Trace."""
    events = stream(
        method,
        pair,
        prompt,
        messages=messages,
        raw_prompt=raw_prompt,
        prompt_ids=prompt_ids,
        config=config,
        cancel=cancel,
        deadline_seconds=deadline_seconds,
        meter=meter,
        session=session,
        interval_seconds=math.inf,
    )
    *_, trace = events
    assert isinstance(trace, Trace)
    return trace


class _Run:
    """One run; checks its arguments when it is made, decodes in `events`."""

    def __init__(
        self,
        info: MethodInfo,
        pair: ModelPair,
        prompt_ids: list[int],
        config: DecodeConfig,
        cancel: threading.Event,
        deadline_seconds: float | None,
        meter: Meter | None,
        session: Session | None,
        interval_seconds: float,
    ) -> None:
        number = isinstance(deadline_seconds, (int, float)) and deadline_seconds > 0
        if deadline_seconds is not None and not number:
            raise ConfigError(
                f"deadline_seconds is {deadline_seconds!r}, but must be a number greater than 0."
            )
        self.info = info
        self.pair = pair
        self.prompt_ids = prompt_ids
        config = config.with_draft_length(info.draft_length)
        if config.beam_width == "auto" and not (
            info.uses_draft and "beam_width" in info.parameters
        ):
            # Rows of costs are those of widths.
            config = dataclasses.replace(config, beam_width=config.width, iteration_costs=None)
        self.config = config
        self._check_request()
        self.room = pair.context_length - len(prompt_ids)
        self._cancel = cancel
        self._closed = threading.Event()
        self._deadline_seconds = deadline_seconds
        self._meter = meter
        self._session = session
        self._interval_seconds = interval_seconds
        self._bunch: list[Step] = []  # written and not handed over yet
        self._handed_over_at = -math.inf
        self._queue: queue.SimpleQueue[list[Step | Trace | BaseException]] = queue.SimpleQueue()

    def events(self) -> Iterator[Step | Trace]:
        """Runs the worker and hands on what it reports."""
        started = time.perf_counter()
        seconds = self._deadline_seconds
        self._deadline = None if seconds is None else started + seconds
        worker = threading.Thread(target=self._work, name=f"mtad-{self.info.id}", daemon=True)
        worker.start()
        try:
            while True:
                for event in self._queue.get():
                    if isinstance(event, BaseException):
                        raise event
                    yield event
                    if isinstance(event, Trace):
                        return
        finally:
            self._closed.set()
            worker.join()

    def _check_request(self) -> None:
        pair, config, info = self.pair, self.config, self.info
        if info.uses_draft and pair.draft is None:
            raise PairError(
                f"{info.id} needs a draft model, and this pair has none. Add one, or choose a"
                " method that runs on the target alone, such as autoregressive."
            )
        width = max(AUTO_WIDTHS) if config.beam_width == "auto" else config.beam_width
        if "beam_width" in info.parameters and width > pair.vocab_size:
            asked = f"{width}" if width == config.beam_width else f'"auto", up to {width}'
            raise ConfigError(
                f"beam_width is {asked}, but the vocabulary of the pair has"
                f" {pair.vocab_size} tokens. Choose at most that many beams."
            )
        size = len(self.prompt_ids)
        if size >= pair.context_length:
            raise PromptError(
                f"The prompt has {size:,} tokens, {size - pair.context_length + 1:,} too many: the"
                f" context of this pair holds {pair.context_length:,}, one of them for the"
                " answer. Shorten the prompt."
            )
        wrong = [token for token in self.prompt_ids if not 0 <= token < pair.vocab_size]
        if wrong:
            raise PromptError(
                f"The prompt has token id {wrong[0]}, but ids must be from 0 to"
                f" {pair.vocab_size - 1}."
            )

    def _check(self) -> None:
        """Called before every pass of either model."""
        if self._cancel.is_set() or self._closed.is_set():
            raise Cancelled("The run was stopped.")
        if self._deadline is not None and time.perf_counter() > self._deadline:
            raise DeadlineExceeded(f"The run took longer than {self._deadline_seconds} s.")

    def _work(self) -> None:
        try:
            lock = device_lock(self.pair.device)
            while not lock.acquire(timeout=_LOCK_POLL_SECONDS):
                if self._closed.is_set():
                    return
                self._check()
            try:
                with torch.inference_mode():
                    self._report(self._decode())
            finally:
                lock.release()
        except BaseException as error:  # handed to the thread that waits, which raises it
            self._report(error)

    def _due(self) -> bool:
        """Whether the interval since steps were handed over is over."""
        return time.perf_counter() - self._handed_over_at >= self._interval_seconds

    def _report(self, *last: Trace | BaseException) -> None:
        """Hands over what waits, and what comes after it."""
        self._queue.put([*self._bunch, *last])
        self._bunch, self._handed_over_at = [], time.perf_counter()

    def _decode(self) -> Trace:
        pair, device = self.pair, self.pair.device
        with contextlib.suppress(Cancelled):  # the run's own first pass says so again
            _warm_up(pair, self._check)
            self._measure_costs()
        meter = self._meter or meter_for(pair.target, device)
        timing = Timing(device, meter)
        recorder = Recorder(clock_for(device), on_decode=timing.begin_decoding)
        target = CachedLM(pair.engine_target, pair.vocab_size, recorder=recorder, check=self._check)
        drafter = self._drafter(recorder) if self.info.uses_draft else None
        budget = min(self.config.max_new_tokens, self.room)
        outcomes = load_decoder(self.info.id)(
            target,
            drafter,
            self.prompt_ids,
            dataclasses.replace(self.config, max_new_tokens=budget),
            torch.Generator(device).manual_seed(self.config.seed),
            eos_token_ids=pair.eos_token_ids,
        )
        scribe = Scribe(pair.tokenizer, self.prompt_ids, self.config.stop, recorder, timing)
        started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        timing.begin()
        try:
            with decoding(pair):
                if self._session is not None:
                    self._session.begin(pair, self.prompt_ids, target, drafter)
                reason = self._drain(outcomes, scribe)
        except BaseException:
            with contextlib.suppress(Exception):  # what ended the run is what its reader is told
                self._finish(timing, scribe)
            raise
        windows = self._finish(timing, scribe)
        scribe.settle()
        notes = tuple(pair.notes) if self.info.uses_draft else ()
        if self._session is not None:
            notes += self._leave(self._session, scribe, target, drafter)
        summary = summarize(
            scribe.steps,
            decode_seconds=timing.decode_seconds,
            prefill_seconds=timing.prefill_seconds,
            time_to_first_token_seconds=scribe.first_token_seconds,
            energy=windows.decode,
            end_to_end_energy=windows.end_to_end,
            target_weight_bytes=pair.target_info.weight_bytes,
            draft_weight_bytes=pair.draft_info.weight_bytes if pair.draft_info else 0,
        )
        tokenizer = pair.tokenizer
        return Trace(
            method=self.info.id,
            config=self.config,
            target=pair.target_info,
            draft=pair.draft_info if self.info.uses_draft else None,
            device=str(device),
            dtype=pair.weights,
            engine=pair.engine,
            versions=_versions(device),
            prompt="" if tokenizer is None else str(tokenizer.decode(self.prompt_ids)),
            prompt_ids=tuple(self.prompt_ids),
            started_at=started_at,
            text="".join(step.text for step in scribe.steps),
            stop_reason=reason or self._end(scribe),
            steps=tuple(scribe.steps),
            energy=windows.decode,
            end_to_end_energy=windows.end_to_end,
            summary=summary,
            notes=notes,
        )

    def _drain(self, outcomes: Iterator[Outcome], scribe: Scribe) -> StopReason | None:
        """Takes decisions, and says what stopped the run; None if it came to its end."""
        try:
            for outcome in outcomes:
                scribe.note(outcome)
                due = self._due()
                if due or scribe.watches:
                    self._bunch.extend(scribe.write())
                if due:
                    self._report()
                if scribe.stopped:
                    return "stop"
        except DeadlineExceeded:
            return "deadline"
        except Cancelled:
            return "cancelled"
        return None

    def _finish(self, timing: Timing, scribe: Scribe) -> EnergyWindows:
        """Stops the clock, then writes what nobody has seen yet: that is not decoding."""
        try:
            return timing.end()
        finally:
            self._bunch.extend(scribe.write())

    def _end(self, scribe: Scribe) -> StopReason:
        """Why a run came to its end."""
        last = scribe.steps[-1].decision.emitted[-1]
        if last in self.pair.eos_token_ids and not self.config.ignore_eos:
            return "eos"
        return "context" if self.room < self.config.max_new_tokens else "length"

    def _leave(
        self, session: Session, scribe: Scribe, target: CachedLM, drafter: RecordedDrafter | None
    ) -> tuple[str, ...]:
        """Hands the caches to the session; says what the run had from it."""
        emitted = (token for step in scribe.steps for token in step.decision.emitted)
        session.end(self.pair, [*self.prompt_ids, *emitted], target, drafter)
        if not session.reused_tokens:
            return ()
        return (
            f"{session.reused_tokens:,} of {len(self.prompt_ids):,} prompt tokens were in the cache"
            " of the conversation; the prefill read the others.",
        )

    def _measure_costs(self) -> None:
        """Fills in the costs where the config asks for "auto" and leaves them open."""
        info, pair, config = self.info, self.pair, self.config
        name = "tree_costs" if "k_config" in info.parameters else "iteration_costs"
        drafts = config.k_config if name == "tree_costs" else config.num_draft_tokens
        if drafts != "auto" or name not in info.parameters or getattr(config, name) is not None:
            return
        known = _costs.setdefault(pair, {})
        key = (info.id, config.beam_width)
        if key not in known:
            with decoding(pair):
                known[key] = measure_iterations(info.id, pair, self._models, config)
        self.config = dataclasses.replace(config, **{name: known[key]})

    def _models(self) -> tuple[CachedLM, RecordedDrafter]:
        """Both models with empty caches, for measurements."""
        recorder = Recorder(clock_for(self.pair.device))
        pair = self.pair
        target = CachedLM(pair.engine_target, pair.vocab_size, check=self._check)
        return target, self._drafter(recorder)

    def _drafter(self, recorder: Recorder) -> RecordedDrafter:
        drafter = as_drafter(self.pair)
        return RecordedDrafter(drafter, self.pair.vocab_size, recorder, self._check)


def _warm_up(pair: ModelPair, check: Callable[[], None]) -> None:
    """The first passes of a model pay for allocations and kernels; no run should."""
    if pair in _warmed:
        return
    lm = CachedLM(pair.engine_target, pair.vocab_size, check=check)
    # A drafter of the user's own is left alone: what it does at its first call is its business.
    known = isinstance(pair.draft, (PreTrainedModel, HiddenDraft))
    draft = as_drafter(pair) if known else None
    token = torch.zeros(1, dtype=torch.int64, device=lm.device)
    layers = draft.target_layers if draft else ()
    hidden = lm.prefill(token, layers)
    # An engine may prepare a pass for what is asked of it.
    for asked in dict.fromkeys([(), layers]):
        for rows in (1, 5):
            lm.forward(token.expand(rows), layers=asked)
    if draft is not None:
        check()
        draft.prefill(token, hidden)
        draft.next_logits(token)
        draft.next_logits(token.expand(4), token.expand(4))
    synchronize(pair.device)
    _set_garbage_apart()
    _warmed.add(pair)


def _set_garbage_apart() -> None:
    """Has Python's collector leave alone what is alive now, unless it does so already.

    That is torch and transformers for the most part, hundreds of thousands of objects that stay. A
    full collection walks through them for a fifth of a second, and comes in the middle of some run.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def _versions(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_name() or platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "mtad": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "hardware": hardware,
    }
