"""Files that are whole or not there, and how a long run is watched and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import filelock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtad.errors import Cancelled, MtadError

_KEY = "mtad"


class DistillError(MtadError):
    """A file or folder cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Watch:
    """Sees a long run, and stops it.

    Attributes:
        progress: called with a stage, the tokens done, the tokens in all, and a note.
        say: called with a line that should stay in sight.
        cancel: set it to stop; nothing that is finished is lost.
    """

    progress: Callable[[str, int, int, str], None] = lambda stage, done, total, note: None
    say: Callable[[str], None] = lambda line: None
    cancel: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises `Cancelled` if the run shall stop."""
        if self.cancel.is_set():
            raise Cancelled("Stopped. What is finished is kept: the same command goes on from it.")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all; the same content gives the same bytes."""
    # One entry, since safetensors writes several in an order of its own.
    with replacing(path) as partial:
        save_file(tensors, partial, {_KEY: json.dumps(metadata)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped into memory, and the metadata of a file by `save_tensors`.

    Raises:
        ValueError: it is damaged, or another kind of file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})[_KEY])
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is no object")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (KeyError, RecursionError):
        raise ValueError("it has no metadata of ours") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to; what was written becomes `path` once it is on the disk.

    Only for a folder that one process writes at a time.

    Raises:
        DistillError: the disk refused.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        try:
            yield partial
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
            partial.chmod(0o644)  # safetensors writes for the owner's eyes only
            partial.replace(path)
            if os.name != "nt":  # Windows opens no folder
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        finally:
            partial.unlink(missing_ok=True)
    except (SafetensorError, OSError) as error:  # the first also for a disk that is full
        raise DistillError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}. Make room"
            " there, or choose another folder, and run the same command again."
        ) from error


def write_text(path: Path, text: str) -> None:
    """A UTF-8 text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def locked(folder: Path, phase: str) -> Iterator[None]:
    """Makes the folder, and keeps a second process from doing the same phase in it.

    Raises:
        DistillError: another process does, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f".{phase}.lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise DistillError(
            f"Another process does the phase {phase} in {folder}. Wait for it, or choose another"
            " --work folder."
        ) from None
    except OSError as error:
        raise DistillError(f"{folder} cannot be used: {error.strerror or error}.") from error
    try:
        yield
    finally:
        lock.release()
