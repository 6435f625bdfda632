"""`mtad bench`: our methods and transformers' own generation, timed side by side in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mtad.acceptance.measures import Costs
from mtad.acceptance.records import Setting, Task, locked
from mtad.bench.measures import BASELINES, Line, Row, rows, without
from mtad.bench.predictions import passes_of
from mtad.bench.records import Run, RunFile, matching, plain
from mtad.bench.roofline import Machine, Shape
from mtad.cli_bench_table import footer, tables
from mtad.cli_compare import check_repeats
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
from mtad.cli_options import shown, with_config
from mtad.cli_progress import loading
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
    stage,
)
from mtad.config import DecodeConfig
from mtad.errors import Cancelled
from mtad.terminal import clean, console

METHODS = "autoregressive,speculative,mtad,mtad_tree,specinfer"
PROMPTS = 16
# Rounds of cost measurements, so many at a time.
_COST_PARTS, _COST_ROUNDS = 16, 3
_SLOW_BALLAST = (
    "The target with ballast runs through transformers, which is slower on a CPU. --engine native"
    " packs it first: that takes a minute a billion parameters, and its memory twice."
)


@dataclass
class Outcome:
    """What there is to report.

    Attributes:
        header: what the runs have in common.
        config: of all runs.
        tasks: the prompts.
        repeats: of each prompt.
        lines: the rows to show.
        runs: finished.
        resumed: how many of them an earlier process made.
        machine: None if it was not measured.
        costs: None if they could not be measured; a note then says why.
        targets: by row, the shape of its target.
        drafts: by row, the shape of its draft.
        failures: by row, the error that took it out.
        notes: what a reader of any result must know.
        interrupted: True if Ctrl-C ended it.
        found: the figures.
    """

    header: dict[str, Any]
    config: DecodeConfig
    tasks: list[Task]
    repeats: int
    lines: list[Line]
    runs: list[Run]
    resumed: int = 0
    machine: Machine | None = None
    costs: Costs | None = None
    targets: dict[Setting, Shape] = field(default_factory=dict)
    drafts: dict[Setting, Shape] = field(default_factory=dict)
    failures: dict[Setting, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    found: list[Row] = field(default_factory=list)

    @property
    def settings(self) -> list[Setting]:
        """Of the rows that take part."""
        return [line.setting for line in self.lines if line.absent is None]

    @property
    def planned(self) -> int:
        """Runs in all."""
        return len(self.settings) * len(self.tasks) * self.repeats


@with_config
def bench(
    config: DecodeConfig,
    pair: PairOption = "smollm2",
    draft: DraftOption = None,
    methods: Annotated[
        str, typer.Option("--methods", "-m", help="Ids of ours with commas between.")
    ] = METHODS,
    baselines: Annotated[
        str,
        typer.Option(
            "--transformers", help="Its rows: float32, bfloat16, assisted; or none of them."
        ),
    ] = ",".join(BASELINES),
    prompts: PromptsOption = None,
    limit: Annotated[int, typer.Option(help=LIMIT_HELP)] = PROMPTS,
    repeats: Annotated[int, typer.Option(help="Runs of each row and prompt. 1 to 1000.")] = 1,
    records: RecordsOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What runs our methods: eager, native, native-float32 or cuda. Default: the"
            " fastest that can; with ballast on a CPU eager."
        ),
    ] = None,
    ballast: Annotated[
        str | None,
        typer.Option(help="Give the target the price of a large shape: 1b, 8b or 13b."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Save runs, figures, costs and machine here.")
    ] = None,
    as_markdown: MarkdownOption = False,
) -> None:
    """Time our methods beside transformers' generate, and against what the machine could do."""
    chosen = method_ids(methods)
    foreign = _baselines(baselines)
    check_repeats(repeats)
    tasks = read_tasks(prompts, limit)
    check_separate({"--prompts": prompts or HELD_OUT, "--records": records, "--json": json_file})
    for file in (records, json_file):
        if file is not None:
            check_writable(file)
    with locked(records) if records is not None else contextlib.nullcontext():
        models = _load(pair, device, dtype, engine, draft, ballast)
        outcome = _measure(models, chosen, foreign, tasks, repeats, config, records)
    outcome.found = rows(
        without(outcome.lines, outcome.failures),
        outcome.runs,
        config,
        costs=outcome.costs,
        machine=outcome.machine,
        targets=outcome.targets,
        drafts=outcome.drafts,
    )
    if json_file is not None and outcome.runs:
        write_atomically(json_file, _json(outcome))
    _report(outcome, as_markdown)
    if outcome.interrupted:
        raise typer.Exit(130)
    if outcome.failures:
        raise typer.Exit(1)


def _baselines(text: str) -> list[str]:
    if text.strip() == "none":
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BASELINES:
            raise UsageError(
                f"--transformers holds {name!r}, but must hold {', '.join(BASELINES)} with commas"
                " between, or be none."
            )
    return [name for name in BASELINES if name in names]


def _load(
    pair: str,
    device: str | None,
    dtype: str | None,
    engine: str | None,
    draft: Path | None,
    ballast: str | None,
) -> Any:
    """The pair, with the draft, the ballast and the engine that were asked for."""
    from mtad.loading import resolve_device
    from mtad.pairs import EAGER, check_engine, fastest_engine

    if engine is not None:
        check_engine(engine, resolve_device(device))
    if ballast is None:
        return load(pair, device, dtype, draft, engine)
    from mtad.ballast import SHAPES
    from mtad.ballast_pair import with_ballast

    if ballast not in SHAPES:
        raise UsageError(f"--ballast is {ballast!r}, but must be one of {', '.join(SHAPES)}.")
    small = load(pair, device, dtype, draft, EAGER)  # nobody runs it
    # On a CPU the packed copy of a large model would take minutes and its memory twice.
    own = fastest_engine(small) if small.device.type == "cuda" else EAGER
    with loading(sys.stderr) as bar:
        large = with_ballast(small, ballast, engine=engine or own, progress=bar)
    if engine is None and small.device.type == "cpu":
        return dataclasses.replace(large, notes=(*large.notes, _SLOW_BALLAST))
    return large


def _measure(
    models: Any,
    methods: list[str],
    baselines: list[str],
    tasks: list[Task],
    repeats: int,
    config: DecodeConfig,
    records: Path | None,
) -> Outcome:
    from mtad.acceptance.sweep import fingerprint
    from mtad.bench.machine import machine_name, versions
    from mtad.bench.systems import build, encode, shapes

    prompts = encode(models, tasks)
    systems, lines = build(models, methods, baselines, config)
    header = {
        **fingerprint(models, config),
        "machine": machine_name(models.device),
        "versions": versions(),
    }
    kept = RunFile(records, header) if records is not None else None
    settings = [line.setting for line in lines if line.absent is None]
    done = matching(kept.runs, tasks, settings, repeats) if kept is not None else []
    outcome = Outcome(header, config, tasks, repeats, lines, done, len(done), notes=models.notes)
    outcome.targets, outcome.drafts = shapes(systems)
    _run(outcome, models, systems, prompts, kept)
    return outcome


def _run(
    outcome: Outcome,
    models: Any,
    systems: Sequence[Any],
    prompts: dict[str, list[int]],
    file: RunFile | None,
) -> None:
    """Measures machine and costs, then runs what is not in the file yet.

    Costs and bandwidth are measured again between the runs: a machine that others use as well has
    slow minutes, and what one of them says is not true of the others. The context of the costs is
    that of the middle of a run.
    """
    from mtad.acceptance.costs import measure_costs, together
    from mtad.bench.machine import with_bandwidth
    from mtad.bench.systems import Failure, measure, missing

    err = console(sys.stderr)
    config, settings = outcome.config, outcome.settings
    todo = missing(outcome.tasks, settings, outcome.repeats, outcome.runs, config.seed)
    with stop_on_interrupt() as stop:
        try:
            outcome.machine = _machine(outcome, models, stop, err)
            passes = passes_of(settings, config)
            width = config.width
            length = statistics.fmean(map(len, prompts.values())) + config.max_new_tokens / 2
            context = round(length)
            outcome.costs, why = pass_costs(
                models,
                passes,
                width,
                stop,
                err,
                purpose="prediction by passes alone",
                rounds=_COST_ROUNDS,
                context=context,
            )
            outcome.notes += why
            parts = [] if outcome.costs is None else [outcome.costs]
            marks = {len(todo) * part // _COST_PARTS for part in range(1, _COST_PARTS)}
            with progress(err, outcome.planned, len(todo)) as say:
                for done, found in enumerate(measure(systems, todo, prompts, config, stop), 1):
                    if isinstance(found, Failure):
                        outcome.failures[found.setting] = found.message
                        err.print(clean(f"{found.setting} is out: {found.message}"), soft_wrap=True)
                    else:
                        if file is not None:
                            file.add(found)
                        outcome.runs.append(found)
                        say(dataclasses.replace(found.record, tokens=found.timed_tokens))
                    if done not in marks:
                        continue
                    outcome.machine = with_bandwidth(outcome.machine, models.device, stop)
                    if parts:
                        more = measure_costs(
                            models,
                            passes,
                            width,
                            rounds=_COST_ROUNDS,
                            context=context,
                            cancel=stop,
                        )
                        parts.append(more)
                        outcome.costs = together(parts)
        except (Cancelled, KeyboardInterrupt):
            outcome.interrupted = True
        outcome.interrupted |= stop.is_set()


def _machine(outcome: Outcome, models: Any, stop: threading.Event, err: Console) -> Machine:
    from mtad.bench.machine import measure_machine

    dtypes = [line.dtype for line in outcome.lines if line.absent is None]
    with stage(err, "Measuring what the machine can do") as show:
        return measure_machine(models.device, dtypes, cancel=stop, progress=show)


def _json(outcome: Outcome) -> str:
    costs, machine = outcome.costs, outcome.machine
    content = {
        **outcome.header,
        "config": dataclasses.asdict(outcome.config),
        "rates": None if machine is None else dataclasses.asdict(machine),
        "costs_seconds": None if costs is None else dataclasses.asdict(costs),
        "prompts": [task.id for task in outcome.tasks],
        "repeats": outcome.repeats,
        "runs_planned": outcome.planned,
        "runs_finished": len(outcome.runs),
        "runs_of_an_earlier_process": outcome.resumed,
        "rows": [dataclasses.asdict(row) for row in outcome.found],
        "runs": plain(outcome.runs),
        "failures": {str(setting): message for setting, message in outcome.failures.items()},
        "notes": [*footer(outcome.found, costs, machine), *outcome.notes],
    }
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def _report(outcome: Outcome, as_markdown: bool) -> None:
    out, err = console(sys.stdout), console(sys.stderr)
    if outcome.runs:
        for headings, lines in tables(outcome.found, outcome.costs):
            print_table(out, headings, lines, as_markdown=as_markdown)
        for line in (*footer(outcome.found, outcome.costs, outcome.machine), *_setup(outcome)):
            shown = "- " + line.replace("*", r"\*") if as_markdown else line
            out.print(clean(shown).replace("\n", " "), soft_wrap=True)
    if outcome.interrupted:
        err.print(f"Stopped: {len(outcome.runs)} of {outcome.planned} runs were finished.")
    for setting, message in outcome.failures.items():
        err.print(clean(f"mtad: {setting} failed at {message}"), soft_wrap=True)


def _setup(outcome: Outcome) -> list[str]:
    header, config = outcome.header, outcome.config
    draft = f", draft {header['draft']['name']}" if header["draft"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [
        f"{header['target']['name']}{draft}; {header['device']}, {header['dtype']},"
        f" {header['engine']}; {len(outcome.runs)} of {outcome.planned} runs (prompts:"
        f" {len({run.record.task_id for run in outcome.runs})}, repeats: {outcome.repeats}).",
        f"At most {config.max_new_tokens} tokens, temperature {config.temperature:g},"
        f" top-k {config.top_k}, top-p {config.top_p:g}, γ {config.num_draft_tokens or 4},"
        f" W {config.beam_width}, τ {config.accept_threshold:g}, k-config"
        f" {shown(config.k_config)}, seed {config.seed}.",
        f"{versions}.",
        *outcome.notes,
    ]
    if outcome.resumed:
        lines.append(
            f"{outcome.resumed} of the runs are of an earlier process; costs and limits were"
            " measured in this one."
        )
    return lines
