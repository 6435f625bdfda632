"""The draft as it will be used, unrolled for all positions of a row at once.

Index t of a row of L tokens stands for token t + 1, so there are T = L − 2 of them that have
both a state below and a successor that was written. Depth 0 reads token t + 1 with the target's
state of token t. Depth k reads it with the draft's own state of depth k − 1 at index t − 1: it is
the k-th guess after the target was last seen, at token t − k. Such a line of guesses sees what
drafting has in its cache: depth 0 up to where the line began, then the line's own states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.distill.losses import overlap, warped_target, weighted
from mtad.distill.recipe import Training
from mtad.distill.writing import Origin, Shard
from mtad.hidden_draft import Ends, HiddenDraft, Past
from mtad.sampling import warp

# Rows of logits at a time: as many as a core's cache holds, or a GPU computes at once.
_PIECE_ROWS = 128
_PIECE_ROWS_GPU = 4096


def mask(length: int, depth: int, device: torch.device) -> Tensor:
    """[T, (depth + 1)·T] additive: what depth k sees of depths 0 to k, side by side."""
    query = torch.arange(length, device=device).unsqueeze(1)
    key = torch.arange(length, device=device)
    seen = [key <= query - depth]
    seen += [key == query - depth + below for below in range(1, depth + 1)]
    # At depth 0 `seen` is the causal triangle; above it each row sees at least itself.
    return torch.where(torch.cat(seen, 1), 0.0, -torch.inf)


def unroll(draft: HiddenDraft, ends: Ends, batch: Shard, depths: int) -> Iterator[Tensor]:
    """Yields the states [B, T, H] of one depth after another; at depth k the first k are void."""
    length = batch.token_ids.shape[1] - 2
    device = batch.token_ids.device
    embedded = ends.embed(batch.token_ids[:, 1:-1]).float()
    state = draft.read_target(batch.hidden[:, :-2].float())
    positions = torch.arange(1, length + 1, device=device)
    past: Past | None = None
    for depth in range(depths):
        seen = mask(length, depth, device).to(state.dtype)
        state, past = draft(embedded, state, positions, seen, past)
        yield state
        state = torch.cat([state[:, :1], state[:, :-1]], 1)


@dataclass(frozen=True)
class TextHead:
    """The head with E more rows: of those tokens of a batch that are not among the K.

    In drafting only those count that stand in the text which the target has read.

    Attributes:
        ends: the target's, with the rows.
        columns: [V] int64, the head's column of each token; −1 for none.
        first: [B, E] the place in each row where such a token comes first; L where it does not.
    """

    ends: Ends
    columns: Tensor
    first: Tensor

    @staticmethod
    def of(ends: Ends, columns: Tensor, batch: Shard) -> TextHead:
        """Of a batch whose tokens may be any; `columns` [V] are those of the K alone."""
        tokens = batch.token_ids.long()
        count, (rows, length) = ends.head.shape[0], tokens.shape
        more = torch.unique(tokens[columns[tokens] < 0])
        columns = columns.index_put((more,), torch.arange(count, count + len(more)).to(columns))
        places = torch.arange(length, dtype=torch.int32, device=tokens.device).expand(rows, -1)
        first = places.new_full((rows, count + len(more)), length)
        first.scatter_reduce_(1, columns[tokens], places, "amin")
        return TextHead(ends.with_rows(more), columns, first[:, count:])

    def missing(self, index: Tensor, length: int, depth: int) -> Tensor:
        """[N] of the flattened [B·T] indices → bool [N, E], what was not read when a line began."""
        last_read = index % length - depth
        return self.first[index // length] > last_read.unsqueeze(1)


@dataclass(frozen=True)
class Goal:
    """What the draft should say at N chosen indices of a batch.

    Attributes:
        index: [N] int64 into the flattened [B·T] indices.
        weights: [N].
        columns: [N, K] int64, the head's column of each of the target's tokens; −1 for none.
        logprobs: [N, K], the target's log-probabilities of those tokens.
        state: [N, H], the target's last hidden state.
        missing: [N, E], see `TextHead.missing`.
    """

    index: Tensor
    weights: Tensor
    columns: Tensor
    logprobs: Tensor
    state: Tensor
    missing: Tensor

    @staticmethod
    def of(batch: Shard, depth: int, weights: Tensor, head: TextHead, size: int) -> Goal:
        """All indices that count at a depth.

        Args:
            batch: on the device of the draft.
            depth: the first indices of a row have no line of that many guesses.
            weights: [3], of a next token by its origin.
            head: of the batch.
            size: H.
        """
        weight = weights[batch.origins[:, 2:].long()]
        weight[:, :depth] = 0
        weight = weight.flatten()
        index = weight.nonzero().squeeze(1)

        def pick(values: Tensor) -> Tensor:
            return values[:, 1:-1].flatten(0, 1)[index]

        return Goal(
            index,
            weight[index],
            head.columns[pick(batch.top_ids).long()],
            pick(batch.top_logprobs).float(),
            pick(batch.hidden[..., -size:]).float(),
            head.missing(index, batch.token_ids.shape[1] - 2, depth),
        )

    def rows(self, start: int, stop: int) -> Goal:
        """The goal of some of the indices."""
        return Goal(**{name: values[start:stop] for name, values in vars(self).items()})

    def of_head(self, ends: Ends, head_input: Tensor) -> Tensor:
        """[N, H] → logits [N, head] in float32, −∞ for what is missing."""
        kind = head_input.dtype
        bias = None if ends.bias is None else ends.bias.to(kind)
        logits = F.linear(head_input, ends.head.to(kind), bias).float()
        more = logits[:, logits.shape[1] - self.missing.shape[1] :]
        more.masked_fill_(self.missing, -torch.inf)
        return logits

    def in_columns(self, logprobs: Tensor) -> Tensor:
        """[N, head] log-probabilities → [N, K] those of the target's tokens, −∞ for no column."""
        picked = logprobs.gather(1, self.columns.clamp(min=0))
        return picked.masked_fill(self.columns < 0, -torch.inf)


def loss(
    draft: HiddenDraft,
    ends: Ends,
    batch: Shard,
    columns: Tensor,
    training: Training,
    feature_share: float,
) -> Tensor:
    """What training makes small: all depths, the distribution and the state.

    Args:
        draft: the draft.
        ends: the target's.
        batch: on the same device.
        columns: [V] int64, the head's column of each of its K tokens; −1 for all others.
        training: the weights.
        feature_share: from 0 to 1, how much of `feature_weight` still counts.
    """
    by_origin = torch.tensor([0.0, training.question_weight, 1.0], device=columns.device)
    size = draft.config.hidden_size
    scale = batch.hidden[..., -size:].float().std()
    feature_weight = training.feature_weight * feature_share
    total = torch.zeros((), device=columns.device)
    head = TextHead.of(ends, columns, batch)
    depths = [training.depth_decay**depth for depth in range(training.depths)]
    for depth, states in enumerate(unroll(draft, ends, batch, training.depths)):
        goal = Goal.of(batch, depth, by_origin, head, size)
        head_input = draft.head_input(states.flatten(0, 1)[goal.index].float())

        def missed(piece: Tensor, goal: Goal) -> Tensor:
            draft_logprobs = goal.in_columns(goal.of_head(head.ends, piece).log_softmax(-1))
            values = weighted(
                training.losses,
                goal.logprobs,
                draft_logprobs,
                training.warp_top_k,
                training.warp_top_p,
            )
            if feature_weight:
                distance = F.smooth_l1_loss(piece / scale, goal.state / scale, reduction="none")
                values = values + feature_weight * distance.mean(-1)
            return (values * goal.weights).sum()

        share = depths[depth] / sum(depths) / goal.weights.sum().clamp(min=1e-6)
        sum_of = _InPieces.apply(head_input, goal, missed)  # type: ignore[no-untyped-call]
        total = total + share * sum_of
    return total


class _InPieces(torch.autograd.Function):
    """A sum over rows, taken with its gradient a few rows at a time.

    Logits are the widest thing in training by far: so they stay in a CPU's cache, and never
    are all in memory at once.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, goal: Goal, function: Callable[[Tensor, Goal], Tensor]
    ) -> Tensor:
        """The sum of `function` over pieces of [N, H] rows and of their goal."""
        total, gradient = rows.new_zeros(()), torch.empty_like(rows)
        size = _PIECE_ROWS if rows.device.type == "cpu" else _PIECE_ROWS_GPU
        for start in range(0, rows.shape[0], size):
            with torch.enable_grad():
                piece = rows[start : start + size].detach().requires_grad_()
                value = function(piece, goal.rows(start, start + size))
            total += value.detach()
            gradient[start : start + size] = torch.autograd.grad(value, piece)[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient was taken on the way."""
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


@torch.no_grad()
def overlaps(
    draft: HiddenDraft, ends: Ends, batch: Shard, columns: Tensor, training: Training
) -> Tensor:
    """[depths, 3]: sums over the answers of α, of α after the warp, and their number.

    The warp is the recipe's, applied to both sides.
    """
    answers = torch.zeros(len(Origin), device=columns.device)
    answers[Origin.ANSWER] = 1
    config = DecodeConfig(top_k=training.warp_top_k, top_p=training.warp_top_p)
    head = TextHead.of(ends, columns, batch)
    rows = []
    for depth, states in enumerate(unroll(draft, ends, batch, training.evaluate_depths)):
        goal = Goal.of(batch, depth, answers, head, draft.config.hidden_size)
        said = goal.of_head(head.ends, draft.head_input(states.flatten(0, 1)[goal.index].float()))
        plain = overlap(goal.logprobs, goal.in_columns(said.log_softmax(-1)))
        narrow = warped_target(goal.logprobs, training.warp_top_k, training.warp_top_p)
        warped = overlap(narrow, goal.in_columns(warp(said, config).dense()))
        rows.append(torch.stack([plain.sum(), warped.sum(), goal.weights.sum()]))
    return torch.stack(rows)
