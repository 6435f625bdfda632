"""The strip of passes, and what another threshold τ would have accepted in each of them.

Pure: a Trace in, JSON-able dictionaries out. The rule itself is `mtad.whatif`'s; here it is
asked for many τ at once. Every τ of the slider is compared with every recorded ratio here, in
Python, and a browser gets whole numbers: so what it shows agrees with the library to the bit,
whatever its logarithm does.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

from mtad.catalogue import method_info
from mtad.config import DecodeConfig
from mtad.trace import Decision, Trace
from mtad.ui.steps import number
from mtad.whatif import JOINT_METHODS, accepted_length_at, accepted_path, node_ratios

LOWEST, HIGHEST = 0.01, 1.0
STEPS_A_DECADE = 80
# What people would set; near these the even steps would miss them by a hair.
_ROUND = {0.02, 0.03, 0.05, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9}
_KIND_LETTERS = {"bonus": "b", "corrected": "c", "sampled": "s", None: "-"}
# One in so many values of the slider stands in the table beside the curve.
_TABLE_EVERY = 16


def slider_thresholds(recorded: float) -> list[float]:
    """The τ that the slider offers, ascending: 0.01 to 1 on a log scale, and the recorded one."""
    decades = round(math.log10(HIGHEST / LOWEST))
    values = {
        round(LOWEST * 10 ** (step / STEPS_A_DECADE), 4)
        for step in range(decades * STEPS_A_DECADE + 1)
    }
    return sorted(values | _ROUND | {recorded})


def strip_view(trace: Trace) -> dict[str, Any]:
    """All passes as columns of small numbers, so that thousands of them are a short message.

    Returns:
        `emitted`, `accepted`, `offered`: tokens, by pass; `kinds`: one letter a pass for what
        the target added (b, c, s; - for nothing); `rescued`: the passes in which a later token
        lifted the joint ratio back over log τ; `top`: the height of the tallest cell; `start`:
        the pass to show first: the deepest rescue, or one that was accepted in part.
    """
    decisions = [step.decision for step in trace.steps]
    emitted = [len(decision.emitted) for decision in decisions]
    accepted = [min(len(d.emitted), d.accepted_length) for d in decisions]
    offered = [decision.tree.depth for decision in decisions]
    joint = trace.method in JOINT_METHODS
    rescued = [i for i, d in enumerate(decisions) if joint and dips(d, trace.config)]
    partial = [i for i, (a, o) in enumerate(zip(accepted, offered, strict=True)) if 0 < a < o]
    return {
        "emitted": emitted,
        "accepted": accepted,
        "offered": offered,
        "kinds": "".join(
            _KIND_LETTERS[d.final_kind] if len(d.emitted) > a else "-"
            for d, a in zip(decisions, accepted, strict=True)
        ),
        "rescued": rescued,
        "start": max(rescued, key=lambda i: _fall(decisions[i], trace.config))
        if rescued
        else next(iter(partial), 0),
        "top": max(max(emitted, default=1), max(offered, default=0) + 1 if joint else 1, 1),
    }


def dips(decision: Decision, config: DecodeConfig) -> list[int]:
    """Depths, from 1, at which the accepted path stood under log τ before a later token passed."""
    if len(decision.path) < 2:
        return []
    log_threshold = math.log(config.accept_threshold)
    ratios = node_ratios(decision)
    if not ratios[decision.path[-1]] > log_threshold:
        return []
    return [
        depth
        for depth, node in enumerate(decision.path[:-1], 1)
        if not ratios[node] > log_threshold
    ]


def _fall(decision: Decision, config: DecodeConfig) -> float:
    """How far the deepest dip of a rescued path falls under log τ."""
    ratios = node_ratios(decision)
    lowest = min(ratios[decision.path[depth - 1]] for depth in dips(decision, config))
    return math.log(config.accept_threshold) - lowest


def what_if_view(trace: Trace) -> dict[str, Any]:
    """What the slider needs of a whole trace.

    Returns:
        `why`: why there is no slider, "" if there is one. Then also `taus`: texts; `recorded`:
        the index of the trace's own τ; `ranks`: by pass, for each depth the number of leading τ
        that accept at least so many tokens; `x`: places of the τ on the axis, 0 to 1;
        `expected` and `expected_texts`: tokens a pass, by τ; `table`: rows of texts.

    Raises:
        TraceError: a decision of a joint method has no reference for its whole depth.
    """
    if trace.method not in JOINT_METHODS:
        info = method_info(trace.method)
        rest = "its rule compares other figures, below" if info.uses_draft else "it drafts nothing"
        return {"why": f"{info.title} has no threshold τ to change: {rest}."}
    if not trace.steps:
        return {"why": "This trace has no pass."}
    taus = slider_thresholds(trace.config.accept_threshold)
    logs = [math.log(tau) for tau in taus]
    ranks = [_ranks(step.decision, logs) for step in trace.steps]
    expected = _expected(ranks, len(taus))
    texts = [tau_text(tau) for tau in taus]
    recorded = taus.index(trace.config.accept_threshold)
    span = logs[-1] - logs[0] or 1.0
    in_table = sorted({*range(0, len(taus), _TABLE_EVERY), len(taus) - 1, recorded})
    return {
        "why": "",
        "taus": texts,
        "recorded": recorded,
        "ranks": ranks,
        "x": [round((log - logs[0]) / span, 5) for log in logs],
        "ticks": [
            [tau_text(tau), round((math.log(tau) - logs[0]) / span, 5)]
            for tau in (0.01, 0.03, 0.1, 0.3, 1.0)
            if taus[0] <= tau <= taus[-1]
        ],
        "logs": [round(log, 4) for log in logs],
        "log_texts": [number(log) for log in logs],
        "expected": expected,
        "expected_texts": [number(value) for value in expected],
        "table": [
            [texts[k] + (" (recorded)" if k == recorded else ""), number(expected[k])]
            for k in in_table
        ],
    }


def what_if_at(trace: Trace, threshold: float) -> dict[str, Any]:
    """The same for one τ that is not on the slider, asked of the library itself.

    Raises:
        ConfigError: the threshold is no number greater than 0, or not finite.
        TraceError: a decision of a joint method has no reference for its whole depth.
    """
    lengths = [accepted_length_at(step.decision, threshold) for step in trace.steps]
    expected = (sum(lengths) + len(lengths)) / len(lengths)
    log = math.log(threshold)
    return {
        "tau": tau_text(threshold),
        "log": round(log, 4),
        "log_text": number(log),
        "lengths": lengths,
        "expected": expected,
        "expected_text": number(expected),
    }


def disagreeing(trace: Trace) -> int:
    """Passes whose recorded path is not what the method's rule makes of the recorded figures."""
    if not method_info(trace.method).uses_draft:
        return 0
    return sum(
        accepted_path(step.decision, trace.method, trace.config) != step.decision.path
        for step in trace.steps
    )


def tau_text(tau: float) -> str:
    """A τ as short as it can be said."""
    return f"{tau:.6g}"


def _ranks(decision: Decision, log_thresholds: Sequence[float]) -> list[int]:
    """By depth: the number of leading thresholds that accept at least this many tokens.

    A length is accepted if it or a longer one passes, so what counts at a depth is the largest
    ratio there or deeper.
    """
    best = [-math.inf] * decision.tree.depth
    for ratio, depth in zip(node_ratios(decision), decision.tree.depths, strict=True):
        best[depth - 1] = max(best[depth - 1], ratio)
    for depth in range(len(best) - 2, -1, -1):
        best[depth] = max(best[depth], best[depth + 1])
    # As many thresholds lie strictly under the ratio as bisect_left says.
    return [bisect.bisect_left(log_thresholds, ratio) for ratio in best]


def _expected(ranks: Sequence[Sequence[int]], count: int) -> list[float]:
    """Tokens a pass, by threshold: the mean of accepted length + 1."""
    at_rank = [0] * (count + 1)
    for row in ranks:
        for rank in row:
            at_rank[rank] += 1
    accepted = sum(at_rank)
    expected = []
    for index in range(count):
        # At the threshold of this index a depth counts if more than `index` thresholds accept it.
        accepted -= at_rank[index]
        expected.append((accepted + len(ranks)) / len(ranks))
    return expected
