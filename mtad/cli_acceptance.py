"""`mtad acceptance`: a pair on held-out prompts, every method at several γ and τ, one table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtad.acceptance.measures import Costs, Row, frontier, needed_passes, rows
from mtad.acceptance.records import (
    Record,
    RecordFile,
    Setting,
    Task,
    grid,
    locked,
    match,
    spread,
)
from mtad.cli_acceptance_table import (
    COST_HEADINGS,
    FRONTIER_HEADINGS,
    HEADINGS,
    Cells,
    cells,
    cost_cells,
    frontier_cells,
    markdown,
    notes,
    rich_tables,
)
from mtad.cli_generate import (
    DeviceOption,
    DraftOption,
    DtypeOption,
    PairOption,
    check_method,
    load,
)
from mtad.cli_io import (
    UsageError,
    check_separate,
    check_writable,
    read_prompts,
    stop_on_interrupt,
    write_atomically,
)
from mtad.cli_options import with_config
from mtad.config import DecodeConfig
from mtad.errors import Cancelled, ConfigError, MtadError, PairError
from mtad.shipped import ASSETS
from mtad.terminal import clean, console, number

HELD_OUT = ASSETS / "prompts" / "held_out.jsonl"
DRAFT_LENGTHS = (2, 4, 6, 8)


@dataclass
class Outcome:
    """What there is to report.

    Attributes:
        header: what the runs have in common.
        config: of all runs.
        settings: the grid.
        tasks: the prompts.
        records: finished runs.
        notes: what a reader of any result of the pair must know.
        costs: None if they could not be measured; a note then says why.
        interrupted: True if Ctrl-C ended it.
        failure: what else ended it.
        found: the figures of each setting.
    """

    header: dict[str, Any]
    config: DecodeConfig
    settings: list[Setting]
    tasks: list[Task]
    records: list[Record]
    notes: tuple[str, ...] = ()
    costs: Costs | None = None
    interrupted: bool = False
    failure: MtadError | None = None
    found: list[Row] = field(default_factory=list)

    @property
    def planned(self) -> int:
        """Runs in all."""
        return len(self.settings) * len(self.tasks)


@with_config
def acceptance(
    config: DecodeConfig,
    pair: PairOption = "smollm2",
    draft: DraftOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompt set, as for compare. Default: the held-out prompts."),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", "-m", help="Ids with commas between.")
    ] = "autoregressive,speculative,mtad,mtad_tree",
    gammas: Annotated[
        str | None,
        typer.Option(help="Draft lengths γ. Default: --num-draft-tokens, or 2,4,6,8."),
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="τs; several also print the frontier. Default: --accept-threshold, or 0.5."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Run this many prompts only, of all kinds in turn.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Keep finished runs in this .jsonl file, and go on where it ends."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Save the figures to this file.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown.")
    ] = False,
) -> None:
    """Measure a pair on held-out prompts: tokens a pass and perplexity, with intervals.

    All prompts with all settings take hours on a CPU: begin with --limit 7, and keep --records.
    """
    settings = _settings(methods, gammas, thresholds, config)
    tasks = _tasks(prompts, limit)
    check_separate({"--prompts": prompts or HELD_OUT, "--records": records, "--json": json_file})
    for file in (records, json_file):
        if file is not None:
            check_writable(file)
    with locked(records) if records is not None else contextlib.nullcontext():
        models = load(pair, device, dtype, draft)
        outcome = _measure(models, config, settings, tasks, records)
    outcome.found = rows(
        outcome.records, settings, costs=outcome.costs, beam_width=config.beam_width
    )
    if json_file is not None and outcome.found:
        write_atomically(json_file, _json(outcome))
    _report(outcome, as_markdown)
    if outcome.failure is not None:
        raise outcome.failure
    if outcome.interrupted:
        raise typer.Exit(130)


def _settings(
    methods: str, gammas: str | None, thresholds: str | None, config: DecodeConfig
) -> list[Setting]:
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        check_method(name)
    lengths: list[int | Literal["auto"]] = list(DRAFT_LENGTHS)
    if gammas is not None:
        lengths = [_whole(text) for text in gammas.split(",")]
    elif config.num_draft_tokens is not None:
        lengths = [config.num_draft_tokens]
    taus = [config.accept_threshold]
    if thresholds is not None:
        taus = [_number(text) for text in thresholds.split(",")]
    try:
        return grid(names, lengths, taus)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--gammas holds {text!r}, but must hold whole numbers.") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--thresholds holds {text!r}, but must hold numbers.") from None


def _tasks(file: Path | None, limit: int | None) -> list[Task]:
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, but must be at least 1.")
    if file is None and not HELD_OUT.is_file():
        raise UsageError("This installation has no held-out prompts. Name some with --prompts.")
    asked = read_prompts(file or HELD_OUT)
    return spread([Task(one.id, one.kind, one.request()) for one in asked], limit)


def _measure(
    models: Any,
    config: DecodeConfig,
    settings: list[Setting],
    tasks: list[Task],
    records: Path | None,
) -> Outcome:
    from mtad.acceptance.sweep import fingerprint

    header = fingerprint(models, config)
    kept = RecordFile(records, header) if records is not None else None
    done = match(kept.records, tasks, settings) if kept is not None else []
    outcome = Outcome(header, config, settings, tasks, done, models.notes)
    _run(outcome, models, kept)
    return outcome


def _run(outcome: Outcome, models: Any, file: RecordFile | None) -> None:
    """Measures the costs, then runs what is not in the file yet."""
    from mtad.acceptance.sweep import jobs, sweep

    err = console(sys.stderr)
    todo = jobs(outcome.tasks, outcome.settings, outcome.records, outcome.config.seed)
    with stop_on_interrupt() as stop:
        try:
            outcome.costs = _costs(outcome, models, stop, err)
            with _progress(err, outcome.planned, len(todo)) as say:
                for record in sweep(models, todo, outcome.config, stop):
                    if file is not None:
                        file.append(record)
                    outcome.records.append(record)
                    say(record)
        except (Cancelled, KeyboardInterrupt):
            outcome.interrupted = True
        except MtadError as error:
            outcome.failure = error
        outcome.interrupted |= stop.is_set()


def _costs(outcome: Outcome, models: Any, stop: threading.Event, err: Console) -> Costs | None:
    """None, and a note that says why, where the pair does not let them be measured."""
    from mtad.acceptance.costs import measure_costs

    width = outcome.config.beam_width
    passes = needed_passes(outcome.settings, width)
    try:
        with err.status("") if err.is_terminal else contextlib.nullcontext() as status:
            if status is None:
                err.print("Measuring what the passes cost.")

            def show(done: int, total: int) -> None:
                if status is not None:
                    status.update(f"Measuring what the passes cost: {done} of {total}")

            return measure_costs(models, passes, width, cancel=stop, progress=show)
    except PairError as error:
        outcome.notes += (f"There is no score. {error}",)
        err.print(clean(f"Without a score: {error}"), soft_wrap=True)
        return None


@contextlib.contextmanager
def _progress(err: Console, planned: int, missing: int) -> Iterator[Callable[[Record], None]]:
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


def _json(outcome: Outcome) -> str:
    content = {
        "header": outcome.header,
        "prompts": [task.id for task in outcome.tasks],
        "runs_planned": outcome.planned,
        "runs_finished": len(outcome.records),
        "costs_seconds": None if outcome.costs is None else dataclasses.asdict(outcome.costs),
        "rows": [dataclasses.asdict(row) for row in outcome.found],
        "frontier": [
            dataclasses.asdict(row.setting) for row, best in frontier(outcome.found) if best
        ],
        "notes": outcome.notes,
    }
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def _report(outcome: Outcome, as_markdown: bool) -> None:
    out, err = console(sys.stdout), console(sys.stderr)
    tables: list[tuple[Cells, list[Cells]]] = []
    if outcome.found:
        tables.append((HEADINGS, cells(outcome.found)))
        tables.append((FRONTIER_HEADINGS, frontier_cells(outcome.found)))
    if outcome.costs is not None:
        tables.append((COST_HEADINGS, cost_cells(outcome.costs)))
    for headings, lines in tables:
        if not lines:
            continue
        if as_markdown:
            out.file.write(markdown(headings, lines) + "\n")
            out.print()
        else:
            for table in rich_tables(headings, lines, out.width):
                out.print(table)
                out.print()
        if headings == HEADINGS:
            for line in _footer(outcome):
                shown = "- " + line.replace("*", r"\*") if as_markdown else line
                out.print(clean(shown), soft_wrap=True)
            out.print()
    if outcome.interrupted:
        err.print(f"Stopped: {len(outcome.records)} of {outcome.planned} runs were finished.")


def _footer(outcome: Outcome) -> Sequence[str]:
    header, config = outcome.header, outcome.config
    draft = f", draft {header['draft']['name']}" if header["draft"] else ""
    prompts = len({record.task_id for record in outcome.records})
    return [
        *notes(outcome.found, outcome.costs),
        f"{header['target']['name']}{draft}; {header['device']}, {header['dtype']},"
        f" {header['engine']}; {len(outcome.records)} of {outcome.planned} runs"
        f" (prompts: {prompts}).",
        f"At most {config.max_new_tokens} tokens, temperature {config.temperature:g},"
        f" top-k {config.top_k}, top-p {config.top_p:g}, W {config.beam_width},"
        f" seed {config.seed}.",
        *outcome.notes,
    ]
