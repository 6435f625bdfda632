"""`mtad generate`: one method writes one answer, streamed to stdout while it is decoded."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mtad.catalogue import method_info
from mtad.cli_io import (
    UsageError,
    check_separate,
    check_writable,
    read_prompt,
    stop_on_interrupt,
    write_atomically,
)
from mtad.cli_options import with_config
from mtad.cli_progress import loading
from mtad.config import DecodeConfig
from mtad.errors import ConfigError
from mtad.terminal import clean, console, header_lines, legend, step_text, summary_lines
from mtad.text import check_content
from mtad.trace import Step, Trace

PairOption = Annotated[str, typer.Option("--pair", help="Models; see `mtad pairs`.")]
DraftOption = Annotated[
    Path | None,
    typer.Option(help="Folder of a draft of mtad distill, in place of the pair's own."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 … Default: the fastest that there is."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16. Default: what suits the device."),
]


@with_config
def generate(
    config: DecodeConfig,
    prompt: Annotated[
        str | None,
        typer.Argument(help='The prompt; "-", or nothing and a pipe, reads the standard input.'),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="Decoding method; see `mtad methods`.")
    ] = "mtad",
    pair: PairOption = "smollm2",
    draft: DraftOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Read the prompt from this file."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="System prompt of the chat."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Apply no chat template.")] = False,
    show: Annotated[
        bool,
        typer.Option(
            "--show",
            help="Mark accepted, rejected, bonus and corrected tokens; with brackets in a pipe.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Save the trace to this file."),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(help="Stop after this many seconds. Above 0."),
    ] = None,
) -> None:
    """Answer a prompt; the text goes to stdout while it is decoded, the measures to stderr."""
    if raw and system is not None:
        raise UsageError("--system needs a chat template, and --raw applies none: drop one.")
    if deadline is not None and not 0 < deadline < float("inf"):
        raise UsageError(f"--deadline is {deadline}, but must be a finite number above 0.")
    check_method(method)
    if json_file is not None:
        check_separate({"--prompt-file": prompt_file, "--json": json_file})
        check_writable(json_file)
    text = check_content(read_prompt(prompt, prompt_file), "The prompt")
    asked = as_prompt(text, system=system, raw=raw)

    from mtad.runner import READER_SECONDS, stream

    models = load(pair, device, dtype, draft)
    out = console(sys.stdout)
    with stop_on_interrupt() as stop:
        events = stream(
            method,
            models,
            **asked,
            config=config,
            cancel=stop,
            deadline_seconds=deadline,
            interval_seconds=READER_SECONDS,
        )
        trace = _print_events(events, out, show=show)
    if json_file is not None:
        write_atomically(json_file, trace.to_json())
    err = console(sys.stderr)
    for line in ("", *header_lines(trace), *summary_lines(trace)):
        err.print(line, soft_wrap=True)
    if trace.stop_reason == "cancelled":
        raise typer.Exit(130)


def check_method(method: str) -> None:
    """Refuses a method that does not exist before any model is loaded.

    Raises:
        UsageError: the message lists those that exist.
    """
    try:
        method_info(method)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def as_prompt(text: str, *, system: str | None = None, raw: bool = False) -> dict[str, Any]:
    """The keyword argument by which the runner takes this prompt."""
    if raw:
        return {"raw_prompt": text}
    if system is not None:
        return {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": text},
            ]
        }
    return {"prompt": text}


def method_ids(text: str) -> list[str]:
    """Ids with commas between, each once.

    Raises:
        UsageError: there is no such method.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        check_method(name)
    return list(dict.fromkeys(names))


def load(
    pair: str,
    device: str | None,
    dtype: str | None,
    draft: Path | None,
    engine: str | None = None,
) -> Any:
    """The pair, loaded with a bar on stderr; with the draft of a folder, if one is given."""
    from mtad.draft_files import load_draft, read_draft
    from mtad.pairs import load_pair

    if draft is not None:
        read_draft(draft)  # what is no draft is refused before a model is loaded
    with loading(sys.stderr) as progress:
        models = load_pair(pair, device=device, dtype=dtype, engine=engine, progress=progress)
    if draft is None:
        return models
    found = load_draft(draft, models.target)
    name = draft.resolve().name
    return dataclasses.replace(
        models, draft=found, draft_name=name, draft_revision="", draft_note="", notes=()
    )


def _print_events(events: Iterable[Step | Trace], out: Console, *, show: bool) -> Trace:
    """Prints steps as they come; the last event is the trace."""
    styled = out.is_terminal
    if show:
        out.print(legend(styled=styled), soft_wrap=True)
    trace = None
    last = "\n"
    with _Hypothesis(console(sys.stderr)) as hypothesis:
        for event in events:
            if isinstance(event, Trace):
                trace = event
                continue
            if event.decision.provisional:
                hypothesis.show(event.text)
                continue
            hypothesis.hide()
            last = event.text or last
            if show:
                out.print(step_text(event, styled=styled), end="", soft_wrap=True)
            else:
                # Into a pipe goes what the model wrote; only a terminal must be protected.
                out.file.write(clean(event.text) if out.is_terminal else event.text)
            out.file.flush()
    if not last.endswith("\n"):
        out.file.write("\n")
        out.file.flush()
    if trace is None:
        raise RuntimeError("the runner ended without a trace")
    return trace


class _Hypothesis:
    """Shows on a terminal what `beam` holds for best so far; it is gone when the answer comes."""

    def __init__(self, err: Console) -> None:
        self._status = err.status("") if err.is_terminal else None
        self._shown = False

    def __enter__(self) -> _Hypothesis:
        return self

    def __exit__(self, *exception: object) -> None:
        self.hide()

    def show(self, text: str) -> None:
        if self._status is None:
            return
        tail = clean(text[-60:]).replace("\n", " ").replace("\t", " ")
        self._status.update(Text(f"best so far: …{tail}"))
        if not self._shown:
            self._status.start()
            self._shown = True

    def hide(self) -> None:
        if self._status is not None and self._shown:
            self._status.stop()
            self._shown = False
