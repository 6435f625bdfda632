"""Pace: how long the next draft should be, from what iterations cost and what was accepted.

With γ draft tokens an iteration emits 1 + S(1) + … + S(γ) tokens on average, S(d) being the
probability that at least d of them are accepted, and costs c(γ). The best γ has the most tokens for
its cost (Leviathan et al. 2023, section 3.5, with a measured cost in place of a constant one and
observed acceptance in place of one rate for all depths). Pure: no clock, no model, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_AUTO_DRAFT_TOKENS = 16
# Before anything is known: a draft whose tokens pass four times in five, for one tenth of a pass.
_FIRST_RATE = 0.8
_FIRST_COSTS = tuple(1.0 + 0.1 * length for length in range(MAX_AUTO_DRAFT_TOKENS + 1))
# Observations that the first guess, and the mean of all depths, count for.
_PRIOR = 4.0
# What was seen this many iterations ago counts half.
_HALF_LIFE = 32.0


class Pace:
    """Chooses γ for `num_draft_tokens="auto"`.

    Attributes:
        length: γ of the next iteration, from 1 to the longest that has a cost.
    """

    def __init__(self, costs: Sequence[float] | None = None) -> None:
        """Begins without observations.

        Args:
            costs: c(0), c(1), … in any unit, two or more; a guess if None.
        """
        self._costs = tuple(costs or _FIRST_COSTS)
        depths = len(self._costs) - 1
        # By depth: how often it was offered below accepted tokens, and accepted as well.
        self._tried = [0.0] * depths
        self._passed = [0.0] * depths
        self.length = self._best()

    def observe(self, accepted: int, offered: int) -> None:
        """Takes in an iteration in which `accepted` of `offered` draft tokens were accepted."""
        fade = 0.5 ** (1.0 / _HALF_LIFE)
        for depth in range(len(self._tried)):
            self._tried[depth] *= fade
            self._passed[depth] *= fade
            if depth < offered and depth <= accepted:
                self._tried[depth] += 1.0
                self._passed[depth] += float(depth < accepted)
        self.length = self._best()

    def _best(self) -> int:
        mean = (sum(self._passed) + _PRIOR * _FIRST_RATE) / (sum(self._tried) + _PRIOR)
        survives, expected = 1.0, 1.0
        best, best_rate = 1, 0.0
        for depth, cost in enumerate(self._costs[1:]):
            # Depths that were seldom reached take over the mean of all.
            rate = (self._passed[depth] + _PRIOR * mean) / (self._tried[depth] + _PRIOR)
            survives *= rate
            expected += survives
            if expected / cost > best_rate:
                best, best_rate = depth + 1, expected / cost
        return best
