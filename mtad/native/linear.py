"""The kernels' view of a single linear layer."""

from __future__ import annotations

from mtad.native.abi import Matrix
from mtad.native.packing import Packed


def matrix(packed: Packed) -> Matrix:
    """Of packed weights, which have to outlive it."""
    return Matrix(packed.kind, packed.rows, packed.columns, 0, packed.data.data_ptr())
