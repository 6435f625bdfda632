"""Measures what the machine can do: read, copy and multiply, as fast as torch can make it.

Every rate is the best of several rounds on all of torch's threads. The buffer is several times
the last-level cache, so that what is read comes from memory, and on a GPU so large that starting a
kernel, some ten microseconds, is no part of the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers

from mtad import loading
from mtad.bench.roofline import Machine
from mtad.errors import Cancelled
from mtad.native.memory import large_pages
from mtad.processor import cpu_name
from mtad.recording import synchronize
from mtad.version import __version__

ROUNDS = 7
# Where the machine does not say how large its cache is: more than a laptop has.
UNKNOWN_CACHE_BYTES = 64 * 2**20
_CACHES = 4  # the buffer holds so many
_MIN_BUFFER_BYTES = 256 * 2**20
_MAX_BUFFER_BYTES = 4 * 2**30  # a GPU needs over a millisecond for it
_COLUMNS = 4096
_MIN_PRODUCT = 256
_MAX_PRODUCT = 8192
_PRODUCT_SECONDS = 0.02
_CPU_CACHES = Path("/sys/devices/system/cpu")
# What the native engine multiplies weights of so many bits as.
_WHOLE = {"int8": torch.int8, "int4": torch.int8}


def measure_machine(
    device: torch.device,
    dtypes: Iterable[str],
    *,
    cancel: threading.Event | None = None,
    progress: Callable[[str], None] = lambda what: None,
    buffer_bytes: int | None = None,
    largest_product: int = _MAX_PRODUCT,
) -> Machine:
    """The rates that limits are made of.

    Args:
        device: of the models.
        dtypes: whose matrix rate is wanted, "int8" and "int4" for products of bytes; names that
            torch does not know are left out.
        cancel: stops between two rounds.
        progress: called with what is measured next.
        buffer_bytes: instead of several times the last-level cache.
        largest_product: rows and columns of the largest matrices.

    Raises:
        Cancelled: it was stopped.
    """
    best = _Best(device, cancel)
    cache = last_level_cache(device)
    size = buffer_bytes or _buffer_bytes(device, cache)
    progress("reading")
    read, copied = _bandwidths(best, size)
    found: dict[str, float] = {}
    for name in dict.fromkeys(dtypes):
        kind = _WHOLE.get(name, getattr(torch, name, None))
        if not isinstance(kind, torch.dtype) or not (kind.is_floating_point or name in _WHOLE):
            continue
        progress(f"multiplying in {name}")
        # Not every device multiplies bytes.
        with contextlib.suppress(RuntimeError) if name in _WHOLE else contextlib.nullcontext():
            found[name] = _matrix_rate(best, kind, largest_product)
    return Machine(
        name=machine_name(device),
        cache_bytes=cache,
        buffer_bytes=size,
        read_bytes_per_second=read,
        copy_bytes_per_second=copied,
        operations_per_second=found,
        reads=(read,),
    )


def machine_name(device: torch.device) -> str:
    """The processor or board, and torch's threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = cpu_name() or platform.processor().strip() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of what a time depends on beside the machine."""
    return {
        "mtad": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "system": f"{platform.system()} {platform.machine()}",
    }


def last_level_cache(device: torch.device, root: Path = _CPU_CACHES) -> int:
    """Bytes of the device's last-level cache, all parts of it; a guess where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    parts: dict[int, dict[str, int]] = {}
    for index in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text().strip()
            size = (index / "size").read_text().strip()
            scale = {"K": 2**10, "M": 2**20}[size[-1]]
            parts.setdefault(level, {})[shared] = int(size[:-1]) * scale
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return sum(parts[max(parts)].values()) if parts else UNKNOWN_CACHE_BYTES


def _buffer_bytes(device: torch.device, cache: int) -> int:
    """Several caches, but not more than a quarter of what is free: there are two buffers."""
    least = _MAX_BUFFER_BYTES if device.type == "cuda" else _MIN_BUFFER_BYTES
    wanted = min(max(_CACHES * cache, least), _MAX_BUFFER_BYTES)
    free = loading.free_bytes(device)
    return wanted if free is None else max(min(wanted, free // 4), 2**20)


class _Best:
    """Seconds of the fastest of several calls, the device caught up before and after."""

    def __init__(self, device: torch.device, cancel: threading.Event | None) -> None:
        self.device = device
        self._cancel = cancel

    def __call__(self, call: Callable[[], object], rounds: int = ROUNDS) -> float:
        fastest = float("inf")
        for _ in range(rounds + 1):  # the first one warms up, and counts if it is the fastest
            if self._cancel is not None and self._cancel.is_set():
                raise Cancelled("The measurement was stopped.")
            synchronize(self.device)
            start = time.perf_counter()
            call()
            synchronize(self.device)
            fastest = min(fastest, time.perf_counter() - start)
        return fastest


def with_bandwidth(
    machine: Machine, device: torch.device, cancel: threading.Event | None = None
) -> Machine:
    """The machine with its bandwidths measured once more, each the better of the two.

    Others may have used the memory when they were measured, and no limit may come from that.

    Raises:
        Cancelled: it was stopped.
    """
    read, copied = _bandwidths(_Best(device, cancel), machine.buffer_bytes)
    return dataclasses.replace(
        machine,
        read_bytes_per_second=max(read, machine.read_bytes_per_second),
        copy_bytes_per_second=max(copied, machine.copy_bytes_per_second),
        reads=(*machine.reads, read),
    )


@torch.inference_mode()
def _bandwidths(best: _Best, size: int) -> tuple[float, float]:
    """Bytes a second that a sum or a matrix-vector product reads, and that a copy reads."""
    rows = max(size // (4 * _COLUMNS), 1)
    if best.device.type == "cpu":  # in pages as the kernels' weights are
        source = large_pages(4 * rows * _COLUMNS).view(torch.float32).view(rows, -1).fill_(1.0)
    else:
        source = torch.ones(rows, _COLUMNS, device=best.device)
    vector = torch.ones(_COLUMNS, device=best.device)
    moved = 4 * source.numel()
    reading = min(best(source.sum), best(lambda: torch.mv(source, vector)))
    goal = torch.zeros_like(source)
    copying = best(lambda: goal.copy_(source))
    return moved / reading, moved / copying


@torch.inference_mode()
def _matrix_rate(best: _Best, dtype: torch.dtype, largest: int) -> float:
    """Operations a second of the largest square product that is tried."""
    size, fastest_rate = min(_MIN_PRODUCT, largest), 0.0
    while True:
        before = fastest_rate
        # A GPU multiplies numbers that are all alike with less power, and so faster.
        one = torch.randn(size, size, device=best.device)
        if not dtype.is_floating_point:
            one = one.mul(40).clamp(-127, 127)
        one = one.to(dtype)
        multiply = torch.matmul if dtype.is_floating_point else torch._int_mm
        seconds = best(lambda a=one, product=multiply: product(a, a), rounds=3)  # type: ignore[misc]
        fastest_rate = max(fastest_rate, 2 * size**3 / seconds)
        # A product that others held up is slow too; the next one says whether it was that.
        if size >= largest or (seconds >= _PRODUCT_SECONDS and fastest_rate < 1.5 * before):
            return fastest_rate
        size = min(2 * size, largest)
