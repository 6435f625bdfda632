"""What W hypotheses of a beam search are: their tokens, and the probabilities along the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class Histories:
    """W hypotheses after s steps. A slot with joint −∞ is dead: it holds no hypothesis.

    Attributes:
        token_ids: [W, s] the tokens; after an end-of-sequence padded with it.
        logprobs: [W, s] their conditional log-probabilities, 0 for padding.
        nodes: [W, s] which slot of step s held the hypothesis: (step index) · W + slot.
        real: [W, s] bool, False for padding and in dead slots.
        joint: [W] joint log-probability of the scored conditionals, float64; NaN in all slots
            once the model gave a NaN, and so is the latest log-probability.
        finished: [W] bool.
        came_from: [W] slot of the step before that each hypothesis continues.
    """

    token_ids: Tensor
    logprobs: Tensor
    nodes: Tensor
    real: Tensor
    joint: Tensor
    finished: Tensor
    came_from: Tensor

    @property
    def steps(self) -> int:
        """Tokens in each hypothesis, padding included."""
        return self.token_ids.shape[1]

    def best(self) -> Tensor:
        """Slot of the hypothesis with the largest joint, as a tensor of one element."""
        return self.joint.argmax().view(1)


AnyHistories = TypeVar("AnyHistories", bound=Histories)


class BeamBlock(NamedTuple):
    """The hypothesis with the largest joint after s steps.

    Attributes:
        token_ids, logprobs, real: [s], see `Histories`.
        path: [w + s] the way to its last token among the undecided nodes of a cache: the w tokens
            that it began with, then its own nodes.
    """

    token_ids: Tensor
    logprobs: Tensor
    real: Tensor
    path: Tensor


class BeamTree(NamedTuple):
    """The W·s hypotheses of all s steps as nodes, level by level, each named by its last token.

    Attributes:
        token_ids: [W·s].
        parents: [W·s], −1 for a child of the root.
        logprobs: [W·s] of each token given those before it.
        real: [W·s] bool.
        paths: [W·s, s] the node at each depth on the way to every node, −1 below it.
        reference: [s] log-probabilities of the best final hypothesis, 0 after its end.
    """

    token_ids: Tensor
    parents: Tensor
    logprobs: Tensor
    real: Tensor
    paths: Tensor
    reference: Tensor


class Searched(Protocol):
    """A search that is over: what a draft makes of the hypotheses after each of its steps."""

    @property
    def steps(self) -> int:
        """How many there were."""

    def best_block(self, waiting: int) -> BeamBlock:
        """See `BeamBlock`; `waiting` is w."""

    def tree(self) -> BeamTree:
        """See `BeamTree`."""


class History(list[AnyHistories]):
    """The hypotheses after each step; see `Searched`."""

    @property
    def steps(self) -> int:
        """See `Searched.steps`."""
        return len(self)

    def best_block(self, waiting: int) -> BeamBlock:
        """See `BeamBlock`; `waiting` is w."""
        last, best = self[-1], self[-1].best()
        token_ids, logprobs, real, nodes = (
            column.index_select(0, best)[0]
            for column in (last.token_ids, last.logprobs, last.real, last.nodes)
        )
        begin = torch.arange(waiting, device=nodes.device)
        return BeamBlock(token_ids, logprobs, real, torch.cat([begin, waiting + nodes]))

    def tree(self) -> BeamTree:
        """See `BeamTree`."""
        roots = torch.full_like(self[0].nodes[:, -1], -1)
        return BeamTree(
            token_ids=torch.cat([beams.token_ids[:, -1] for beams in self]),
            parents=torch.cat([roots] + [beams.nodes[:, -2] for beams in self[1:]]),
            logprobs=torch.cat([beams.logprobs[:, -1] for beams in self]),
            real=torch.cat([beams.real[:, -1] for beams in self]),
            paths=torch.cat(
                [pad(beams.nodes, (0, len(self) - beams.steps), value=-1) for beams in self]
            ),
            reference=self[-1].logprobs.index_select(0, self[-1].best())[0],
        )
