"""What `mtad acceptance` and `mtad bench` share: prompts, options, costs, progress, printing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtad.acceptance.measures import Costs, Pass
from mtad.acceptance.records import Record, Task, spread
from mtad.cli_acceptance_table import Cells, markdown, rich_tables
from mtad.cli_io import UsageError, read_prompts
from mtad.errors import PairError
from mtad.shipped import ASSETS
from mtad.terminal import clean, number

HELD_OUT = ASSETS / "prompts" / "held_out.jsonl"

PromptsOption = Annotated[
    Path | None,
    typer.Option(help="Prompt set, as for compare. Default: the held-out prompts."),
]
RecordsOption = Annotated[
    Path | None,
    typer.Option(help="Keep finished runs in this .jsonl file, and go on where it ends."),
]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")]
LIMIT_HELP = "Run this many prompts only, of all kinds in turn."


def read_tasks(file: Path | None, limit: int | None) -> list[Task]:
    """The first `limit` prompts of a set, or of the held-out ones, of all kinds in turn."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, but must be at least 1.")
    if file is None and not HELD_OUT.is_file():
        raise UsageError("This installation has no held-out prompts. Name some with --prompts.")
    asked = read_prompts(file or HELD_OUT)
    return spread([Task(one.id, one.kind, one.request()) for one in asked], limit)


@contextlib.contextmanager
def stage(err: Console, what: str) -> Iterator[Callable[[str], None]]:
    """One line that says what lasts; on a terminal also how far it is."""
    if not err.is_terminal:
        err.print(f"{what}.")
        yield lambda how_far: None
        return
    with err.status(what) as status:
        yield lambda how_far: status.update(clean(f"{what}: {how_far}"))


def pass_costs(
    models: Any,
    passes: Collection[Pass],
    beam_width: int,
    stop: threading.Event,
    err: Console,
    *,
    purpose: str,
    rounds: int | None = None,
    context: int | None = None,
) -> tuple[Costs | None, tuple[str, ...]]:
    """What the passes cost; or None, and a note that says why there is no `purpose`."""
    from mtad.acceptance.costs import CONTEXT_TOKENS, ROUNDS, measure_costs

    try:
        with stage(err, "Measuring what the passes cost") as show:
            found = measure_costs(
                models,
                passes,
                beam_width,
                rounds=rounds or ROUNDS,
                context=context or CONTEXT_TOKENS,
                cancel=stop,
                progress=lambda done, total: show(f"{done} of {total}"),
            )
    except PairError as error:
        err.print(clean(f"Without a {purpose}: {error}"), soft_wrap=True)
        return None, (f"There is no {purpose}. {error}",)
    return found, ()


@contextlib.contextmanager
def progress(err: Console, planned: int, missing: int) -> Iterator[Callable[[Record], None]]:
    """A bar on a terminal, a line for each finished run elsewhere; both say what remains."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
        speed_estimate_period=600.0,
    )
    # What an earlier run has finished is no progress of this one.
    task = bar.add_task("", total=missing)
    began = time.monotonic()
    done = 0

    def say(record: Record) -> None:
        nonlocal done
        done += 1
        text = clean(f"{record.setting}, {record.task_id}").replace("\n", " ")
        bar.update(task, advance=1, description=text)
        if err.is_terminal:
            return
        speed = number(record.tokens / max(record.decode_seconds, 1e-9), 1)
        minutes = (time.monotonic() - began) / done * (missing - done) / 60
        count = planned - missing + done
        err.print(
            f"{count}/{planned} {text}: {speed} tokens/s, {number(minutes, 1)} min left",
            soft_wrap=True,
        )

    with bar:
        yield say


def print_table(
    out: Console, headings: Cells, lines: Sequence[Cells], *, as_markdown: bool
) -> None:
    """Prints a table and an empty line; one that is too wide for a terminal in several parts."""
    if as_markdown:
        out.file.write(markdown(headings, lines) + "\n\n")
        return
    for table in rich_tables(headings, lines, out.width):
        out.print(table)
        out.print()
