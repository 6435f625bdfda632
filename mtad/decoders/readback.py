"""What is read back of an iteration, and how a decision is made of it.

One packed copy brings everything to the host; on a CPU a column is read when it is asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mtad.errors import PairError
from mtad.logits import wide
from mtad.trace import Alternative, DraftTree, FinalKind

# Tensors by name; or their sizes, and all their elements one after the other.
Packed: TypeAlias = "dict[str, Tensor] | tuple[dict[str, int], Tensor]"


def to_host(**columns: Tensor) -> Host:
    """Reads tensors back in one copy, flattened, under the names they were given."""
    return unpack(pack(**columns))


def pack(**optional: Tensor | None) -> Packed:
    """Tensors by name, so that one copy brings them all to the host; no name for None.

    On a device all elements go one after the other into one tensor. float64 holds token ids and
    float32 values exactly. (On MPS float32 does, for vocabularies under 2^24.)
    """
    columns = {name: column for name, column in optional.items() if column is not None}
    if _on_host(next(iter(columns.values()))):
        return columns
    flat = {name: column.flatten() for name, column in columns.items()}
    first, *others = flat.values()
    sizes = {name: column.shape[0] for name, column in flat.items()}
    return sizes, torch.cat([wide(first), *others])


def _on_host(tensor: Tensor) -> bool:
    """Whether several reads are no dearer than one."""
    return tensor.is_cpu


class Host:
    """Columns by name, flattened, as lists; of tensors on the host those that were asked for.

    A name that there is none of is an empty list.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.columns: dict[str, list[float]] = {}

    def __getitem__(self, name: str) -> list[float]:
        found = self.columns.get(name)
        if found is None:
            tensor = self._tensors.get(name)
            found = self.columns[name] = [] if tensor is None else tensor.flatten().tolist()
        return found

    def read(self) -> Host:
        """With every column read: what is in the tensors may change."""
        for name in self._tensors:
            self[name]
        return self


def unpack(packed: Packed) -> Host:
    """Reads back what `pack` gave."""
    if isinstance(packed, dict):
        return Host(packed)
    sizes, together = packed
    values: list[float] = together.tolist()
    host, start = Host({}), 0
    for name, size in sizes.items():
        host.columns[name] = values[start : start + size]
        start += size
    return host


@dataclass(frozen=True)
class Pruned:
    """The tree that was really offered.

    Attributes:
        tree: without slots that held no node, and without what a draft wrote below an
            end-of-sequence: nothing lives there.
        index: what the nodes that are left were called before → their place in the tree.
    """

    tree: DraftTree
    index: Mapping[int, int]

    def path(self, host: Host, accepted: int) -> tuple[int, ...]:
        """The accepted nodes."""
        nodes = map(int, host["path"]) if host["path"] else range(accepted)
        return tuple(self.index[node] for node in itertools.islice(nodes, accepted))

    def final_kind(
        self, path: Sequence[int], emitted: Sequence[int], corrects: bool
    ) -> FinalKind | None:
        """What the token behind the path is; None without one."""
        if not self.tree.token_ids:
            return "sampled"
        if len(emitted) == len(path):
            return None
        last = path[-1] if path else -1
        return "corrected" if corrects and last in self.tree.parents else "bonus"


_NO_TREE = Pruned(DraftTree(), {})


def offered_depths(host: Host, eos_ids: Collection[int]) -> list[int]:
    """[N] the depth of each node from 1 on; 0 for those that `Pruned` leaves out."""
    token_ids, real = host["token_ids"], host["real"]
    depths: list[int] = []
    for node, parent in enumerate(host["parents"] or range(-1, len(token_ids) - 1)):
        above = 0
        if parent >= 0:
            above = depths[int(parent)] if token_ids[int(parent)] not in eos_ids else 0
        lives = (parent < 0 or above) and (not real or real[node])
        depths.append(above + 1 if lives else 0)
    return depths


def prune(host: Host, eos_ids: Collection[int]) -> Pruned:
    """See `Pruned`."""
    depths = offered_depths(host, eos_ids)
    if not depths:
        return _NO_TREE
    kept = [node for node, depth in enumerate(depths) if depth]
    index = {node: place for place, node in enumerate(kept)}
    token_ids, parents = host["token_ids"], host["parents"] or range(-1, len(depths) - 1)

    def tested(column: list[float]) -> tuple[float | None, ...]:
        """NaN marks a node that was not tested."""
        values = [column[node] for node in kept] if column else []
        return tuple(None if math.isnan(value) else value for value in values)

    tree = DraftTree(
        token_ids=tuple(int(token_ids[node]) for node in kept),
        parents=tuple(index.get(int(parents[node]), -1) for node in kept),
        draft_logprobs=tuple(host["draft_logprobs"][node] for node in kept),
        target_logprobs=tuple(host["target_logprobs"][node] for node in kept),
        scores=tested(host["scores"]),
        thresholds=tested(host["thresholds"]),
    )
    return Pruned(tree, index)


def alternatives(
    host: Host,
    count: int,
    positions: int,
    text_of: Callable[[int], str] = lambda token_id: "",
) -> tuple[tuple[Alternative, ...], ...]:
    """The recorded alternatives of the first positions, `count` each."""
    end = count * positions
    tokens = [int(token) for token in host["alternative_ids"][:end]]
    logprobs = host["alternative_logprobs"][:end]
    flat = tuple(map(Alternative, tokens, logprobs, map(text_of, tokens)))
    return tuple(flat[i : i + count] for i in range(0, len(flat), count))


def check_finite(model: str, logprobs: Sequence[float]) -> None:
    """Refuses to go on with a model whose logits are not numbers.

    Raises:
        PairError: a log-probability is NaN.
    """
    if math.isnan(sum(logprobs)):  # none of them is +∞, so that only a NaN makes one
        raise PairError(
            f"The {model}'s logits are not numbers (NaN). Load the pair in another dtype, such as"
            ' load_pair(name, dtype="float32").'
        )
