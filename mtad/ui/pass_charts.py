"""What decided a pass, as a chart: joint ratios against log τ, or scores against thresholds.

Pure, as `mtad.ui.passes` is, of which this is a part: axes and labels are made here, the browser
draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mtad.trace import DraftTree, Step, Trace
from mtad.ui.steps import DASH, is_block
from mtad.ui.steps import number as plain_number
from mtad.ui.what_if import dips, tau_text
from mtad.whatif import JOINT_METHODS, node_ratios

# By method: what its rule compares, as headings: score, threshold, test.
TESTS = {
    "speculative": ("p/q", "drawn u", "p/q > u"),
    "specinfer": ("p/q", "drawn u", "p/q > u"),
    "typical": ("p", "threshold", "p > threshold"),
    "bild": ("log p, unfiltered", "limit", "log p ≥ limit"),
}
# How far under or over the lines of a chart a point may pull its axis.
_REACH_NATS = 6.0


def number(value: float | None, digits: int = 2) -> str:
    """A figure as everywhere on the page; absurd ones, of a file from anywhere, stay short."""
    if value is None or math.isnan(value):
        return DASH
    if math.isfinite(value) and abs(value) >= 1e6:
        return f"{value:.1e}".replace("-", "−", 1) if value < 0 else f"{value:.1e}"
    return plain_number(value, digits)


def ratio_text(value: float, log_threshold: float) -> str:
    """A ratio beside log τ, with as many digits as it takes to tell them apart."""
    near = math.isfinite(value) and abs(value - log_threshold) < 0.015
    return number(value, 4 if near else 2)


def passes(tree: DraftTree, node: int, method: str) -> bool | None:
    """Whether a node passed its own test; None if it was not tested."""
    score, threshold = at(tree.scores, node), at(tree.thresholds, node)
    if score is None or threshold is None:
        return None
    return score >= threshold if method == "bild" else score > threshold


def chart(trace: Trace, step: Step, nodes: Sequence[int]) -> dict[str, Any] | None:
    """Of the nodes that are drawn; None where there is nothing to compare."""
    tree = step.decision.tree
    if not nodes:
        return None
    if trace.method in JOINT_METHODS:
        return _ratio_chart(trace, step, nodes)
    if trace.method in TESTS and any(score is not None for score in tree.scores):
        return _test_chart(trace, step, nodes)
    return None


def _ratio_chart(trace: Trace, step: Step, nodes: Sequence[int]) -> dict[str, Any]:
    """The joint ratio along every path, against depth, with the line log τ."""
    decision, tree = step.decision, step.decision.tree
    log_tau = math.log(trace.config.accept_threshold)
    ratios = node_ratios(decision)
    place = {node: row for row, node in enumerate(nodes)}
    inner = {tree.parents[node] for node in nodes}
    leaves = [node for node in nodes if node not in inner]
    finite = [ratios[node] for node in nodes if math.isfinite(ratios[node])]
    lines = (0.0, log_tau)
    low = max(min((*finite, *lines)), min(lines) - _REACH_NATS)
    high = min(max((*finite, *lines)), max(lines) + _REACH_NATS)
    margin = 0.1 * (high - low) or 1.0
    length = decision.accepted_length
    ends = {0: "no prefix passes", 1: "longest passing prefix: 1 token"}
    return {
        "kind": "ratio",
        "low": round(low - margin, 4),
        "high": round(high + margin, 4),
        "log_tau": round(log_tau, 4),
        "line": f"log τ = {number(log_tau)} (τ = {tau_text(trace.config.accept_threshold)})",
        "values": [_plot(ratios[node]) for node in nodes],
        "labels": [ratio_text(ratios[node], log_tau) for node in nodes],
        "curves": [[place[node] for node in tree.path_to(leaf)] for leaf in leaves],
        "chosen": [place[node] for node in decision.path if node in place],
        "depth": tree.depth,
        "end": length,
        "end_text": ends.get(length, f"longest passing prefix: {length} tokens"),
        "dips": dips(decision, trace.config),
        "reference": _reference_leaf(step, place),
    }


def _reference_leaf(step: Step, place: dict[int, int]) -> int:
    """The row of the leaf whose log q the threshold was measured against; −1 if not found."""
    decision, tree = step.decision, step.decision.tree
    if is_block(tree):
        return -1
    depth = len(decision.reference_logprobs)
    for node, row in place.items():
        if tree.depths[node] == depth:
            path = tree.path_to(node)
            if tuple(tree.draft_logprobs[k] for k in path) == decision.reference_logprobs:
                return row
    return -1


def _test_chart(trace: Trace, step: Step, nodes: Sequence[int]) -> dict[str, Any]:
    """Score against threshold, one pair a tested node, by depth."""
    tree = step.decision.tree
    score_name, threshold_name, test = TESTS[trace.method]
    items, values = [], []
    for row, node in enumerate(nodes):
        score, threshold = at(tree.scores, node), at(tree.thresholds, node)
        tested = score is not None and threshold is not None
        if not tested and not is_block(tree):
            continue
        pair = [_scaled(score, trace.method), _scaled(threshold, trace.method)] if tested else []
        values += [value for value in pair if value is not None and math.isfinite(value)]
        items.append(
            {
                "row": row,
                "d": tree.depths[node],
                "score": _plot(pair[0]) if pair else None,
                "threshold": _plot(pair[1]) if pair else None,
                "st": number(score) if tested else "",
                "tt": number(threshold) if tested else "",
                "v": passes(tree, node, trace.method),
            }
        )
    low, high, ticks = _scale(trace.method, values)
    return {
        "kind": "tests",
        "score": score_name,
        "threshold": threshold_name,
        "test": test,
        "bars": trace.method in ("speculative", "specinfer"),
        "low": low,
        "high": high,
        "ticks": ticks,
        "items": items,
        "depth": tree.depth,
    }


def _scaled(value: float | None, method: str) -> float | None:
    """Where a figure stands on the axis: probabilities of `typical` by their logarithm."""
    if value is None or method != "typical":
        return value
    return math.log10(value) if value > 0 else -math.inf


def _scale(method: str, values: Sequence[float]) -> tuple[float, float, list[list[Any]]]:
    """Ends and ticks of the axis."""
    if method in ("speculative", "specinfer"):
        return 0.0, 1.0, [[0.0, "0"], [0.5, "0.5"], [1.0, "1"]]
    if method == "typical":
        low = max(-6.0, min(-2.0, math.floor(min(values, default=-2.0))))
        return low, 0.0, [[float(k), f"{10.0**k:g}"] for k in range(int(low), 1)]
    low = max(min(values, default=-5.0), -40.0) * 1.12 - 0.5
    step = max(1, round(-low / 5))
    return round(low, 3), 0.0, [[float(k), number(k, 0)] for k in range(0, int(low) - 1, -step)]


def at(values: Sequence[float | None], node: int) -> float | None:
    """Of a node; None where there is no such column."""
    return values[node] if node < len(values) else None


def _plot(value: float | None) -> float | str | None:
    """A figure for the drawing: JSON has no infinities."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return round(value, 4)
