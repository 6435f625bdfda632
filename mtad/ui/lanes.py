"""A lane of the page: one run of one method, grown step by step, always ready to be drawn.

Pure: takes Steps and at last a Trace, gives JSON-able dictionaries. Knows no model, no
browser, no thread and no gradio. While a run goes on the figures come from the Steps; when it
has ended they come from the Trace's Summary and nowhere else. Every step carries the figures of
its moment, so that a replay shows what was shown when it happened.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

from mtad.catalogue import MethodInfo
from mtad.config import DecodeConfig
from mtad.trace import EnergyReading, Step, Trace
from mtad.ui.names import short_name
from mtad.ui.steps import DASH, columns, number, step_view

LaneState = Literal["waiting", "running", "done", "stopped", "failed"]
NOW_WINDOW_SECONDS = 2.0
WAITS = "waits: the methods run one after another"

_STATE_TEXTS: dict[LaneState, str] = {
    "waiting": "waiting",
    "running": "decoding",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}
_STOP_TEXTS = {
    "eos": "the model ended its answer",
    "length": "reached max_new_tokens",
    "context": "the context is full",
    "stop": "a stop string appeared",
    "cancelled": "stopped by you",
    "deadline": "reached the time limit",
}


class Tally:
    """The figures of a run up to a step.

    Attributes:
        tokens: emitted tokens.
        seconds: since decoding began.
    """

    def __init__(self, info: MethodInfo) -> None:
        self._info = info
        self.tokens = 0
        self.seconds = 0.0
        self._passes = 0
        self._accepted = 0
        self._offered = 0
        self._joules: float | None = None
        self._recent: deque[tuple[float, int]] = deque([(0.0, 0)])

    def add(self, step: Step) -> None:
        """Counts a finished step."""
        decision = step.decision
        self.tokens += len(decision.emitted)
        self._passes += decision.target_passes
        self._accepted += decision.accepted_length
        self._offered += decision.tree.depth
        self.seconds = step.seconds
        self._joules = step.joules
        self._recent.append((step.seconds, self.tokens))
        while len(self._recent) > 2 and self._recent[1][0] <= step.seconds - NOW_WINDOW_SECONDS:
            self._recent.popleft()

    def figures(self) -> list[list[str]]:
        """[value, second line] of the meters that are known while a run goes on, in order."""
        rate = self.tokens / self.seconds if self.seconds > 0 else None
        block = self.tokens / self._passes if self._passes else None
        joules = self._joules
        known = joules is not None and self.tokens > 0
        return [
            [number(rate, 1), f"now {number(self._rate_now(), 1)}"],
            [number(block), ""],
            list(
                _acceptance(self._info, self._accepted / self._offered if self._offered else None)
            ),
            [f"{self._passes:,}", f"{self.tokens:,} tokens"],
            [
                number(joules / self.tokens) if joules is not None and known else DASH,
                f"{number(joules, 1)} J" if known else "known at the end",
            ],
        ]

    def _rate_now(self) -> float | None:
        first, last = self._recent[0], self._recent[-1]
        span = last[0] - first[0]
        return (last[1] - first[1]) / span if span > 0 else None


class Lane:
    """The view of one method's run.

    Attributes:
        info: the method.
        state: waiting, running, done, stopped (cancelled or past its deadline) or failed.
        steps: views of the finished steps, in order; grows at its end only.
        epoch: counts how often `steps` was replaced; a reader of an older epoch starts anew.
        trace: the finished run; None before.
    """

    def __init__(self, info: MethodInfo, config: DecodeConfig) -> None:
        self.info = info
        self.config = config
        self.state: LaneState = "waiting"
        self.steps: list[dict[str, Any]] = []
        self.epoch = 0
        self.trace: Trace | None = None
        self._provisional = ""
        self._message = ""
        self._tally = Tally(info)

    def start(self, message: str = "") -> None:
        """The run has begun; `message` says what it is busy with before its first step."""
        self.state = "running"
        self._message = message

    def add(self, step: Step) -> None:
        """Appends a step. A provisional one only replaces the hypothesis that is shown."""
        self.state = "running"
        self._message = ""
        decision = step.decision
        if decision.provisional:
            self._provisional = step.text
            self._tally.seconds = step.seconds
            return
        self._provisional = ""
        self.steps.append(_moment(step, self.info, self.config, self._tally))

    def finish(self, trace: Trace) -> None:
        """The run has ended. The trace is the truth: differing steps are replaced by its own."""
        self.trace = trace
        self.config = trace.config
        self._provisional = ""
        tally = Tally(self.info)
        steps = [_moment(step, self.info, trace.config, tally) for step in trace.steps]
        if steps != self.steps:
            self.steps = steps
            self.epoch += 1
        early = trace.stop_reason in ("cancelled", "deadline")
        self.state = "stopped" if early else "done"
        self._message = _STOP_TEXTS[trace.stop_reason]

    def fail(self, message: str) -> None:
        """The run ended without a trace. The message of a MtadError is shown verbatim."""
        self.state = "failed"
        self._message = message

    def skip(self, message: str) -> None:
        """The run will not take place."""
        self.state = "stopped"
        self._message = message

    @property
    def message(self) -> str:
        """What it is busy with, or why it is not; in words."""
        return self._message or (WAITS if self.state == "waiting" else "")

    def header(self) -> dict[str, Any]:
        """What never changes during a run."""
        return {
            "method": self.info.id,
            "title": self.info.title,
            "short": short_name(self.info.id),
            "summary": self.info.summary,
            "lossless": self.info.lossless,
            "columns": list(columns(self.info.id)),
        }

    def view(self, start: int = 0) -> dict[str, Any]:
        """All but the steps before `start`; `from` and `count` say which steps are inside."""
        view: dict[str, Any] = {
            **self.header(),
            "state": self.state,
            "state_text": _STATE_TEXTS[self.state],
            "message": self.message,
            "epoch": self.epoch,
            "from": start,
            "count": len(self.steps),
            "steps": self.steps[start:],
            "provisional": self._provisional,
            "meters": self.meters(),
            "trace": self.trace is not None,
        }
        return view

    def remarks(self) -> list[str]:
        """What must be read beside the figures: the trace's notes, why there are no joules."""
        if self.trace is None:
            return []
        energy = self.trace.energy
        why = [f"No energy figure: {energy.reason or 'not measured'}"]
        return [*self.trace.notes, *(why if energy.joules is None else [])]

    def spoken(self) -> str:
        """What the status line says to a screen reader when the run has ended."""
        if self.trace is None:
            return f"{self.info.title}: {self._message}"
        summary = self.trace.summary
        return (
            f"{self.info.title} {self.state}: {summary.tokens} tokens,"
            f" {number(summary.tokens_per_second, 1)} tokens per second,"
            f" {number(summary.block_efficiency)} tokens per target pass."
        )

    def meters(self) -> list[dict[str, str]]:
        """The figures above the text: id, label, value, a second line, and why there is none."""
        if self.state == "waiting" or (self.trace is None and not self._tally.tokens):
            return self._empty_meters()
        return self._final_meters(self.trace) if self.trace else self._live_meters()

    def _empty_meters(self) -> list[dict[str, str]]:
        meters = [
            _meter("rate", "tokens/s", DASH),
            _meter("block", "tokens per pass", DASH),
            _meter("acceptance", "accepted", DASH, "" if self.info.uses_draft else "no draft"),
            _meter("passes", "target passes", DASH),
            _meter("energy", "J per token", DASH),
            _meter("perplexity", "perplexity", DASH),
        ]
        return meters

    def _live_meters(self) -> list[dict[str, str]]:
        meters = self._empty_meters()
        for meter, (value, note) in zip(meters, self._tally.figures(), strict=False):
            meter.update(value=value, note=note, title=note)
        meters[-1].update(note="known at the end", title="known at the end")
        return meters

    def _final_meters(self, trace: Trace) -> list[dict[str, str]]:
        summary = trace.summary
        return [
            _meter(
                "rate",
                "tokens/s",
                number(summary.tokens_per_second, 1),
                f"in {number(summary.decode_seconds, 1)} s"
                if summary.tokens_per_second is not None
                else "too short to measure",
            ),
            _meter(
                "block",
                "tokens per pass",
                number(summary.block_efficiency),
                "" if summary.block_efficiency is not None else "no target pass",
            ),
            _meter("acceptance", "accepted", *_acceptance(self.info, summary.acceptance_rate)),
            _meter(
                "passes",
                "target passes",
                f"{summary.target_passes:,}",
                f"{summary.tokens:,} tokens",
            ),
            energy_meter(trace.energy, summary.tokens),
            _meter(
                "perplexity",
                "perplexity",
                number(summary.perplexity),
                "" if summary.perplexity is not None else no_perplexity(summary.tokens),
            ),
        ]


def _moment(step: Step, info: MethodInfo, config: DecodeConfig, tally: Tally) -> dict[str, Any]:
    """A step's view with `s`, the seconds at its end, and `m`, the meters then."""
    tally.add(step)
    return {
        **step_view(step, info, config),
        "s": round(step.seconds, 5),
        "m": tally.figures(),
    }


def _acceptance(info: MethodInfo, rate: float | None) -> tuple[str, str]:
    """Value and second line of the meter."""
    if rate is not None:
        return f"{100 * rate:.0f} %", "of offered depth"
    return DASH, "nothing offered" if info.uses_draft else "no draft"


def no_perplexity(tokens: int) -> str:
    """Why a run has no perplexity."""
    return "a token had probability 0" if tokens else "no token was emitted"


def energy_meter(energy: EnergyReading, tokens: int) -> dict[str, str]:
    """Joules per token and joules, or a dash; the reason, often long, is the title.

    An estimate starts with ≈.
    """
    if energy.joules is None or not tokens:
        return _meter("energy", "J per token", DASH, "not measured", energy.reason or "")
    sign = "≈ " if energy.estimated else ""
    error = energy.relative_error
    spread = f" ± {100 * error:.0f} %" if error is not None and error >= 0.005 else ""
    return _meter(
        "energy",
        "J per token",
        sign + number(energy.joules / tokens),
        f"{sign}{number(energy.joules, 1)} J{spread}",
        "; ".join(part for part in (energy.scope, energy.method, energy.reason) if part),
    )


def _meter(name: str, label: str, value: str, note: str = "", title: str = "") -> dict[str, str]:
    return {"id": name, "label": label, "value": value, "note": note, "title": title or note}
