"""Compiles the kernels for this machine, loads them, and owns the threads that they run on.

Compiling takes seconds and happens once: the library is kept in the cache folder under a name
that changes with the source, the compiler, its flags and the processor. A machine without a C
compiler has no native engine, and `unavailable_reason` says so.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mtad.errors import PairError
from mtad.fetch import cache_root
from mtad.histories import Histories
from mtad.processor import cpu_info

SOURCE = Path(__file__).with_name("kernels.c")
# No flag may let the compiler reorder sums: a row's result must not depend on its neighbours.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
_COMPILE_SECONDS = 120

_Pointer = ctypes.c_void_p


class Matrix(ctypes.Structure):
    """`Matrix` of kernels.c."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("streamed", ctypes.c_int32),
        ("data", _Pointer),
    )


class Layer(ctypes.Structure):
    """`Layer` of kernels.c."""

    _fields_ = (
        ("attention_norm", _Pointer),
        ("mlp_norm", _Pointer),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class Model(ctypes.Structure):
    """`Model` of kernels.c."""

    _fields_ = (
        ("layers", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("mlp", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("cosines", _Pointer),
        ("sines", _Pointer),
        ("layer", ctypes.POINTER(Layer)),
        ("norm", _Pointer),
        ("head", Matrix),
    )


class Cache(ctypes.Structure):
    """`Cache` of kernels.c."""

    _fields_ = (
        ("keys", _Pointer),
        ("values", _Pointer),
        ("capacity", ctypes.c_int64),
        ("texts", ctypes.c_int32),
    )


class Pass(ctypes.Structure):
    """`Pass` of kernels.c."""

    _fields_ = (
        ("rows", ctypes.c_int32),
        ("prefix", ctypes.c_int32),
        ("nodes", ctypes.c_int32),
        ("states", _Pointer),
        ("positions", _Pointer),
        ("visible", _Pointer),
        ("logits", _Pointer),
        ("skipped", ctypes.c_int32),
        ("taps", ctypes.c_int32),
        ("tap_layer", _Pointer),
        ("tapped", _Pointer),
    )


class Draft(ctypes.Structure):
    """`Draft` of kernels.c."""

    _fields_ = (
        ("model", Model),
        ("read", Matrix),
        ("join", Matrix),
        ("read_norm", _Pointer),
        ("token_norm", _Pointer),
        ("state_norm", _Pointer),
        ("taps", ctypes.c_int32),
    )


class Step(ctypes.Structure):
    """`Step` of kernels.c."""

    _fields_ = (
        ("prefix", ctypes.c_int32),
        ("old", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("position", ctypes.c_int32),
        ("embedded", _Pointer),
        ("parents", _Pointer),
        ("given", _Pointer),
        ("known", ctypes.c_int32),
        ("skipped", ctypes.c_int32),
        ("logits", _Pointer),
    )


# In the order of `Growth` in kernels.c: first what it reads, last what it only writes.
HISTORIES = tuple(field.name for field in dataclasses.fields(Histories))


class Rows(ctypes.Structure):
    """`Rows` of kernels.c."""

    _fields_ = (
        ("values", _Pointer),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("best", _Pointer),
        ("at", _Pointer),
        ("sums", _Pointer),
    )


class Mixture(ctypes.Structure):
    """`Mixture` of kernels.c."""

    _fields_ = (
        ("values", _Pointer),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("text", _Pointer),
        ("tails", _Pointer),
        ("count", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("odds", _Pointer),
        ("places", _Pointer),
        ("absent", ctypes.c_int64),
        ("mixed", _Pointer),
        ("extra", _Pointer),
    )


class Choices(ctypes.Structure):
    """`Choices` of kernels.c."""

    _fields_ = (
        ("logits", _Pointer),
        ("stride", ctypes.c_int64),
        ("names", _Pointer),
        ("extra", _Pointer),
        ("rows", ctypes.c_int32),
        ("all", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("values", _Pointer),
        ("token_ids", _Pointer),
        ("logprobs", _Pointer),
        ("sums", _Pointer),
    )


class Growth(ctypes.Structure):
    """`Growth` of kernels.c."""

    _fields_ = (
        ("choices", Choices),
        ("chance", _Pointer),
        ("steps", ctypes.c_int32),
        ("width", ctypes.c_int32),
        *((f"old_{name}", _Pointer) for name in HISTORIES[:-1]),
        *((f"new_{name}", _Pointer) for name in HISTORIES),
        ("races", _Pointer),
    )


class Sample(ctypes.Structure):
    """`Sample` of kernels.c."""

    _fields_ = (
        ("choices", Choices),
        ("uniform", _Pointer),
        ("drawn", _Pointer),
        ("picked", _Pointer),
    )


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
        file = _library_file(compiler, chosen)
        try:
            if file.exists() or _writable(file.parent):
                return _declare(_loaded(compiler, chosen, file))
            # A cache that came with an image may be read-only: compile for this process alone.
            with tempfile.TemporaryDirectory(prefix="mtad-kernels-") as folder:
                return _declare(_loaded(compiler, chosen, Path(folder) / file.name))
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


class Context:
    """The threads of one caller and their scratch memory. One call at a time."""

    def __init__(self, threads: int, library: ctypes.CDLL | None = None) -> None:
        self.library = library or load()
        self.threads = threads
        self.process = os.getpid()
        self.pointer = self.library.mtad_open(threads)
        if not self.pointer:
            raise PairError(f"This machine would not start {threads} threads. Set fewer.")

    def __del__(self) -> None:
        # In a forked process the threads are not there to be ended.
        if getattr(self, "pointer", None) and os.getpid() == self.process:
            self.library.mtad_close(self.pointer)


_of_thread = threading.local()


def context() -> Context:
    """The calling thread's own context, with as many threads as torch would use.

    It ends with the thread.
    """
    found: Context | None = getattr(_of_thread, "context", None)
    threads: int = getattr(_of_thread, "lent", 0) or torch.get_num_threads()
    if found is None or found.threads != threads or found.process != os.getpid():
        found = _of_thread.context = Context(threads)
    return found


@contextmanager
def lent_threads() -> Iterator[None]:
    """Torch's threads go to the kernels for a while: between two passes it computes on one.

    What torch does there is too small for two threads, and its second one would spin on the
    processor that the kernels' own is waiting on. Holds for the calling thread alone.
    """
    threads = torch.get_num_threads()
    _of_thread.lent = threads
    _set_own_threads(1)
    try:
        yield
    finally:
        _of_thread.lent = 0
        _set_own_threads(threads)


def _set_own_threads(count: int) -> None:
    """How many threads torch uses for the calling one.

    Torch also makes this the number of all threads that are still to come, so another thread
    sets that back to what it was.
    """
    common: list[int] = []
    _in_another_thread(lambda: common.append(torch.get_num_threads()))
    torch.set_num_threads(count)
    _in_another_thread(lambda: torch.set_num_threads(common[0]))


def _in_another_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def _compiler() -> str | None:
    named = os.environ.get("CC")
    candidates = [named] if named else ["cc", "gcc", "clang"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def _library_file(compiler: str, flags: Sequence[str]) -> Path:
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update(repr((*_FLAGS, *flags, platform.machine(), _processor())).encode())
    stat = os.stat(compiler)
    digest.update(repr((compiler, stat.st_size, stat.st_mtime_ns)).encode())
    return cache_root() / "kernels" / f"{digest.hexdigest()[:16]}.so"


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


def _loaded(compiler: str, flags: Sequence[str], file: Path) -> ctypes.CDLL:
    if not file.exists():
        _compile(compiler, flags, file)
    return ctypes.CDLL(str(file))


def _compile(compiler: str, flags: Sequence[str], file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        staged = Path(folder) / file.name
        command = [compiler, *_FLAGS, *flags, "-o", str(staged), str(SOURCE), "-lpthread", "-lm"]
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_COMPILE_SECONDS,
        )
        os.replace(staged, file)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    integer = ctypes.c_int
    for name, result, arguments in (
        ("mtad_open", _Pointer, (integer,)),
        ("mtad_close", None, (_Pointer,)),
        ("mtad_linear", integer, (_Pointer, ctypes.POINTER(Matrix), _Pointer, _Pointer, integer)),
        (
            "mtad_forward",
            integer,
            (
                _Pointer,
                ctypes.POINTER(Model),
                ctypes.POINTER(Cache),
                ctypes.POINTER(Pass),
            ),
        ),
        (
            "mtad_move",
            None,
            (ctypes.POINTER(Model), ctypes.POINTER(Cache), _Pointer, integer, integer),
        ),
        (
            "mtad_draft",
            integer,
            (_Pointer, ctypes.POINTER(Draft), ctypes.POINTER(Cache), ctypes.POINTER(Step)),
        ),
        ("mtad_read", integer, (_Pointer, ctypes.POINTER(Draft), _Pointer, _Pointer, integer)),
        ("mtad_rows", None, (_Pointer, ctypes.POINTER(Rows))),
        (
            "mtad_warp",
            None,
            (_Pointer, integer, integer, ctypes.c_double, ctypes.c_double, _Pointer),
        ),
        ("mtad_choose", None, (_Pointer, ctypes.POINTER(Choices))),
        ("mtad_grow", None, (_Pointer, ctypes.POINTER(Growth))),
        ("mtad_sample", None, (_Pointer, ctypes.POINTER(Sample))),
        ("mtad_draw", None, (*[_Pointer] * 3, integer, integer, _Pointer)),
        ("mtad_pick", None, (*[_Pointer] * 3, integer, integer, _Pointer)),
        ("mtad_mix", None, (ctypes.POINTER(Mixture),)),
        ("mtad_kernels", ctypes.c_char_p, ()),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
