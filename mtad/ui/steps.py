"""One decoding step as the page shows it: tokens with provenance, struck-out drafts, figures.

Pure: `Step` in, JSON-able dictionaries out. Knows no model, no browser and no gradio. All
figures are formatted here, so that they can be tested without a browser; all texts are data
and are handed over unchanged, the browser puts them into text nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mtad.catalogue import MethodInfo
from mtad.config import DecodeConfig
from mtad.trace import DraftTree, Step

DASH = "–"
_KIND_LETTERS = {"accepted": "a", "bonus": "b", "corrected": "c", "sampled": "s"}
_JOINT_METHODS = ("mtad", "mtad_tree")
# By method: the columns of the figures that its rule compared. The joint methods compare sums
# along the path, the others one token at a time.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "mtad": ("draft token", "log p joint", "log q joint", "log p/q", "> log τ"),
    "mtad_tree": ("draft token", "log p joint", "log q joint", "log p/q", "> log τ"),
    "speculative": ("draft token", "p/q", "drawn u", "p/q > u"),
    "specinfer": ("draft token", "p/q", "drawn u", "p/q > u"),
    "typical": ("draft token", "p", "threshold", "p > threshold"),
    "bild": ("draft token", "log p", "limit", "log p ≥ limit"),
}
_OTHER_COLUMNS = ("draft token", "log p", "log q", "kept")


def columns(method: str) -> tuple[str, ...]:
    """Headings of the rows that `step_view` gives for the draft tokens of a method."""
    return _COLUMNS.get(method, _OTHER_COLUMNS)


def number(value: float | None, digits: int = 2) -> str:
    """A figure as people read it: a real minus sign, −∞, a dash where there is none."""
    if value is None:
        return DASH
    if value == -math.inf:
        return "−∞"
    if value == math.inf:
        return "∞"
    text = f"{value:,.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.removeprefix("-")
    return text.replace("-", "−")


def duration(seconds: float) -> str:
    """A short time: milliseconds below one second."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s"


def visible(text: str) -> str:
    """A token's text for a place that has one line: line ends and tabs become signs."""
    return text.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥")


def rejected_nodes(step: Step) -> tuple[int, ...]:
    """The draft nodes that are shown struck out: where the accepted path could have gone on.

    Of a block these are all nodes after the accepted ones. Of a tree they are the children of
    the last accepted node; if it has none, all nodes one level deeper than it.
    """
    tree, path = step.decision.tree, step.decision.path
    taken = set(path)
    if is_block(tree):
        return tuple(node for node in range(len(tree.token_ids)) if node not in taken)
    end = path[-1] if path else -1
    children = tuple(node for node, parent in enumerate(tree.parents) if parent == end)
    if children:
        return children
    return tuple(node for node, depth in enumerate(tree.depths) if depth == len(path) + 1)


def is_block(tree: DraftTree) -> bool:
    """True if every node has at most one child: a chain of draft tokens."""
    return all(parent == node - 1 for node, parent in enumerate(tree.parents))


def step_view(step: Step, info: MethodInfo, config: DecodeConfig) -> dict[str, Any]:
    """A step as the token view draws it.

    Returns:
        `i`: index of the step; `t`: emitted tokens as [kind letter, text]; `x`: texts of the
        rejected draft tokens; `alt`: True if those are alternatives of one another; `h`: the
        headline of the details; `f`: facts as [name, figure]; `n`: one row a draft token as
        [text, figure, ..., passed], passed being True, False or None (not tested), preceded
        by whether the token was accepted.
    """
    decision = step.decision
    tree = decision.tree
    rejected = rejected_nodes(step)
    view: dict[str, Any] = {
        "i": step.index,
        "t": [
            [_KIND_LETTERS[kind], text]
            for kind, text in zip(decision.kinds, step.emitted_texts, strict=True)
        ],
        "h": headline(step),
        "f": _facts(step, info, config),
    }
    if rejected:
        view["x"] = [visible(step.node_texts[node]) for node in rejected]
        if not is_block(tree):
            view["alt"] = True
    if tree.token_ids:
        view["n"] = _rows(step, info, config, (*decision.path, *rejected))
    return view


def headline(step: Step) -> str:
    """What happened in a step, in words."""
    decision = step.decision
    parts = []
    if decision.tree.token_ids:
        offered = decision.tree.depth
        parts.append(f"accepted {decision.accepted_length} of {offered} offered")
        if not is_block(decision.tree):
            parts.append(f"{len(decision.tree.token_ids)} nodes in the tree")
    added = len(decision.emitted) - min(len(decision.emitted), decision.accepted_length)
    if added and decision.final_kind:
        name = {"bonus": "bonus", "corrected": "corrected", "sampled": "sampled"}
        parts.append(f"{added} {name[decision.final_kind]}")
    return f"Block {step.index + 1}: " + (", ".join(parts) or "nothing emitted")


def reference_logprobs(step: Step) -> list[float]:
    """By depth, the cumulative log q that the joint rule measured against (float64, in order)."""
    decision = step.decision
    conditionals: Sequence[float] = decision.reference_logprobs
    if not conditionals and is_block(decision.tree):
        conditionals = decision.tree.draft_logprobs
    return _cumulative(conditionals)


def _cumulative(values: Sequence[float]) -> list[float]:
    sums, total = [], 0.0
    for value in values:
        total += value
        sums.append(total)
    return sums


def _difference(log_p: float, log_q: float) -> float:
    """Log p − log q where p = 0 always loses, also against q = 0."""
    return -math.inf if log_p == -math.inf else log_p - log_q


def _facts(step: Step, info: MethodInfo, config: DecodeConfig) -> list[list[str]]:
    decision = step.decision
    tree = decision.tree
    facts: list[list[str]] = []
    if tree.token_ids and decision.path:
        log_p = sum(tree.target_logprobs[node] for node in decision.path)
        log_q = sum(tree.draft_logprobs[node] for node in decision.path)
        facts.append(["log p of the accepted", number(log_p)])
        facts.append(["log q", number(log_q)])
    if info.id in _JOINT_METHODS:
        facts.append(["log τ", number(math.log(config.accept_threshold))])
    if not tree.token_ids and decision.emitted_logprobs:
        facts.append(["log p", number(sum(decision.emitted_logprobs))])
    if info.uses_draft:
        facts.append(["draft", duration(step.draft_seconds)])
    facts.append(["target", duration(step.verify_seconds)])
    return facts


def _rows(
    step: Step, info: MethodInfo, config: DecodeConfig, nodes: Sequence[int]
) -> list[list[Any]]:
    joint = info.id in _JOINT_METHODS
    reference = reference_logprobs(step) if joint else []
    taken = set(step.decision.path)
    rows: list[list[Any]] = []
    for node in nodes:
        figures: list[Any]
        if joint:
            figures = _joint_figures(step.decision.tree, node, reference, config)
        elif info.id in _COLUMNS and step.decision.tree.scores:
            figures = _score_figures(step.decision.tree, node, info.id)
        else:
            tree = step.decision.tree
            kept = node in taken
            figures = [number(tree.target_logprobs[node]), number(tree.draft_logprobs[node]), kept]
            if info.id in _COLUMNS:
                # A draft that was not tested has no score: nothing to show but dashes.
                figures = [DASH] * (len(columns(info.id)) - 2) + [None]
        rows.append([node in taken, visible(step.node_texts[node]), *figures])
    return rows


def _joint_figures(
    tree: DraftTree, node: int, reference: Sequence[float], config: DecodeConfig
) -> list[Any]:
    path = tree.path_to(node)
    log_p = _cumulative([tree.target_logprobs[k] for k in path])[-1]
    if len(path) > len(reference):
        return [number(log_p), DASH, DASH, None]
    log_q = reference[len(path) - 1]
    ratio = _difference(log_p, log_q)
    return [number(log_p), number(log_q), number(ratio), ratio > math.log(config.accept_threshold)]


def _score_figures(tree: DraftTree, node: int, method: str) -> list[Any]:
    score = tree.scores[node]
    threshold = tree.thresholds[node] if tree.thresholds else None
    if score is None or threshold is None:
        return [number(score), number(threshold), None]
    passed = score >= threshold if method == "bild" else score > threshold
    return [number(score), number(threshold), passed]
