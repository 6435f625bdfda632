"""The choice of the draft's length, from invented costs and acceptance. No model."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from mtad import iteration_costs
from mtad.config import DecodeConfig
from mtad.errors import ConfigError
from mtad.iteration_costs import DEAR, TURNS, _by_length
from mtad.pace import (
    AUTO_TREES,
    AUTO_WIDTHS,
    MAX_AUTO_DRAFT_TOKENS,
    Pace,
    TreePace,
    WidthPace,
    nodes,
)


def best_length(rate: float, costs: list[float]) -> int:
    """The γ with the most tokens for its cost if every token passes with the same probability."""

    def tokens(length: int) -> float:
        return sum(rate**depth for depth in range(length + 1))

    return max(range(1, len(costs)), key=lambda length: tokens(length) / costs[length])


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("price", [0.02, 0.1, 0.3])
def test_it_settles_near_the_best_length(rate: float, price: float) -> None:
    """The last 200 choices together lose at most 4 % against the best constant length.

    Seeded. With a half-life of 32 iterations the estimate of a rate has a standard deviation of
    about 0.06, for which the loss stays under 3 % in all cases; a Pace that ignored its
    observations would lose more than 4 % in seven of the fifteen.
    """
    costs = [1 + price * length for length in range(17)]
    pace, rng = Pace(costs), random.Random(1)
    tokens = cost = 0.0
    for turn in range(400):
        length = pace.length
        accepted = 0
        while accepted < length and rng.random() < rate:
            accepted += 1
        if turn >= 200:
            # What is expected of this length, not what luck gave.
            tokens += sum(rate**depth for depth in range(length + 1))
            cost += costs[length]
        pace.observe(accepted, length)
    best = best_length(rate, costs)
    ideal = sum(rate**depth for depth in range(best + 1)) / costs[best]
    assert tokens / cost > 0.96 * ideal


def test_a_free_draft_is_as_long_as_it_may_be_and_a_useless_one_as_short() -> None:
    assert Pace([1.0] * 9).length == 8
    pace = Pace()
    assert 1 < pace.length <= MAX_AUTO_DRAFT_TOKENS
    for _ in range(60):
        pace.observe(0, pace.length)
    assert pace.length == 1


def test_it_comes_back_when_the_text_grows_easy() -> None:
    pace = Pace()
    for _ in range(60):
        pace.observe(0, pace.length)
    for _ in range(80):
        pace.observe(pace.length, pace.length)
    assert pace.length >= 8


def test_lengths_between_the_measured_ones_are_interpolated() -> None:
    costs = _by_length({0: 1.0, 1: 1.5, 2: 1.4, 4: 2.0})
    assert costs == (1.0, 1.5, 1.5, 1.7, 2.0)


def expected_tokens(tree: tuple[int, ...], rates: list[float]) -> float:
    """Of an iteration where the k-th sibling that is tested passes with the k-th rate."""
    survives = tokens = 1.0
    for children in tree:
        missed = 1.0
        for rate in rates[:children]:
            missed *= 1.0 - rate
        survives *= 1.0 - missed
        tokens += survives
    return tokens


@pytest.mark.parametrize(
    "rates", [[0.1, 0.1, 0.0, 0.0], [0.5, 0.1, 0.0, 0.0], [0.5, 0.4, 0.3, 0.3]]
)
@pytest.mark.parametrize("row", [0.01, 0.1, 0.4])
def test_it_settles_near_the_best_tree(rates: list[float], row: float) -> None:
    """Its last 200 choices lose at most 4 % together against the best constant tree. Seeded."""
    costs = [1.0 + row * nodes(tree) + 0.1 * len(tree) for tree in AUTO_TREES]
    pace, rng = TreePace([1.0, *costs]), random.Random(1)
    tokens = cost = 0.0
    for turn in range(400):
        tree = pace.tree
        if turn >= 200:
            tokens += expected_tokens(tree, rates)
            cost += costs[AUTO_TREES.index(tree)]
        tests = []
        for children in tree:
            passed = [rng.random() < rate for rate in rates[:children]]
            tests.append((passed.index(True) + 1 if any(passed) else children, any(passed)))
            if not any(passed):
                break
        pace.observe(tests)
    ideal = max(
        expected_tokens(tree, rates) / cost for tree, cost in zip(AUTO_TREES, costs, strict=True)
    )
    assert tokens / cost > 0.96 * ideal


def test_costs_of_other_trees_are_refused() -> None:
    with pytest.raises(ConfigError, match="tree_costs"):
        TreePace([1.0, 1.2])
    assert TreePace().tree in AUTO_TREES


@pytest.mark.parametrize(
    ("rates", "row", "good"),
    [
        ([0.4, 0.6, 0.7, 0.75], 0.0, {8}),  # a free search is as wide as it may be
        ([0.6, 0.6, 0.6, 0.6], 0.2, {1}),  # a dear one that gains nothing as narrow
        ([0.3, 0.7, 0.7, 0.7], 0.05, {2}),
        ([0.5, 0.6, 0.6, 0.6], 0.001, {2, 4, 8}),  # alike, all but the first
    ],
)
def test_the_width_is_one_that_costs_next_to_no_speed(
    rates: list[float], row: float, good: set[int]
) -> None:
    """`rates` are those at which a token of each width passes. Seeded.

    From the first iteration on at most 10 % are lost against the best constant shape.
    """
    costs = [[1.0 + (0.1 + row * width) * n for n in range(17)] for width in AUTO_WIDTHS]

    def speed(width: int, length: int) -> float:
        place = AUTO_WIDTHS.index(width)
        return sum(rates[place] ** depth for depth in range(length + 1)) / costs[place][length]

    for seed in range(4):
        pace, rng = WidthPace(costs), random.Random(seed)
        chosen, tokens, cost = [], 0.0, 0.0
        for _ in range(400):
            width, length = pace.width, pace.length
            place = AUTO_WIDTHS.index(width)
            accepted = 0
            while accepted < length and rng.random() < rates[place]:
                accepted += 1
            chosen.append(width)
            tokens += speed(width, length) * costs[place][length]
            cost += costs[place][length]
            pace.observe(accepted, length)
        ideal = max(speed(width, length) for width in AUTO_WIDTHS for length in range(1, 17))
        assert tokens / cost > 0.9 * ideal
        assert statistics.mode(chosen) in good


def test_costs_of_other_widths_are_refused() -> None:
    for costs in ([1.0, 1.2, 1.3, 1.4], [[1.0, 1.2]]):
        with pytest.raises(ConfigError, match="iteration_costs"):
            WidthPace(costs)
    assert WidthPace().width in AUTO_WIDTHS


def measured(monkeypatch: pytest.MonkeyPatch, spoilt: dict[tuple[int, int], float]) -> Any:
    """Costs of γ 1, 2, 4, 8 where γ really costs 1 + γ / 10 iterations of 1 ms.

    `spoilt` says by turn and γ how many times as long an iteration seems; γ 0 is one without draft.
    """
    turn = -1

    def seconds(length: int) -> float:
        nonlocal turn
        turn += length == 0
        return 0.001 * (1.0 + length / 10.0) * spoilt.get((turn, length), 1.0)

    def iterations(_: Any, __: Any, ___: int, method: str, fields: dict[str, int]) -> int:
        return 0 if method == "autoregressive" else fields["num_draft_tokens"]

    monkeypatch.setattr(iteration_costs, "_iterations", iterations)
    monkeypatch.setattr(iteration_costs, "_seconds", seconds)
    drafts = {length: {"num_draft_tokens": length} for length in (1, 2, 4, 8)}
    make: Any = None
    found = iteration_costs._measure("mtad", make, DecodeConfig(), 100, drafts)
    assert turn == TURNS - 1
    return found


def test_a_slow_turn_and_a_slow_iteration_price_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pytest.approx({1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}, abs=1e-3)
    assert measured(monkeypatch, {}) == expected
    assert measured(monkeypatch, {(1, length): 3.0 for length in (0, 1, 2, 4, 8)}) == expected
    for length, turn in itertools.product((0, 1, 4, 8), range(TURNS)):
        assert measured(monkeypatch, {(turn, length): 4.0}) == expected, (turn, length)
    # One that seems too dear ends its turn, and is tried again in the next.
    assert measured(monkeypatch, {(0, 2): DEAR * 2}) == expected


def test_a_draft_that_is_always_too_dear_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {(turn, 4): 10.0 for turn in range(TURNS)})
    assert list(found) == [1, 2, 4] and found[4] == pytest.approx(14.0)


def test_of_two_iterations_the_faster_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One may have recorded a graph; the first holds the prefill and is not timed."""
    now = 0.0

    def iterations() -> Iterator[None]:
        nonlocal now
        for seconds in (100.0, 9.0, 2.0, 1.0):
            now += seconds
            yield

    monkeypatch.setattr(iteration_costs.time, "perf_counter", lambda: now)
    run: Any = iterations()
    assert iteration_costs._seconds(run) == 2.0
    assert next(run, "ended") == "ended"
