"""The command line: python -m mtad COMMAND; `--help` lists the commands.

Exit codes: 0 done, 1 an error or a failed run, 2 a command line that makes no sense, 130 stopped
by Ctrl-C. The answer of a model goes to stdout, everything about it to stderr. `methods`,
`replay` and every --help load neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from mtad.catalogue import methods as catalogue
from mtad.cli_acceptance import acceptance
from mtad.cli_bench import bench
from mtad.cli_compare import compare
from mtad.cli_distill import distill
from mtad.cli_generate import generate
from mtad.cli_io import UsageError, read_trace, stop_on_interrupt
from mtad.cli_progress import loading
from mtad.errors import Cancelled, DeadlineExceeded, MtadError
from mtad.terminal import clean, console, header_lines, legend, step_text, summary_lines
from mtad.trace import Trace
from mtad.version import __version__

_MAX_WAIT_SECONDS = 3600.0


class _Group(TyperGroup):
    """Turns exceptions into a message on stderr and an exit code, in one place."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _fail(ctx, error, 2) from None
        except MtadError as error:
            stopped = isinstance(error, Cancelled) and not isinstance(error, DeadlineExceeded)
            raise _fail(ctx, error, 130 if stopped else 1) from None
        except KeyboardInterrupt:
            print("\nStopped.", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Whoever read our output has seen enough. Nothing more can be flushed to it.
            _forget_stdout()
            raise typer.Exit(1) from None
        except OSError as error:
            raise _fail(ctx, error, 1) from None


def _fail(ctx: Any, error: Exception, code: int) -> typer.Exit:
    if ctx.params.get("debug"):
        traceback.print_exception(error)
    print(f"mtad: {clean(str(error))}", file=sys.stderr)
    return typer.Exit(code)


def _forget_stdout() -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)


app = typer.Typer(
    cls=_Group,
    name="mtad",
    help="Multi-token assisted decoding and its baselines, on real models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"mtad {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MTAD_DEBUG", help="Show tracebacks of errors.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the decoding methods and the parameters that each one reads."""
    if as_json:
        print(json.dumps([dataclasses.asdict(info) for info in catalogue()], indent=2))
        return
    table = Table("id", "title", "same distribution as the target", "parameters of its own")
    shared = set.intersection(*(set(info.parameters) for info in catalogue()))
    for info in catalogue():
        own = ", ".join(name for name in info.parameters if name not in shared)
        table.add_row(info.id, info.title, "yes" if info.lossless else "no", own or "none")
    out = console(sys.stdout)
    out.print(table)
    names = [name for name in catalogue()[0].parameters if name in shared]
    out.print(f"Every method reads: {', '.join(names)}.")


@app.command()
def pairs(
    device: Annotated[
        str | None, typer.Option(help="Judge this device. Default: the fastest that there is.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the pairs of models, and which of them this machine can hold."""
    from mtad.pairs import presets, unavailable_reason

    known = [(preset, unavailable_reason(preset, device)) for preset in presets()]
    if as_json:
        entries = [
            {**dataclasses.asdict(preset), "unavailable": reason} for preset, reason in known
        ]
        print(json.dumps(entries, indent=2))
        return
    table = Table("id", "pair", "licence", "runs here")
    for preset, reason in known:
        license_text = preset.license + (" (accept it on the hub first)" if preset.gated else "")
        table.add_row(preset.id, preset.title, license_text, "yes" if reason is None else reason)
    console(sys.stdout).print(table)


@app.command()
def fetch(
    force: Annotated[bool, typer.Option("--force", help="Fetch and convert again.")] = False,
) -> None:
    """Fetch the embedded target model into the cache (MTAD_HOME, or ~/.cache/mtad)."""
    from mtad.fetch import fetch as fetch_weights

    with stop_on_interrupt() as stop, loading(sys.stderr) as progress:
        folder = fetch_weights(force=force, progress=progress, cancel=stop)
    print(folder)


@app.command()
def replay(
    file: Annotated[str, typer.Argument(help='A trace in JSON; "-" reads the standard input.')],
    speed: Annotated[float, typer.Option(help="How much faster than it ran. Above 0.")] = 1.0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print everything at once.")] = False,
) -> None:
    """Show a recorded run again, pass by pass, without a model."""
    if not 0 < speed < float("inf"):
        raise UsageError(f"--speed is {speed}, but must be a finite number above 0.")
    _replay(read_trace(file), None if no_wait else speed)


def _replay(trace: Trace, speed: float | None) -> None:
    out = console(sys.stdout)
    styled = out.is_terminal and not out.legacy_windows
    for line in header_lines(trace):
        out.print(line, soft_wrap=True)
    out.print(legend(styled), soft_wrap=True)
    out.print()
    before = 0.0
    for step in trace.steps:
        if speed is not None:
            time.sleep(min(max(step.seconds - before, 0.0) / speed, _MAX_WAIT_SECONDS))
        before = max(before, step.seconds)
        out.print(step_text(step, styled=styled), end="", soft_wrap=True)
        out.file.flush()
    out.print("\n")
    for line in summary_lines(trace):
        out.print(line, soft_wrap=True)


app.command()(generate)
app.command()(compare)
app.command()(distill)
app.command()(acceptance)
app.command()(bench)


def main() -> None:
    """Entry of `python -m mtad` and of the script `mtad`."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark; a run does not end.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="mtad")
