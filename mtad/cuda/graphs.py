"""Computations over fixed buffers, recorded as CUDA graphs when they are first needed.

What is recorded may not wait for the device, and its shapes and addresses are frozen: only the
contents of its buffers change from one replay to the next.
"""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Any


class Graphs:
    """Recorded computations by key; the least recently used one makes room for a new one."""

    def __init__(
        self, device: torch.device, most: int = MOST_GRAPHS, *, share_memory: bool = True
    ) -> None:
        """Nothing is recorded on other devices than GPUs.

        Args:
            device: where everything stands.
            most: computations that are kept.
            share_memory: the result of a computation is needed only until the next one of the
                same owner, of whatever key.
        """
        self._device = device
        self._most = most
        self._share_memory = share_memory
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._records = device.type == "cuda" and os.environ.get(GRAPHS_VARIABLE, "1") != "0"
        if self._records:
            self._new_pool()
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, key: Hashable, compute: Callable[..., T], *tensors: Tensor) -> T:
        """What `compute(*tensors)` gives.

        Args:
            key: what its shapes and addresses depend on, besides the shapes of `tensors`.
            compute: reads and writes tensors that stay where they are, and reads copies of
                `tensors`. Running it twice must give what running it once does.
            tensors: of any place.

        Returns:
            Its result; the next call with this key, or with shared memory any call, may overwrite
            the tensors in it.
        """
        if not self._records:
            return self.launch(compute, *tensors)
        key = key, *((tensor.shape, tensor.dtype) for tensor in tensors)
        found = self._recorded.get(key)
        if found is None:
            found = self._recorded[key] = self._record(compute, tensors)
            if len(self._recorded) > self._most:
                self._recorded.popitem(last=False)
        elif tensors:
            torch._foreach_copy_(found.inputs, tensors)
        self._recorded.move_to_end(key)
        found.graph.replay()
        output: T = found.output
        return output

    def launch(self, compute: Callable[..., T], *tensors: Tensor) -> T:
        """What `compute` gives, kernel by kernel."""
        with ordinary_tensors():
            return compute(*tensors)

    def clear(self) -> None:
        """Forgets everything, after buffers have moved."""
        self._recorded.clear()
        if self._records:
            self._new_pool()

    def _new_pool(self) -> None:
        # The graphs of one owner run one after another, so that they may share memory. Once the
        # last of them is gone, so is their pool.
        self._pool = torch.cuda.graph_pool_handle() if self._share_memory else None

    def _record(self, compute: Callable[..., T], tensors: Sequence[Tensor]) -> _Recorded:
        with torch.cuda.device(self._device), ordinary_tensors():
            inputs = [tensor.clone() for tensor in tensors]
            # Libraries set themselves up at their first call, which no graph can hold.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                compute(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using CUDA meanwhile.
            with (
                _no_collection(),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                output = compute(*inputs)
        return _Recorded(graph, inputs, output)
