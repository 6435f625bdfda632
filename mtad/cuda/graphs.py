"""Computations over fixed buffers, recorded as CUDA graphs when they are first needed.

What is recorded may not wait for the device, and its shapes and addresses are frozen: only the
contents of its buffers change from one replay to the next.
"""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

GRAPHS_VARIABLE = "MTAD_CUDA_GRAPHS"
"""Set to 0, every computation is launched kernel by kernel: slow, and easier to debug."""

MOST_GRAPHS = 64

T = TypeVar("T")


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made inside can be written to by anyone later, in inference mode or out of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def _no_collection() -> Iterator[None]:
    """What is collected may call CUDA to free itself, which spoils a recording."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Recorded(Generic[T]):
    def __init__(self, graph: torch.cuda.CUDAGraph, output: T) -> None:
        self.graph = graph
        self.output = output


class Graphs(Generic[T]):
    """Recorded computations by key; the least recently used one makes room for a new one."""

    def __init__(self, device: torch.device, most: int = MOST_GRAPHS) -> None:
        self._device = device
        self._most = most
        self._recorded: OrderedDict[Hashable, _Recorded[T]] = OrderedDict()
        self._records = device.type == "cuda" and os.environ.get(GRAPHS_VARIABLE, "1") != "0"
        if self._records:
            self._new_pool()
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` gives.

        Args:
            key: what its shapes and addresses depend on.
            compute: reads and writes tensors that stay where they are. Running it twice must
                give what running it once does.

        Returns:
            Its tensors; the next call may overwrite them.
        """
        if not self._records:
            return self.launch(compute)
        found = self._recorded.get(key)
        if found is None:
            found = self._recorded[key] = self._record(compute)
            if len(self._recorded) > self._most:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        found.graph.replay()
        return found.output

    def launch(self, compute: Callable[[], T]) -> T:
        """What `compute` gives, kernel by kernel."""
        with ordinary_tensors():
            return compute()

    def clear(self) -> None:
        """Forgets everything, after buffers have moved."""
        self._recorded.clear()
        if self._records:
            self._new_pool()

    def _new_pool(self) -> None:
        # The graphs of one owner run one after another, so that they may share memory. Once the
        # last of them is gone, so is their pool.
        self._pool = torch.cuda.graph_pool_handle()

    def _record(self, compute: Callable[[], T]) -> _Recorded[T]:
        with torch.cuda.device(self._device), ordinary_tensors():
            # Libraries set themselves up at their first call, which no graph can hold.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                compute()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using CUDA meanwhile.
            with (
                _no_collection(),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                output = compute()
        return _Recorded(graph, output)
