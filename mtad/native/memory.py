"""Memory that the kernels read: of weights in large pages, where the system has them.

A pass reads every weight once. In pages of 4 KiB that is an address to be looked up for every
seventh group of weights of a block, and those that Python and torch need are forgotten meanwhile.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_LARGE_PAGE = 2 * 2**20
# What is not used of it costs addresses and no memory.
_CHUNK_BYTES = 64 * 2**20
_ALIGNMENT = 64


def floats(*shape: int) -> Tensor:
    """Not of torch's default type, which another thread changes while it loads a model."""
    return torch.empty(*shape, dtype=torch.float32)


class Arena:
    """Gives matrices places one behind the other. Each lives as long as a view of it does."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def place(self, data: Tensor) -> Tensor:
        """A copy of [n] uint8 that begins at a multiple of 64 bytes."""
        count = data.shape[0]
        size = -(-count // _ALIGNMENT) * _ALIGNMENT
        if size > self._free.shape[0]:
            self._free = large_pages(max(size, _CHUNK_BYTES))
        place, self._free = self._free[:count], self._free[size:]
        return place.copy_(data)


def large_pages(size: int) -> Tensor:
    """[size] uint8, in large pages if Linux grants them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    try:
        area = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {size:,} bytes of weights") from error
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    start = -memory.data_ptr() % _LARGE_PAGE
    return memory[start : start + size]
