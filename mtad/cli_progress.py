"""Progress of fetching and loading on stderr: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mtad.terminal import clean, console

_STAGES = {
    "wait": "Waiting for another process that fetches the model",
    "download": "Downloading the model",
    "verify": "Verifying the download",
    "convert": "Converting the model (half a minute)",
    "load": "Loading the models",
}


@contextlib.contextmanager
def loading(stream: TextIO) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function progress(stage, done_bytes, total_bytes) that draws on `stream`."""
    out = console(stream)
    if not out.is_terminal:
        yield _lines(stream)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True) as bars:
        tasks = {}

        def report(stage: str, done_bytes: int, total_bytes: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(clean(_STAGES.get(stage, stage)), total=None)
            # A stage of unknown size gets a bar that only moves.
            bars.update(tasks[stage], completed=done_bytes, total=total_bytes or None)

        yield report


def _lines(stream: TextIO) -> Callable[[str, int, int], None]:
    shown: dict[str, int] = {}

    def report(stage: str, done_bytes: int, total_bytes: int) -> None:
        quarter = 4 * done_bytes // total_bytes if total_bytes else 0
        if shown.get(stage, -1) >= quarter:
            return
        shown[stage] = quarter
        part = f": {25 * quarter} %" if total_bytes else ""
        print(f"{clean(_STAGES.get(stage, stage))}{part}", file=stream, flush=True)

    return report
