"""Hand-made traces: known figures, and texts that a terminal or a page must not obey."""

from __future__ import annotations

import math

from mtad.config import DecodeConfig
from mtad.metrics import summarize
from mtad.trace import Decision, DraftTree, EnergyReading, ModelInfo, Step, Trace

# Markup, an escape sequence that clears the screen, a carriage return, a C1 control character,
# a bidirectional override.
HOSTILE = "[bold]\x1b[2J\r\x9b2J\u202e"
NO_SENSOR = "no sensor"


def trace(
    method: str = "mtad",
    *,
    text: str = " three",
    tokens_per_second: float = 10.0,
    joules: float | None = None,
    energy_method: str = "none",
    seed: int = 0,
) -> Trace:
    """Two passes: of [one two wrong] two are accepted, then a bonus; of [no] none, then `text`.

    Four tokens, 2 passes, offered depth 4, accepted 2.
    """
    blocks = (
        Decision(
            tree=DraftTree((1, 2, 9), (-1, 0, 1), (-0.5, -0.5, -0.1), (-0.5, -0.25, -math.inf)),
            path=(0, 1),
            emitted=(1, 2, 3),
            emitted_logprobs=(-0.5, -0.25, -0.25),
            final_kind="bonus",
            reference_logprobs=(-0.5, -0.5, -0.1),
        ),
        Decision(
            tree=DraftTree((8,), (-1,), (-0.5,), (-4.0,)),
            emitted=(4,),
            emitted_logprobs=(-1.0,),
            final_kind="corrected",
            reference_logprobs=(-0.5,),
        ),
    )
    seconds = 4 / tokens_per_second
    steps = (
        Step(0, blocks[0], ("one", " two", " and"), ("one", " two", " wrong"), 0.0, 0.0, 0.0),
        Step(1, blocks[1], (text,), (" no",), 0.0, 0.0, seconds),
    )
    reason = NO_SENSOR if joules is None else None
    energy = EnergyReading(joules, seconds, energy_method, "test board", None, reason)
    return Trace(
        method=method,
        config=DecodeConfig(seed=seed),
        target=ModelInfo("big"),
        draft=ModelInfo("small"),
        device="cpu",
        dtype="float32",
        engine="eager",
        versions={},
        prompt="count",
        prompt_ids=(0,),
        started_at="2026-01-01T00:00:00+00:00",
        text="one two and" + text,
        stop_reason="length",
        steps=steps,
        energy=energy,
        end_to_end_energy=energy,
        summary=summarize(
            steps,
            decode_seconds=seconds,
            prefill_seconds=0.0,
            time_to_first_token_seconds=0.0,
            energy=energy,
            end_to_end_energy=energy,
            target_weight_bytes=8,
            draft_weight_bytes=2,
        ),
        notes=("a stand-in",),
    )
