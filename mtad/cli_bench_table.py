"""The tables of `mtad bench`: speed, predictions, text and shares, limits, costs. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mtad.acceptance.measures import RESAMPLES, Costs, Estimate
from mtad.bench.measures import ASSISTED, GENERATE, MIN_PROMPTS, Row
from mtad.bench.roofline import Machine, Reached
from mtad.cli_acceptance_table import COST_HEADINGS, Cells, cost_cells, percent
from mtad.terminal import DASH, clean, joules, number

# Every table begins with what a figure may not be read without.
_KEYS = ("row", "engine", "dtype")
SPEED_HEADINGS = (
    *_KEYS,
    "tokens/s",
    "× autoregressive",
    "× speculative",
    "× transformers float32",
    "J/token",
    "tokens/pass",
)
PREDICTION_HEADINGS = (
    *_KEYS,
    "× of all tokens",
    "predicted ×",
    "measured / predicted",
    "predicted × by passes alone",
    "measured / that",
)
TEXT_HEADINGS = (
    *_KEYS,
    "perplexity",
    "distinct-4",
    "repeated 4-grams",
    "draft",
    "verification",
    "everything else",
    "prompts",
    "tokens",
)
LIMIT_HEADINGS = (
    *_KEYS,
    "rows",
    "MB",
    "limit, ms",
    "by",
    "measured, ms",
    "reached",
    "draft: rows",
    "MB",
    "limit, ms",
    "by",
    "measured, ms",
    "reached",
)
_GIGA = 1e9
_TEXT = (
    "draft, verification, everything else: of the decode time. distinct-4: distinct 4-grams /"
    " 4-grams, counted within each answer; repeated 4-grams: the rest of them."
)


def tables(found: Sequence[Row], costs: Costs | None) -> list[tuple[Cells, list[Cells]]]:
    """Headings and lines of each table."""
    ours = [row for row in found if not row.line.transformers]
    made = [
        (SPEED_HEADINGS, [_speed(row) for row in found]),
        (PREDICTION_HEADINGS, [_prediction(row) for row in ours]),
        (TEXT_HEADINGS, [_text(row) for row in found]),
        (LIMIT_HEADINGS, [_limits(row) for row in found]),
    ]
    made = [(headings, lines) for headings, lines in made if lines]
    if costs is not None:
        made.append((COST_HEADINGS, cost_cells(costs)))
    return made


def interval(figure: Estimate | None, digits: int = 2) -> str:
    """The figure and its interval; a dash in place of an interval that there is not."""
    if figure is None:
        return DASH
    inside = DASH
    if figure.low is not None and figure.high is not None:
        inside = f"{number(figure.low, digits)}, {number(figure.high, digits)}"
    return f"{number(figure.value, digits)} [{inside}]"


def _keys(row: Row) -> tuple[str, str, str]:
    return row.line.title, row.line.engine, row.line.dtype


def _speed(row: Row) -> Cells:
    spent = DASH if row.energy is None else joules(row.joules_per_token, row.energy)
    return (
        *_keys(row),
        interval(row.tokens_per_second, 1),
        interval(row.times_autoregressive),
        interval(row.times_speculative),
        interval(row.times_transformers),
        spent,
        interval(row.block_efficiency),
    )


def _prediction(row: Row) -> Cells:
    return (
        *_keys(row),
        number(row.speedup),
        number(row.predicted),
        number(row.measured_over_predicted),
        number(row.predicted_alone),
        number(row.measured_over_alone),
    )


def _text(row: Row) -> Cells:
    return (
        *_keys(row),
        interval(row.perplexity),
        number(row.distinct_4, 3),
        percent(row.repeated_4gram_share),
        percent(row.draft_share),
        percent(row.verify_share),
        percent(row.other_share),
        f"{row.prompts:,}" if row.prompts else DASH,
        f"{row.tokens:,}" if row.tokens else DASH,
    )


def _limits(row: Row) -> Cells:
    return (*_keys(row), *_limit(row.target_pass), *_limit(row.draft_step))


def _limit(found: Reached | None) -> Cells:
    if found is None:
        return (DASH,) * 6
    return (
        number(found.rows, 1),
        number(found.pass_bytes / 1e6, 1),
        number(1e3 * found.limit_seconds),
        found.bound,
        number(1e3 * found.measured_seconds),
        percent(found.share),
    )


def footer(found: Sequence[Row], costs: Costs | None, machine: Machine | None) -> list[str]:
    """What must stand under the tables: what a figure is, and why there is a dash. Cleaned."""
    lines = [*_absent(found), *_baselines(found), *_intervals(found), *_energy(found)]
    lines += [*_transformers(found), *_predictions(found, costs), _TEXT, *_roofline(found, machine)]
    return [clean(line).replace("\n", " ") for line in lines]


def _absent(found: Sequence[Row]) -> list[str]:
    lines = []
    for row in found:
        if row.line.absent is not None:
            lines.append(
                f"{row.line.title} ({row.line.dtype}) {DASH}: {row.line.absent.rstrip('.')}."
            )
        elif not row.prompts:
            lines.append(f"{row.line.title} ({row.line.dtype}) {DASH}: no run was finished.")
    return lines


def _baselines(found: Sequence[Row]) -> list[str]:
    there = {row.line.setting.method for row in found if row.prompts}
    lines = []
    for method in ("autoregressive", "speculative"):
        if method not in there:
            lines.append(f"× {method} {DASH}: {method} has no finished run.")
    if GENERATE["float32"] not in there:
        lines.append(f"× transformers float32 {DASH}: that row has no finished run.")
    return lines


def _intervals(found: Sequence[Row]) -> list[str]:
    lines = [
        "tokens/s, × autoregressive, × speculative, × transformers float32: medians over the"
        " prompts, ratios at the same prompt; without prefill. tokens/pass and perplexity: pooled."
        f" [low, high]: 95 %, {RESAMPLES:,} bootstrap resamples over the prompts."
    ]
    if any(0 < row.prompts < MIN_PROMPTS for row in found):
        lines.append(
            f"[{DASH}]: fewer than {MIN_PROMPTS} prompts are too few for an interval."
            " Give more with --limit or --prompts."
        )
    return lines


def _energy(found: Sequence[Row]) -> list[str]:
    """Rows of one method of measuring share a line; the reason of a short run may differ."""
    said: dict[str, list[str]] = {}
    for row in found:
        reading = row.energy
        if reading is None:
            continue
        if row.joules_per_token is None:
            text = f"J/token {DASH}: {reading.reason or 'not measured'}"
        else:
            text = f"J/token: {reading.method}, {reading.scope}"
            text += f", {reading.reason}" if reading.reason else ""
        said.setdefault(text, []).append(f"{row.line.title}, {row.line.dtype}")
    if len(said) == 1:
        return list(said)
    return [f"{text} ({'; '.join(rows)})" for text, rows in said.items()]


def _transformers(found: Sequence[Row]) -> list[str]:
    there = {row.line.setting.method: row for row in found if row.line.transformers and row.prompts}
    lines = []
    if there:
        lines.append(
            "transformers: times of what follows its first pass, which is its prefill; perplexity"
            " from a pass of the same model afterwards, which is not timed."
        )
    if ASSISTED in there:
        gamma = there[ASSISTED].line.setting.num_draft_tokens
        schedule = "starting at 4, as auto does" if gamma == "auto" else "constant"
        lines.append(
            f"assisted generation: num_assistant_tokens {gamma}, {schedule},"
            " assistant_confidence_threshold 0."
        )
    return lines


def _predictions(found: Sequence[Row], costs: Costs | None) -> list[str]:
    lines = [
        "× of all tokens: as × autoregressive, of all runs of both rows together in place of the"
        " median over the prompts. predicted ×: tokens/pass × the cost of a one-token pass / the"
        " cost of verification and drafting in these runs: how much faster the models are without"
        " what stands between their passes. So measured / predicted says what is lost there,"
        " beside what autoregressive loses, and nothing of the passes themselves.",
    ]
    if costs is None:
        return [*lines, f"predicted × by passes alone {DASH}: the costs were not measured."]
    lines.append(
        "predicted × by passes alone: the same by costs measured outside of the runs, in this"
        f" process, before the runs and between them: medians of {costs.rounds} ratios to the"
        f" one-token pass before each, at a context of {costs.context}. With γ auto the iterations"
        " of a run cost what its mean verification does, between two measured ones; where lengths"
        " differ much within a run, that is a little too cheap. It differs where"
        " the clock did, and where passes cost more behind each other than alone."
    )
    without = [row.line.title for row in found if row.prompts and row.predicted_alone is None]
    if without:
        lines.append(
            f"predicted × by passes alone {DASH}: for {', '.join(dict.fromkeys(without))} no fixed"
            " cost of an iteration was measured (transformers, bild, trees that W does not divide)."
        )
    return lines


def _roofline(found: Sequence[Row], machine: Machine | None) -> list[str]:
    if machine is None:
        return [f"limit {DASH}: the machine was not measured."]
    rates = ", ".join(
        f"{name} {number(rate / _GIGA, 1)}" for name, rate in machine.operations_per_second.items()
    )
    reads = machine.reads or (machine.read_bytes_per_second,)
    lines = [
        "limit: the bytes of a pass / the bandwidth of reading, or its operations / the matrix"
        " rate, whichever is longer. Bytes: all weights once, keys and values of the mean context."
        " Reading counts, as a pass hardly writes. rows: tokens that the mean pass reads; of a"
        " draft that does not count them by γ, W and the tree, — where those are auto.",
        f"{machine.name}: reads {number(machine.read_bytes_per_second / _GIGA, 1)} GB/s (a sum or"
        f" a matrix-vector product over {machine.buffer_bytes / 1e6:,.0f} MB; best of"
        f" {len(reads)} times before the runs and between them, median"
        f" {number(statistics.median(reads) / _GIGA, 1)}; last-level cache"
        f" {machine.cache_bytes / 1e6:,.0f} MB), copies"
        f" {number(machine.copy_bytes_per_second / _GIGA, 1)} GB/s (bytes read; as many are"
        f" written); matrix products, Gop/s: {rates or DASH}.",
    ]
    passes = [one for row in found for one in (row.target_pass, row.draft_step) if one is not None]
    unknown = {row.line.dtype for row in found if row.target_pass is not None}
    unknown -= machine.operations_per_second.keys()
    if unknown:
        lines.append(
            f"The matrix rate of {', '.join(sorted(unknown))} was not measured: its limit is that"
            " of the bandwidth alone, and may be too low where a pass has many rows."
        )
    if any(one.share > 1.0 for one in passes):
        lines.append(
            "A share above 100 %: the bandwidth was measured while others used the memory, or the"
            " bytes stood in a cache."
        )
    if any(one.pass_bytes < machine.cache_bytes for one in passes):
        lines.append(
            "A pass of fewer bytes than the last-level cache holds may find them there: it can be"
            " faster than its limit."
        )
    return lines
