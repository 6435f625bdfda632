"""What a run records beside its decisions: seconds, joules and texts.

Also watches for stop strings, because only here ids have become text. A decision is noted when it
falls, and written out as a step when somebody is to see it: after a pass, which has driven
everything else out of a CPU's caches, the same lines take three times as long as for several
decisions in a row.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtad.energy import EnergyWindows, Meter, none_meter, probe
from mtad.lm import Recorder
from mtad.text import Detokenizer
from mtad.trace import Decision, Outcome, Step, replace_emitted


class Timing:
    """Wall seconds and joules of the two windows, with the device caught up at every end."""

    def __init__(self, device: torch.device, meter: Meter) -> None:
        self.meter = meter
        self._device = device
        self._began = self._ended = 0.0
        self._decode_began: float | None = None

    def begin(self) -> None:
        """Opens the end-to-end window."""
        synchronize(self._device)
        self.meter.start()
        self._began = time.perf_counter()

    def begin_decoding(self) -> None:
        """Opens the decode window: the prefill is over."""
        synchronize(self._device)
        self.meter.mark()
        self._decode_began = time.perf_counter()

    def end(self) -> EnergyWindows:
        """Closes both windows and gives the meter's readings."""
        synchronize(self._device)
        self._ended = time.perf_counter()
        if self._decode_began is None:  # stopped during the prefill: no second was decoding
            self._decode_began = self._ended
        return self.meter.stop()

    def since_decoding_began(self) -> float:
        """Seconds; 0 before it has."""
        began = self._decode_began
        return 0.0 if began is None else time.perf_counter() - began

    @property
    def prefill_seconds(self) -> float:
        """Known once decoding has begun."""
        assert self._decode_began is not None
        return self._decode_began - self._began

    @property
    def decode_seconds(self) -> float:
        """Known after `end`."""
        assert self._decode_began is not None
        return self._ended - self._decode_began


@dataclass(frozen=True)
class _Noted:
    """A decision, and what can only be read off when it falls."""

    outcome: Outcome
    seconds: float
    joules: float | None
    spans: dict[str, float]


class Scribe:
    """Turns decisions into steps: texts, seconds, joules; watches for stop strings.

    Attributes:
        steps: what the Trace will hold, as far as it is written.
        watches: True if every decision must be written at once, since text may end the run.
        stopped: True once a stop string has appeared.
        first_token_seconds: from the start of the prefill to the first emitted token.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        recorder: Recorder,
        timing: Timing,
    ) -> None:
        self.steps: list[Step] = []
        self.stopped = False
        self.first_token_seconds: float | None = None
        self.watches = bool(stop)
        self._noted: deque[_Noted] = deque()
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._stop = stop
        self._recorder = recorder
        self._timing = timing
        self._words = Detokenizer(tokenizer, prompt_ids)
        self._provisional: Step | None = None
        self._seconds = {"draft": 0.0, "verify": 0.0}
        self._tail = ""

    def note(self, outcome: Outcome) -> None:
        """Takes a decision at the moment when it falls."""
        seconds = self._timing.since_decoding_began()
        joules = self._timing.meter.joules_so_far()
        if self.first_token_seconds is None and outcome.emitted:
            self.first_token_seconds = self._timing.prefill_seconds + seconds
        self._noted.append(_Noted(outcome, seconds, joules, self._recorder.take()))

    def write(self) -> Iterator[Step]:
        """The steps of what was noted since; provisional ones are remembered, not recorded.

        A hypothesis that another one has replaced already is not spelled: nobody would see it.
        """
        while self._noted:
            one = self._noted.popleft()
            for name, spent in one.spans.items():
                self._seconds[name] = self._seconds.get(name, 0.0) + spent
            if not (one.outcome.provisional and self._noted):
                yield self._step(one)

    def _step(self, noted: _Noted) -> Step:
        words = self._words
        if noted.outcome.provisional or self._provisional is not None:
            # A hypothesis is spelled from the start each time: its tokens may all be others.
            words = Detokenizer(self._tokenizer, self._prompt_ids)
            self._tail = ""
        decision = noted.outcome.write(words.piece)
        texts = [words.push(token) for token in decision.emitted]
        decision, texts = self._cut_at_stop(decision, texts)
        step = Step(
            index=len(self.steps),
            decision=decision,
            emitted_texts=tuple(texts),
            node_texts=tuple(words.piece(token) for token in decision.tree.token_ids),
            draft_seconds=self._seconds["draft"],
            verify_seconds=self._seconds["verify"],
            seconds=noted.seconds,
            joules=noted.joules,
        )
        if decision.provisional:
            self._provisional = step
        else:
            self.steps.append(step)
            self._provisional = None
            self._seconds = {"draft": 0.0, "verify": 0.0}
        return step

    def settle(self) -> None:
        """After a stop, the last hypothesis is what was decoded."""
        if self._provisional is not None:
            decision = dataclasses.replace(self._provisional.decision, provisional=False)
            self.steps.append(dataclasses.replace(self._provisional, decision=decision))
            self._provisional = None

    def _take_back(self, excess: int) -> None:
        """A stop string may have begun in earlier steps: the record loses what they showed."""
        for index in range(len(self.steps) - 1, -1, -1):
            if not excess:
                return
            texts, excess = _shorten(self.steps[index].emitted_texts, excess)
            self.steps[index] = dataclasses.replace(self.steps[index], emitted_texts=tuple(texts))

    def _cut_at_stop(self, decision: Decision, texts: list[str]) -> tuple[Decision, list[str]]:
        """Cuts a step at the first stop string, which may have begun in earlier steps."""
        if not self._stop:
            return decision, texts
        longest = max(len(stop) for stop in self._stop)
        text = self._tail
        for count, piece in enumerate(texts, start=1):
            text += piece
            found = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
            if found:
                self.stopped = not decision.provisional
                texts, excess = _shorten(texts[:count], len(text) - min(found))
                self._take_back(0 if decision.provisional else excess)
                return replace_emitted(decision, count), texts
        self._tail = text[-(longest - 1) :] if longest > 1 else ""
        return decision, texts


def _shorten(texts: Sequence[str], excess: int) -> tuple[list[str], int]:
    """Takes `excess` characters off the end of the joined texts; also says how many are left."""
    shortened = list(texts)
    for index in range(len(texts) - 1, -1, -1):
        taken = min(excess, len(texts[index]))
        shortened[index] = texts[index][: len(texts[index]) - taken]
        excess -= taken
    return shortened, excess


def meter_for(model: torch.nn.Module, device: torch.device) -> Meter:
    """The best meter for the board that a model stands on; none for several boards."""
    boards = {parameter.device for parameter in model.parameters()}
    if len(boards) > 1:
        return none_meter(
            f"The target is spread over {len(boards)} devices, and one sensor sees one of them."
        )
    return probe(device)


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    elif device.type == "mps":
        torch.mps.synchronize()
