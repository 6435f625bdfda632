"""`mtad distill`: makes a draft for a target, in two phases that can be stopped at any time."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mtad.cli_generate import DeviceOption
from mtad.cli_io import UsageError, stop_on_interrupt
from mtad.cli_progress import loading
from mtad.errors import ConfigError
from mtad.terminal import clean, console

_STAGES = {"write": "Writing", "train": "Training", "evaluate": "Evaluating"}
# Between two lines of progress where there is no terminal.
_LINE_SECONDS = 10.0

Report = Callable[[str, int, int, str], None]


class Phase(str, Enum):
    """What to do."""

    all = "all"
    write = "write"
    train = "train"


def distill(
    recipe_file: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="Such as assets/recipes/smollm2-cpu.json."),
    ],
    work: Annotated[
        Path, typer.Option(help="Folder of the corpus and the checkpoint; a run goes on from it.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the finished draft. Not needed to write only.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Instead of the recipe's: a pair, a folder, or a model of the hub."),
    ] = None,
    device: DeviceOption = None,
    phase: Annotated[
        Phase, typer.Option(help="Write the corpus, train on it, or all.")
    ] = Phase.all,
    start: Annotated[
        Path | None, typer.Option(help="Folder of a draft whose weights to begin with.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change the recipe: training.epochs=2."),
    ] = None,
) -> None:
    """Make a draft for a target: the target writes, a small model learns from it.

    Ctrl-C stops it; the same command goes on where it was stopped.
    """
    from mtad.distill.recipe import read_recipe

    try:
        recipe = read_recipe(recipe_file, changes or ())
    except ConfigError as error:
        raise UsageError(str(error)) from None
    if out is None and phase is not Phase.write:
        raise UsageError("Say with --out where the finished draft shall go.")
    if start is not None and not start.is_dir():
        raise UsageError(f"--start is {start}, but must be a folder with a draft.")
    if work.exists() and not work.is_dir():
        raise UsageError(f"--work is {work}, which is no folder.")

    from mtad.distill import run
    from mtad.distill.files import DistillError, Watch
    from mtad.distill.targets import load_target, writing_dtype
    from mtad.loading import dtype_name, resolve_device

    if phase is not Phase.write and out is not None:
        try:
            run.check_out(out, start)
        except DistillError as error:
            raise UsageError(str(error)) from None
    place = resolve_device(device)
    dtype, reason = writing_dtype(place)
    err = console(sys.stderr)
    with stop_on_interrupt() as stop:
        with loading(sys.stderr) as progress:
            name = target or recipe.target
            model = load_target(name, place, dtype, local=target is not None, progress=progress)
        if target is not None:  # for the card; of a folder only its own name
            recipe = dataclasses.replace(recipe, target=model.name)
        err.print(
            f"{clean(model.name)} on {place} in {dtype_name(dtype)} ({clean(reason)}).",
            soft_wrap=True,
            markup=False,
        )
        with _watching(err) as (report, say):
            watch = Watch(report, say, stop)
            if phase is not Phase.train:
                run.write(model, recipe, work, watch=watch)
            if phase is not Phase.write and out is not None:
                run.learn(model, recipe, work, out, start=start, watch=watch)
    print(work if phase is Phase.write else out)


@contextlib.contextmanager
def _watching(err: Console) -> Iterator[tuple[Report, Callable[[str], None]]]:
    """Gives progress(stage, done, total, note) and say(line), drawn on `err`."""
    if not err.is_terminal:

        def say(line: str) -> None:
            print(clean(line), file=sys.stderr, flush=True)

        yield _lines(say), say
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err, transient=True, speed_estimate_period=120) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                # Not from 0: what an earlier run has done says nothing about the speed.
                tasks[stage] = bars.add_task(_STAGES[stage], completed=done, note="")
            elif done < bars.tasks[tasks[stage]].completed:  # the stage begins again
                bars.reset(tasks[stage], completed=done)
            shown = done < total or stage != "evaluate"
            bars.update(tasks[stage], completed=done, total=total, note=clean(note), visible=shown)

        def write(line: str) -> None:
            bars.console.print(clean(line), soft_wrap=True, markup=False, highlight=False)

        yield draw, write


class _Rate(ProgressColumn):
    """Speed in units a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "—", style="progress.data.speed")


def _lines(say: Callable[[str], None]) -> Report:
    """A line every few seconds: share, speed, remaining time."""
    first: dict[str, tuple[float, int]] = {}
    latest: dict[str, int] = {}
    last = -_LINE_SECONDS

    def report(stage: str, done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done < latest.get(stage, 1 + done):  # the stage begins, or begins again
            first[stage] = (now, done)
        latest[stage] = done
        began, before = first[stage]
        if now - last < _LINE_SECONDS or done == before:
            return
        last = now
        speed = (done - before) / max(now - began, 1e-9)
        left = int((total - done) / speed)
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        line = f"{_STAGES[stage]}: {done / total:.1%}, {speed:,.0f}/s, {clock} left"
        say(f"{line}, {note}" if note else line)

    return report
