"""From runs to the rows of the table. Pure; imports no torch.

A prompt is the unit: its repeats are pooled, and resamples draw prompts, the same ones for every
row. tokens/s is the median over the prompts of each prompt's median over its repeats; a ratio is
the median over the prompts of what two rows did at the same prompt in the same repeat. Other
figures are pooled over tokens and passes, as in `mtad acceptance`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mtad.acceptance import measures as acceptance
from mtad.acceptance.measures import (
    RESAMPLES,
    Costs,
    Estimate,
    Statistic,
    estimate,
    iteration_passes,
    ratio,
)
from mtad.acceptance.records import Record, Setting
from mtad.bench.predictions import mean_rows, predict_alone
from mtad.bench.records import Run, Runs
from mtad.bench.roofline import Machine, Reached, Shape, reached
from mtad.config import DecodeConfig
from mtad.trace import EnergyReading

MIN_PROMPTS = 5
"""From fewer prompts there is no interval: its percentiles would be those of single prompts."""

GENERATE = {"float32": "transformers-float32", "bfloat16": "transformers-bfloat16"}
ASSISTED = "transformers-assisted"
BASELINES = (*GENERATE, "assisted")
_PLAIN, _SPECULATIVE = "autoregressive", "speculative"


def is_foreign(setting: Setting) -> bool:
    """True for a row of transformers' own generation."""
    return setting.method in (*GENERATE.values(), ASSISTED)


@dataclass(frozen=True)
class Line:
    """A row before it has figures.

    Attributes:
        setting: `method` is the id of the row.
        engine: what runs the models.
        dtype: of the target.
        absent: why it has no figures; None if it takes part.
    """

    setting: Setting
    engine: str
    dtype: str
    absent: str | None = None

    @property
    def transformers(self) -> bool:
        """True for transformers' own generation."""
        return is_foreign(self.setting)

    @property
    def title(self) -> str:
        """For people."""
        if not self.transformers:
            return self.setting.method
        assisted = self.setting.method == ASSISTED
        return "transformers assisted generation" if assisted else "transformers generate"


@dataclass(frozen=True)
class Row:
    """The figures of a row. None: not defined, not measured, or its baseline is not there.

    Attributes:
        line: which one.
        prompts: with a finished run.
        tokens: emitted.
        tokens_per_second: median over the prompts.
        times_autoregressive: how much faster than our `autoregressive`.
        times_speculative: how much faster than our `speculative`.
        times_transformers: how much faster than `generate` in float32.
        joules_per_token: only if every run was measured.
        energy: of one run: how it was measured, and the reason if it was not.
        block_efficiency: tokens / target passes.
        perplexity: pooled over the tokens.
        distinct_4: distinct 4-grams / 4-grams, counted within each answer.
        repeated_4gram_share: share of 4-grams that had occurred before in their answer.
        draft_share: of the decode seconds, in the draft; None where nothing was drafted.
        verify_share: in the target; like the others None where the clock saw no pass.
        other_share: outside of both models.
        speedup: how much faster than `autoregressive` of all tokens together, as those that are
            predicted.
        predicted: the same by tokens a pass and what passes cost in these runs, with nothing
            between them.
        measured_over_predicted: `speedup` / `predicted`: what is lost between the passes, beside
            what `autoregressive` loses.
        predicted_alone: as `predicted`, by what the same passes cost outside of any run.
        measured_over_alone: `speedup` / `predicted_alone`.
        target_pass: the mean pass of the target against its limit.
        draft_step: the mean pass of the draft.
    """

    line: Line
    prompts: int = 0
    tokens: int = 0
    tokens_per_second: Estimate | None = None
    times_autoregressive: Estimate | None = None
    times_speculative: Estimate | None = None
    times_transformers: Estimate | None = None
    joules_per_token: float | None = None
    energy: EnergyReading | None = None
    block_efficiency: Estimate | None = None
    perplexity: Estimate | None = None
    distinct_4: float | None = None
    repeated_4gram_share: float | None = None
    draft_share: float | None = None
    verify_share: float | None = None
    other_share: float | None = None
    speedup: float | None = None
    predicted: float | None = None
    measured_over_predicted: float | None = None
    predicted_alone: float | None = None
    measured_over_alone: float | None = None
    target_pass: Reached | None = None
    draft_step: Reached | None = None


def rows(
    lines: Sequence[Line],
    runs: Sequence[Run],
    config: DecodeConfig,
    *,
    costs: Costs | None = None,
    machine: Machine | None = None,
    targets: Mapping[Setting, Shape] | None = None,
    drafts: Mapping[Setting, Shape] | None = None,
    times: int = RESAMPLES,
    seed: int = 0,
) -> list[Row]:
    """A row for each line, in their order; one that is absent has no figures.

    Args:
        lines: what there is to show. Runs of others, and of those that are absent, are left out.
        runs: finished.
        config: of all runs.
        costs: of the passes alone.
        machine: for the limits.
        targets: by row, what a pass of the target reads and computes.
        drafts: likewise of the draft.
        times: resamples.
        seed: of the resamples.
    """
    by_line: dict[Setting, dict[tuple[str, int], Run]] = {}
    for run in sorted(runs, key=lambda run: (run.record.task_id, run.repeat)):
        own = by_line.setdefault(run.record.setting, {})
        own[run.record.task_id, run.repeat] = run
    shown = [line for line in lines if line.absent is None and line.setting in by_line]
    found = {line.setting: by_line[line.setting] for line in shown}
    pooled = [record for own in found.values() for record in pool(own)]
    quality = {
        row.setting: row
        for row in acceptance.rows(
            pooled, list(found), costs=costs, beam_width=config.width, times=times, seed=seed
        )
    }
    plain = found.get(Setting(_PLAIN), {})
    speculative = next(
        (own for setting, own in found.items() if setting.method == _SPECULATIVE), {}
    )
    foreign = found.get(Setting(GENERATE["float32"]), {})

    def row_of(line: Line) -> Row:
        own = found[line.setting]
        first = next(iter(own.values()))
        line = dataclasses.replace(line, engine=first.engine, dtype=first.dtype)
        resampling, baselines = _Resampling(times, seed), (plain, speculative, foreign)
        return _timed(own, resampling, baselines, quality[line.setting], line)

    def finish(row: Row) -> Row:
        setting, own = row.line.setting, found[row.line.setting]
        # What transformers' passes cost says nothing of ours.
        expected = None if row.line.transformers else _speedup(own, plain, _in_passes)
        alone = predict_alone(quality[setting], config, costs, own)
        measured = _speedup(own, plain, operator.attrgetter("decode_seconds"))
        shape, draft = (targets or {}).get(setting), (drafts or {}).get(setting)
        return dataclasses.replace(
            row,
            speedup=measured,
            predicted=expected,
            measured_over_predicted=_over(measured, expected),
            predicted_alone=alone,
            measured_over_alone=_over(measured, alone),
            target_pass=_target_pass(own, shape, machine, row.line.dtype),
            draft_step=_draft_step(own, draft, machine, row.line.dtype, config),
        )

    return [finish(row_of(line)) if line in shown else Row(line) for line in lines]


def _speedup(own: Runs, plain: Runs, spent: Callable[[Record], float]) -> float | None:
    """Tokens a second over those of `plain`, each of all tokens together, where both have run.

    By the seconds of both models it is what is predicted, tokens/pass × the cost of a one-token
    pass / the cost of verification and drafting, since a pass of `plain` emits one token.
    """
    both = own.keys() & plain.keys()

    def rate(runs: Runs) -> float | None:
        seconds = math.fsum(spent(runs[key].record) for key in both)
        return ratio(sum(runs[key].timed_tokens for key in both), seconds)

    return _over(rate(own), rate(plain))


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _in_passes(record: Record) -> float:
    return record.verify_seconds + record.draft_seconds


def pool(own: Runs) -> list[Record]:
    """One record a prompt: its repeats added up."""
    by_task: dict[str, list[Record]] = {}
    for run in own.values():
        by_task.setdefault(run.record.task_id, []).append(run.record)
    return [_sum(records) for records in by_task.values()]


def _sum(records: Sequence[Record]) -> Record:
    counts = (
        "tokens",
        "target_passes",
        "target_positions",
        "draft_passes",
        "accepted",
        "offered",
        "ngrams",
        "distinct_ngrams",
    )
    spans = ("decode_seconds", "draft_seconds", "verify_seconds")
    values: dict[str, float | None] = {
        name: sum(getattr(record, name) for record in records) for name in (*counts, *spans)
    }
    known = [record.nll for record in records if record.nll is not None]
    values["nll"] = math.fsum(known) if len(known) == len(records) else None
    return dataclasses.replace(records[0], **values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Resampling:
    times: int
    seed: int

    def median(self, values: Sequence[float]) -> Estimate | None:
        """Of one value a prompt."""

        def statistic(indices: Sequence[int]) -> float | None:
            return statistics.median([values[i] for i in indices]) if indices else None

        return self.estimate(statistic, len(values))

    def estimate(self, statistic: Statistic, count: int) -> Estimate | None:
        return enough(estimate(statistic, count, times=self.times, seed=self.seed), count)


def enough(figure: Estimate | None, prompts: int) -> Estimate | None:
    """The figure, without its interval if the prompts are too few for one."""
    if figure is None or prompts >= MIN_PROMPTS:
        return figure
    return Estimate(figure.value)


def by_prompt(own: Runs, figure: Callable[[str, int, Run], float | None]) -> list[float]:
    """A figure of each prompt: the median over its repeats. Prompts without one are left out."""
    found: dict[str, list[float]] = {}
    for (task, repeat), run in own.items():
        value = figure(task, repeat, run)
        if value is not None:
            found.setdefault(task, []).append(value)
    return [statistics.median(values) for values in found.values()]


def _timed(
    own: Runs,
    resampling: _Resampling,
    baselines: tuple[Runs, Runs, Runs],
    quality: acceptance.Row,
    line: Line,
) -> Row:
    runs = list(own.values())
    plain, speculative, foreign = baselines

    def against(baseline: Runs) -> Estimate | None:
        def figure(task: str, repeat: int, run: Run) -> float | None:
            other = baseline.get((task, repeat))
            speed, base = run.tokens_per_second, other.tokens_per_second if other else None
            return None if speed is None or base is None else ratio(speed, base)

        return resampling.median(by_prompt(own, figure))

    seconds = math.fsum(run.record.decode_seconds for run in runs)
    drafting = math.fsum(run.record.draft_seconds for run in runs)
    verifying = math.fsum(run.record.verify_seconds for run in runs)
    unmeasured = [run for run in runs if run.energy.joules is None]
    joules = None if unmeasured else math.fsum(run.energy.joules or 0.0 for run in runs)
    count = quality.prompts
    drafts = drafting > 0.0 or any(run.record.draft_passes for run in runs)
    timed = any(run.timed_passes for run in runs)
    return Row(
        line=line,
        prompts=count,
        tokens=quality.tokens,
        tokens_per_second=resampling.median(by_prompt(own, lambda *one: one[2].tokens_per_second)),
        times_autoregressive=against(plain),
        times_speculative=against(speculative),
        times_transformers=against(foreign),
        joules_per_token=(
            None if joules is None else ratio(joules, sum(run.timed_tokens for run in runs))
        ),
        energy=(unmeasured or runs)[0].energy,
        block_efficiency=enough(quality.block_efficiency, count),
        perplexity=enough(quality.perplexity, count),
        distinct_4=quality.distinct_4,
        repeated_4gram_share=quality.repeated_4gram_share,
        draft_share=ratio(drafting, seconds) if drafts and timed else None,
        verify_share=ratio(verifying, seconds) if timed else None,
        # Spans may be device times, which can exceed the wall clock by its own error.
        other_share=ratio(max(0.0, seconds - drafting - verifying), seconds) if timed else None,
    )


def draft_rows(setting: Setting, config: DecodeConfig) -> float | None:
    """Mean rows of a draft step where nobody counted them, by what the method drafts."""
    if setting.method == "specinfer":
        if config.k_config == "auto":
            return None
        return statistics.fmean([1, *itertools.accumulate(config.k_config[:-1], operator.mul)])
    gamma = setting.num_draft_tokens
    passes = iteration_passes(setting, config.width)
    if passes is None or not isinstance(gamma, int):
        return 1.0 if setting.method in ("speculative", "typical", "bild") else None
    return (1 + (gamma - 1) * passes[1][1]) / gamma


def _context(own: Runs) -> float:
    """Mean tokens in the cache of a pass: the prompt and half of the answer."""
    runs = list(own.values())
    weights = [run.record.target_passes for run in runs]
    lengths = [run.prompt_tokens + run.record.tokens / 2 for run in runs]
    return math.fsum(map(math.prod, zip(weights, lengths, strict=True))) / sum(weights)


def _target_pass(
    own: Runs, shape: Shape | None, machine: Machine | None, dtype: str
) -> Reached | None:
    runs = own.values()
    passes = sum(run.timed_passes for run in runs)
    seconds = math.fsum(run.record.verify_seconds for run in runs)
    return _limit(own, shape, machine, dtype, passes, seconds, mean_rows(own))


def _draft_step(
    own: Runs, shape: Shape | None, machine: Machine | None, dtype: str, config: DecodeConfig
) -> Reached | None:
    runs = list(own.values())
    passes = sum(run.timed_draft_passes for run in runs)
    seconds = math.fsum(run.record.draft_seconds for run in runs)
    counted = [run.timed_draft_positions for run in runs if run.timed_draft_positions is not None]
    width = draft_rows(runs[0].record.setting, config)
    if counted and passes:
        width = sum(counted) / passes
    return _limit(own, shape, machine, dtype, passes, seconds, width)


def _limit(
    own: Runs,
    shape: Shape | None,
    machine: Machine | None,
    dtype: str,
    passes: int,
    seconds: float,
    width: float | None,
) -> Reached | None:
    """The mean of passes of `width` rows against its limit; None where one of them is unknown."""
    if shape is None or machine is None or width is None or not passes or not seconds:
        return None
    return reached(
        shape,
        rows=width,
        context=_context(own),
        seconds=seconds / passes,
        read_bytes_per_second=machine.read_bytes_per_second,
        operations_per_second=machine.operations_per_second.get(dtype),
    )


def without(lines: Sequence[Line], failures: Mapping[Setting, str]) -> list[Line]:
    """The lines, those that failed marked as absent with the message."""
    return [
        dataclasses.replace(line, absent=failures[line.setting])
        if line.setting in failures
        else line
        for line in lines
    ]
