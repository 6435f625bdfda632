"""One target pass as the Inspect tab shows it: draft, rule, alternatives, bound.

Pure: `Trace` in, JSON-able dictionaries out; knows no model, no browser and no gradio. Figures
are formatted and verdicts decided here, so that they can be tested; the browser only draws.
Everything comes from the trace's JSON. Texts of tokens are data; those that cannot be seen or
that turn the writing direction are spelled out, so that a box shows what its token is.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from mtad.catalogue import MethodInfo, method_info
from mtad.trace import Alternative, Bound, DraftTree, ModelInfo, Step, Trace
from mtad.ui.lanes import Lane
from mtad.ui.pass_charts import TESTS, at, chart, number, passes, ratio_text
from mtad.ui.steps import DASH, duration, is_block, visible
from mtad.ui.what_if import dips, disagreeing
from mtad.whatif import JOINT_METHODS, node_ratios

# A legitimate draft has 1,024 nodes at most; more of them could not be read anyway.
MAX_DRAWN = 512
# Emitted tokens of one pass that are drawn and listed; `beam` emits its whole answer in one.
MAX_EMITTED = 64
CONTEXT_CHARACTERS = 120
MAX_PROMPT_CHARACTERS = 4000
_KIND_LETTERS = {"accepted": "a", "bonus": "b", "corrected": "c", "sampled": "s"}
_UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Co", "Cn", "Cs"}
_NO_DRAFT = {
    "autoregressive": "Single-token sampling drafts nothing: every pass of the target gives one"
    " token, so there is nothing to accept or to reject.",
    "beam": "Beam sampling runs on the target alone: it keeps its best continuations and emits"
    " one at the end. Nothing is drafted, so there is nothing to accept or to reject.",
    "mtjd": "Joint decoding chooses a block with the target alone and commits it whole. Nothing is"
    " drafted, so there is nothing to accept or to reject.",
}
TextsOf = Callable[[Sequence[int]], list[str]]


def shown(text: str) -> str:
    """A token's text for a small box: spaces at its ends and what cannot be seen get signs."""
    text = visible(text)
    if not text:
        return "▯"
    core = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    trail = len(text) - len(text.rstrip(" ")) if core else 0
    signs = [
        f"⟨{ord(character):04X}⟩" if unicodedata.category(character) in _UNSEEN else character
        for character in core
    ]
    return "␣" * lead + "".join(signs) + "␣" * trail


def trace_view(trace: Trace, label: str) -> dict[str, Any]:
    """Who made the trace, how, and what it came to.

    Returns:
        `label`, `title`, `summary`, `lossless` of the method; `meters` as above a lane;
        `config`, `machine`: [name, value] pairs; `prompt`; `notes`, to be read beside the figures,
        and `remarks`, that may be folded away; `count`: number of passes.
    """
    info = method_info(trace.method)
    lane = Lane(info, trace.config)
    lane.state, lane.trace = "done", trace
    config = dataclasses.asdict(trace.config)
    models = [["target", _model(trace.target)]]
    if trace.draft is not None:
        models.append(["draft", _model(trace.draft)])
    notes = list(trace.notes)
    wrong = disagreeing(trace)
    if wrong:
        notes.append(
            f"In {wrong:,} of {len(trace.steps):,} passes the accepted path is not what the rule of"
            f" {info.title} makes of the recorded figures."
        )
    return {
        "label": label,
        "title": info.title,
        "summary": info.summary,
        "lossless": info.lossless,
        "meters": [
            {name: _cut(text, 28 if name == "value" else 200) for name, text in meter.items()}
            for meter in lane.meters()
        ],
        "config": [[name, _cut(_plain(config[name]), 60)] for name in info.parameters],
        "machine": [
            *models,
            ["device", f"{trace.device}, {trace.dtype}, {trace.engine} engine"],
            *([name, version] for name, version in list(trace.versions.items())[:12]),
            ["recorded", trace.started_at],
        ],
        "prompt": trace.prompt[:MAX_PROMPT_CHARACTERS],
        "notes": notes[:12],
        "remarks": lane.remarks()[len(trace.notes) :],
        "count": len(trace.steps),
    }


def _model(model: ModelInfo) -> str:
    size = f", {model.parameters / 1e6:,.0f} M parameters" if model.parameters else ""
    note = f". {model.note}" if model.note else ""
    return f"{model.name}{size}{note}"


def _plain(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def pass_view(
    trace: Trace, index: int, texts_of: TextsOf | None = None, no_gap: str = ""
) -> dict[str, Any]:
    """Everything that the page shows of one pass.

    Args:
        trace: whose pass it is.
        index: of the step; must exist.
        texts_of: texts of the tokens of a best block; None where no tokenizer is at hand.
        no_gap: why the true gap cannot be measured for this trace; "" if it can.
    """
    info = method_info(trace.method)
    step = trace.steps[index]
    tree = step.decision.tree
    nodes = _drawn(tree, step.decision.path)
    rows = _rows(trace, info, step, nodes)
    return {
        "i": index,
        "title": _title(trace, step),
        "facts": _facts(step, info),
        "context": _context(trace, index),
        "verdict": verdict(trace, step),
        "root": _root_text(trace, index),
        "rows": rows,
        "hidden": len(tree.token_ids) - len(nodes),
        "final": _final(step),
        "chart": chart(trace, step, nodes),
        "columns": columns(trace.method),
        "alternatives": _alternatives(step),
        "more": max(0, len(step.decision.emitted) - MAX_EMITTED),
        "bound": bound_view(trace, step, texts_of, no_gap),
    }


def columns(method: str) -> list[str]:
    """Headings of the cells of a row; the last is the test."""
    own = ["log p", "log q", "Σ log p", "Σ log q"]
    if method == "mtad":
        return [*own, "log p/q of the prefix", "> log τ"]
    if method == "mtad_tree":
        return [*own, "log p/q to the reference", "> log τ"]
    return [*own, *TESTS.get(method, ("score", "threshold", "passed"))]


def verdict(trace: Trace, step: Step) -> str:
    """Why the pass ended where it did, in words."""
    decision = step.decision
    info = method_info(trace.method)
    if not info.uses_draft:
        return _NO_DRAFT.get(trace.method, "This method drafts nothing.")
    if not decision.tree.token_ids:
        return "Nothing was drafted for this pass: it is a plain pass of the target."
    if trace.method in JOINT_METHODS:
        return _joint_verdict(trace, step)
    return _test_verdict(trace, step)


def bound_view(
    trace: Trace, step: Step, texts_of: TextsOf | None = None, no_gap: str = ""
) -> dict[str, Any]:
    """The certified part, and the three terms and the true gap where they are known.

    Returns:
        `why`: why there is no bound at all, or "". `certified`, `log_tau`: texts. `terms`: rows
        of [name, meaning, figure], empty while unknown; `limit` and `gap`: texts; `best`: texts
        of the best block; `reason`: why a figure is a dash; `measurable`: True if the true gap
        may be asked for.
    """
    decision = step.decision
    if trace.method not in JOINT_METHODS:
        lossless = method_info(trace.method).lossless
        why = (
            "no bound is needed: the tokens have exactly the distribution of sampling the target"
            if lossless
            else "this method's rule certifies none; it holds for MTAD and multi-candidate MTAD"
        )
        return {"why": f"– ({why})."}
    if not decision.path:
        return {"why": "– (no draft token was accepted, so there is nothing to bound)."}
    log_tau = math.log(trace.config.accept_threshold)
    view: dict[str, Any] = {
        "why": "",
        "certified": number(node_ratios(decision)[decision.path[-1]], 3),
        "log_tau": number(log_tau, 3),
        "terms": [],
        "limit": DASH,
        "gap": DASH,
        "best": [],
        "reason": no_gap or "not measured yet",
        "measurable": not no_gap,
    }
    if step.bound is not None:
        view |= _measured(step.bound, texts_of)
    return view


def _measured(bound: Bound, texts_of: TextsOf | None) -> dict[str, Any]:
    best = list(bound.best_token_ids[:MAX_EMITTED])
    return {
        "terms": [
            ["draft's error on y", "log p(y)/q(y)", number(bound.draft_error, 3)],
            ["search gap", "log q(y)/q(x)", number(bound.search_gap, 3)],
            ["slack", "log 1/τ", number(bound.slack, 3)],
        ],
        "limit": number(bound.limit, 3),
        "gap": number(bound.gap, 3),
        "best": [shown(text) for text in texts_of(best)]
        if texts_of
        else [f"token {token}" for token in best],
        "reason": bound.reason or "",
        "measurable": False,
    }


# ------------------------------------------------------------------ the draft


def _drawn(tree: DraftTree, path: Sequence[int]) -> list[int]:
    """The nodes that are drawn, parents first: all of them, unless they are absurdly many."""
    size = len(tree.token_ids)
    if size <= MAX_DRAWN:
        return list(range(size))
    return sorted({*path[:MAX_DRAWN], *range(MAX_DRAWN)})


def _rows(trace: Trace, info: MethodInfo, step: Step, nodes: Sequence[int]) -> list[dict[str, Any]]:
    """One row a node: text, place in the drawing, state, verdict and figures."""
    tree = step.decision.tree
    taken = set(step.decision.path)
    block = is_block(tree)
    place = {node: row for row, node in enumerate(nodes)}
    lanes = layout(tree, step.decision.path, nodes)
    joint_p, joint_q = _sums(tree, tree.target_logprobs), _sums(tree, tree.draft_logprobs)
    ratios = node_ratios(step.decision) if trace.method in JOINT_METHODS else []
    rows = []
    for node in nodes:
        cells = [
            number(tree.target_logprobs[node]),
            number(tree.draft_logprobs[node]),
            number(joint_p[node]),
            number(joint_q[node]),
        ]
        passed: bool | None
        if ratios:
            passed = ratios[node] > math.log(trace.config.accept_threshold)
            cells.append(ratio_text(ratios[node], math.log(trace.config.accept_threshold)))
        else:
            passed = passes(tree, node, trace.method)
            cells += [number(at(tree.scores, node)), number(at(tree.thresholds, node))]
        rows.append(
            {
                "t": shown(step.node_texts[node]),
                "id": tree.token_ids[node],
                "p": place.get(tree.parents[node], -1),
                "d": tree.depths[node],
                "y": lanes[node],
                "s": "accepted" if node in taken else "rejected" if block else "not taken",
                "v": passed,
                "w": _verdict_word(passed, node in taken, trace.method in JOINT_METHODS),
                "c": cells,
            }
        )
    return rows


def layout(tree: DraftTree, path: Sequence[int], nodes: Sequence[int]) -> dict[int, int]:
    """The line of each node, from 0: the accepted path on the topmost, straight.

    What the target added itself goes on in that line, so other children of the last accepted
    node start on the next one.
    """
    children: dict[int, list[int]] = {}
    for node in nodes:
        children.setdefault(tree.parents[node], []).append(node)
    on_path = set(path)
    end = path[-1] if path else -1
    lines: dict[int, int] = {}
    free = 0
    # Depth first; of several children the accepted one is met first.
    stack = [(child, -1) for child in _order(children.get(-1, []), on_path)]
    if end == -1:
        free = 1
    while stack:
        node, line = stack.pop()
        if line < 0:
            line = free
        lines[node] = line
        free = max(free, line + 1)
        below = _order(children.get(node, []), on_path)
        straight = node != end
        for rank, child in enumerate(below):
            first = rank == len(below) - 1
            stack.append((child, line if first and straight else -1))
    return lines


def _order(children: Sequence[int], on_path: set[int]) -> list[int]:
    """For a stack: the last is drawn first."""
    return sorted(children, key=lambda node: (node in on_path, -node))


def _final(step: Step) -> list[list[str]]:
    """What the target added after the accepted tokens: [kind letter, text, kind, log p]."""
    decision = step.decision
    columns_ = zip(decision.kinds, step.emitted_texts, decision.emitted_logprobs, strict=True)
    return [
        [_KIND_LETTERS[kind], shown(text), kind, number(logprob)]
        for kind, text, logprob in columns_
        if kind != "accepted"
    ][:MAX_EMITTED]


# ------------------------------------------------------------------ what the rule compared


def _joint_verdict(trace: Trace, step: Step) -> str:
    decision = step.decision
    length, depth = decision.accepted_length, decision.tree.depth
    log_tau = math.log(trace.config.accept_threshold)
    ratios = node_ratios(decision)

    def said(ratio: float) -> str:
        return ratio_text(ratio, log_tau)

    line = f"log τ = {number(log_tau, 4)}"
    if length == 0:
        return (
            f"No prefix has a joint ratio above {line}; the best reaches {said(max(ratios))}."
            " Nothing is accepted, and the pass gives the target's own token."
        )
    at_end = said(ratios[decision.path[-1]])
    low = dips(decision, trace.config)
    if low:
        under = ", ".join(f"{said(ratios[decision.path[d - 1]])} at depth {d}" for d in low)
        return (
            f"An early dip, rescued: the joint ratio is under {line} ({under}), but at depth"
            f" {length} it is back at {at_end}. The longest passing prefix counts, so the tokens of"
            " the dip are accepted with it."
        )
    if length == depth:
        return f"Accepted to its whole depth: the joint ratio {at_end} is above {line}."
    deeper = [r for r, d in zip(ratios, decision.tree.depths, strict=True) if d > length]
    return (
        f"At depth {length} the joint ratio {at_end} is above {line}; deeper it is at most"
        f" {said(max(deeper))}. So {length} of {depth} are accepted, and the target adds a token."
    )


def _test_verdict(trace: Trace, step: Step) -> str:
    decision, tree = step.decision, step.decision.tree
    length = decision.accepted_length
    failed = [
        node
        for node in range(len(tree.token_ids))
        if passes(tree, node, trace.method) is False
        and tree.depths[node] == length + 1
        and tree.parents[node] == (decision.path[-1] if decision.path else -1)
    ]
    _, _, test = TESTS.get(trace.method, ("", "", "the test"))
    if not failed:
        if length == tree.depth:
            return f"Every offered depth passes its test ({test}): the whole draft is accepted."
        return f"{length} of {tree.depth} offered tokens are accepted."
    node = failed[-1]
    score, threshold = number(at(tree.scores, node)), number(at(tree.thresholds, node))
    where = f"at depth {length + 1}"
    if trace.method == "speculative":
        return (
            f"Rejected {where}: p/q is {score}, not above the drawn u of {threshold}. The target"
            " draws a token from what p has more than q, and what follows is dropped."
        )
    if trace.method == "specinfer":
        tested = "the only candidate fails" if len(failed) == 1 else f"all {len(failed)} tests fail"
        return (
            f"Candidates are tested in turn; {where} {tested}. The target draws its own token from"
            " what is left of p."
        )
    if trace.method == "typical":
        return (
            f"Rejected {where}: p is {score}, not above the threshold {threshold} ="
            " min(ε, δ·exp(−entropy)). The target draws its own token, what follows is dropped."
        )
    return (
        f"Rolled back {where}: log p is {score}, under the limit {threshold}. The target's own"
        " token replaces it, and the rest is dropped."
    )


def _verdict_word(passed: bool | None, taken: bool, joint: bool) -> str:
    if passed is None:
        return "not tested"
    if passed:
        return "✓ yes" if taken or joint else "✓ yes, but after a rejection"
    return "✗ no, a later one passes" if taken and joint else "✗ no"


# ------------------------------------------------------------------ around it


def _title(trace: Trace, step: Step) -> str:
    decision = step.decision
    kind = "Pass" if decision.target_passes == 1 else "Iteration"
    parts = []
    if decision.tree.token_ids:
        parts.append(f"accepted {decision.accepted_length} of {decision.tree.depth} offered")
        if not is_block(decision.tree):
            parts.append(f"{len(decision.tree.token_ids)} nodes in the tree")
    added = len(decision.emitted) - min(len(decision.emitted), decision.accepted_length)
    if added:
        parts.append(f"{added} {decision.final_kind}")
    if len(decision.emitted) < decision.accepted_length:
        parts.append("the run ended inside the accepted ones")
    if decision.target_passes > 1:
        parts.append(f"{decision.target_passes:,} target passes")
    count = f"{kind} {step.index + 1:,} of {len(trace.steps):,}"
    return f"{count}: {', '.join(parts) or 'nothing emitted'}"


def _facts(step: Step, info: MethodInfo) -> list[list[str]]:
    facts = [["target", duration(step.verify_seconds)]]
    if info.uses_draft:
        facts.insert(0, ["draft", duration(step.draft_seconds)])
    facts.append(["rows in the pass", f"{step.decision.target_positions:,}"])
    facts.append(["since the start", f"{number(step.seconds)} s"])
    if step.joules is not None:
        facts.append(["joules so far", number(step.joules, 1)])
    return facts


def _context(trace: Trace, index: int) -> list[Any]:
    """What stands before, the emitted tokens as [kind letter, text], and what follows."""
    before = ""
    for step in reversed(trace.steps[max(0, index - CONTEXT_CHARACTERS) : index]):
        before = step.text + before
        if len(before) > CONTEXT_CHARACTERS:
            break
    after = ""
    for step in trace.steps[index + 1 : index + 1 + CONTEXT_CHARACTERS]:
        after += step.text
        if len(after) > CONTEXT_CHARACTERS:
            break
    step = trace.steps[index]
    tokens = [
        [_KIND_LETTERS[kind], text]
        for kind, text in zip(step.decision.kinds, step.emitted_texts, strict=True)
    ]
    cut_before = ("…" if len(before) > CONTEXT_CHARACTERS else "") + before[-CONTEXT_CHARACTERS:]
    cut_after = after[:CONTEXT_CHARACTERS] + ("…" if len(after) > CONTEXT_CHARACTERS else "")
    return [cut_before, tokens, cut_after]


def _root_text(trace: Trace, index: int) -> str:
    """The token that the draft goes on from."""
    for step in reversed(trace.steps[:index]):
        if step.emitted_texts:
            return shown(step.emitted_texts[-1])
    return "prompt"


def _alternatives(step: Step) -> list[dict[str, Any]]:
    """By emitted token: the target's best, as [text, share of the bar, text, is it the one]."""
    decision = step.decision
    views = []
    rows = zip(
        decision.kinds,
        step.emitted_texts,
        decision.emitted,
        decision.emitted_logprobs,
        decision.alternatives or ((),) * len(decision.emitted),
        strict=True,
    )
    for kind, text, token, logprob, listed in list(rows)[:MAX_EMITTED]:
        entries: list[list[Any]] = [_alternative(each, each.token_id == token) for each in listed]
        if not any(entry[3] for entry in entries):
            entries.append(_alternative(Alternative(token, logprob, text), True))
        views.append({"t": shown(text), "k": _KIND_LETTERS[kind], "list": entries})
    return views


def _alternative(alternative: Alternative, chosen: bool) -> list[Any]:
    probability = math.exp(min(0.0, alternative.logprob))
    text = number(probability, 3) if probability >= 0.0005 or not probability else "< 0.001"
    return [shown(alternative.text), round(probability, 4), text, chosen]


def _sums(tree: DraftTree, logprobs: Sequence[float]) -> list[float]:
    sums: list[float] = []
    for parent, logprob in zip(tree.parents, logprobs, strict=True):
        sums.append(logprob if parent < 0 else sums[parent] + logprob)
    return sums
