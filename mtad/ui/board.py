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
from mtad.ui.about import about
from mtad.ui.lanes import Lane
from mtad.ui.results import power, results_table


class Board:
    """Lanes, status line and results table of one comparison.

    Args:
        run_id: names the comparison towards the browser.
        methods: one lane each, in the order in which they run.
        config: parameters of the runs.
        prompt: what was asked; "" if only the traces know it.
        recorded: True if the runs were made long ago and perhaps on another machine.

    Attributes:
        run_id: as given.
        lanes: one a method, in the order in which they run.
    """

    def __init__(
        self,
        run_id: str,
        methods: Sequence[MethodInfo],
        config: DecodeConfig,
        prompt: str = "",
        *,
        recorded: bool = False,
    ) -> None:
        self.run_id = run_id
        self._prompt = prompt
        self._recorded = recorded
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

    def hush(self) -> None:
        """Nothing of what has happened is spoken: nobody was there to hear it."""
        with self._lock:
            self._spoken = ""

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
            traces = [lane.trace for lane in self.lanes.values() if lane.trace is not None]
            return {
                "run": self.run_id,
                "recorded": self._recorded,
                "tick": self._tick,
                "status": self._status,
                "error": self._error,
                "say": self._spoken,
                "notes": self._all_notes(),
                "over": self._over,
                "about": about(traces, self._prompt) if traces else None,
                "lanes": lanes,
                "table": results_table(list(self.lanes.values())) if self._over else None,
                # By method, for the chart of watts; sent once, since no point of it will change.
                "power": {trace.method: power(trace) for trace in traces} if self._over else {},
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
