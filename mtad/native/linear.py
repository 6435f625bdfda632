"""A single linear layer on the kernels."""

from __future__ import annotations

import ctypes

from torch import Tensor

from mtad.native.library import Matrix, context
from mtad.native.packing import Packed, pack


class NativeLinear:
    """Frozen weights, packed once.

    Attributes:
        packed: as the kernels read them.
    """

    def __init__(self, weight: Tensor, kind: int | None = None) -> None:
        self.packed = pack(weight, kind)
        self._matrix = matrix(self.packed)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, columns] → [n, rows], float32; codes meet inputs rounded to 8 bits."""
        x = x.float().contiguous()
        out = x.new_empty(x.shape[0], self.packed.rows)
        threads = context()
        failed = threads.library.mtad_linear(
            threads.pointer,
            ctypes.byref(self._matrix),
            x.data_ptr(),
            out.data_ptr(),
            x.shape[0],
        )
        if failed:
            raise MemoryError(f"no memory for {x.shape[0]:,} rows")
        return out


def matrix(packed: Packed) -> Matrix:
    """The kernels' view of packed weights, which have to outlive it."""
    return Matrix(packed.kind, packed.rows, packed.columns, packed.data.data_ptr())
