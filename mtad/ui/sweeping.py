"""One visitor's sweep: checked request, one run a turn, and what has been measured so far.

A cell of a sweep is one prompt under one setting. Each cell is an event of its own in the page's
queue: `play_turn` decodes one and names the next turn, which lines up behind whoever came in the
meantime. So nobody waits for more than one cell, and a page that is gone asks for no further one.
Knows no gradio, and no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mtad.acceptance.order import Job, jobs, task_seed
from mtad.acceptance.records import Setting, Task, grid, spread
from mtad.bench.measures import Line, Row, rows
from mtad.bench.records import Run
from mtad.catalogue import methods
from mtad.config import DecodeConfig
from mtad.errors import Cancelled, ConfigError, DeadlineExceeded, MtadError
from mtad.shipped import ASSETS
from mtad.trace import Trace
from mtad.ui.comparison import (
    DEADLINE_SECONDS,
    INTERVAL_SECONDS,
    PairSource,
    Stream,
    config_of,
    wait_for_models,
)
from mtad.ui.latest import Latest
from mtad.ui.limits import Limits

MAX_RUNS = 400
MAX_SETTINGS = 32
MAX_NEW_TOKENS = 512
MAX_SWEEPS = 64
PROMPT_SETS = ("compare", "held_out")
_log = logging.getLogger(__name__)

State = Literal["waiting", "running", "stopped", "done", "failed"]
# shelve(setting, task, trace) → the key of the trace
Shelve = Callable[[Setting, Task, Trace], str]


@functools.cache
def prompt_set(name: str) -> tuple[Task, ...]:
    """The prompts of a shipped set, of all kinds in turn; none if this installation lacks it."""
    file = ASSETS / "prompts" / f"{name}.jsonl"
    if not file.is_file():
        return ()
    tasks = []
    for line in file.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        request = {key: fields[key] for key in ("prompt", "messages") if key in fields}
        tasks.append(Task(fields["id"], fields["kind"], request))
    return tuple(spread(tasks))


@dataclass(frozen=True)
class SweepRequest:
    """What a visitor asked for, checked.

    Attributes:
        tasks: the prompts, the same for all settings.
        settings: the points of the chart.
        config: everything else; γ, τ and W are those of the settings.
    """

    tasks: tuple[Task, ...]
    settings: tuple[Setting, ...]
    config: DecodeConfig

    @property
    def size(self) -> int:
        """Runs in all."""
        return len(self.tasks) * len(self.settings)


def check_sweep(
    method_ids: Sequence[str],
    draft_lengths: str,
    thresholds: str,
    beam_widths: str,
    prompts: Sequence[float | None],
    **parameters: Any,
) -> SweepRequest:
    """Checks a request.

    Args:
        method_ids: ids of methods, in any order.
        draft_lengths: values of γ as text, with commas between; "auto" is one.
        thresholds: likewise of τ.
        beam_widths: likewise of W.
        prompts: how many of each of `PROMPT_SETS`.
        parameters: fields of `DecodeConfig` that all runs share; None means the default.

    Raises:
        ConfigError: names the value, the range and what to do.
    """
    config = _config(parameters)
    if not isinstance(method_ids, (list, tuple)) or not method_ids:
        raise ConfigError("No method is chosen. Tick at least one.")
    reads = {name for info in methods() if info.id in method_ids for name in info.parameters}
    gammas = _values(draft_lengths, "num_draft_tokens", "γ", "2, 4, 8", reads)
    taus = _values(thresholds, "accept_threshold", "τ", "0.1, 0.3, 0.5", reads)
    widths = _values(beam_widths, "beam_width", "W", "2, 4, 8", reads)
    order = [info.id for info in methods()]
    chosen = sorted(
        dict.fromkeys(method_ids),
        key=lambda name: order.index(name) if name in order else len(order),
    )
    settings = grid(chosen, gammas, taus, widths)
    if len(settings) > MAX_SETTINGS:
        raise ConfigError(
            f"These methods and values make {len(settings)} settings, but a chart takes at most"
            f" {MAX_SETTINGS}. Take out some values or methods."
        )
    tasks: list[Task] = []
    for name, count in zip(PROMPT_SETS, prompts, strict=True):
        tasks += prompt_set(name)[: _count(name, count)]
    if not tasks:
        raise ConfigError(
            "The prompt set is empty: 0 prompts are taken from both sets. Take at least one."
        )
    request = SweepRequest(tuple(tasks), tuple(settings), config)
    if request.size > MAX_RUNS:
        raise ConfigError(
            f"{len(settings)} settings × {len(tasks)} prompts are {request.size:,} runs, but a"
            f" sweep takes at most {MAX_RUNS}. Take fewer prompts, values or methods."
        )
    return request


def check_limits(request: SweepRequest, limits: Limits) -> None:
    """Raises ConfigError if a sweep is more than this page allows."""
    limits.check_methods(len({setting.method for setting in request.settings}))
    limits.check_cells(request.size)
    for setting in request.settings:
        limits.check_config(setting.config(request.config, request.config.seed))


def _config(parameters: dict[str, Any]) -> DecodeConfig:
    config = config_of(parameters)
    if config.max_new_tokens > MAX_NEW_TOKENS:
        raise ConfigError(
            f"max_new_tokens is {config.max_new_tokens:,}, but must be at most {MAX_NEW_TOKENS} in"
            " a sweep. Choose a smaller number."
        )
    return config


def _values(text: object, name: str, symbol: str, example: str, reads: set[str]) -> list[Any]:
    """The numbers of a list; the library checks their ranges."""
    if name not in reads:
        return [None]
    parts = [part for part in re.split(r"[,;\s]+", str(text or "")) if part]
    if not parts:
        raise ConfigError(
            f"There is no value of {symbol}, but a chosen method reads {name}. Write one or more"
            f" with commas between, such as {example}."
        )
    found: list[Any] = []
    for part in parts:
        if part == "auto" and name == "num_draft_tokens":
            found.append(part)
            continue
        try:
            found.append(float(part) if name == "accept_threshold" else int(part))
        except ValueError:
            kind = "a number" if name == "accept_threshold" else "a whole number"
            raise ConfigError(
                f"{symbol} holds {part[:40]!r}, which is not {kind}. Write numbers with commas"
                f" between, such as {example}."
            ) from None
    return found


def _count(name: str, count: object) -> int:
    there = len(prompt_set(name))
    number = count if isinstance(count, (int, float)) and not isinstance(count, bool) else math.nan
    if not (0 <= number <= there and float(number).is_integer()):
        title = name.replace("_", "-")
        raise ConfigError(
            f"The number of {title} prompts is {str(count)[:40]}, but must be a whole number from 0"
            f" to {there}."
        )
    return int(number)


@dataclass(frozen=True)
class Snapshot:
    """A sweep at one moment.

    Attributes:
        state: waiting for the device or in line, running, or over.
        done: finished runs.
        job: what runs or comes next; None if nothing does.
        doing: what the run is busy with; "" while it is in line.
        remaining_seconds: what the missing runs will take, waiting for others not included; None
            as long as nobody can tell.
        rows: figures by setting.
        failures: why a setting was left out from some run on.
        error: what ended the sweep.
        models: the pair that ran.
        notes: of the pair.
    """

    state: State
    done: int
    job: Job | None
    doing: str
    remaining_seconds: float | None
    rows: dict[Setting, Row]
    failures: dict[Setting, str]
    error: str
    models: str
    notes: tuple[str, ...]


class Sweep:
    """A request, the runs that it has, and the switch that stops it. For several threads.

    Attributes:
        id: names it towards the browser; nobody can guess it.
        request: what was asked for.
        cancel: set it to end the run that goes on; its record is lost, the others stay.
    """

    def __init__(self, request: SweepRequest, before: Sweep | None = None) -> None:
        """A sweep, which goes on with what an earlier one of the same parameters has measured."""
        self.id = secrets.token_hex(16)
        self.request = request
        self.cancel = threading.Event()
        self._lock = threading.Lock()
        self._runs: dict[tuple[Setting, str], tuple[Run, str]] = {}
        self._rows: dict[Setting, Row] = {}
        self._models = ""
        if before is not None:
            with before._lock:
                self._runs, self._models = dict(before._runs), before._models
            self._rows = {one: row for one in request.settings if (row := self._row(one))}
        self._state: State = "waiting"
        self._turn = 0
        self._doing = ""
        self._failures: dict[Setting, str] = {}
        self._error = ""
        self._notes: tuple[str, ...] = ()
        self._began = self._ended = 0.0
        self._turn_seconds: list[float] = []
        self._gap_seconds: list[float] = []

    def missing(self) -> list[Job]:
        """What is still to be run, in order."""
        with self._lock:
            return self._missing()

    def runs(self, setting: Setting | None = None) -> list[tuple[Task, Run, str]]:
        """The finished runs with the keys of their traces, prompt by prompt."""
        with self._lock:
            return [
                (task, *self._runs[one, task.id])
                for task in self.request.tasks
                for one in self.request.settings
                if (one, task.id) in self._runs and setting in (None, one)
            ]

    def done_of(self, request: SweepRequest) -> int:
        """How many runs of another request of the same parameters are there."""
        with self._lock:
            return self._done(request)

    def snapshot(self) -> Snapshot:
        """How it stands."""
        with self._lock:
            todo = self._missing()
            active = self._state in ("waiting", "running")
            return Snapshot(
                state=self._state,
                done=self._done(self.request),
                job=todo[0] if todo and active else None,
                doing=self._doing,
                remaining_seconds=self._remaining(len(todo)) if active else None,
                rows={one: self._rows[one] for one in self.request.settings if one in self._rows},
                failures=dict(self._failures),
                error=self._error,
                models=self._models,
                notes=self._notes,
            )

    def stop(self) -> None:
        """The Stop button: ends the run that goes on, or takes the sweep out of the line."""
        self.cancel.set()
        with self._lock:
            if self._state == "waiting":
                self._state = "stopped"

    def interrupt(self) -> None:
        """The next turn never came, for instance because the queue is full."""
        with self._lock:
            if self._state == "waiting":
                self._state = "failed"
                self._error = (
                    "The next run found no place in the line. What was measured is kept; press Run"
                    " to go on."
                )

    def settle(self) -> None:
        """Nothing is missing: the sweep is over before it began."""
        with self._lock:
            self._state = "done"

    # What follows is called by `play_turn` only.

    def begin(self, turn: int) -> bool:
        """True if this is the turn that comes next; each begins once, whoever asks for it."""
        with self._lock:
            if turn != self._turn or self.cancel.is_set() or self._state != "waiting":
                return False
            self._turn += 1
            self._state = "running"
            self._began = time.monotonic()
            if self._ended:
                self._gap_seconds.append(self._began - self._ended)
            return True

    def use(self, pair: Any) -> None:
        """This pair runs. What another one has measured is no part of the sweep."""
        models = f"{pair.name}, {pair.device}, {pair.weights}, {pair.engine} engine"
        with self._lock:
            if self._models not in ("", models):
                self._runs, self._rows = {}, {}
            self._models = models
            self._notes = tuple(pair.notes)

    def busy(self, doing: str) -> None:
        """What the run that goes on is busy with."""
        with self._lock:
            self._doing = doing

    def add(self, setting: Setting, task: Task, run: Run, key: str) -> None:
        """A run is finished."""
        with self._lock:
            self._runs[setting, task.id] = (run, key)
            row = self._row(setting)
            assert row is not None
            self._rows[setting] = row

    def leave_out(self, setting: Setting, message: str) -> None:
        """A setting failed; its further runs are not made."""
        with self._lock:
            self._failures[setting] = message

    def fail(self, message: str) -> None:
        """The sweep cannot go on."""
        with self._lock:
            self._state, self._error = "failed", message

    def end_turn(self) -> int | None:
        """The turn is over; returns the next one, None if there is none."""
        with self._lock:
            self._doing = ""
            self._ended = time.monotonic()
            self._turn_seconds.append(self._ended - self._began)
            if self._state != "running":
                return None
            if self.cancel.is_set():
                self._state = "stopped"
                return None
            if not self._missing():
                self._state = "done"
                return None
            self._state = "waiting"
            return self._turn

    def _missing(self) -> list[Job]:
        request = self.request
        settings = [one for one in request.settings if one not in self._failures]
        done = [run.record for run, _ in self._runs.values()]
        return jobs(request.tasks, settings, done, request.config.seed)

    def _done(self, request: SweepRequest) -> int:
        """Runs of a request that are there."""
        return sum(
            (setting, task.id) in self._runs
            for task in request.tasks
            for setting in request.settings
        )

    def _row(self, setting: Setting) -> Row | None:
        """The figures of a setting, over the prompts of this request and no others."""
        found = [self._runs.get((setting, task.id)) for task in self.request.tasks]
        own = [kept[0] for kept in found if kept is not None]
        if not own:
            return None
        (row,) = rows([Line(setting, own[0].engine, own[0].dtype)], own, self.request.config)
        return row

    def _remaining(self, missing: int) -> float | None:
        if not self._turn_seconds:
            return None
        gap = statistics.median(self._gap_seconds) if self._gap_seconds else 0.0
        return missing * (statistics.fmean(self._turn_seconds) + gap)


class Sweeps:
    """The last sweeps of all visitors, found by their unguessable ids."""

    def __init__(self, limit: int = MAX_SWEEPS) -> None:
        self._kept: Latest[Sweep] = Latest(limit)
        self._latest: dict[str, Sweep] = {}
        self._lock = threading.Lock()

    def open(self, visit: str, request: SweepRequest) -> Sweep:
        """A new sweep of a visit. It has what the visit's latest one measured, if that fits."""
        with self._lock:
            before = self._fitting(visit, request)
            sweep = Sweep(request, before)
            self._latest[visit] = sweep
            for gone in self._kept.put(sweep.id, sweep):
                self._latest = {v: one for v, one in self._latest.items() if one is not gone}
        return sweep

    def get(self, sweep_id: object) -> Sweep | None:
        """The sweep of that id; None if it is unknown or forgotten."""
        return self._kept.get(sweep_id)

    def forget(self, visit: str) -> None:
        """The visit's next sweep begins anew."""
        with self._lock:
            self._latest.pop(visit, None)

    def already(self, visit: str, request: SweepRequest) -> int:
        """How many runs of a request the visit has already."""
        with self._lock:
            before = self._fitting(visit, request)
        return before.done_of(request) if before else 0

    def _fitting(self, visit: str, request: SweepRequest) -> Sweep | None:
        before = self._latest.get(visit) if visit else None
        return before if before is not None and before.request.config == request.config else None


def play_turn(
    sweep: Sweep, turn: int, source: PairSource, stream: Stream, shelve: Shelve
) -> Generator[int | None, None, None]:
    """Makes one run of a sweep; yields whenever the page has something new to show.

    The last value is the number of the next turn, None if the sweep is over; those before it are
    None. Closing the generator (a closed tab) or `sweep.stop` ends the run within one target pass.
    """
    if not sweep.begin(turn):
        return
    ended = False
    try:
        pair = yield from _wait_for_pair(sweep, source)
        if pair is not None:
            sweep.use(pair)
            todo = sweep.missing()
            if todo:
                yield from _run(sweep, *todo[0], pair, stream, shelve)
        ended = True
        yield sweep.end_turn()
    finally:
        if not ended:
            sweep.cancel.set()
            sweep.end_turn()


def _wait_for_pair(sweep: Sweep, source: PairSource) -> Generator[None, None, Any]:
    """Returns the pair; None where there is none, or Stop was pressed."""

    def waiting(line: str) -> None:
        sweep.busy(f"waiting for the models, {line}")

    if not (yield from wait_for_models(source, sweep.cancel, waiting)):
        return None
    if source.pair is None:
        sweep.fail(source.status().text)
    return source.pair


def _run(
    sweep: Sweep, task: Task, setting: Setting, pair: Any, stream: Stream, shelve: Shelve
) -> Generator[None, None, None]:
    tokens, sent_at = 0, 0.0
    shared = sweep.request.config
    sweep.busy("reading the prompt")
    try:
        events: Any = stream(
            setting.method,
            pair,
            **task.request,
            config=setting.config(shared, task_seed(shared.seed, task)),
            cancel=sweep.cancel,
            deadline_seconds=DEADLINE_SECONDS,
        )
        with contextlib.closing(events):
            for event in events:
                if isinstance(event, Trace):
                    _keep(sweep, setting, task, event, shelve)
                    break
                if not event.decision.provisional:
                    tokens += len(event.decision.emitted)
                sweep.busy(f"{tokens} tokens")
                if time.monotonic() - sent_at >= INTERVAL_SECONDS:
                    sent_at = time.monotonic()
                    yield
    except DeadlineExceeded as error:
        sweep.leave_out(setting, f"prompt {task.id}: {error}")
    except Cancelled:
        return
    except MtadError as error:
        sweep.leave_out(setting, f"prompt {task.id}: {error}")
    except Exception as error:
        _log.exception("%s on %s failed", setting, task.id)
        name = type(error).__name__
        sweep.leave_out(setting, f"prompt {task.id}: failed ({name}); the server's log says more")


def _keep(sweep: Sweep, setting: Setting, task: Task, trace: Trace, shelve: Shelve) -> None:
    if trace.stop_reason == "cancelled":
        return
    if trace.stop_reason == "deadline":
        sweep.leave_out(setting, f"prompt {task.id}: took longer than a run may here")
        return
    key = shelve(setting, task, trace)
    sweep.add(setting, task, Run.of(trace, setting, task), key)
