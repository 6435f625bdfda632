"""The board: all lanes of one comparison, and the messages that bring a browser up to date.

A message holds the small state of every lane and only those steps that its reader has not yet
got. A reader says how many steps it has; whoever missed a message (a tab in the background, a
component that was mounted late) asks again with its own counts and is whole. Nothing is sent
twice in the normal case, so a run of thousands of tokens costs the same per message as a short
one.

Pure but for a lock: the decoding generator writes while a server function reads.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from mtad.catalogue import MethodInfo
from mtad.config import DecodeConfig
from mtad.trace import Step, Trace
from mtad.ui.lanes import Lane, no_perplexity
from mtad.ui.steps import DASH, number

BASELINES = ("speculative", "autoregressive")


class Board:
    """Lanes, status line and results table of one comparison.

    Attributes:
        run_id: names the comparison towards the browser.
        lanes: one a method, in the order in which they run.
    """

    def __init__(self, run_id: str, methods: Sequence[MethodInfo], config: DecodeConfig) -> None:
        self.run_id = run_id
        self.lanes = {info.id: Lane(info, config) for info in methods}
        self._lock = threading.Lock()
        self._tick = 0
        self._status = ""
        self._error = ""
        self._spoken = ""
        self._notes: tuple[str, ...] = ()
        self._over = False

    def status(self, text: str, *, notes: Sequence[str] | None = None) -> None:
        """Sets the line above the lanes, and the notes that hold for the whole comparison."""
        with self._lock:
            self._status = text
            if notes is not None:
                self._notes = tuple(notes)

    def error(self, message: str) -> None:
        """Shows a message that the visitor must read; it stays until the next run."""
        with self._lock:
            self._error = self._spoken = message

    def start(self, method: str, message: str) -> None:
        """A method begins."""
        with self._lock:
            self.lanes[method].start(message)
            names = list(self.lanes)
            self._status = (
                f"Running {names.index(method) + 1} of {len(names)}:"
                f" {self.lanes[method].info.title}"
            )

    def add(self, method: str, step: Step) -> None:
        """A step has happened."""
        with self._lock:
            self.lanes[method].add(step)

    def finish(self, method: str, trace: Trace) -> None:
        """A method has ended with a trace."""
        with self._lock:
            self.lanes[method].finish(trace)
            self._spoken = self.lanes[method].spoken()

    def fail(self, method: str, message: str) -> None:
        """A method has ended without a trace."""
        with self._lock:
            self.lanes[method].fail(message)
            self._spoken = self.lanes[method].spoken()

    def close(self, status: str, unfinished: str = "did not run") -> None:
        """The comparison is over; lanes that still wait are marked with `unfinished`."""
        with self._lock:
            for lane in self.lanes.values():
                if lane.state in ("waiting", "running"):
                    lane.skip(unfinished)
            self._status = status
            self._over = True

    def message(self, have: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Any]:
        """What a reader needs who has `have` (epoch and steps by method; None: nothing)."""
        have = have or {}
        with self._lock:
            self._tick += 1
            lanes = []
            for name, lane in self.lanes.items():
                epoch, count = have.get(name, (lane.epoch, 0))
                start = count if epoch == lane.epoch and 0 <= count <= len(lane.steps) else 0
                lanes.append(lane.view(start))
            return {
                "run": self.run_id,
                "tick": self._tick,
                "status": self._status,
                "error": self._error,
                "say": self._spoken,
                "notes": self._all_notes(),
                "over": self._over,
                "lanes": lanes,
                "table": results_table(list(self.lanes.values())) if self._over else None,
            }

    def _all_notes(self) -> list[str]:
        """Each note once; one that not all lanes with a trace share names its method."""
        traced = [lane for lane in self.lanes.values() if lane.trace is not None]
        by_note: dict[str, list[Lane]] = {}
        for lane in traced:
            for note in lane.remarks():
                by_note.setdefault(note, []).append(lane)
        notes = list(self._notes)
        for note, lanes in by_note.items():
            if note in self._notes:
                continue
            if len(lanes) < len(traced):
                note = f"{', '.join(lane.info.title for lane in lanes)}: {note}"
            notes.append(note)
        return notes


def error_message(message: str) -> str:
    """A message, encoded, that shows an error and leaves the lanes as they are."""
    return encode({"run": None, "error": message, "say": message})


def encode(message: Mapping[str, Any]) -> str:
    """JSON for the token view. `<` is escaped, so that no layer can take a token for a tag."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def results_table(lanes: Sequence[Lane]) -> dict[str, Any] | None:
    """Figures of the finished runs with ratios to the baselines; None if nothing finished.

    A cell is [text, reason]; the reason is "" where there is a figure.
    """
    finished = [lane for lane in lanes if lane.trace is not None and lane.trace.summary.tokens]
    if not finished:
        return None
    rates = {lane.info.id: lane.trace.summary.tokens_per_second for lane in finished if lane.trace}
    rows = []
    for lane in finished:
        assert lane.trace is not None
        summary, energy = lane.trace.summary, lane.trace.energy
        per_token = summary.joules_per_token
        sign = "≈ " if energy.estimated else ""
        cells = [
            [f"{summary.tokens:,}", ""],
            [number(summary.tokens_per_second, 1), "too short to measure"],
            *[_ratio(summary.tokens_per_second, rates, baseline) for baseline in BASELINES],
            [number(summary.block_efficiency), "no target pass"],
            [
                f"{100 * summary.acceptance_rate:.0f} %"
                if summary.acceptance_rate is not None
                else DASH,
                "nothing offered" if lane.info.uses_draft else "no draft",
            ],
            [f"{summary.target_passes:,}", ""],
            [number(summary.perplexity), no_perplexity(summary.tokens)],
            [
                sign + number(per_token) if per_token is not None else DASH,
                energy.reason or "not measured",
            ],
        ]
        rows.append(
            {
                "title": lane.info.title,
                "stopped": lane.state != "done",
                "cells": [[text, why if text == DASH else ""] for text, why in cells],
            }
        )
    return {
        "columns": [
            "method",
            "tokens",
            "tokens/s",
            "speed vs speculative",
            "speed vs single-token",
            "tokens per pass",
            "accepted",
            "target passes",
            "perplexity",
            "J per token",
        ],
        "rows": rows,
    }


def _ratio(rate: float | None, rates: Mapping[str, float | None], baseline: str) -> list[str]:
    if baseline not in rates:
        return [DASH, "not in this comparison"]
    reference = rates[baseline]
    if rate is None or not reference:
        return [DASH, "too short to measure"]
    return [f"{rate / reference:.2f}×", ""]
