"""What the commands share with the outside: prompts, files, and Ctrl-C. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mtad.errors import MtadError, PromptError, TraceError
from mtad.fields import is_text
from mtad.trace import MAX_TRACE_BYTES, Trace

MAX_PROMPT_FILE_BYTES = 16 * 1024 * 1024


class UsageError(MtadError):
    """The command line asks for something that makes no sense; exit code 2."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a prompt set.

    Attributes:
        id: names it in files and messages.
        text: what is asked; of a conversation the last turn.
        kind: what sort of task it is, "" if unknown.
        messages: (role, content) of every turn of a conversation; empty for a single prompt.
    """

    id: str
    text: str
    kind: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    def request(self, *, raw: bool = False) -> dict[str, Any]:
        """The keyword argument by which the runner takes it.

        Raises:
            UsageError: it is a conversation, and `raw` asks for no chat template.
        """
        if not self.messages:
            return {"raw_prompt" if raw else "prompt": self.text}
        if raw:
            raise UsageError(
                f"Prompt {self.id!r} is a conversation and needs a chat template, and --raw"
                " applies none: drop one."
            )
        return {"messages": [{"role": role, "content": text} for role, text in self.messages]}


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt from the argument, a file, or stdin ("-", or nothing and a pipe).

    Raises:
        UsageError: none or two of them were given.
        PromptError: the file cannot be read as UTF-8 text.
    """
    if argument is not None and file is not None:
        raise UsageError("Give the prompt as an argument or with --prompt-file, not both.")
    if file is not None:
        return read_text(file)
    if argument is None and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError(
            'There is no prompt. Give it as an argument, with --prompt-file FILE, or "-" to'
            " read it from the standard input."
        )
    if argument is None or argument == "-":
        if sys.stdin is None:
            raise UsageError("There is no standard input to read the prompt from.")
        return _decode(sys.stdin.buffer.read(MAX_PROMPT_FILE_BYTES + 1), "The standard input")
    return argument


def read_text(file: Path) -> str:
    """A UTF-8 text file, without its last line end.

    Raises:
        PromptError: it cannot be read, is too large, or is no UTF-8 text.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_PROMPT_FILE_BYTES + 1)
    except OSError as error:
        raise PromptError(f"{file} cannot be read: {error.strerror}.") from None
    return _decode(data, str(file))


def _decode(data: bytes, name: str) -> str:
    if len(data) > MAX_PROMPT_FILE_BYTES:
        raise PromptError(f"{name} is larger than {MAX_PROMPT_FILE_BYTES:,} bytes.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is no UTF-8 text (byte {error.start}).") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def read_prompts(file: Path) -> list[Prompt]:
    """A prompt set: JSON lines {"prompt": …, "id": …, "kind": …}, or else one prompt a line.

    In place of "prompt", "messages" may hold a conversation: [{"role": …, "content": …}, …], the
    last turn the user's.

    Raises:
        PromptError: the file cannot be read, a line of a .jsonl file is no such object or holds
            half of a character, an id occurs twice, or there is no prompt in it.
    """
    prompts = []
    # Not splitlines(): a JSON string may hold U+2028, which is no line end there.
    for count, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        if file.suffix == ".jsonl":
            prompts.append(_parse_line(file, count, line))
        else:
            prompts.append(Prompt(f"line-{count}", line.strip()))
    if not prompts:
        raise PromptError(f"{file} holds no prompt.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise PromptError(f"{file} has the id {prompt.id!r} more than once.")
        seen.add(prompt.id)
    return prompts


def _parse_line(file: Path, count: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{file}, line {count} is no JSON: {error}.") from None
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise PromptError(
            f'{file}, line {count} is no JSON object with either a "prompt" or "messages".'
        )
    turns = _turns(file, count, entry["messages"]) if "messages" in entry else ()
    text = turns[-1][1] if turns else entry["prompt"]
    if not isinstance(text, str):
        raise PromptError(f'{file}, line {count}: "prompt" is no text.')
    found = Prompt(str(entry.get("id", f"line-{count}")), text, str(entry.get("kind", "")), turns)
    texts = [("id", found.id), ("kind", found.kind), ("prompt", text)]
    for name, value in [*texts, *(("messages", content) for _, content in turns)]:
        # JSON can spell a lone surrogate, but neither a tokenizer nor a UTF-8 file takes it.
        if not is_text(value):
            raise PromptError(
                f'{file}, line {count}: "{name}" holds half of a character (a lone surrogate).'
                " Remove it."
            )
    return found


def _turns(file: Path, count: int, given: Any) -> tuple[tuple[str, str], ...]:
    good = isinstance(given, list) and all(
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
        for turn in given
    )
    if not good or not given or given[-1]["role"] != "user":
        raise PromptError(
            f'{file}, line {count}: "messages" must be a list of turns with a "role" (system,'
            ' user or assistant) and a text "content", the last one the user\'s.'
        )
    return tuple((turn["role"], turn["content"]) for turn in given)


def read_trace(file: str) -> Trace:
    """A trace from a file, or from stdin for "-".

    Raises:
        TraceError: it cannot be read, or is no trace.
    """
    try:
        if file == "-" and sys.stdin is None:
            raise UsageError("There is no standard input to read the trace from.")
        if file == "-":
            return Trace.from_json(sys.stdin.buffer.read(MAX_TRACE_BYTES + 1))
        with Path(file).open("rb") as stream:
            return Trace.from_json(stream.read(MAX_TRACE_BYTES + 1))
    except OSError as error:
        raise TraceError(f"{file} cannot be read: {error.strerror}.") from None


def check_writable(file: Path) -> None:
    """Refuses a file that cannot be written, before a long run and not after it.

    Raises:
        UsageError: its folder does not exist or cannot be written, or it is a folder.
    """
    if file.is_dir():
        raise UsageError(f"{file} is a folder; name a file in it.")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"{file} cannot be written: there is no folder {file.parent}.")
    if not os.access(file.absolute().parent, os.W_OK):
        raise UsageError(f"{file} cannot be written: the folder {file.parent} is read-only.")
    try:
        if file.exists() and not file.is_file():
            raise UsageError(f"{file} is a device or a pipe; name an ordinary file.")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}.") from None


def check_separate(files: Mapping[str, Path | None]) -> None:
    """Refuses two options that name one file: writing the one would destroy the other.

    Args:
        files: by option, the file that it names.

    Raises:
        UsageError: two of them are the same, links followed.
    """
    given = [(option, file) for option, file in files.items() if file is not None]
    for (one, first), (other, second) in itertools.combinations(given, 2):
        if _is_same(first, second):
            raise UsageError(
                f"{one} and {other} both name {second}, and writing the one would destroy the"
                f" other. Name another file with {other}."
            )


def _is_same(first: Path, second: Path) -> bool:
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return first.samefile(second)
    except OSError:  # one of them does not exist
        return False


def write_atomically(file: Path, text: str) -> None:
    """Writes the file whole or not at all; whoever reads meanwhile sees the old one.

    Raises:
        MtadError: the disk refused; the message says why.
    """
    temporary: Path | None = None
    try:
        file = Path(os.path.realpath(file))  # a link stays a link
        handle, name = tempfile.mkstemp(prefix=".mtad-", dir=file.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes it private; a result is for whoever may read the folder.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(file)
    except OSError as error:
        raise MtadError(f"{file} cannot be written: {error.strerror}.") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event, so that a run can end between two passes.

    The second one raises KeyboardInterrupt as usual.
    """
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT)
    # A shell that starts a job in the background has it ignore Ctrl-C; that stays so.
    if not main or previous is signal.SIG_IGN:
        yield stop
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
