"""Draws traces on a terminal: coloured tokens, headers, summaries. Imports no torch.

Everything that comes from a model, a prompt or a file is data here. It passes through `clean`
before it meets a terminal, and reaches rich as `Text`, never as markup.
"""

from __future__ import annotations

import math
import unicodedata
from typing import TextIO

from rich.console import Console
from rich.text import Text

from mtad.trace import EnergyReading, Step, StopReason, Summary, Trace

DASH = "—"

# Okabe–Ito, readable on dark and on light backgrounds. Never colour alone: each kind has a
# line or a weight of its own, so that NO_COLOR and colour-blind readers lose nothing.
STYLES = {
    "accepted": "underline #0072B2",
    "rejected": "strike #D55E00",
    "bonus": "bold underline2",
    "corrected": "bold italic",
    "sampled": "",
}
# The same on paper or in a pipe, where there are no styles.
BRACKETS = {
    "accepted": ("", ""),
    "rejected": ("[-", "-]"),
    "bonus": ("{+", "+}"),
    "corrected": ("{=", "=}"),
    "sampled": ("", ""),
}
_MEANING = {
    "accepted": "accepted from the draft",
    "rejected": "rejected draft",
    "bonus": "bonus of the target",
    "corrected": "corrected by the target",
    "sampled": "sampled from the target",
}
# These turn the direction of what follows, so that a text reads other than it is.
_DIRECTION = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u061c")
_PAPER_WIDTH = 160


def clean(text: str) -> str:
    r"""`text` with everything that a terminal would obey made visible instead.

    Newline and tab stay. Control characters (ESC, carriage return, backspace, C1 …) become
    their control pictures or \x escapes; direction marks, line separators and lone surrogates
    become \u escapes. Emoji joiners and combining marks stay.
    """
    return "".join(char if char in "\n\t" or char.isprintable() else _seen(char) for char in text)


def _seen(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    category = unicodedata.category(char)
    # Spaces of other widths, joiners and variation marks are ordinary typography.
    if category == "Zs" or (category == "Cf" and char not in _DIRECTION) or category == "Co":
        return char
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def console(stream: TextIO) -> Console:
    """A console on `stream`: no markup, no guessing of highlights, wide where it is no terminal.

    NO_COLOR, FORCE_COLOR and TERM=dumb are respected by rich itself.
    """
    made = Console(file=stream, markup=False, emoji=False, highlight=False)
    if not made.is_terminal:
        made = Console(file=stream, markup=False, emoji=False, highlight=False, width=_PAPER_WIDTH)
    return made


def legend(styled: bool) -> Text:
    """One line that says what the styles (or the brackets) mean."""
    line = Text()
    for kind, meaning in _MEANING.items():
        if line:
            line.append("  ")
        line.append_text(_token(meaning, kind, styled))
    return line


def step_text(step: Step, *, styled: bool) -> Text:
    """One step: accepted tokens, the draft that was rejected, what the target added.

    Args:
        step: the step.
        styled: colours and lines if True, brackets if False.
    """
    decision = step.decision
    line = Text()
    accepted = min(len(decision.path), len(decision.emitted))
    for text in step.emitted_texts[:accepted]:
        line.append_text(_token(text, "accepted", styled))
    line.append_text(_rejected(step, styled))
    for text, kind in zip(step.emitted_texts[accepted:], decision.kinds[accepted:], strict=True):
        line.append_text(_token(text, kind, styled))
    return line


def _rejected(step: Step, styled: bool) -> Text:
    """What was offered and not accepted: the rest of a block, or the number of nodes of a tree."""
    decision = step.decision
    on_path = set(decision.path)
    rest = [node for node in range(len(decision.tree.token_ids)) if node not in on_path]
    if not rest:
        return Text()
    if decision.tree.depth == len(decision.tree.token_ids):
        return _token("".join(step.node_texts[node] for node in rest), "rejected", styled)
    return _token(f"⟨{len(rest)} other nodes⟩", "rejected", styled)


def _token(text: str, kind: str, styled: bool) -> Text:
    shown = clean(text)
    if styled:
        return Text(shown, style=STYLES[kind])
    before, after = BRACKETS[kind]
    return Text(f"{before}{shown}{after}" if shown else "")


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; a dash where there is none, ∞ where it is infinite."""
    if value is None:
        return DASH
    return f"{value:,.{digits}f}" if math.isfinite(value) else "∞"


def joules(value: float | None, reading: EnergyReading) -> str:
    """Joules or joules per token; an estimate starts with ≈."""
    if value is None:
        return DASH
    figure = f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    return f"≈ {figure}" if reading.estimated else figure


def header_lines(trace: Trace) -> list[str]:
    """Which method ran on which models, where and when. Already cleaned."""
    models = trace.target.name
    if trace.draft is not None:
        models += f", draft {trace.draft.name}"
    where = f"{trace.device}, {trace.dtype}, {trace.engine}, seed {trace.config.seed}"
    return [_line(f"{trace.method}: {models}"), _line(f"{where}, started {trace.started_at}")]


def summary_lines(trace: Trace) -> list[str]:
    """The measures of a run, the reason for each missing one, the notes. Already cleaned."""
    summary = trace.summary
    first = summary.time_to_first_token_seconds
    lines = [
        f"{summary.tokens} tokens in {number(summary.decode_seconds)} s:"
        f" {number(summary.tokens_per_second, 1)} tokens/s"
        f" (prefill {number(summary.prefill_seconds)} s,"
        f" first token after {number(first)} s)",
        f"{summary.target_passes} target passes: {number(summary.block_efficiency)} tokens a pass,"
        f" acceptance rate {number(summary.acceptance_rate)}",
        f"perplexity {number(summary.perplexity)}, distinct-4 {number(summary.distinct_4)},"
        f" repeated 4-grams {number(summary.repeated_4gram_share)}",
        _energy_line(summary, trace.energy),
        f"ended: {_END[trace.stop_reason]}",
    ]
    lines += [f"note: {note}" for note in trace.notes]
    return [_line(line) for line in lines]


def _energy_line(summary: Summary, reading: EnergyReading) -> str:
    if summary.joules is None:
        return f"energy {DASH}: {reading.reason or 'not measured'}"
    line = (
        f"energy {joules(summary.joules, reading)} J,"
        f" {joules(summary.joules_per_token, reading)} J/token ({reading.method}, {reading.scope})"
    )
    return f"{line}: {reading.reason}" if reading.reason else line


_END: dict[StopReason, str] = {
    "eos": "the model wrote an end-of-sequence token",
    "length": "max_new_tokens was reached",
    "context": "the context of the pair is full",
    "stop": "a stop string appeared",
    "cancelled": "stopped by the user",
    "deadline": "the deadline was reached",
}


def _line(text: str) -> str:
    """Cleaned, and on one line."""
    return clean(text).replace("\n", "␊").replace("\t", " ")
