"""The choice of the draft's length, from invented costs and acceptance. No model."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mtad import iteration_costs
from mtad.errors import ConfigError
from mtad.iteration_costs import (
    DEAR,
    ROUNDS,
    SLOW_SECONDS,
    SLOW_TURNS,
    TURNS,
    _by_length,
)
from mtad.pace import (
    AUTO_TREES,
    AUTO_WIDTHS,
    MAX_AUTO_DRAFT_TOKENS,
    FloorPace,
    Pace,
    TreePace,
    WidthPace,
    growing,
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


def draft_block(pace: FloorPace, surely: list[float]) -> list[float]:
    """log q of a block whose tokens have these probabilities one after the other."""
    block: list[float] = []
    for q in surely:
        block.append(math.log(q))
        if len(block) == pace.length or sum(block) < pace.floors[len(block) - 1]:
            break
    return block


@pytest.mark.parametrize("sharpness", [0.4, 0.6, 1.0])
@pytest.mark.parametrize("price", [0.05, 0.2])
def test_a_block_ends_where_the_draft_is_unsure(sharpness: float, price: float) -> None:
    """Tokens pass more often the surer the draft is: then it beats every constant length.

    Seeded; also where they pass at other rates than it takes for granted.
    """
    costs = [1.0, *(1.3 + price * n for n in range(16))]

    def play(length: int | None) -> float:
        pace, rng = FloorPace(costs), random.Random(2)
        tokens = cost = 0.0
        for _ in range(3000):
            # Easy and hard places follow each other.
            surely = [rng.choice((0.15, 0.5, 0.97, 0.97)) for _ in range(16)]
            luck = [rng.random() for _ in surely]
            if length is None:
                block = draft_block(pace, surely)
            else:
                block = [math.log(q) for q in surely[:length]]
            accepted = 0
            while accepted < len(block) and luck[accepted] < surely[accepted] ** sharpness:
                accepted += 1
            tokens, cost = tokens + accepted + 1, cost + costs[len(block)]
            pace.observe(accepted, block, len(block))
        return tokens / cost

    best = max(play(length) for length in range(1, 17))
    assert play(None) > 1.02 * best


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_where_a_draft_is_always_sure_its_length_is_learned(rate: float) -> None:
    """At temperature 0 every draft token has probability 1."""
    costs = [1.0 + 0.2 * length for length in range(17)]
    pace, rng = FloorPace(costs), random.Random(3)
    lengths = []
    for _ in range(300):
        block = draft_block(pace, [1.0] * 16)
        accepted = 0
        while accepted < len(block) and rng.random() < rate:
            accepted += 1
        pace.observe(accepted, block, len(block))
        lengths.append(len(block))

    def speed(length: float) -> float:
        tokens = (1 - rate ** (length + 1)) / (1 - rate)
        return tokens / (1.0 + 0.2 * length)

    ideal = max(speed(length) for length in range(1, 17))
    assert statistics.mean(map(speed, lengths[100:])) > 0.9 * ideal


def test_what_a_token_costs_more_never_becomes_less() -> None:
    assert growing([1.0, 1.3, 1.4, 1.7]) == pytest.approx([0.2, 0.2, 0.3])
    assert growing([1.0, 1.1, 1.3]) == pytest.approx([0.1, 0.2])
    assert growing([1.0]) == []
    pace = FloorPace([1.0, 1.3, 1.3, 1.3])
    for _ in range(40):
        pace.observe(0, [0.0], 1)
    assert all(math.isfinite(floor) for floor in pace.floors)
    assert FloorPace([1.0, 1.2]).floors == []


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

    `spoilt` says by turn and γ how many times as long an iteration seems; with −γ one without a
    draft that is measured before those.
    """
    turns: dict[int, int] = {}
    lengths = itertools.cycle((1, 2, 4, 8))
    coming = next(lengths)

    def seconds(length: int) -> float:
        nonlocal coming
        if length == 0:
            turn = turns.get(coming, -1) + 1
            return 0.001 * spoilt.get((turn, -coming), 1.0)
        assert length == coming, "each right behind one without a draft"
        turn = turns[length] = turns.get(length, -1) + 1
        found = (1.0 + length / 10.0) * spoilt.get((turn, length), 1.0)
        dear = min(found, dearest.get(length, found)) > DEAR
        dearest[length] = min(found, dearest.get(length, found))
        while dear and coming != 8:
            coming = next(lengths)
        coming = next(lengths)
        return 0.001 * found

    def run(method: str, fields: dict[str, int]) -> int:
        return 0 if method == "autoregressive" else fields["num_draft_tokens"]

    dearest: dict[int, float] = {}
    monkeypatch.setattr(iteration_costs, "_seconds", seconds)
    drafts = {length: {"num_draft_tokens": length} for length in (1, 2, 4, 8)}
    doubles: Any = run
    found = iteration_costs._measure(doubles, "mtad", drafts)
    assert turns[1] == TURNS - 1
    return found


def test_a_slow_turn_and_a_slow_iteration_price_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pytest.approx({1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}, abs=1e-3)
    lengths = (1, 2, 4, 8)
    assert measured(monkeypatch, {}) == expected
    slow = {(1, side * length): 3.0 for length in lengths for side in (1, -1)}
    assert measured(monkeypatch, slow) == expected
    for length, turn in itertools.product(lengths, range(TURNS)):
        assert measured(monkeypatch, {(turn, length): 4.0}) == expected, (turn, length)
        assert measured(monkeypatch, {(turn, -length): 4.0}) == expected, (turn, length)
    # One that seems too dear ends its turn, and is tried again in the next.
    assert measured(monkeypatch, {(0, 2): DEAR * 2}) == expected


def test_a_draft_that_is_always_too_dear_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {(turn, 4): 10.0 for turn in range(TURNS)})
    assert list(found) == [1, 2, 4] and found[4] == pytest.approx(14.0)


def test_slow_passes_are_measured_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def seconds(length: int) -> float:
        asked.append(length)
        return SLOW_SECONDS * (1.1 + length)

    def run(method: str, fields: dict[str, int]) -> int:
        return 0 if method == "autoregressive" else fields["num_draft_tokens"]

    monkeypatch.setattr(iteration_costs, "_seconds", seconds)
    drafts = {length: {"num_draft_tokens": length} for length in (1, 2)}
    doubles: Any = run
    iteration_costs._measure(doubles, "mtad", drafts)
    assert asked == [0, 1, 0, 2] * SLOW_TURNS


def lasting(monkeypatch: pytest.MonkeyPatch, *milliseconds: float) -> tuple[float, int]:
    """What iterations that last so long are said to take, in milliseconds, and how many ran."""
    now, count = 0.0, 0

    def iterations() -> Iterator[str]:
        nonlocal now, count
        for each in milliseconds:
            now, count = now + each / 1000, count + 1
            yield "outcome"

    with monkeypatch.context() as patched:
        clock = SimpleNamespace(perf_counter=lambda: now)
        patched.setattr(iteration_costs, "time", clock)
        run: Any = iterations()
        found = iteration_costs._seconds(run)
        assert next(run, "ended") == "ended"
    return 1000 * found, count


def test_the_median_iteration_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One may have recorded a graph; the first holds what is read of the text."""
    found, count = lasting(monkeypatch, 100.0, 9.0, 2.0, 3.0, 1.0, 4.0, 4.5, 99.0)
    assert (found, count) == (pytest.approx(3.0), 1 + ROUNDS)
    # Two of those that take long, and what there is room for.
    found, count = lasting(monkeypatch, 100.0, 40.0, 30.0, 1.0)
    assert (found, count) == (pytest.approx(30.0), 3)
    assert lasting(monkeypatch, 7.0) == (pytest.approx(7.0), 1)
