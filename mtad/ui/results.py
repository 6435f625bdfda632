"""The figures of finished lanes: the table of the page, its CSV, and watts over time.

Pure: knows no browser and no gradio. Ratios are taken within one comparison only.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mtad.trace import Trace
from mtad.ui.about import about
from mtad.ui.lanes import Lane, no_perplexity
from mtad.ui.steps import DASH, number

BASELINES = ("speculative", "autoregressive")
# More points than a chart of this size can show would only be sent for nothing.
MAX_POWER_POINTS = 200
MIN_POWER_SECONDS = 0.2
_CSV_MEASURES = (
    "tokens",
    "tokens_per_second",
    "block_efficiency",
    "acceptance_rate",
    "target_passes",
    "perplexity",
    "distinct_4",
    "repeated_4gram_share",
    "joules",
    "joules_per_token",
    "watts",
    "decode_seconds",
    "prefill_seconds",
    "end_to_end_seconds",
)


def results_table(lanes: Sequence[Lane]) -> dict[str, Any] | None:
    """Figures of the finished runs with ratios to the baselines; None if nothing finished.

    A cell is [text, reason]; the reason is "" where there is a figure.
    """
    finished = [lane for lane in lanes if lane.trace is not None and lane.trace.summary.tokens]
    if not finished:
        return None
    rates = {lane.info.id: lane.trace.summary.tokens_per_second for lane in finished if lane.trace}
    rows = []
    for lane in finished:
        assert lane.trace is not None
        summary, energy = lane.trace.summary, lane.trace.energy
        per_token = summary.joules_per_token
        sign = "≈ " if energy.estimated else ""
        short = "fewer than four tokens"
        cells = [
            [f"{summary.tokens:,}", ""],
            [number(summary.tokens_per_second, 1), "too short to measure"],
            *[_ratio(summary.tokens_per_second, rates, baseline) for baseline in BASELINES],
            [number(summary.block_efficiency), "no target pass"],
            [
                _percent(summary.acceptance_rate),
                "nothing offered" if lane.info.uses_draft else "no draft",
            ],
            [f"{summary.target_passes:,}", ""],
            [number(summary.perplexity), no_perplexity(summary.tokens)],
            [number(summary.distinct_4), short],
            [_percent(summary.repeated_4gram_share), short],
            [
                sign + number(per_token) if per_token is not None else DASH,
                energy.reason or "not measured",
            ],
        ]
        rows.append(
            {
                "title": lane.info.title,
                "stopped": lane.state != "done",
                "cells": [[text, why if text == DASH else ""] for text, why in cells],
            }
        )
    return {
        "columns": [
            "method",
            "tokens",
            "tokens/s",
            "speed vs speculative",
            "speed vs single-token",
            "tokens per pass",
            "accepted",
            "target passes",
            "perplexity",
            "distinct-4",
            "repeated 4-grams",
            "J per token",
        ],
        "rows": rows,
    }


def results_csv(traces: Sequence[Trace]) -> str:
    """The table for programs: full figures, units in the names, an empty cell for no figure."""
    rates = {trace.method: trace.summary.tokens_per_second for trace in traces}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "method",
            *_CSV_MEASURES,
            *(f"speed_vs_{baseline}" for baseline in BASELINES),
            "energy_method",
            "stop_reason",
            "seed",
            "models",
            "machine",
            "started_at",
        ]
    )
    for trace in traces:
        words = about([trace])
        writer.writerow(
            [
                trace.method,
                *(getattr(trace.summary, name) for name in _CSV_MEASURES),
                *(_quotient(trace.summary.tokens_per_second, rates.get(b)) for b in BASELINES),
                trace.energy.method,
                trace.stop_reason,
                trace.config.seed,
                words["models"],
                words["machine"],
                trace.started_at,
            ]
        )
    return out.getvalue()


def power(trace: Trace) -> list[list[float]]:
    """[seconds, watts] over the run, from the joules of its steps.

    Each point is the mean since the point before, over a span that the sensor can resolve. Empty
    where no sensor told joules while the run went on; an estimate is not a measurement.
    """
    if trace.energy.estimated:
        return []
    seconds = trace.steps[-1].seconds if trace.steps else 0.0
    span = max(
        MIN_POWER_SECONDS, 2 * (trace.energy.resolution_s or 0.0), seconds / MAX_POWER_POINTS
    )
    points: list[list[float]] = []
    since: tuple[float, float] = (0.0, 0.0)
    for step in trace.steps:
        if step.joules is None or step.seconds - since[0] < span:
            continue
        watts = (step.joules - since[1]) / (step.seconds - since[0])
        points.append([round(step.seconds, 3), round(watts, 2)])
        since = (step.seconds, step.joules)
    return points


def _percent(share: float | None) -> str:
    return f"{100 * share:.0f} %" if share is not None else DASH


def _quotient(rate: float | None, reference: float | None) -> float | None:
    return rate / reference if rate is not None and reference else None


def _ratio(rate: float | None, rates: Mapping[str, float | None], baseline: str) -> list[str]:
    if baseline not in rates:
        return [DASH, "not in this comparison"]
    ratio = _quotient(rate, rates[baseline])
    return [f"{ratio:.2f}×", ""] if ratio is not None else [DASH, "too short to measure"]
