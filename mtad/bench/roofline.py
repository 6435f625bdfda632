"""How fast a pass could be at best: its bytes over the bandwidth, its operations over their rate.

Pure arithmetic: imports no torch. The larger of the two times is the limit, as a machine can at
best do both at once. The bandwidth is that of *reading*: of what a pass moves, weights and the
cache's old keys and values are read, and only the new ones, a thousandth of it, are written. A
copy writes as much as it reads, so that its rate would set the limit too low.

What is counted is what no engine gets around; activations, embeddings that are looked up, norms
and the mask are left out. So nobody reaches the limit wholly, unless the rates were measured while
others used the machine, or what is read stands in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Bound = Literal["bandwidth", "arithmetic"]


@dataclass(frozen=True)
class Shape:
    """What one pass of a model reads and computes.

    Attributes:
        weight_bytes: read once a pass, however many rows it has.
        parameters: weights that every row is multiplied with.
        layers: attention layers.
        query_size: query heads × their size.
        key_value_size: key-value heads × their size.
        cache_item_bytes: bytes of a number in the cache.
    """

    weight_bytes: int
    parameters: int
    layers: int
    query_size: int
    key_value_size: int
    cache_item_bytes: int


@dataclass(frozen=True)
class Machine:
    """What the machine can do, measured by `mtad.bench.machine`.

    Attributes:
        name: processor or board, and threads.
        cache_bytes: its last-level cache.
        buffer_bytes: what was read and copied.
        read_bytes_per_second: of reading a buffer that no cache holds, the fastest of `reads`.
        copy_bytes_per_second: of copying it, counting what is read; as much is written.
        reads: every time that reading was measured; others may use the memory as well.
        operations_per_second: of a large matrix product, by dtype; an addition and a
            multiplication are two.
    """

    name: str
    cache_bytes: int
    buffer_bytes: int
    read_bytes_per_second: float
    copy_bytes_per_second: float
    operations_per_second: Mapping[str, float]
    reads: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reached:
    """A kind of pass against its limit.

    Attributes:
        rows: mean number of a pass.
        context: mean number of tokens in the cache.
        pass_bytes: moved by such a pass.
        operations: of such a pass.
        limit_seconds: it cannot be faster.
        bound: by what.
        measured_seconds: mean.
        share: limit / measured.
    """

    rows: float
    context: float
    pass_bytes: float
    operations: float
    limit_seconds: float
    bound: Bound
    measured_seconds: float
    share: float


def pass_bytes(shape: Shape, rows: float, context: float) -> float:
    """Weights once, keys and values of the cache read, those of the rows written."""
    token_bytes = 2 * shape.layers * shape.key_value_size * shape.cache_item_bytes
    return shape.weight_bytes + token_bytes * (context + rows)


def pass_operations(shape: Shape, rows: float, context: float) -> float:
    """Two for each weight and row, and four for each pair of a row and a token that it sees.

    A row sees at least the cache and itself; what it sees of the other rows is left out.
    """
    attention = 4 * shape.layers * shape.query_size * (context + 1)
    return rows * (2 * shape.parameters + attention)


def reached(
    shape: Shape,
    *,
    rows: float,
    context: float,
    seconds: float,
    read_bytes_per_second: float,
    operations_per_second: float | None,
) -> Reached:
    """A measured pass against its limit.

    Args:
        shape: of the model.
        rows: of the pass.
        context: tokens in the cache.
        seconds: measured.
        read_bytes_per_second: of the machine.
        operations_per_second: of the machine, in the arithmetic of this engine. None if unknown:
            the limit is then that of the bandwidth, which is lower or equal.
    """
    moved = pass_bytes(shape, rows, context)
    operations = pass_operations(shape, rows, context)
    reading = moved / read_bytes_per_second
    computing = operations / operations_per_second if operations_per_second else 0.0
    limit = max(reading, computing)
    return Reached(
        rows=rows,
        context=context,
        pass_bytes=moved,
        operations=operations,
        limit_seconds=limit,
        bound="arithmetic" if computing > reading else "bandwidth",
        measured_seconds=seconds,
        share=limit / seconds,
    )
