"""What W hypotheses of a beam search are: their tokens, and the probabilities along the way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
