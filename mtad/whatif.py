"""Replays the acceptance rules on the recorded columns of a decision, without a model.

Two uses: to check a trace against itself (`accepted_path` gives the very path that the decoder
took), and to ask what another threshold τ would have accepted. An answer of the second kind is
per pass: another choice would have changed every pass after it. Pure Python, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mtad.config import DecodeConfig
from mtad.errors import ConfigError, TraceError
from mtad.trace import Decision, DraftTree, Step

JOINT_METHODS = ("mtad", "mtad_tree")


def accepted_path(decision: Decision, method: str, config: DecodeConfig) -> tuple[int, ...]:
    """The nodes that `method` accepts, root to leaf, from the recorded columns alone.

    Args:
        decision: with the columns that the method records.
        method: id of the method; those without an acceptance rule accept nothing.
        config: of the run; only `accept_threshold` is read.

    Raises:
        TraceError: the reference of a joint method is shorter than its tree.
    """
    if method in JOINT_METHODS:
        return _joint_path(decision, config.accept_threshold)
    if method in ("speculative", "typical"):
        return _chain(decision.tree, or_equal=False)
    if method == "bild":
        return _chain(decision.tree, or_equal=True)
    if method == "specinfer":
        return _first_passing_children(decision.tree)
    return ()


def accepted_length_at(decision: Decision, threshold: float) -> int:
    """Draft tokens of an `mtad` or `mtad_tree` decision that the threshold τ would accept.

    Raises:
        ConfigError: the threshold is not finite or not greater than 0.
        TraceError: the decision has a tree and no reference for its whole depth.
    """
    log_threshold = _log(threshold)
    return _longest(_best_ratio_by_depth(decision), log_threshold)


def threshold_curve(steps: Sequence[Step], thresholds: Sequence[float]) -> list[float]:
    """Expected emitted tokens a target pass for each τ: the mean of accepted length + 1.

    The end of a run (end-of-sequence, token limit) cuts what is emitted, not what is counted here.

    Args:
        steps: of a run of `mtad` or `mtad_tree`.
        thresholds: values of τ, in any order.

    Returns:
        One figure a threshold; empty if there are no steps, as nothing can be expected then.

    Raises:
        ConfigError: a threshold is not finite or not greater than 0.
        TraceError: a decision has a tree and no reference for its whole depth.
    """
    log_thresholds = [_log(threshold) for threshold in thresholds]
    if not steps:
        return []
    best = [_best_ratio_by_depth(step.decision) for step in steps]
    return [
        sum(_longest(ratios, log_threshold) + 1 for ratios in best) / len(best)
        for log_threshold in log_thresholds
    ]


def node_ratios(decision: Decision) -> list[float]:
    """By node: log p(path to the node) − log q(reference of the same length), in nats.

    −∞ where the target gives the path no probability. A node passes τ if its value > log τ.

    Raises:
        TraceError: the reference is shorter than the tree is deep.
    """
    tree = decision.tree
    if len(decision.reference_logprobs) < tree.depth:
        raise TraceError(
            f"reference_logprobs has {len(decision.reference_logprobs)} entries, but the draft is"
            f" {tree.depth} tokens deep: this is no decision of mtad or mtad_tree."
        )
    reference_sums = _running_sums(decision.reference_logprobs)
    return [
        _difference(target_sum, reference_sums[depth - 1])
        for target_sum, depth in zip(_target_sums(tree), tree.depths, strict=True)
    ]


def joint_ratios(decision: Decision) -> list[list[float]]:
    """Cumulative log p − log q by depth, one list for each leaf of the draft, in node order.

    Entry i belongs to depth i + 1. log q is the reference's where the decision has one, else the
    draft's own along the path, so that a decision of any drafting method can be drawn. Values may
    be infinite where a probability is 0.

    Raises:
        TraceError: there is a reference, but shorter than the tree is deep.
    """
    tree = decision.tree
    inner = set(tree.parents)
    paths = [tree.path_to(leaf) for leaf in range(len(tree.token_ids)) if leaf not in inner]
    if decision.reference_logprobs:
        ratios = node_ratios(decision)
    else:
        draft_sums = _path_sums(tree, tree.draft_logprobs)
        ratios = list(map(_difference, _target_sums(tree), draft_sums))
    return [[ratios[node] for node in path] for path in paths]


def _joint_path(decision: Decision, threshold: float) -> tuple[int, ...]:
    tree = decision.tree
    log_threshold = _log(threshold)
    ratios = node_ratios(decision)
    target_sums = _target_sums(tree)
    best = -1
    for node, depth in enumerate(tree.depths):
        if not ratios[node] > log_threshold:
            continue
        if best < 0 or (depth, target_sums[node]) > (tree.depths[best], target_sums[best]):
            best = node
    return tree.path_to(best)


def _best_ratio_by_depth(decision: Decision) -> list[float]:
    """The largest ratio of each depth: the one that decides whether the depth passes."""
    best = [-math.inf] * decision.tree.depth
    for ratio, depth in zip(node_ratios(decision), decision.tree.depths, strict=True):
        best[depth - 1] = max(best[depth - 1], ratio)
    return best


def _longest(best_ratios: Sequence[float], log_threshold: float) -> int:
    for length in range(len(best_ratios), 0, -1):
        if best_ratios[length - 1] > log_threshold:
            return length
    return 0


def _chain(tree: DraftTree, *, or_equal: bool) -> tuple[int, ...]:
    """Follows first children as long as each passes its test."""
    path: list[int] = []
    for node, passes in enumerate(_tests(tree, or_equal=or_equal)):
        follows = tree.parents[node] == (path[-1] if path else -1)
        if follows and not passes:
            break
        if follows:
            path.append(node)
    return tuple(path)


def _first_passing_children(tree: DraftTree) -> tuple[int, ...]:
    """From the root, the first child that passes, then its first child that passes, and so on."""
    path: list[int] = []
    # A parent stands before its children, so one walk over the nodes meets each choice in order.
    for node, passes in enumerate(_tests(tree, or_equal=False)):
        if passes and tree.parents[node] == (path[-1] if path else -1):
            path.append(node)
    return tuple(path)


def _tests(tree: DraftTree, *, or_equal: bool) -> Iterator[bool]:
    """By node: was it tested, and did it pass. A node that was not tested does not pass."""
    if not tree.scores or not tree.thresholds:
        yield from (False for _ in tree.token_ids)
        return
    for score, threshold in zip(tree.scores, tree.thresholds, strict=True):
        if score is None or threshold is None:
            yield False
        else:
            yield score >= threshold if or_equal else score > threshold


def _target_sums(tree: DraftTree) -> list[float]:
    return _path_sums(tree, tree.target_logprobs)


def _path_sums(tree: DraftTree, logprobs: Sequence[float]) -> list[float]:
    """By node: the sum of `logprobs` from depth 1 to the node, added in that order."""
    sums: list[float] = []
    for parent, logprob in zip(tree.parents, logprobs, strict=True):
        sums.append(logprob if parent < 0 else sums[parent] + logprob)
    return sums


def _running_sums(logprobs: Sequence[float]) -> list[float]:
    """Sums of the first 1, 2, … entries.

    Not `sum`, which rounds differently from Python 3.12 on, nor `math.fsum`: the decoder adds in
    plain float64 from the left, and the result must agree with it to the last bit.
    """
    sums: list[float] = []
    total = 0.0
    for logprob in logprobs:
        total += logprob
        sums.append(total)
    return sums


def _difference(target_sum: float, reference_sum: float) -> float:
    # −∞ − −∞ has no value; a path without probability under the target must never pass.
    return -math.inf if target_sum == -math.inf else target_sum - reference_sum


def _log(threshold: float) -> float:
    if not (math.isfinite(threshold) and threshold > 0):
        raise ConfigError(
            f"accept_threshold is {threshold}, but must be a number greater than 0 and finite."
        )
    return math.log(threshold)
