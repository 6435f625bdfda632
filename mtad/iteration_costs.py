"""What an iteration of a method costs on this machine, by the length of its draft.

Whole iterations of the very decoder are timed, so everything that a longer draft takes is in them:
draft steps, the wider verification, the search, and what Python does between. The lengths take
turns, and the fastest of all iterations counts: what else a machine does only adds to them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence

import torch

from mtad.config import DecodeConfig
from mtad.decoders import load_decoder
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.pace import MAX_AUTO_DRAFT_TOKENS
from mtad.trace import Decision

CONTEXT_TOKENS = 100
SWEEPS = 2
ROUNDS = 4
LENGTHS = (1, 2, 4, 8, MAX_AUTO_DRAFT_TOKENS)


def measure_iterations(
    method: str,
    make: Callable[[], tuple[CachedLM, Drafter]],
    config: DecodeConfig,
    context_length: int,
) -> tuple[float, ...]:
    """Seconds of an iteration with γ = 0, 1, … draft tokens, relative to one without a draft.

    The caller holds the device. Lengths between the measured ones are interpolated, and a longer
    draft never counts as cheaper than a shorter one.

    Args:
        method: with a draft, whose length is `num_draft_tokens`.
        make: both models with empty caches; their passes stop the measurement by raising.
        config: of the run; its γ, seed and limits are not read.
        context_length: of the pair.

    Returns:
        1.0 for γ = 0, then up to `MAX_AUTO_DRAFT_TOKENS`, or fewer where the context is too short.
    """
    lengths = [n for n in LENGTHS if (ROUNDS + 2) * (n + 1) < context_length // 2] or [1]
    context = max(2, min(CONTEXT_TOKENS, context_length // 2))
    times: dict[int, list[float]] = {length: [] for length in (0, *lengths)}
    for _ in range(SWEEPS):
        for length, seconds_of in times.items():
            # One after the other: a drafter of the user's own is one object, and holds one text.
            run = _iterations(method, *make(), config, context, length)
            next(run)  # holds the prefill
            for _ in range(ROUNDS):
                start = time.perf_counter()
                next(run)
                seconds_of.append(time.perf_counter() - start)
            run.close()
    seconds = {length: min(values) for length, values in times.items()}
    return _by_length(seconds)


def _iterations(
    method: str,
    target: CachedLM,
    draft: Drafter,
    config: DecodeConfig,
    context: int,
    length: int,
) -> Generator[Decision, None, None]:
    """Iterations with γ = `length` on any text: what they cost depends little on it."""
    prompt = [1 + k * 7919 % (target.vocab_size - 1) for k in range(context)]
    plain = length == 0
    fixed = dataclasses.replace(
        config,
        max_new_tokens=(ROUNDS + 2) * (length + 1),
        num_draft_tokens=length or None,
        iteration_costs=None,
        ignore_eos=True,
        stop=(),
    )
    generator = torch.Generator(target.device).manual_seed(0)
    decode = load_decoder("autoregressive" if plain else method)
    yield from decode(target, None if plain else draft, prompt, fixed, generator)


def _by_length(seconds: dict[int, float]) -> tuple[float, ...]:
    """Relative costs of all lengths from 0 to the longest."""
    lengths: Sequence[int] = sorted(seconds)
    costs = [1.0]
    for low, high in zip(lengths, lengths[1:], strict=False):
        first, last = (seconds[length] / seconds[0] for length in (low, high))
        for length in range(low + 1, high + 1):
            between = first + (last - first) * (length - low) / (high - low)
            costs.append(max(costs[-1], between))
    return tuple(round(cost, 4) for cost in costs)
