"""Pace: how much to draft next, from what iterations cost and what was accepted.

With γ draft tokens an iteration emits 1 + S(1) + … + S(γ) tokens on average, S(d) being the
probability that at least d of them are accepted, and costs c(γ). The best γ has the most tokens for
its cost (Leviathan et al. 2023, section 3.5, with a measured cost in place of a constant one and
observed acceptance in place of one rate for all depths). Of a tree it is the same with S(d) the
probability that some path of d nodes passes. Pure: no clock, no model, no torch.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

from mtad.fields import refuse

MAX_AUTO_DRAFT_TOKENS = 16
# The W that `beam_width="auto"` chooses from, and how much of the best speed the widest may cost: a
# wider search finds likelier blocks, so that W is first of all a matter of quality.
AUTO_WIDTHS = (1, 2, 4, 8)
_WORTH = 0.95
# The shapes that `k_config="auto"` chooses from: lines, and trees that branch early, since what
# stands further down is seldom reached.
AUTO_TREES: tuple[tuple[int, ...], ...] = (
    (1,),
    (1, 1),
    (1, 1, 1, 1),
    (2, 1),
    (2, 1, 1, 1),
    (2, 2, 1),
    (4, 2, 2),
    (4, 2, 2, 1, 1),
)
# Before anything is known: a draft whose tokens pass four times in five, for one tenth of a pass.
_FIRST_RATE = 0.8
_FIRST_COSTS = tuple(1.0 + 0.1 * length for length in range(MAX_AUTO_DRAFT_TOKENS + 1))
# Observations that the first guess, and the mean of all depths, count for.
_PRIOR = 4.0
# A token of probability q is accepted about so often: q to the power of this.
_SHARPNESS = 0.6
# What a token costs at least, and how many were accepted.
_FREE = 1e-6
# What was seen this many iterations ago counts half.
_FADE = 0.5 ** (1.0 / 32.0)


class Pace:
    """Chooses γ for `num_draft_tokens="auto"`.

    Attributes:
        length: γ of the next iteration, from 1 to the longest that has a cost.
        rate: tokens for its cost that are expected with that.
        floors: none: it chooses before a block; see `FloorPace`.
    """

    floors: Sequence[float] = ()

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
        self.choose()

    def observe(self, accepted: int, offered: int) -> None:
        """Takes in an iteration in which `accepted` of `offered` draft tokens were accepted."""
        self.note(accepted, offered)
        self.choose()

    def note(self, accepted: int, offered: int) -> None:
        """Takes it in without a new choice; nothing offered means one that was another's."""
        self._tried = [count * _FADE for count in self._tried]
        self._passed = [count * _FADE for count in self._passed]
        for depth in range(min(offered, accepted + 1, len(self._tried))):
            self._tried[depth] += 1.0
            self._passed[depth] += float(depth < accepted)

    def choose(self, guess: float = _FIRST_RATE) -> float:
        """Sets `length` and `rate`; gives the rate at which tokens of any depth are accepted.

        `guess` is that rate as it is expected before anything was observed.
        """
        mean = (sum(self._passed) + _PRIOR * guess) / (sum(self._tried) + _PRIOR)
        survives, expected = 1.0, 1.0
        self.length, self.rate = 1, 0.0
        for depth, cost in enumerate(self._costs[1:]):
            # Depths that were seldom reached take over the mean of all.
            rate = (self._passed[depth] + _PRIOR * mean) / (self._tried[depth] + _PRIOR)
            survives *= rate
            expected += survives
            if expected / cost > self.rate:
                self.length, self.rate = depth + 1, expected / cost
        return mean


class FloorPace:
    """Chooses for `num_draft_tokens="auto"` where a block ends, while it is drafted.

    Tokens of which the draft is sure are accepted more often: one of probability q at a rate of
    about m · q ** `_SHARPNESS`, be it by tests of single tokens or by a joint one (docs/log.md); m
    is observed. So a block of n tokens with the joint probability Q passes as a whole at a rate of
    m ** n · Q ** `_SHARPNESS`. One token more is worth drafting while that, times the rate at
    which any token passes, is more than what its cost earns elsewhere: the tokens for their cost
    of the run so far. (That the best policy is such a threshold: Huang et al. 2024, arXiv
    2405.19715.) It looks at nothing but what the draft says, so the tokens of speculative decoding
    keep their distribution.

    Attributes:
        length: the most draft tokens of a block.
        floors: [length − 1] a block ends behind token i (from 0) where its joint log-probability is
            below floors[i], or that token ends the text.
    """

    def __init__(self, costs: Sequence[float] | None = None) -> None:
        """Begins without observations; see `Pace`."""
        self._costs = tuple(costs or _FIRST_COSTS)
        self.length = len(self._costs) - 1
        self._more = [math.log(max(more, _FREE)) for more in growing(self._costs[1:])]
        # Of draft tokens: how many were tested, q ** _SHARPNESS of those, and how many passed.
        self._tried, self._sure = _PRIOR, _PRIOR * _FIRST_RATE
        self._passed = _PRIOR * _FIRST_RATE
        # Of iterations: their cost, and their tokens.
        self._spent = _PRIOR * self._costs[0]
        self._earned = self._spent * Pace(costs).rate
        self._choose()

    def observe(self, accepted: int, logprobs: Sequence[float], length: int) -> None:
        """Takes in an iteration.

        Args:
            accepted: so many draft tokens.
            logprobs: log q of all of them.
            length: of the block that was paid for, padding behind an end of the text included.
        """
        tested = logprobs[: accepted + 1]
        self._tried = self._tried * _FADE + len(tested)
        self._sure = self._sure * _FADE + sum(math.exp(_SHARPNESS * each) for each in tested)
        self._passed = self._passed * _FADE + accepted
        self._spent = self._spent * _FADE + self._costs[min(length, self.length)]
        self._earned = self._earned * _FADE + accepted + 1
        self._choose()

    def _choose(self) -> None:
        passed = max(self._passed, _FREE)
        worth = math.log(self._earned / self._spent * self._tried / passed)
        miss = max(0.0, math.log(max(self._sure, _FREE) / passed))  # −log m
        self.floors = [
            (worth + more + count * miss) / _SHARPNESS for count, more in enumerate(self._more, 1)
        ]


def growing(costs: Sequence[float]) -> list[float]:
    """What each cost is more than the one before it, if that never becomes less.

    A cost that was measured too low or too high makes one step dear and the next one cheap; such
    neighbours share what they cost together (the greatest convex function below the costs).
    """
    runs: list[tuple[float, int]] = []  # of equal steps
    for before, after in itertools.pairwise(costs):
        step, count = after - before, 1
        while runs and runs[-1][0] > step:
            earlier, times = runs.pop()
            step = (earlier * times + step * count) / (times + count)
            count += times
        runs.append((step, count))
    return [step for step, count in runs for _ in range(count)]


class WidthPace:
    """Chooses γ and W for `beam_width="auto"`: the widest search that costs next to no speed.

    Each width has a `Pace` of its own, which forgets while it rests. It is guessed to pass as many
    tokens as the next wider one: so a narrower search is tried where it is so much cheaper that it
    might be worth it, and tried again some time later.

    Attributes:
        width: W of the next iteration: one of `AUTO_WIDTHS`.
        length: its γ.
        floors: none, as of each `Pace`.
    """

    floors: Sequence[float] = ()

    def __init__(self, costs: Sequence[Sequence[float]] | None = None) -> None:
        """Begins without observations.

        Args:
            costs: for each of `AUTO_WIDTHS` what `Pace` takes; a guess if None.

        Raises:
            ConfigError: there are more or fewer of them.
        """
        rows = [None] * len(AUTO_WIDTHS) if costs is None else costs
        if len(rows) != len(AUTO_WIDTHS) or any(isinstance(row, float) for row in rows):
            allowed = f'costs by γ for each W of {AUTO_WIDTHS} with beam_width "auto"'
            refuse("iteration_costs", costs, allowed)
        self._paces = {width: Pace(row) for width, row in zip(AUTO_WIDTHS, rows, strict=True)}
        self._choose()

    def observe(self, accepted: int, offered: int) -> None:
        """Takes in an iteration with the present width, see `Pace.observe`."""
        for width, pace in self._paces.items():
            pace.note(accepted, offered if width == self.width else 0)
        self._choose()

    def _choose(self) -> None:
        guess = _FIRST_RATE
        for pace in reversed(self._paces.values()):
            guess = pace.choose(guess)
        enough = _WORTH * max(pace.rate for pace in self._paces.values())
        self.width = max(width for width, pace in self._paces.items() if pace.rate >= enough)
        self.length = self._paces[self.width].length


class TreePace:
    """Chooses the tree of `specinfer` for `k_config="auto"`.

    Attributes:
        tree: children of a node, by depth, of the next iteration: one of `AUTO_TREES`.
    """

    def __init__(self, costs: Sequence[float] | None = None) -> None:
        """Begins without observations.

        Args:
            costs: of an iteration without a draft, then with each of `AUTO_TREES`, in any unit; a
                guess by the tokens that are read if None.

        Raises:
            ConfigError: there are more or fewer of them.
        """
        if costs is None:
            costs = (1.0, *(1.0 + 0.05 * (nodes(tree) + len(tree)) for tree in AUTO_TREES))
        if len(costs) != 1 + len(AUTO_TREES) or not all(isinstance(cost, float) for cost in costs):
            allowed = f'{1 + len(AUTO_TREES)} numbers with k_config "auto": without a draft, then'
            refuse("tree_costs", tuple(costs), f"{allowed} with each of {AUTO_TREES}")
        self._costs = tuple(costs[1:])
        depths, siblings = max(map(len, AUTO_TREES)), max(map(max, AUTO_TREES))
        # By depth, then by how many siblings were rejected before: tested, and accepted.
        self._tried = [[0.0] * siblings for _ in range(depths)]
        self._passed = [[0.0] * siblings for _ in range(depths)]
        self.tree = self._best()

    def observe(self, tests: Sequence[tuple[int, bool]]) -> None:
        """Takes in an iteration: of each depth how many were tested, and if the last one passed."""
        for row in (*self._tried, *self._passed):
            row[:] = [count * _FADE for count in row]
        for depth, (tested, accepted) in enumerate(tests):
            for sibling in range(tested):
                self._tried[depth][sibling] += 1.0
            if accepted:
                self._passed[depth][tested - 1] += 1.0
        self.tree = self._best()

    def _best(self) -> tuple[int, ...]:
        rates = self._rates()
        best, best_rate = AUTO_TREES[0], 0.0
        for tree, cost in zip(AUTO_TREES, self._costs, strict=True):
            survives, expected = 1.0, 1.0
            for depth, children in enumerate(tree):
                survives *= 1.0 - math.prod(1.0 - rate for rate in rates[depth][:children])
                expected += survives
            if expected / cost > best_rate:
                best, best_rate = tree, expected / cost
        return best

    def _rates(self) -> list[list[float]]:
        """By depth and sibling: how often one that is tested passes."""
        depths = range(len(self._tried))
        means, guess = [], _FIRST_RATE
        for sibling in range(len(self._tried[0])):
            tried = sum(self._tried[depth][sibling] for depth in depths)
            passed = sum(self._passed[depth][sibling] for depth in depths)
            means.append((passed + _PRIOR * guess) / (tried + _PRIOR))
            guess = means[-1] / 2.0  # what the draft finds less likely passes more seldom
        return [
            [
                (self._passed[depth][sibling] + _PRIOR * mean)
                / (self._tried[depth][sibling] + _PRIOR)
                for sibling, mean in enumerate(means)
            ]
            for depth in depths
        ]


def nodes(tree: Sequence[int]) -> int:
    """How many nodes a tree has below its root."""
    return sum(itertools.accumulate(tree, operator.mul))
