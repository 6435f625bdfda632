"""The tables of `mtad acceptance`: settings with their intervals, costs, the frontier. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from mtad.acceptance.measures import RESAMPLES, Costs, Estimate, Row, frontier
from mtad.terminal import DASH, clean, number

HEADINGS = (
    "method",
    "γ",
    "τ",
    "tokens/pass",
    "× speculative",
    "acceptance",
    "score",
    "tokens/s",
    "perplexity",
    "vs autoregressive, %",
    "distinct-4",
    "repeated 4-grams",
    "tokens",
)
COST_HEADINGS = ("pass", "rows", "ms", "/ one-token target pass")
FRONTIER_HEADINGS = (
    "method",
    "τ",
    "best γ",
    "tokens/pass",
    "perplexity",
    "vs autoregressive, %",
    "repeated 4-grams",
    "score",
    "on the frontier",
)

# The columns that name a row; they stand in every part of a table that is too wide.
KEYS = 3
MAX_PARTS = 3
_GAP = 2

Cells = tuple[str, ...]


def interval(figure: Estimate | None) -> str:
    """The figure and its interval."""
    if figure is None:
        return DASH
    if figure.low is None or figure.high is None:
        return number(figure.value)
    return f"{number(figure.value)} [{number(figure.low)}, {number(figure.high)}]"


def change(figure: Estimate | None) -> str:
    """A relative change and its interval, in per cent."""
    if figure is None:
        return DASH
    if figure.low is None or figure.high is None:
        return f"{100 * figure.value:+.1f}"
    return f"{100 * figure.value:+.1f} [{100 * figure.low:+.1f}, {100 * figure.high:+.1f}]"


def percent(share: float | None) -> str:
    """A share in per cent."""
    return DASH if share is None else f"{100 * share:.1f} %"


def cells(found: Sequence[Row]) -> list[Cells]:
    """One tuple a row, in the order of `HEADINGS`."""
    return [
        (
            row.setting.method,
            _gamma(row) + "*" * row.best_block + "†" * row.best_score,
            _tau(row),
            interval(row.block_efficiency),
            interval(row.times_speculative),
            number(row.acceptance_rate),
            number(row.score),
            number(row.tokens_per_second, 1),
            interval(row.perplexity),
            change(row.perplexity_change),
            number(row.distinct_4, 3),
            percent(row.repeated_4gram_share),
            f"{row.tokens:,}",
        )
        for row in found
    ]


def frontier_cells(found: Sequence[Row]) -> list[Cells]:
    """One tuple a method and τ, in the order of `FRONTIER_HEADINGS`."""
    return [
        (
            row.setting.method,
            _tau(row),
            _gamma(row),
            interval(row.block_efficiency),
            interval(row.perplexity),
            change(row.perplexity_change),
            percent(row.repeated_4gram_share),
            number(row.score),
            "yes" if best else "no",
        )
        for row, best in frontier(found)
    ]


def cost_cells(costs: Costs) -> list[Cells]:
    """One tuple a kind of pass, in the order of `COST_HEADINGS`."""
    measured = [("target", rows, seconds) for rows, seconds in sorted(costs.target.items())]
    measured += [("target, tree", rows, seconds) for rows, seconds in sorted(costs.tree.items())]
    if costs.draft_first is not None:
        measured.append(("draft, first step of a block", 2, costs.draft_first))
    measured += [("draft, later step", rows, time) for rows, time in sorted(costs.draft.items())]
    one = costs.target[1]
    return [
        (name, str(rows), number(1e3 * seconds), percent(seconds / one))
        for name, rows, seconds in measured
    ]


def _gamma(row: Row) -> str:
    gamma = row.setting.num_draft_tokens
    return DASH if gamma is None else str(gamma)


def _tau(row: Row) -> str:
    tau = row.setting.accept_threshold
    return DASH if tau is None else f"{tau:g}"


def notes(found: Sequence[Row], costs: Costs | None) -> list[str]:
    """What must stand under the table."""
    lines = [f"[low, high]: 95 %, {RESAMPLES:,} bootstrap resamples over the prompts, in pairs."]
    if any(row.best_block for row in found):
        best = "* best γ of its method and τ by tokens/pass"
        lines.append(best + (", † by score." if costs else "."))
    speculative = [row for row in found if row.setting.method == "speculative"]
    if speculative:
        own = next((row for row in speculative if row.best_block), speculative[0])
        lines.append(f"× speculative: tokens/pass against {own.setting}, its own best γ.")
    else:
        lines.append(f"× speculative {DASH}: speculative was not run.")
    if not any(row.setting.method == "autoregressive" for row in found):
        lines.append(f"vs autoregressive {DASH}: autoregressive was not run.")
    if costs is None:
        lines.append(f"score {DASH}: the costs were not measured.")
    else:
        lines.append(
            "score: tokens/pass over the cost of a pass and its draft, a one-token target pass"
            f" being 1; costs are medians of {costs.rounds} at a context of {costs.context}."
        )
    return lines


def rich_tables(headings: Cells, lines: Sequence[Cells], width: int) -> list[Table]:
    """One table for a terminal of `width` columns, up to three parts of it, or a line a figure."""
    for parts in range(1, MAX_PARTS + 1):
        columns = _parts(len(headings), parts)
        if all(_width(headings, lines, own) <= width for own in columns):
            return [_table(headings, lines, own) for own in columns]
    narrow = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(2):
        narrow.add_column(overflow="fold")  # by default a long word would be cut off
    for line in lines:
        narrow.add_row(Text(clean(line[0]), style="bold"), "")
        for heading, cell in zip(headings[1:], line[1:], strict=True):
            narrow.add_row(Text(f"  {heading}"), Text(clean(cell)))
    return [narrow]


def _parts(count: int, parts: int) -> list[list[int]]:
    """The columns of each part: the keys, and an even share of the others."""
    ends = [KEYS + (count - KEYS) * part // parts for part in range(parts + 1)]
    return [[*range(KEYS), *range(*own)] for own in itertools.pairwise(ends)]


def _width(headings: Cells, lines: Sequence[Cells], columns: Sequence[int]) -> int:
    return sum(max(len(line[i]) for line in (headings, *lines)) + _GAP for i in columns)


def _table(headings: Cells, lines: Sequence[Cells], columns: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for i in columns:
        table.add_column(headings[i], justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(clean(line[i])) for i in columns))
    return table


def markdown(headings: Cells, lines: Sequence[Cells]) -> str:
    """The table as Markdown."""
    every = [headings, ("---", *("---:" for _ in headings[1:])), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every).replace("*", r"\*")
