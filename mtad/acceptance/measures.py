"""From records to figures: pooled over all tokens, with intervals by bootstrap over prompts.

A resample draws as many prompts as there are, with replacement. All settings of a resample are
read at the same prompts, so that a ratio of two settings is resampled in pairs: prompts that are
easy for one are easy for the other. Intervals hold 95 %, from the percentiles. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mtad.acceptance.records import Record, Setting

RESAMPLES = 2000
_TAIL = 0.025

# statistic(indices of prompts, with repetition) → figure; None where it is not defined
Statistic = Callable[[Sequence[int]], "float | None"]

# ("target", "tree" or "draft", rows)
Pass = tuple[str, int]
ONE_TOKEN: Pass = ("target", 1)


def iteration_passes(setting: Setting, beam_width: int) -> tuple[Pass, Pass] | None:
    """The target's pass and the later draft steps of one iteration.

    None without a draft, and where iterations differ.
    """
    beam_width = setting.beam_width or beam_width
    draft_rows = {"speculative": 1, "typical": 1, "mtad": beam_width, "mtad_tree": beam_width}
    rows, gamma = draft_rows.get(setting.method), setting.num_draft_tokens
    if rows is None or not isinstance(gamma, int):
        return None
    if setting.method == "mtad_tree":
        return ("tree", 1 + gamma * beam_width), ("draft", rows)
    return ("target", 1 + gamma), ("draft", rows)


def needed_passes(settings: Sequence[Setting], beam_width: int) -> set[Pass]:
    """The passes whose costs the scores of these settings are made of."""
    found = [iteration_passes(setting, beam_width) for setting in settings]
    return {ONE_TOKEN, *(one for passes in found if passes for one in passes)}


@dataclass(frozen=True)
class Costs:
    """Seconds of passes, measured; see `mtad.acceptance.costs`.

    Attributes:
        context: tokens in the caches at the start.
        rounds: measurements of each, of which the median is taken.
        target: of a target pass over a block, by its rows.
        tree: of a target pass over a tree, by its rows.
        draft: of a later draft step of a block, by its rows.
        draft_first: of the first draft step after two accepted tokens; None without a draft.
    """

    context: int
    rounds: int
    target: Mapping[int, float]
    tree: Mapping[int, float]
    draft: Mapping[int, float]
    draft_first: float | None

    def pass_seconds(self, setting: Setting, beam_width: int) -> float | None:
        """Of one iteration: a target pass and the draft that it verifies. None if unknown."""
        if setting.method == "autoregressive":
            return self.target.get(1)
        passes, gamma = iteration_passes(setting, beam_width), setting.num_draft_tokens
        if self.draft_first is None or passes is None or not isinstance(gamma, int):
            return None
        (kind, rows), (_, draft_rows) = passes
        target = (self.tree if kind == "tree" else self.target).get(rows)
        step = self.draft.get(draft_rows)
        if step is None or target is None:
            return None
        return target + self.draft_first + (gamma - 1) * step


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; no interval from fewer than two prompts."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """The figures of one setting. None: not defined, or its baseline was not run.

    Attributes:
        setting: which one.
        prompts: finished.
        tokens: emitted.
        target_passes: all of them.
        block_efficiency: tokens / target passes.
        times_speculative: block efficiency / that of `speculative` at its own best γ.
        acceptance_rate: accepted draft tokens / offered depth.
        perplexity: exp of the mean −log p over all tokens.
        perplexity_change: perplexity / that of `autoregressive`, minus 1.
        distinct_4: distinct 4-grams / 4-grams, counted within each answer.
        repeated_4gram_share: share of 4-grams that had occurred before in their answer.
        tokens_per_second: tokens / decode seconds.
        score: tokens a pass / cost of a pass with its draft, the cost of a one-token target
            pass being 1: how much faster than `autoregressive` the models alone would be.
        best_block: this γ has the largest block efficiency of its method and τ.
        best_score: likewise the largest score.
    """

    setting: Setting
    prompts: int
    tokens: int
    target_passes: int
    block_efficiency: Estimate | None
    times_speculative: Estimate | None
    acceptance_rate: float | None
    perplexity: Estimate | None
    perplexity_change: Estimate | None
    distinct_4: float | None
    repeated_4gram_share: float | None
    tokens_per_second: float | None
    score: float | None
    best_block: bool = False
    best_score: bool = False


def ratio(numerator: float, denominator: float) -> float | None:
    """None where nothing is counted, or no float holds the result."""
    found = numerator / denominator if denominator else math.inf
    return found if math.isfinite(found) else None


@functools.lru_cache(maxsize=8)
def resamples(count: int, times: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """The prompts of each resample. The same for every statistic: that is what pairs them."""
    chance = random.Random(seed)
    numbers = range(count)
    return tuple(tuple(chance.choices(numbers, k=count)) for _ in range(times))


def estimate(
    statistic: Statistic, count: int, *, times: int = RESAMPLES, seed: int = 0
) -> Estimate | None:
    """A statistic of all prompts, and the percentile interval of its resamples."""
    value = statistic(range(count))
    if value is None:
        return None
    if count < 2:
        return Estimate(value)
    drawn = [statistic(indices) for indices in resamples(count, times, seed)]
    known = sorted(figure for figure in drawn if figure is not None)
    if len(known) < len(drawn):
        return Estimate(value)
    return Estimate(value, quantile(known, _TAIL), quantile(known, 1 - _TAIL))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest values, linearly."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def rows(
    records: Sequence[Record],
    settings: Sequence[Setting],
    *,
    costs: Costs | None = None,
    beam_width: int = 4,
    times: int = RESAMPLES,
    seed: int = 0,
) -> list[Row]:
    """A row for each setting that has a record, in their order.

    Args:
        records: finished runs.
        settings: which ones to show.
        costs: for the score.
        beam_width: W of the runs, for the score.
        times: resamples.
        seed: of the resamples.
    """
    runs: dict[Setting, dict[str, Record]] = {}
    for record in sorted(records, key=lambda record: record.task_id):
        runs.setdefault(record.setting, {})[record.task_id] = record
    shown = [setting for setting in settings if setting in runs]

    def efficiency_of(setting: Setting) -> float:
        own = runs[setting].values()
        return ratio(sum(run.tokens for run in own), sum(run.target_passes for run in own)) or 0.0

    plain = next((runs[one] for one in shown if one.method == "autoregressive"), {})
    speculative = [one for one in shown if one.method == "speculative"]
    best = runs[max(speculative, key=efficiency_of)] if speculative else {}
    found = [
        _row(setting, runs[setting], best, plain, costs, beam_width, times, seed)
        for setting in shown
    ]
    return [_mark(row, found) for row in found]


def _row(
    setting: Setting,
    own: Mapping[str, Record],
    speculative: Mapping[str, Record],
    plain: Mapping[str, Record],
    costs: Costs | None,
    beam_width: int,
    times: int,
    seed: int,
) -> Row:
    runs = list(own.values())
    block_efficiency = estimate(_efficiency(runs), len(runs), times=times, seed=seed)
    seconds = costs.pass_seconds(setting, beam_width) if costs else None
    one_token = costs.target.get(1) if costs else None
    score = None
    if block_efficiency and seconds and one_token:
        score = block_efficiency.value * one_token / seconds
    distinct = ratio(sum(run.distinct_ngrams for run in runs), sum(run.ngrams for run in runs))
    return Row(
        setting=setting,
        prompts=len(runs),
        tokens=sum(run.tokens for run in runs),
        target_passes=sum(run.target_passes for run in runs),
        block_efficiency=block_efficiency,
        times_speculative=_against(own, speculative, _efficiency, times, seed),
        acceptance_rate=ratio(sum(run.accepted for run in runs), sum(run.offered for run in runs)),
        perplexity=estimate(_perplexity(runs), len(runs), times=times, seed=seed),
        perplexity_change=_against(own, plain, _perplexity, times, seed, offset=-1.0),
        distinct_4=distinct,
        repeated_4gram_share=None if distinct is None else 1 - distinct,
        tokens_per_second=ratio(
            sum(run.tokens for run in runs), math.fsum(run.decode_seconds for run in runs)
        ),
        score=score,
    )


def _efficiency(runs: Sequence[Record]) -> Statistic:
    tokens = [run.tokens for run in runs]
    passes = [run.target_passes for run in runs]

    def statistic(indices: Sequence[int]) -> float | None:
        return ratio(sum(map(tokens.__getitem__, indices)), sum(map(passes.__getitem__, indices)))

    return statistic


def _perplexity(runs: Sequence[Record]) -> Statistic:
    tokens = [run.tokens for run in runs]
    # A token that the target holds for impossible leaves no figure, as in a single run.
    nll = [math.nan if run.nll is None else run.nll for run in runs]
    known = all(map(math.isfinite, nll))

    def statistic(indices: Sequence[int]) -> float | None:
        count = sum(map(tokens.__getitem__, indices))
        try:
            return math.exp(sum(map(nll.__getitem__, indices)) / count) if known and count else None
        except OverflowError:
            return None

    return statistic


def _against(
    own: Mapping[str, Record],
    baseline: Mapping[str, Record],
    measure: Callable[[Sequence[Record]], Statistic],
    times: int,
    seed: int,
    offset: float = 0.0,
) -> Estimate | None:
    """A measure / the baseline's at the same prompts, plus `offset`."""
    common = [task for task in own if task in baseline]
    if not common:
        return None
    above = measure([own[task] for task in common])
    below = measure([baseline[task] for task in common])

    def statistic(indices: Sequence[int]) -> float | None:
        upper, lower = above(indices), below(indices)
        found = None if upper is None or lower is None else ratio(upper, lower)
        return None if found is None else found + offset

    return estimate(statistic, len(common), times=times, seed=seed)


def _mark(row: Row, found: Sequence[Row]) -> Row:
    """Says whether this γ is its method's best."""
    rivals = [
        other
        for other in found
        if other.setting.method == row.setting.method
        and other.setting.accept_threshold == row.setting.accept_threshold
    ]
    if len(rivals) < 2:
        return row
    scored = [other for other in rivals if other.score is not None]
    best_score = max(scored, key=lambda other: other.score or 0.0) if scored else None
    return dataclasses.replace(
        row,
        best_block=row is max(rivals, key=_efficient),
        best_score=row is best_score,
    )


def frontier(found: Sequence[Row]) -> list[tuple[Row, bool]]:
    """How τ trades tokens a pass against perplexity: the best γ of each method and τ.

    Returns:
        Rows, and whether no other row of the method has both more tokens a pass and a lower
        perplexity. Empty for fewer than two thresholds.
    """
    best: dict[tuple[str, float], Row] = {}
    for row in found:
        tau = row.setting.accept_threshold
        if tau is None or row.block_efficiency is None or row.perplexity is None:
            continue
        key = (row.setting.method, tau)
        if key not in best or _efficient(best[key]) < _efficient(row):
            best[key] = row
    if len({tau for _, tau in best}) < 2:
        return []
    chosen = list(best.values())
    return [(row, not any(_beats(other, row) for other in chosen)) for row in chosen]


def _efficient(row: Row) -> float:
    return row.block_efficiency.value if row.block_efficiency else 0.0


def _beats(other: Row, row: Row) -> bool:
    if other.setting.method != row.setting.method or not (other.perplexity and row.perplexity):
        return False
    mine = (_efficient(row), -row.perplexity.value)
    theirs = (_efficient(other), -other.perplexity.value)
    return theirs != mine and all(their >= own for their, own in zip(theirs, mine, strict=True))
