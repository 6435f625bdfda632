"""Token trees: who is whose ancestor, the additive mask that follows from it, positions.

A tree is written as a column of parents: the index of each node's parent, −1 for a child of
the committed prefix. Parents come before children. Pure functions without host reads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def extend_ancestors(ancestors: Tensor | None, parents: Tensor, levels: int) -> Tensor:
    """The ancestor matrix of a tree that grows by some nodes.

    Args:
        ancestors: [n, n] bool of the nodes so far, True where column is row or above it;
            None for no nodes.
        parents: [m] int64 of the new nodes, counted over old and new nodes together.
        levels: an upper bound on how many levels the new nodes span.

    Returns:
        [n + m, n + m] bool.
    """
    old = 0 if ancestors is None else ancestors.shape[0]
    new = parents.shape[0]
    matrix = torch.zeros(old + new, old + new, dtype=torch.bool, device=parents.device)
    if ancestors is not None:
        matrix[:old, :old] = ancestors
    matrix[old:, old:] = torch.eye(new, dtype=torch.bool, device=parents.device)
    has_parent = (parents >= 0).unsqueeze(-1)
    safe_parents = parents.clamp_min(0)
    for _ in range(levels):
        matrix[old:] |= matrix[safe_parents] & has_parent
    return matrix


def grown(
    ancestors: Tensor | None, parents: Tensor, levels: int, length: int
) -> tuple[Tensor, Tensor]:
    """`extend_ancestors`, and the new nodes' positions [m] in a text that goes on at `length`."""
    whole = extend_ancestors(ancestors, parents, levels)
    return whole, length + node_depths(whole)[-parents.shape[0] :]


def chain_ancestors(length: int, device: torch.device) -> Tensor:
    """[length, length] bool: the ancestor matrix of a linear block."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def additive_mask(
    ancestors: Tensor, prefix: int, new: int, dtype: torch.dtype, window: int | None = None
) -> Tensor:
    """What attention adds to its scores for the last `new` nodes of a tree.

    A boolean 4-D mask is silently wrong under eager attention, so this one is a float mask:
    0 where a node may look, the type's minimum elsewhere.

    Args:
        ancestors: [n, n] bool.
        prefix: committed tokens before the tree; all of them are visible.
        new: rows of the mask, the last ones of the tree.
        dtype: the model's.
        window: sliding window in tokens; a node sees only what is nearer than that.

    Returns:
        [1, 1, new, prefix + n].
    """
    rows = ancestors[-new:]
    visible = torch.nn.functional.pad(rows, (prefix, 0), value=True)
    if window is not None:
        depths = node_depths(ancestors)
        key_positions = torch.cat([torch.arange(prefix, device=ancestors.device), prefix + depths])
        query_positions = prefix + depths[-new:]
        visible = visible & (query_positions.unsqueeze(-1) - key_positions < window)
    mask = torch.zeros(visible.shape, dtype=dtype, device=ancestors.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min).view(1, 1, new, -1)


def node_depths(ancestors: Tensor) -> Tensor:
    """[n] int64: how far below the first level each node stands, 0 for the first level."""
    return ancestors.sum(-1) - 1
