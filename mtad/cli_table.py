"""The table of `mtad compare`: traces of the same prompts in, one row a method out. Pure.

Figures of several runs are pooled over their tokens and passes, not averaged over runs;
tokens/s is the median over the repeats, each repeat taken over all of its prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from mtad.terminal import DASH, clean, joules, number
from mtad.trace import EnergyReading, Trace

NGRAM = 4
HEADINGS = (
    "method",
    "tokens",
    "target passes",
    "tokens/pass",
    "acceptance",
    "tokens/s",
    "× speculative",
    "× autoregressive",
    "perplexity",
    "distinct-4",
    "J/token",
)


@dataclass(frozen=True)
class Run:
    """One finished run of a comparison.

    Attributes:
        prompt_id: of the prompt set.
        repeat: number of the repetition, from 0.
        trace: what happened.
    """

    prompt_id: str
    repeat: int
    trace: Trace


@dataclass(frozen=True)
class Row:
    """The pooled measures of one method; None: not defined or not measured.

    Attributes:
        method: its id.
        runs: finished runs.
        tokens: emitted tokens of all runs.
        target_passes: passes of all runs.
        block_efficiency: tokens / target passes.
        acceptance_rate: accepted draft tokens / offered depth.
        tokens_per_second: median over the repeats.
        perplexity: pooled over the tokens.
        distinct_4: distinct 4-grams / 4-grams, counted within each answer.
        joules_per_token: joules / tokens; only if every run was measured.
        energy: of one run: how it was measured, and the reason if it was not.
    """

    method: str
    runs: int
    tokens: int
    target_passes: int
    block_efficiency: float | None
    acceptance_rate: float | None
    tokens_per_second: float | None
    perplexity: float | None
    distinct_4: float | None
    joules_per_token: float | None
    energy: EnergyReading


def rows(methods: Sequence[str], runs: Sequence[Run]) -> list[Row]:
    """One row for each method that has a finished run, in the order of `methods`."""
    found = []
    for method in methods:
        own = [run for run in runs if run.trace.method == method]
        if own:
            found.append(_row(method, own))
    return found


def _row(method: str, runs: Sequence[Run]) -> Row:
    traces = [run.trace for run in runs]
    decisions = [decision for trace in traces for decision in trace.decisions()]
    tokens = sum(trace.summary.tokens for trace in traces)
    passes = sum(trace.summary.target_passes for trace in traces)
    offered = sum(decision.tree.depth for decision in decisions)
    accepted = sum(decision.accepted_length for decision in decisions)
    logprobs = [value for decision in decisions for value in decision.emitted_logprobs]
    unmeasured = [trace for trace in traces if trace.energy.joules is None]
    total = None if unmeasured else math.fsum(trace.energy.joules or 0.0 for trace in traces)
    return Row(
        method=method,
        runs=len(runs),
        tokens=tokens,
        target_passes=passes,
        block_efficiency=_ratio(tokens, passes),
        acceptance_rate=_ratio(accepted, offered),
        tokens_per_second=_median_speed(runs),
        perplexity=_perplexity(logprobs),
        distinct_4=_distinct(traces),
        joules_per_token=_ratio(total, tokens),
        energy=(unmeasured or traces)[0].energy,
    )


def _ratio(numerator: float | None, denominator: float) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def _median_speed(runs: Sequence[Run]) -> float | None:
    speeds = []
    for repeat in {run.repeat for run in runs}:
        summaries = [run.trace.summary for run in runs if run.repeat == repeat]
        seconds = math.fsum(summary.decode_seconds for summary in summaries)
        speed = _ratio(sum(summary.tokens for summary in summaries), seconds)
        if speed is not None:
            speeds.append(speed)
    return statistics.median(speeds) if speeds else None


def _perplexity(logprobs: Sequence[float]) -> float | None:
    # As in a single run: a token that the target holds for impossible leaves no figure.
    if not logprobs or -math.inf in logprobs:
        return None
    try:
        return math.exp(-math.fsum(logprobs) / len(logprobs))
    except OverflowError:
        return None


def _distinct(traces: Sequence[Trace]) -> float | None:
    total = distinct = 0
    for trace in traces:
        ids = trace.token_ids
        grams = [ids[i : i + NGRAM] for i in range(len(ids) - NGRAM + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return _ratio(distinct, total)


def cells(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's texts, one tuple a row, in the order of `HEADINGS`."""
    speeds = {row.method: row.tokens_per_second for row in found}
    return [
        (
            row.method,
            f"{row.tokens:,}",
            f"{row.target_passes:,}",
            number(row.block_efficiency),
            number(row.acceptance_rate),
            number(row.tokens_per_second, 1),
            number(_ratio(row.tokens_per_second, speeds.get("speculative") or 0.0)),
            number(_ratio(row.tokens_per_second, speeds.get("autoregressive") or 0.0)),
            number(row.perplexity),
            number(row.distinct_4),
            joules(row.joules_per_token, row.energy),
        )
        for row in found
    ]


def notes(found: Sequence[Row]) -> list[str]:
    """What must stand under the table: why a column has dashes, what a figure is."""
    lines = []
    for baseline in ("speculative", "autoregressive"):
        if found and baseline not in {row.method for row in found}:
            lines.append(f"× {baseline} {DASH}: {baseline} was not run.")
    reasons: dict[str, list[str]] = {}
    for row in found:
        reading = row.energy
        if row.joules_per_token is None:
            said = f"J/token {DASH}: {reading.reason or 'not measured'}"
        else:
            said = f"J/token: {reading.method}, {reading.scope}"
            said += f", {reading.reason}" if reading.reason else ""
        reasons.setdefault(said, []).append(row.method)
    for said, methods in reasons.items():
        whom = "" if len(reasons) == 1 else f" ({', '.join(methods)})"
        lines.append(f"{said}{whom}")
    return [clean(line).replace("\n", " ") for line in lines]


def rich_table(found: Sequence[Row], width: int) -> Table:
    """The table for a terminal of `width` columns: where it does not fit, a line a figure."""
    table = Table()
    for heading in HEADINGS:
        left = heading == "method"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    texts = cells(found)
    for row in texts:
        table.add_row(*(Text(clean(cell)) for cell in row))
    # Headings may break between words, figures and ids may not.
    words = [max(len(word) for word in heading.split()) for heading in HEADINGS]
    figures = [max((len(row[i]) for row in texts), default=0) for i in range(len(HEADINGS))]
    if sum(map(max, words, figures)) + 3 * len(HEADINGS) + 1 <= width:
        return table
    narrow = Table(show_header=False, box=None, pad_edge=False)
    for row in texts:
        narrow.add_row(Text(clean(row[0]), style="bold"), "")
        for heading, cell in zip(HEADINGS[1:], row[1:], strict=True):
            narrow.add_row(Text(f"  {heading}"), Text(clean(cell)))
    return narrow


def markdown(found: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = [HEADINGS, ("---", *("---:" for _ in HEADINGS[1:])), *cells(found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
