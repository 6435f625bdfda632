"""Where runs take place: a cache that grows, the graphs over it, and a way to lend both.

Graphs hold the addresses of a cache. So a cache outlives its run, and the next run gets it with
everything that was recorded over it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mtad.cuda.graphs import Graphs, ordinary_tensors
from mtad.cuda.stack import Stack

FIRST_SLOTS = 1024
FIRST_BUCKET = 256
MOST_ROWS = 64
"""Passes of more rows are not recorded: for those, launching kernels takes little of the time."""


class Arena:
    """A cache of one stack, a power of two of slots long.

    Attributes:
        graphs: over the cache.
        cache: see `Stack.cache`.
        slots: [slots] their numbers.
    """

    def __init__(self, stack: Stack) -> None:
        self.graphs = Graphs(stack.norm.device)
        self._stack = stack
        with ordinary_tensors():
            self._take(stack.cache(FIRST_SLOTS))

    def reserve(self, slots: int, used: int) -> int:
        """Makes room for `slots`, keeping the first `used`.

        Returns:
            The power of two of slots that a pass which needs so many looks at.
        """
        bucket = power_of_two(slots, FIRST_BUCKET)
        if bucket > self.slots.shape[0]:
            with ordinary_tensors():
                grown = self._stack.cache(bucket)
                grown[:, :, :used] = self.cache[:, :, :used]
                self._take(grown)
            self.graphs.clear()
        return bucket

    def wipe(self) -> None:
        """For a new run: what no row sees has weight zero, which helps only if it is finite."""
        self.cache.zero_()

    def move(self, slots: Tensor, start: int) -> None:
        """Moves slots [k] down to start, start + 1, …; what stood there is lost."""
        kept = self.cache.index_select(2, slots)
        self.cache[:, :, start : start + slots.shape[0]] = kept

    def save(self, length: int) -> tuple[Tensor, ...]:
        """A copy of the first `length` slots."""
        return (self.cache[:, :, :length].clone(),)

    def load(self, tensors: Sequence[Tensor], length: int) -> None:
        """Fills the first `length` slots of an empty cache from what `save` gave, or its begin."""
        (kept,) = tensors
        self.reserve(length, 0)
        self.cache[:, :, :length] = kept[:, :, :length]

    def _take(self, cache: Tensor) -> None:
        self.cache = cache
        self.slots = torch.arange(cache.shape[2], device=cache.device)


def power_of_two(count: int, least: int) -> int:
    """The smallest power of two from `least` on that is not below a count."""
    return max(least, 1 << (count - 1).bit_length())


def padded(count: int) -> int:
    """So many rows are computed in place of `count`: one, or a multiple of eight.

    To a GPU eight rows cost what two do, and each number of rows is a graph of its own.
    """
    return 1 if count == 1 else -(-count // 8) * 8


T = TypeVar("T", bound=Arena)


class Lender(Generic[T]):
    """Lends arenas: each to one borrower, until that one is no longer there."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._free: list[T] = []

    def lend(self, borrower: Any) -> T:
        """An arena, wiped."""
        arena = self._free.pop() if self._free else self._make()
        arena.wipe()
        weakref.finalize(borrower, self._free.append, arena).atexit = False
        return arena
