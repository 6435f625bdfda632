"""What an iteration of a method costs on this machine, by the length of its draft or by its tree.

Whole iterations of the very decoder are timed, so everything that a longer draft takes is in them:
draft steps, the wider verification, the search, and what Python does between. The drafts take
turns, each right behind iterations without one, and of their ratios the (lower) median counts: a
machine that is now fast and now slow is so for both sides of a ratio. All begin behind the same
text, which is read once by models whose caches can be kept.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from mtad.catalogue import method_info
from mtad.config import DecodeConfig
from mtad.decoders import load_decoder
from mtad.draft import RecordedDrafter
from mtad.lm import CachedLM
from mtad.pace import AUTO_TREES, AUTO_WIDTHS, MAX_AUTO_DRAFT_TOKENS
from mtad.pairs import ModelPair
from mtad.session import Session
from mtad.trace import Outcome

CONTEXT_TOKENS = 100
TURNS = 5
# Iterations that are timed each time, since the first ones find cold caches and code; fewer where
# they take long, but two.
ROUNDS, BURST_SECONDS = 6, 0.025
# Where a pass takes longer than this, nobody should wait for more turns than these.
SLOW_SECONDS, SLOW_TURNS = 0.03, 3
# An iteration that costs so many without a draft seldom emits as many tokens.
DEAR = 8.0
# More than anything is worth.
NEVER = 1e6
LENGTHS = (1, 2, 4, 8, MAX_AUTO_DRAFT_TOKENS)

K = TypeVar("K", bound=Hashable)
Iterations = Generator[Outcome, None, None]


def measure_iterations(
    method: str,
    pair: ModelPair,
    make: Callable[[], tuple[CachedLM, RecordedDrafter]],
    config: DecodeConfig,
) -> tuple[float, ...] | tuple[tuple[float, ...], ...]:
    """Seconds of an iteration with γ = 0, 1, … draft tokens, relative to one without a draft.

    Of a method that reads `k_config` they are those without a draft and with each of `AUTO_TREES`;
    with beam_width="auto" there is a row of them for each of `AUTO_WIDTHS`.
    The caller holds the device. Lengths between the measured ones are interpolated, and a longer
    draft never counts as cheaper than a shorter one.

    Args:
        method: with a draft, whose length is `num_draft_tokens` or whose tree `k_config` says.
        pair: the models.
        make: both with empty caches; their passes stop the measurement by raising.
        config: of the run; its draft, seed and limits are not read.

    Returns:
        1.0 for no draft, then up to γ = `MAX_AUTO_DRAFT_TOKENS`, or fewer where the context is too
        short or they grow too dear; or those of the trees, `NEVER` likewise.
    """
    whole = pair.context_length
    fits = [n for n in LENGTHS if (ROUNDS + 2) * (n + 1) < whole // 2] or [1]
    # Where not even the shortest drafts fit behind it, the text is shorter.
    context = min(CONTEXT_TOKENS, whole // 2, whole - (ROUNDS + 1) * (max(fits) + 1))
    context = min(max(2, context), whole - 1)
    run = functools.partial(_iterations, pair, make, config, context, Session())
    if "k_config" in method_info(method).parameters:
        trees = [tree for tree in AUTO_TREES if len(tree) <= max(fits)]
        drafts = {tree: {"k_config": tree} for tree in trees}
        times = _measure(run, method, drafts)
        return (1.0, *(times.get(tree, NEVER) for tree in AUTO_TREES))

    def by_length(width: int, lengths: Sequence[int]) -> tuple[float, ...]:
        drafts = {n: {"num_draft_tokens": n, "beam_width": width} for n in lengths}
        return _by_length({0: 1.0} | _measure(run, method, drafts))

    if config.beam_width == "auto" and "beam_width" in method_info(method).parameters:
        return tuple(by_length(width, fits[::2]) for width in AUTO_WIDTHS)  # it takes time enough
    return by_length(config.width, fits)


def _measure(
    run: Callable[[str, Mapping[str, Any]], Iterations],
    method: str,
    drafts: Mapping[K, Mapping[str, Any]],
) -> dict[K, float]:
    """What an iteration with each of the drafts costs, relative to one without.

    They come with the shorter ones first; those behind the first that is too dear are left out.
    """
    wide = {"num_draft_tokens": MAX_AUTO_DRAFT_TOKENS, "beam_width": 1}  # of no draft
    ratios: defaultdict[K, list[float]] = defaultdict(list)
    turns, turn = TURNS, 0
    while turn < turns:
        turn += 1
        for draft, fields in drafts.items():
            plain = _seconds(run("autoregressive", wide))
            turns = SLOW_TURNS if plain > SLOW_SECONDS else turns
            ratios[draft].append(_seconds(run(method, fields)) / plain)
            if min(ratios[draft]) > DEAR:
                break
    return {draft: round(statistics.median_low(found), 4) for draft, found in ratios.items()}


def _seconds(run: Iterations) -> float:
    """Of an iteration, the (lower) median of some from the second on: one may record a graph.

    The first holds what is read of the text; it counts where there is no room for others. Ends the
    run: a drafter of the user's own is one object, and holds one text.
    """
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        if next(run, None) is None:
            break
        times.append(time.perf_counter() - start)
        if len(times) > 2 and sum(times[1:]) > BURST_SECONDS:
            break
    run.close()
    return statistics.median_low(times[1:] or times)


def _iterations(
    pair: ModelPair,
    make: Callable[[], tuple[CachedLM, RecordedDrafter]],
    config: DecodeConfig,
    context: int,
    session: Session,
    method: str,
    fields: Mapping[str, Any],
) -> Iterations:
    """Iterations with a draft on any text: what they cost depends little on it."""
    target, drafter = make()
    used = drafter if method_info(method).uses_draft else None
    prompt = [1 + k * 7919 % (target.vocab_size - 1) for k in range(context)]
    fixed = dataclasses.replace(
        config,
        max_new_tokens=min(
            (ROUNDS + 2) * (MAX_AUTO_DRAFT_TOKENS + 1), pair.context_length - context
        ),
        iteration_costs=None,
        ignore_eos=True,
        stop=(),
        **fields,
    )
    generator = torch.Generator(target.device).manual_seed(0)
    session.begin(pair, prompt, target, used)
    outcomes = load_decoder(method)(target, used, prompt, fixed, generator)
    first = next(outcomes)
    session.end(pair, prompt, target, used)
    yield first
    yield from outcomes


def _by_length(costs: Mapping[int, float]) -> tuple[float, ...]:
    """Relative costs of all lengths from 0 to the longest."""
    lengths: Sequence[int] = sorted(costs)
    found = [costs[0]]
    for low, high in zip(lengths, lengths[1:], strict=False):
        first, last = costs[low], costs[high]
        for length in range(low + 1, high + 1):
            between = first + (last - first) * (length - low) / (high - low)
            found.append(max(found[-1], between))
    return tuple(round(cost, 4) for cost in found)
