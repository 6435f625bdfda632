"""From the steps of a run and what the runner measured to its Summary. Pure Python, no torch.

Every measure follows its definition to the letter. One that is not defined for a run (nothing
was drafted, too few tokens) or was not measured is None, never 0 and never infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mtad.trace import EnergyReading, Step, Summary

NGRAM = 4


def summarize(
    steps: Sequence[Step],
    *,
    decode_seconds: float,
    prefill_seconds: float,
    time_to_first_token_seconds: float | None,
    energy: EnergyReading,
    end_to_end_energy: EnergyReading,
    target_weight_bytes: int,
    draft_weight_bytes: int,
) -> Summary:
    """The measures of a run.

    Args:
        steps: the finished steps, in order, without provisional ones.
        decode_seconds: wall seconds of decoding, prefill excluded.
        prefill_seconds: wall seconds of the prefill.
        time_to_first_token_seconds: from the start of the prefill; None if nothing was emitted.
        energy: over the window of `decode_seconds`.
        end_to_end_energy: over prefill and decoding.
        target_weight_bytes: what one target pass reads; 0 if unknown.
        draft_weight_bytes: what one draft pass reads; 0 if unknown or there is no draft.

    Raises:
        ValueError: a step is provisional, or a duration is negative or not finite.
    """
    _check(steps, decode_seconds, prefill_seconds, time_to_first_token_seconds)
    decisions = [step.decision for step in steps]
    token_ids = [token for decision in decisions for token in decision.emitted]
    logprobs = [value for decision in decisions for value in decision.emitted_logprobs]
    tokens = len(token_ids)
    target_passes = sum(decision.target_passes for decision in decisions)
    draft_passes = sum(decision.draft_passes for decision in decisions)
    draft_seconds = math.fsum(step.draft_seconds for step in steps)
    verify_seconds = math.fsum(step.verify_seconds for step in steps)
    distinct_4, repeated_4gram_share = _ngram_shares(token_ids)
    return Summary(
        tokens=tokens,
        target_passes=target_passes,
        decode_seconds=decode_seconds,
        prefill_seconds=prefill_seconds,
        time_to_first_token_seconds=time_to_first_token_seconds,
        end_to_end_seconds=prefill_seconds + decode_seconds,
        tokens_per_second=_ratio(tokens, decode_seconds),
        block_efficiency=_ratio(tokens, target_passes),
        acceptance_rate=_acceptance_rate(steps),
        perplexity=_perplexity(logprobs),
        distinct_4=distinct_4,
        repeated_4gram_share=repeated_4gram_share,
        joules=energy.joules,
        joules_per_token=_ratio(energy.joules, tokens),
        watts=_ratio(energy.joules, decode_seconds),
        end_to_end_joules=end_to_end_energy.joules,
        weight_bytes_per_token=_ratio(
            _weight_bytes(target_passes, target_weight_bytes, draft_passes, draft_weight_bytes),
            tokens,
        ),
        draft_seconds=draft_seconds,
        verify_seconds=verify_seconds,
        # The spans may be device times, which can exceed the wall clock by its own error.
        other_seconds=max(0.0, decode_seconds - draft_seconds - verify_seconds),
    )


def _check(steps: Sequence[Step], decode: float, prefill: float, first_token: float | None) -> None:
    for step in steps:
        if step.decision.provisional:
            raise ValueError(
                f"Step {step.index} is provisional; leave such steps out of a summary."
            )
    durations = {
        "decode_seconds": decode,
        "prefill_seconds": prefill,
        "time_to_first_token_seconds": 0.0 if first_token is None else first_token,
    }
    for name, value in durations.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, but must be finite and at least 0.")


def _ratio(numerator: float | None, denominator: float) -> float | None:
    if numerator is None or denominator == 0:
        return None
    return numerator / denominator


def _acceptance_rate(steps: Sequence[Step]) -> float | None:
    """Accepted draft tokens over offered depth; positions after a rejection count as offered."""
    offered = sum(step.decision.tree.depth for step in steps)
    accepted = sum(step.decision.accepted_length for step in steps)
    return _ratio(accepted, offered)


def _perplexity(logprobs: Sequence[float]) -> float | None:
    """Perplexity of the tokens, pooled: exp of the mean of −log p.

    None without tokens, and None if a token has probability 0 under the target (or so little that
    the result exceeds the largest float): infinity cannot be written into a trace, and averaging
    over the other tokens alone would make the text look better than it is.
    """
    if not logprobs or -math.inf in logprobs:
        return None
    try:
        return math.exp(-math.fsum(logprobs) / len(logprobs))
    except OverflowError:
        return None


def _ngram_shares(token_ids: Sequence[int]) -> tuple[float | None, float | None]:
    """Share of 4-grams that are distinct, and of those that had occurred before.

    The two add up to 1; both are None for fewer than four tokens.
    """
    total = len(token_ids) - NGRAM + 1
    if total < 1:
        return None, None
    distinct = len({tuple(token_ids[i : i + NGRAM]) for i in range(total)})
    return distinct / total, (total - distinct) / total


def _weight_bytes(
    target_passes: int, target_bytes: int, draft_passes: int, draft_bytes: int
) -> int | None:
    """Bytes of weights that all passes read; None if a model that ran has an unknown size."""
    if (target_passes and not target_bytes) or (draft_passes and not draft_bytes):
        return None
    return target_passes * target_bytes + draft_passes * draft_bytes
