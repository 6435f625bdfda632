"""What a comparison was of: prompt, models and machine, in words, from its traces alone.

Pure: knows no model, no browser and no gradio. All texts are data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mtad.trace import ModelInfo, Trace

_SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|<(?:s|/s|bos|eos|start_of_turn|end_of_turn)>")
_ROLES = ("system", "user", "assistant", "model")


def question(prompt: str) -> str:
    """The last thing that was said in a prompt with chat markup; all of it without markup."""
    said = [part.strip() for part in _SPECIAL.split(prompt)]
    for role in _ROLES:
        said = [part.removeprefix(f"{role}\n").strip() for part in said]
    return next((part for part in reversed(said) if part and part not in _ROLES), "")


def hardware_of(trace: Trace) -> str:
    """The machine, as its runner named it."""
    return trace.versions.get("hardware") or trace.device


def about(traces: Sequence[Trace], prompt: str = "") -> dict[str, Any]:
    """What the page says about a comparison, from at least one of its traces.

    Args:
        traces: of one comparison: one prompt, one machine, one target.
        prompt: what was asked; taken from the first trace if "".

    Returns:
        `prompt`, `models`, `machine` and `made` (the day) for people, `notes` of the target.
    """
    first = traces[0]
    drafts = {trace.draft.name: trace.draft for trace in traces if trace.draft is not None}
    models = model_name(first.target)
    if drafts:
        models += ", draft " + ", ".join(model_name(draft) for draft in drafts.values())
    return {
        "prompt": prompt or question(first.prompt),
        "models": models,
        "machine": (
            f"{hardware_of(first)} ({first.device}, {first.dtype} weights, {first.engine} engine)"
        ),
        "made": first.started_at[:10],
        "notes": [first.target.note] if first.target.note else [],
    }


def model_name(info: ModelInfo) -> str:
    """A model's name and size."""
    if not info.parameters:
        return info.name
    millions = info.parameters / 1e6
    size = f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.0f}M"
    return f"{info.name} ({size} parameters)"
