"""Compiles the kernels for this machine, and loads them.

Compiling takes seconds and happens once: the library is kept in the cache folder under a name
that changes with the source, the compiler, its flags and the processor, and that holds its
checksum, so that a damaged one is made again and not loaded. A machine without a C compiler has no
native engine, and `unavailable_reason` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mtad.errors import PairError
from mtad.fetch import cache_root
from mtad.native.abi import declare
from mtad.processor import cpu_info

SOURCE = Path(__file__).with_name("kernels.c")
# No flag may let the compiler reorder sums: a row's result must not depend on its neighbours.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
_COMPILE_SECONDS = 120
_BUILD = "build-"


@functools.cache
def load(flags: tuple[str, ...] | None = None) -> ctypes.CDLL:
    """The kernels, compiled first if they are not there.

    Args:
        flags: instead of those that compile for this very processor; for tests.

    Raises:
        PairError: there is no compiler, or it failed; the message says how to go on.
    """
    compiler = _compiler()
    if compiler is None:
        raise PairError(
            "The native engine is compiled once on the machine that it runs on, and there is no C"
            " compiler here. Install gcc or clang (or set CC), or choose another engine."
        )
    failures = []
    for chosen in _NATIVE_FLAGS if flags is None else (flags,):
        key, folder = _key(compiler, chosen), cache_root() / "kernels"
        try:
            file = _cached(folder, key)
            if file is None and _writable(folder):
                _sweep(folder)
                file = _compile(compiler, chosen, folder, key)
            if file is not None:
                return declare(ctypes.CDLL(str(file)))
            # A cache that came with an image may be read-only: compile for this process alone.
            with tempfile.TemporaryDirectory(prefix="mtad-kernels-") as own:
                file = _compile(compiler, chosen, Path(own), key)
                return declare(ctypes.CDLL(str(file)))
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            failures.append(str(output).strip().splitlines()[-1][:200] if output else "?")
    raise PairError(
        f"The native engine could not be compiled with {compiler}: {failures[0]}. Install another"
        " C compiler (or set CC), or choose another engine."
    )


@functools.cache
def unavailable_reason() -> str | None:
    """Why there are no kernels on this machine; None if there are. Compiles them if need be."""
    try:
        load()
    except PairError as error:
        return str(error)
    return None


def description() -> str:
    """Which inner product the kernels have, for a line that says where something ran."""
    return f"native kernels ({load().mtad_kernels().decode()})"


def _compiler() -> str | None:
    named = os.environ.get("CC")
    candidates = [named] if named else ["cc", "gcc", "clang"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def _key(compiler: str, flags: Sequence[str]) -> str:
    """What a library's name begins with; it changes with all that a library depends on."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update(repr((*_FLAGS, *flags, platform.machine(), _processor())).encode())
    stat = os.stat(compiler)
    digest.update(repr((compiler, stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _name(key: str, library: Path) -> str:
    return f"{key}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _cached(folder: Path, key: str) -> Path | None:
    """A library that was compiled before and is whole: to load half of one can kill a process."""
    found = folder.glob(f"{key}-*.so")
    return next((file for file in found if file.name == _name(key, file)), None)


def _processor() -> str:
    """What the compiler would see of the processor: a cache may be shared by two machines."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = [line for line in cpu_info() if line.startswith(wanted)]
    return "\n".join(dict.fromkeys(lines)) or platform.processor()


def _writable(folder: Path) -> bool:
    """Makes the folder; False where that, or a file in it, is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _compile(compiler: str, flags: Sequence[str], folder: Path, key: str) -> Path:
    """Makes a library and moves it into the folder in one step."""
    with tempfile.TemporaryDirectory(prefix=_BUILD, dir=folder) as build:
        staged = Path(build) / "kernels.so"
        command = [compiler, *_FLAGS, *flags, "-o", str(staged), str(SOURCE), "-lpthread", "-lm"]
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_COMPILE_SECONDS,
        )
        return staged.replace(folder / _name(key, staged))


def _sweep(folder: Path) -> None:
    """Removes what killed compilers have left behind."""
    for build in folder.glob(f"{_BUILD}*"):
        with contextlib.suppress(OSError):
            if time.time() - build.stat().st_mtime > 2 * _COMPILE_SECONDS:
                shutil.rmtree(build, ignore_errors=True)
