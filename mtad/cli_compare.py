"""`mtad compare`: several methods on the same prompts, one run after another on an idle device.

Every method is warmed up first. Then, repeat by repeat and prompt by prompt, the methods take
turns in an order that is shuffled each time, so that a machine that becomes warm or busy does
not favour one of them. All methods of a repeat share a seed.
"""

from __future__ import annotations

import dataclasses
import random
import re
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtad.catalogue import methods as catalogue
from mtad.cli_generate import (
    DeviceOption,
    DraftOption,
    DtypeOption,
    PairOption,
    load,
    method_ids,
)
from mtad.cli_io import (
    Prompt,
    UsageError,
    check_separate,
    check_writable,
    read_prompts,
    stop_on_interrupt,
    write_atomically,
)
from mtad.cli_options import with_config
from mtad.cli_table import Run, markdown, notes, rich_table, rows
from mtad.config import MAX_SEED, DecodeConfig
from mtad.errors import Cancelled, MtadError
from mtad.terminal import clean, console, number
from mtad.text import check_content
from mtad.trace import Trace

MAX_REPEATS = 1000
WARM_UP_TOKENS = 8

# decode(method, prompt, config) → trace; stop_reason "cancelled" once Ctrl-C was pressed
Decode = Callable[[str, Prompt, DecodeConfig], Trace]


@dataclass
class Comparison:
    """What has been finished so far.

    Attributes:
        planned: runs that there shall be in all.
        seed: of the first repeat; each further one takes the next number.
        runs: the finished ones.
        failures: by method, the message of the error that took it out of the comparison.
        interrupted: True if Ctrl-C ended it.
    """

    planned: int
    seed: int
    runs: list[Run] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


@with_config
def compare(
    config: DecodeConfig,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt, if there is only one."),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", "-m", help='Ids with commas between, or "all".')
    ] = "autoregressive,speculative,mtad",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Prompt set: .jsonl with "prompt" or "messages", "id", "kind", or a line each.'
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each method and prompt. 1 to 1000.")] = 1,
    pair: PairOption = "smollm2",
    draft: DraftOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Apply no chat template.")] = False,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Save the traces: to FILE.jsonl, one a line, or to a folder."),
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
) -> None:
    """Run several methods on the same prompts and print one table."""
    chosen = _methods(methods)
    check_repeats(repeats)
    if (prompt is None) == (prompts is None):
        raise UsageError("Give either one PROMPT or --prompts FILE.")
    if prompts is not None:
        asked = read_prompts(prompts)
    else:
        asked = [Prompt("prompt", check_content(prompt, "The prompt"))]
    requests = {one.id: one.request(raw=raw) for one in asked}
    one_file = json_path is not None and json_path.suffix == ".jsonl"
    check_separate({"--prompts": prompts, "--json": json_path})
    if json_path is not None:
        _prepare(json_path, one_file)

    from mtad.runner import run

    models = load(pair, device, dtype, draft)
    err = console(sys.stderr)
    with stop_on_interrupt() as stop:

        def decode(method: str, prompt: Prompt, config: DecodeConfig) -> Trace:
            given = requests[prompt.id]
            trace: Trace = run(method, models, **given, config=config, cancel=stop)
            return trace

        done = Comparison(len(chosen) * len(asked) * repeats, config.seed)
        try:
            for finished in _take_turns(done, chosen, asked, repeats, config, decode, stop, err):
                if json_path is not None and not one_file:
                    write_atomically(json_path / _file_name(finished), finished.trace.to_json())
        except (KeyboardInterrupt, Cancelled):
            done.interrupted = True
    if json_path is not None and one_file and done.runs:
        write_atomically(json_path, "".join(one.trace.to_json() + "\n" for one in done.runs))
    _report(done, chosen, as_markdown)
    if done.interrupted:
        raise typer.Exit(130)
    if done.failures:
        raise typer.Exit(1)


def _methods(text: str) -> list[str]:
    if text.strip() == "all":
        return [info.id for info in catalogue()]
    return method_ids(text)


def check_repeats(repeats: int) -> None:
    """Refuses a number of repeats.

    Raises:
        UsageError: names the allowed range.
    """
    if not 1 <= repeats <= MAX_REPEATS:
        raise UsageError(f"--repeats is {repeats}, but must be from 1 to {MAX_REPEATS}.")


def _prepare(path: Path, one_file: bool) -> None:
    """Makes sure, before anything runs, that the traces can be saved."""
    if one_file:
        check_writable(path)
        return
    if path.suffix == ".json":
        raise UsageError(f"{path} cannot hold several traces: name a folder, or a file.jsonl.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The folder {path} cannot be made: {error.strerror}.") from None
    check_writable(path / "trace.json")


def _take_turns(
    done: Comparison,
    methods: Sequence[str],
    prompts: Sequence[Prompt],
    repeats: int,
    config: DecodeConfig,
    decode: Decode,
    stop: threading.Event,
    err: Console,
) -> Iterator[Run]:
    """Yields each run when it is finished, and keeps it in `done`."""
    with _Progress(err, done.planned) as progress:
        order = list(turns(methods, prompts, repeats, config.seed))
        _warm_up(done, methods, prompts[0], config, decode, progress)
        for count, (repeat, prompt, method) in enumerate(order, 1):
            if stop.is_set():
                break
            if method in done.failures:
                progress.advance()
                continue
            progress.say(f"{method}: {prompt.id}")
            seed = (config.seed + repeat) % (MAX_SEED + 1)
            try:
                trace = decode(method, prompt, dataclasses.replace(config, seed=seed))
            except Cancelled:
                break
            except MtadError as error:
                done.failures[method] = f"{prompt.id}: {error}"
                progress.advance()
                continue
            if trace.stop_reason == "cancelled":
                break
            finished = Run(prompt.id, repeat, trace)
            done.runs.append(finished)
            speed = number(trace.summary.tokens_per_second, 1)
            progress.finish(f"{count}/{done.planned} {method}, {prompt.id}: {speed} tokens/s")
            yield finished
        done.interrupted = stop.is_set()


def turns(
    methods: Sequence[str], prompts: Sequence[Prompt], repeats: int, seed: int
) -> Iterator[tuple[int, Prompt, str]]:
    """(repeat, prompt, method) of every run: methods side by side, their order shuffled anew."""
    chance = random.Random(seed)
    for repeat in range(repeats):
        for prompt in prompts:
            for method in chance.sample(list(methods), len(methods)):
                yield repeat, prompt, method


def _warm_up(
    done: Comparison,
    methods: Sequence[str],
    prompt: Prompt,
    config: DecodeConfig,
    decode: Decode,
    progress: _Progress,
) -> None:
    """A few tokens of every method: compiled code, pages and caches are in place afterwards."""
    short = dataclasses.replace(config, max_new_tokens=min(WARM_UP_TOKENS, config.max_new_tokens))
    for method in methods:
        progress.say(f"{method}: warm-up")
        try:
            trace = decode(method, prompt, short)
        except Cancelled:
            return
        except MtadError as error:
            done.failures[method] = f"{prompt.id}: {error}"
            continue
        if trace.stop_reason == "cancelled":
            return


class _Progress:
    """A bar on a terminal, a line for each finished run elsewhere."""

    def __init__(self, err: Console, total: int) -> None:
        self._err = err
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.update(self._task, description=clean(text).replace("\n", " "))

    def advance(self) -> None:
        self._bar.advance(self._task)

    def finish(self, text: str) -> None:
        self._bar.advance(self._task)
        if not self._err.is_terminal:
            self._err.print(clean(text).replace("\n", " "), soft_wrap=True)


def _file_name(run: Run) -> str:
    """A name without surprises, whatever the prompt set calls its prompts."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", run.prompt_id)[:80]
    if safe != run.prompt_id:
        safe += f"-{zlib.crc32(run.prompt_id.encode(errors='replace')):08x}"
    return f"{run.trace.method}-{safe}-{run.repeat + 1}.json"


def _report(done: Comparison, methods: Sequence[str], as_markdown: bool) -> None:
    out, err = console(sys.stdout), console(sys.stderr)
    found = rows(methods, done.runs)
    if as_markdown:
        out.file.write(markdown(found) + "\n\n")
        out.file.write("\n".join(f"- {line}" for line in _footer(done, found)) + "\n")
    elif found:
        out.print(rich_table(found, out.width))
        for line in _footer(done, found):
            out.print(line, soft_wrap=True)
    if done.interrupted:
        err.print(f"Stopped: {len(done.runs)} of {done.planned} runs were finished.")
    for method, message in done.failures.items():
        err.print(clean(f"mtad: {method} failed at {message}"), soft_wrap=True)


def _footer(done: Comparison, found: Sequence[Any]) -> list[str]:
    lines = notes(found)
    if done.runs:
        trace = done.runs[0].trace
        prompts = len({run.prompt_id for run in done.runs})
        repeats = len({run.repeat for run in done.runs})
        draft = next((run.trace.draft.name for run in done.runs if run.trace.draft), None)
        models = trace.target.name + (f", draft {draft}" if draft else "")
        lines.append(
            f"{models}; {trace.device}, {trace.dtype}, {trace.engine};"
            f" {len(done.runs)} of {done.planned} runs (prompts: {prompts}, repeats: {repeats},"
            f" seed: {done.seed})."
        )
        lines += dict.fromkeys(note for run in done.runs for note in run.trace.notes)
    return [clean(line).replace("\n", " ") for line in lines]
