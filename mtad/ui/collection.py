"""The traces that Inspect can open: those of a visit, the recorded ones, files from anywhere.

A trace has a key. Keys of a visit's traces are the shelf's and cannot be guessed; keys of
recorded ones are looked up in a table, so nothing that a visitor sends can name a file. Knows no
gradio and no model.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtad.catalogue import method_info
from mtad.errors import MtadError, TraceError
from mtad.trace import Trace
from mtad.ui.about import hardware_of, question
from mtad.ui.recordings import FOLDER, read_traces
from mtad.ui.shelf import Shelf
from mtad.ui.steps import number
from mtad.ui.what_if import strip_view, what_if_view
from mtad.whatif import JOINT_METHODS

MAX_FILE_BYTES = 16 * 1024 * 1024
MAX_TRACES_IN_FILE = 16
MAX_PASSES = 20_000
_log = logging.getLogger(__name__)


class Recorded:
    """The traces that ship with the code; read at the first look, then kept.

    Args:
        folder: of *.jsonl files, one trace a line.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._traces: dict[str, tuple[str, Trace]] | None = None
        self._lock = threading.Lock()

    def all(self) -> dict[str, tuple[str, Trace]]:
        """Label and trace by key."""
        with self._lock:
            if self._traces is None:
                self._traces = dict(self._read())
            return dict(self._traces)

    def get(self, key: str) -> tuple[str, Trace] | None:
        """Label and trace of a key."""
        return self.all().get(key)

    def replace(self, key: str, trace: Trace) -> None:
        """Keeps a trace that has learnt something, such as a bound."""
        with self._lock:
            if self._traces and key in self._traces:
                self._traces[key] = (self._traces[key][0], trace)

    def _read(self) -> Iterator[tuple[str, tuple[str, Trace]]]:
        for file in sorted(self._folder.glob("*.jsonl")):
            for line, found in enumerate(read_traces(file)):
                try:
                    if isinstance(found, MtadError):
                        raise found
                    model, machine = _short(found.target.name, 40), _short(hardware_of(found), 40)
                    label = f"{label_of(found)} · {model}, {machine}"
                except MtadError:
                    # The others can still be shown.
                    _log.exception("line %d of %s is no trace", line + 1, file.name)
                    continue
                yield f"recorded:{file.stem}:{line}", (label, found)


class Collection:
    """Traces of all visits and recorded ones, by key.

    Args:
        shelf: of finished traces.
        recorded: those that ship with the code.
    """

    def __init__(self, shelf: Shelf, recorded: Recorded | None = None) -> None:
        self._shelf = shelf
        self._recorded = recorded or Recorded()

    def get(self, key: object) -> tuple[str, Trace] | None:
        """Label and trace; None if the key is unknown or its trace is no longer kept."""
        if not isinstance(key, str):
            return None
        recorded = self._recorded.get(key)
        if recorded is not None:
            return recorded
        kept = self._shelf.get(key)
        return None if kept is None else (kept.label, kept.trace)

    def replace(self, key: str, trace: Trace) -> None:
        """Puts a trace that has learnt something in the place of the one it was."""
        self._shelf.replace(key, trace)
        self._recorded.replace(key, trace)

    def listing(self, visit: str) -> dict[str, Any]:
        """What can be opened.

        Returns:
            `groups`: [title, [[key, label], ...]] each; `prefer`: the key to open when the
            visitor has not chosen; `own`: True if that is a trace of the visit.
        """
        own = [
            (kept.key, _with_figures(kept.label, kept.trace), kept.trace)
            for kept in self._shelf.of(visit)
        ]
        recorded = [
            (key, _with_figures(label, trace), trace)
            for key, (label, trace) in self._recorded.all().items()
        ]
        best = _newest(own) or _telling(recorded)
        return {
            "groups": [
                [title, [[key, label] for key, label, _ in entries]]
                for title, entries in (("This visit", own), ("Recorded", recorded))
                if entries
            ],
            "prefer": best,
            "own": any(key == best for key, _, _ in own),
        }


def read_file(name: object, text: object) -> list[tuple[str, Trace]]:
    """Label and trace of every trace in a file: one trace, a list of them, or one a line.

    Raises:
        TraceError: it is too large, no trace, or one that this page cannot draw.
        ConfigError: a trace names a method that does not exist.
    """
    if not isinstance(text, str) or not isinstance(name, str):
        raise TraceError("This is not a trace: the file is no text.")
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_FILE_BYTES:
        raise TraceError(
            f"The file has {size:,} bytes, but this page reads at most {MAX_FILE_BYTES:,}. Look"
            " at it on a machine of your own, where the limit is that of the library."
        )
    pieces = _pieces(text)
    if len(pieces) > MAX_TRACES_IN_FILE:
        raise TraceError(
            f"The file holds {len(pieces)} traces, but at most {MAX_TRACES_IN_FILE} are read at"
            " once. Split it."
        )
    return [(f"{_short(name, 40)}: {label_of(trace)}", trace) for trace in map(_read, pieces)]


def label_of(trace: Trace) -> str:
    """Method and question."""
    return f"{method_info(trace.method).title}: {_short(question(trace.prompt), 40)}"


def _pieces(text: str) -> list[str]:
    """The JSON texts of the traces in a file, not yet looked into."""
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            items = json.loads(stripped)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"This is not a trace: {str(error)[:200]}.") from None
        if not items:
            raise TraceError("This is not a trace: the list is empty.")
        return [json.dumps(item) for item in items[: MAX_TRACES_IN_FILE + 1]]
    lines = [line for line in stripped.splitlines() if line.strip()]
    # A trace that was written over several lines has no line that is an object of its own.
    if len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines):
        return lines
    return [stripped]


def _read(text: str) -> Trace:
    trace = Trace.from_json(text)
    method_info(trace.method)
    if len(trace.steps) > MAX_PASSES:
        raise TraceError(
            f"The trace has {len(trace.steps):,} passes, but this page draws at most"
            f" {MAX_PASSES:,}."
        )
    what_if_view(trace)  # says so where a joint method lacks its reference
    return trace


def _newest(entries: Sequence[tuple[str, str, Trace]]) -> str:
    """Of traces that stand latest first, the first of a joint method, or the first of all."""
    joint = [key for key, _, trace in entries if trace.method in JOINT_METHODS]
    return next(iter([*joint, *(key for key, _, _ in entries)]), "")


def _telling(entries: Sequence[tuple[str, str, Trace]]) -> str:
    """The trace of `mtad` with the most rescued dips, if any has one; else as `_newest`.

    A tree has them too, and is no picture to begin with.
    """
    rescued = {
        key: len(strip_view(trace)["rescued"])
        for key, _, trace in entries
        if trace.method == "mtad"
    }
    best = max(rescued, key=rescued.__getitem__, default="")
    return best if rescued.get(best) else _newest(entries)


def _with_figures(label: str, trace: Trace) -> str:
    summary = trace.summary
    return (
        f"{_short(label, 110)} ({summary.tokens:,} tokens,"
        f" {number(summary.block_efficiency)} a pass)"
    )


def _short(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
