"""Exhaustive search for blocks: the oracle behind `mtjd` exact and the bound of the page.

Expands the tree of all blocks whose every token is in the warped support, level by level. The
leaves are read from their parents' logits and never forwarded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.readback import check_finite
from mtad.errors import BudgetError
from mtad.lm import CachedLM
from mtad.logits import wide
from mtad.sampling import Warped, draw, score, top_alternatives
from mtad.trace import Alternative

_CHUNK_NODES = 256
# Leaves are not forwarded, but they are held: about 100 bytes each.
_MAX_LEAVES = 2**22


@dataclass(frozen=True)
class Block:
    """One complete block, on the host.

    Attributes:
        token_ids: its tokens; the last may be an end-of-sequence.
        logprobs: their conditional log-probabilities, warped.
        raw_logprobs: the same of the unwarped target.
        nodes: where all but the last token stand among the target's undecided nodes.
        alternatives: the target's best tokens at each position.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...]
    nodes: tuple[int, ...]
    alternatives: tuple[tuple[Alternative, ...], ...]


@dataclass
class Leaves:
    """Complete blocks of one length: columns over L blocks.

    Attributes:
        token_ids: [L, s].
        logprobs: [L, s] warped conditionals.
        raw_logprobs: [L, s].
        nodes: [L, s] node that each token was read from: its parent in the target's cache.
    """

    token_ids: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor
    nodes: Tensor


@dataclass
class Blocks:
    """All blocks that the search found, finished ones included.

    Attributes:
        leaves: columns, by length of the block.
        joint: [L] joint log-probability of every block, float64, in the order of `leaves`.
        alternatives: by node of the target's cache, its best next tokens.
    """

    leaves: list[Leaves]
    joint: Tensor
    alternatives: list[tuple[Alternative, ...]] = field(default_factory=list)

    def choose(self, joint_temperature: float, uniform: Tensor) -> int:
        """Index drawn with probability ∝ p(block)^(1/T_J); the argmax for T_J = 0."""
        if joint_temperature == 0.0:
            return int(self.joint.argmax())
        logprobs = ((self.joint - self.joint.max()) / joint_temperature).log_softmax(-1)
        index = torch.arange(logprobs.shape[0], device=logprobs.device)
        return int(draw(Warped(index, logprobs, logprobs.shape[0]), uniform.view(())))

    def block(self, index: int) -> Block:
        """The block at an index of `joint`."""
        for leaves in self.leaves:
            count = leaves.token_ids.shape[0]
            if index < count:
                read_from = leaves.nodes[index].tolist()
                return Block(
                    token_ids=tuple(leaves.token_ids[index].tolist()),
                    logprobs=tuple(leaves.logprobs[index].tolist()),
                    raw_logprobs=tuple(leaves.raw_logprobs[index].tolist()),
                    nodes=tuple(read_from[1:]),
                    alternatives=tuple(self.alternatives[node] for node in read_from)
                    if self.alternatives
                    else (),
                )
            index -= count
        raise IndexError(index)


def search_exact(
    target: CachedLM,
    pending: Tensor,
    length: int,
    config: DecodeConfig,
    is_eos: Callable[[Tensor], Tensor],
    *,
    record: int = 0,
) -> Blocks:
    """All blocks of `length` tokens after the pending one, and the shorter ones that ended.

    The forwarded nodes stay undecided in the target's cache; the caller keeps a path.

    Args:
        target: its cache holds everything before the pending token.
        pending: [1].
        length: γ ≥ 1.
        config: the warp and node_budget are read.
        is_eos: which tokens end a block.
        record: alternatives to record for each position.

    Raises:
        BudgetError: the tree needs more forwarded nodes than node_budget allows.
    """
    device = target.device
    found: list[Leaves] = []
    alternatives: list[tuple[Alternative, ...]] = []
    rows, parents = pending, None
    empty = torch.empty(1, 0, device=device)
    frontier = Leaves(empty.long(), empty, empty, empty.long())
    forwarded = 0
    for depth in range(1, length + 1):
        children: list[Leaves] = []
        wanted = 0
        for start in range(0, rows.shape[0], _CHUNK_NODES):
            chunk = slice(start, start + _CHUNK_NODES)
            first = target.nodes
            logits = target.forward(rows[chunk], None if parents is None else parents[chunk]).logits
            here = torch.arange(first, target.nodes, device=device)
            scored = score(logits, config)
            check_finite("target", scored.logprobs.amax(-1).tolist())  # NaN if any entry is
            # Counted before they are made: a level can be far larger than the memory.
            possible = scored.logprobs > -torch.inf
            if depth < length:
                forwarded += int((possible & ~is_eos(scored.token_ids)).sum())
                if forwarded > config.node_budget:
                    limit = f"node_budget is {config.node_budget:,}"
                    raise BudgetError(_too_many(forwarded, "nodes", limit, depth, length, config))
            else:
                wanted += int(possible.sum())
                if wanted > _MAX_LEAVES:
                    limit = f"at most {_MAX_LEAVES:,} are held"
                    raise BudgetError(_too_many(wanted, "blocks", limit, depth, length, config))
            children.append(_expand(_take(frontier, chunk), here, logits, scored, possible))
            if record:
                alternatives.extend(_best_tokens(logits, record))
        level = _concatenate(children)
        ended = is_eos(level.token_ids[:, -1])
        if depth == length:
            found.append(level)
            break
        found.append(_take(level, ended))
        frontier = _take(level, ~ended)
        rows, parents = frontier.token_ids[:, -1], frontier.nodes[:, -1]
        if rows.shape[0] == 0:
            break
    joint = torch.cat([_joint(leaves) for leaves in found])
    return Blocks(found, joint, alternatives)


def _too_many(
    count: int, what: str, limit: str, depth: int, length: int, config: DecodeConfig
) -> str:
    """Which of γ and k to lower, and what else would help."""
    if config.temperature == 0.0:
        advice = (
            "At temperature 0 nothing is filtered, so that every token of the vocabulary counts:"
            f" lower num_draft_tokens (γ, now {length}), choose a temperature above 0, or"
            ' search="beam".'
        )
    else:
        advice = (
            f"Lower num_draft_tokens (γ, now {length}) or top_k (now {config.top_k or 'off'}), or"
            ' choose search="beam".'
        )
    return (
        f"Exact joint decoding needs at least {count:,} {what} at depth {depth} of {length}, but"
        f" {limit}. {advice}"
    )


def _expand(
    frontier: Leaves, nodes: Tensor, logits: Tensor, scored: Warped, possible: Tensor
) -> Leaves:
    """Every token of the warped support below every node of the frontier."""
    row, column = possible.nonzero(as_tuple=True)
    token = scored.token_ids[row, column]
    raw = logits.float().log_softmax(-1)[row, token]
    return Leaves(
        torch.cat([frontier.token_ids[row], token.unsqueeze(-1)], dim=-1),
        torch.cat([frontier.logprobs[row], scored.logprobs[row, column].unsqueeze(-1)], dim=-1),
        torch.cat([frontier.raw_logprobs[row], raw.unsqueeze(-1)], dim=-1),
        torch.cat([frontier.nodes[row], nodes[row].unsqueeze(-1)], dim=-1),
    )


def _joint(leaves: Leaves) -> Tensor:
    return wide(leaves.logprobs).sum(-1)


def _take(leaves: Leaves, index: Tensor | slice) -> Leaves:
    return Leaves(
        leaves.token_ids[index],
        leaves.logprobs[index],
        leaves.raw_logprobs[index],
        leaves.nodes[index],
    )


def _concatenate(parts: list[Leaves]) -> Leaves:
    return Leaves(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.raw_logprobs for part in parts]),
        torch.cat([part.nodes for part in parts]),
    )


def _best_tokens(logits: Tensor, count: int) -> list[tuple[Alternative, ...]]:
    ids, logprobs = top_alternatives(logits, count)
    return [
        tuple(Alternative(token, logprob) for token, logprob in zip(*row, strict=True))
        for row in zip(ids.tolist(), logprobs.tolist(), strict=True)
    ]
