"""How much faster a row should be by what passes cost outside of any run. Pure; no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence

from mtad.acceptance import measures as acceptance
from mtad.acceptance.measures import Costs, Pass, iteration_passes, needed_passes, ratio
from mtad.acceptance.records import Setting
from mtad.bench.records import Runs
from mtad.config import DecodeConfig
from mtad.pace import AUTO_TREES, MAX_AUTO_DRAFT_TOKENS

AUTO_LENGTHS = (1, 2, 4, 8, MAX_AUTO_DRAFT_TOKENS)


def tree_passes(tree: Sequence[int], beam_width: int) -> tuple[Pass, list[Pass]]:
    """The target's pass over a tree of `specinfer`, and the later draft steps.

    A line is verified as a block. A tree that does not divide into W branches, as measured trees
    do, costs what a block of as many rows does.
    """
    levels = list(itertools.accumulate(tree, operator.mul))
    kind = "target" if max(tree) == 1 or sum(levels) % beam_width else "tree"
    return (kind, 1 + sum(levels)), [("draft", rows) for rows in levels[:-1]]


def _trees(config: DecodeConfig) -> Sequence[tuple[int, ...]]:
    """Those that `specinfer` may draw."""
    return AUTO_TREES if config.k_config == "auto" else [config.k_config]


def passes_of(settings: Sequence[Setting], config: DecodeConfig) -> set[Pass]:
    """The passes that these settings are made of."""
    fixed = [one for setting in settings for one in fixed_lengths(setting)]
    found = needed_passes(fixed, config.width)
    if any(setting.method == "specinfer" for setting in settings):
        for tree in _trees(config):
            verification, drafting = tree_passes(tree, config.width)
            found |= {verification, *drafting}
    return found


def fixed_lengths(setting: Setting) -> list[Setting]:
    """The setting itself; with γ "auto" the lengths whose costs stand for all."""
    if setting.num_draft_tokens != "auto":
        return [setting]
    return [dataclasses.replace(setting, num_draft_tokens=length) for length in AUTO_LENGTHS]


def mean_rows(own: Runs) -> float | None:
    """Mean rows of a verification."""
    records = [run.record for run in own.values()]
    positions = sum(record.target_positions for record in records)
    return ratio(positions, sum(record.target_passes for record in records))


def predict_alone(
    quality: acceptance.Row, config: DecodeConfig, costs: Costs | None, own: Runs
) -> float | None:
    """Tokens a pass × the cost of a one-token pass / the cost of verification and drafting.

    The iterations of a run cost what its mean verification does: "auto" changes their shape, and
    the end of an answer cuts it. None where they differ in what they draft in another way (W
    "auto"), and for transformers.

    Args:
        quality: the row.
        config: of the runs.
        costs: measured.
        own: the runs.
    """
    setting = quality.setting
    if costs is None or quality.block_efficiency is None:
        return None
    if setting.method == "autoregressive":
        return quality.score
    if config.beam_width == "auto" and setting.method in ("mtad", "mtad_tree"):
        return None
    if setting.method == "specinfer":
        found = [_tree_point(tree, config, costs) for tree in _trees(config)]
    else:
        found = [_point(one, config, costs) for one in fixed_lengths(setting)]
    points = [point for point in found if point is not None]
    if len(points) < len(found):
        return None
    one_token = costs.target[1]
    seconds = _mean_iteration(sorted([(1.0, one_token), *points]), own)
    if not seconds:
        return None
    return quality.block_efficiency.value * one_token / seconds


def _point(setting: Setting, config: DecodeConfig, costs: Costs) -> tuple[float, float] | None:
    """Rows of the verification, and seconds of an iteration."""
    passes = iteration_passes(setting, config.width)
    seconds = costs.pass_seconds(setting, config.width)
    return None if passes is None or seconds is None else (float(passes[0][1]), seconds)


def _tree_point(
    tree: Sequence[int], config: DecodeConfig, costs: Costs
) -> tuple[float, float] | None:
    """The same of an iteration of `specinfer`."""
    (kind, rows), later = tree_passes(tree, config.width)
    verifying = (costs.tree if kind == "tree" else costs.target).get(rows)
    steps = [costs.draft.get(width) for _, width in later]
    seconds = [verifying, costs.draft_first, *steps]
    known = [one for one in seconds if one is not None]
    return (float(rows), math.fsum(known)) if len(known) == len(seconds) else None


def _mean_iteration(points: Sequence[tuple[float, float]], own: Runs) -> float | None:
    """Seconds of an iteration: rows grow dear, so that their mean over all runs would not do."""
    total, passes = 0.0, 0
    for key, run in own.items():
        seconds = _between(points, mean_rows({key: run}))
        if seconds is None:
            return None
        total += run.record.target_passes * seconds
        passes += run.record.target_passes
    return ratio(total, passes)


def _between(points: Sequence[tuple[float, float]], rows: float | None) -> float | None:
    """Between two points that were measured the cost of an iteration is a straight line."""
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if rows is not None and rows <= right:
            return low + (high - low) * (rows - left) / (right - left)
    return None
