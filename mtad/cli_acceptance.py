"""`mtad acceptance`: a pair on held-out prompts, every method at several γ and τ, one table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mtad.acceptance.measures import Costs, Row, frontier, needed_passes, rows
from mtad.acceptance.records import (
    Record,
    RecordFile,
    Setting,
    Task,
    grid,
    locked,
    match,
)
from mtad.cli_acceptance_table import (
    COST_HEADINGS,
    FRONTIER_HEADINGS,
    HEADINGS,
    Cells,
    cells,
    cost_cells,
    frontier_cells,
    notes,
)
from mtad.cli_generate import (
    DeviceOption,
    DraftOption,
    DtypeOption,
    PairOption,
    load,
    method_ids,
)
from mtad.cli_io import (
    UsageError,
    check_separate,
    check_writable,
    stop_on_interrupt,
    write_atomically,
)
from mtad.cli_options import with_config
from mtad.cli_sweep import (
    HELD_OUT,
    LIMIT_HELP,
    MarkdownOption,
    PromptsOption,
    RecordsOption,
    pass_costs,
    print_table,
    progress,
    read_tasks,
)
from mtad.config import DecodeConfig
from mtad.errors import Cancelled, ConfigError, MtadError
from mtad.terminal import clean, console

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
    prompts: PromptsOption = None,
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
            help="τs; several also print the frontier. Default: --accept-threshold, or 0.3."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help=LIMIT_HELP)] = None,
    records: RecordsOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Save the figures to this file.")
    ] = None,
    as_markdown: MarkdownOption = False,
) -> None:
    """Measure a pair on held-out prompts: tokens a pass and perplexity, with intervals.

    All prompts with all settings take hours on a CPU: begin with --limit 7, and keep --records.
    """
    settings = _settings(methods, gammas, thresholds, config)
    tasks = read_tasks(prompts, limit)
    check_separate({"--prompts": prompts or HELD_OUT, "--records": records, "--json": json_file})
    for file in (records, json_file):
        if file is not None:
            check_writable(file)
    with locked(records) if records is not None else contextlib.nullcontext():
        models = load(pair, device, dtype, draft)
        outcome = _measure(models, config, settings, tasks, records)
    outcome.found = rows(outcome.records, settings, costs=outcome.costs, beam_width=config.width)
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
    names = method_ids(methods)
    lengths: list[int | Literal["auto"]] = list(DRAFT_LENGTHS)
    if gammas is not None:
        lengths = [_whole(text) for text in gammas.split(",")]
    elif config.num_draft_tokens is not None:
        lengths = [config.num_draft_tokens]
    taus = [config.accept_threshold]
    if thresholds is not None:
        taus = [_number(text) for text in thresholds.split(",")]
    try:
        settings = grid(names, lengths, taus)
        for setting in settings:
            setting.config(config, config.seed)
        return settings
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
    from mtad.acceptance.order import jobs
    from mtad.acceptance.sweep import sweep

    err = console(sys.stderr)
    todo = jobs(outcome.tasks, outcome.settings, outcome.records, outcome.config.seed)
    with stop_on_interrupt() as stop:
        try:
            width = outcome.config.width
            passes = needed_passes(outcome.settings, width)
            outcome.costs, why = pass_costs(models, passes, width, stop, err, purpose="score")
            outcome.notes += why
            with progress(err, outcome.planned, len(todo)) as say:
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
        print_table(out, headings, lines, as_markdown=as_markdown)
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
