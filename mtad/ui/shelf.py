"""The shelf: finished traces, kept for a while, so that other tabs can look at them again.

A visit is a random name that one open page carries; it lists its own traces only. A key names one
trace and nobody can guess it. Bounded in steps over all visits: the traces that were looked at
longest ago fall off first. Knows no gradio.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass

from mtad.trace import Trace

MAX_STEPS = 200_000
MAX_TRACES = 2_000


@dataclass(frozen=True)
class Kept:
    """A trace on the shelf.

    Attributes:
        key: names it; nobody can guess it.
        visit: whose it is.
        label: what a list of traces shows.
        trace: the trace.
    """

    key: str
    visit: str
    label: str
    trace: Trace


class Shelf:
    """Traces by key, and which visit they belong to. May be used from several threads.

    Args:
        max_steps: steps that all traces together may have; the newest trace always stays.
        max_traces: most traces.
    """

    def __init__(self, max_steps: int = MAX_STEPS, max_traces: int = MAX_TRACES) -> None:
        self._max_steps = max_steps
        self._max_traces = max_traces
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._steps = 0
        self._lock = threading.Lock()

    def put(self, visit: str, label: str, trace: Trace) -> str:
        """Keeps a trace; returns its key."""
        kept = Kept(secrets.token_hex(16), visit, label, trace)
        with self._lock:
            self._kept[kept.key] = kept
            self._steps += len(trace.steps)
            while len(self._kept) > 1 and (
                self._steps > self._max_steps or len(self._kept) > self._max_traces
            ):
                _, gone = self._kept.popitem(last=False)
                self._steps -= len(gone.trace.steps)
        return kept.key

    def get(self, key: object) -> Kept | None:
        """The trace of a key; None if it is unknown or has fallen off."""
        with self._lock:
            if not isinstance(key, str) or key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]

    def replace(self, key: str, trace: Trace) -> None:
        """Puts a trace with as many steps in the place of the one that has this key, if any has."""
        with self._lock:
            if key in self._kept:
                self._kept[key] = dataclasses.replace(self._kept[key], trace=trace)

    def of(self, visit: str) -> list[Kept]:
        """The traces of a visit, the latest first."""
        with self._lock:
            return [kept for kept in reversed(self._kept.values()) if kept.visit == visit]


def new_visit() -> str:
    """A name for one open page."""
    return secrets.token_hex(16)
