"""Recorded comparisons that ship with the code: shown before any model is loaded.

Each file of assets/traces is one comparison, a trace a line; its README says how it is made. They
are read and turned into the page's message once, when the page is built. Knows no gradio.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtad.catalogue import methods
from mtad.errors import MtadError
from mtad.shipped import ASSETS
from mtad.trace import Trace
from mtad.ui.about import hardware_of
from mtad.ui.board import Board, encode

FOLDER = ASSETS / "traces"
_PREFIX = "recorded-"
_log = logging.getLogger(__name__)


def read_traces(file: Path) -> list[Trace | MtadError]:
    """What the lines of a file hold: a trace each, or why it is none."""
    found: list[Trace | MtadError] = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            try:
                found.append(Trace.from_json(line))
            except MtadError as error:
                found.append(error)
    return found


class Recording:
    """One recorded comparison.

    Attributes:
        id: the name of its file.
        run_id: what names it towards the browser.
        label: model and machine, for a list.
        board: its lanes, finished.
        first: the whole message of the board, encoded.
    """

    def __init__(self, name: str, traces: Sequence[Trace]) -> None:
        by_method = {trace.method: trace for trace in traces}
        infos = [info for info in methods() if info.id in by_method]
        first = traces[0]
        self.id = name
        self.run_id = _PREFIX + name
        self.label = f"{first.target.name} on {hardware_of(first)}"
        self.board = Board(self.run_id, infos, first.config, recorded=True)
        self._traces = {info.id: by_method[info.id] for info in infos}
        # A model that is not what its size says must be named as that beside its figures.
        self.board.status("", notes=[first.target.note] if first.target.note else [])
        for method, trace in self._traces.items():
            self.board.finish(method, trace)
        self.board.close("")
        self.board.hush()
        self.first = encode(self.board.message())

    def traces(self) -> dict[str, Trace]:
        """The traces by method."""
        return dict(self._traces)


class Gallery:
    """All recordings of a folder; what a visitor sends chooses among these and nothing else."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._kept: dict[str, Recording] = {}
        for file in sorted(folder.glob("*.jsonl")):
            try:
                traces = []
                for found in read_traces(file):
                    if isinstance(found, MtadError):
                        raise found
                    traces.append(found)
                if not traces:
                    raise MtadError("it holds no trace")
                self._kept[file.stem] = Recording(file.stem, traces)
            except (MtadError, OSError, ValueError) as error:
                # The page works without it; whoever runs the server can mend it.
                _log.warning("the recording %s is left out: %s", file.name, error)

    def choices(self) -> list[list[str]]:
        """[id, label] of all, in the order of their names."""
        return [[one.id, one.label] for one in self._kept.values()]

    def get(self, name: object) -> Recording | None:
        """The recording of that id, or the first one for ""; None if there is none."""
        if name == "":
            return next(iter(self._kept.values()), None)
        return self._kept.get(name) if isinstance(name, str) else None

    def by_run(self, run_id: Any) -> Recording | None:
        """The recording that the browser knows under this name."""
        if not isinstance(run_id, str) or not run_id.startswith(_PREFIX):
            return None
        return self._kept.get(run_id.removeprefix(_PREFIX))
