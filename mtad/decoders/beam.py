"""Beam search (temperature 0) or beam sampling on the target, as a baseline.

No length penalty; finished hypotheses are kept and compete by their joint probability. While it
runs, the best hypothesis is shown as provisional; it is emitted when the search ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.beams import Beams
from mtad.decoders.common import NUM_ALTERNATIVES, State
from mtad.decoders.readback import alternatives, check_finite, to_host
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.trace import Decision, Outcome

_PRUNE_EVERY = 16


def decode(
    target: CachedLM,
    draft: Drafter | None,
    prompt_ids: Sequence[int],
    config: DecodeConfig,
    generator: torch.Generator,
    *,
    eos_token_ids: Sequence[int] = (),
) -> Iterator[Outcome]:
    """See `mtad.decoders.Decoder`; the draft is not used."""
    state = State.begin(target, None, prompt_ids, config, generator, eos_token_ids)
    width = config.width
    passes = target.passes
    positions = target.positions
    beams = Beams.root(target.device)
    rows = state.pending  # what the next pass reads
    parents: Tensor | None = None
    slots = torch.empty(1, 0, dtype=torch.int64, device=target.device)  # nodes of each beam
    while True:
        first = target.nodes
        logits = target.forward(rows, parents).logits
        held = torch.arange(first, target.nodes, device=target.device)
        slots = torch.cat([slots, held.unsqueeze(-1)], dim=-1)
        beams = beams.grow(
            logits, width, config, state.uniforms, state.is_eos, record=NUM_ALTERNATIVES
        )
        slots = slots.index_select(0, beams.came_from)
        over, decision = read_best(beams, config)
        done = over or beams.steps == config.max_new_tokens
        decision = dataclasses.replace(
            decision,
            target_passes=target.passes - passes,
            target_positions=target.positions - positions,
            provisional=not done,
        )
        yield Outcome.of(decision)
        if done:
            return
        if beams.steps % _PRUNE_EVERY == 0:
            slots = _prune(target, slots)
        rows, parents = beams.token_ids[:, -1], slots[:, -1]


def read_best(beams: Beams, config: DecodeConfig) -> tuple[bool, Decision]:
    """Whether the search is over, and the best hypothesis as a decision (one host read).

    It is over when every hypothesis has ended. A maximising search is also over when the best
    one has: a joint can only fall.
    """
    best = beams.best()
    over = beams.finished.all()  # a dead slot counts as finished
    if config.temperature == 0.0:
        over = over | beams.finished.index_select(0, best).all()
    host = to_host(
        joint=beams.joint.index_select(0, best),
        over=over,
        length=beams.real.index_select(0, best).sum(),
        token_ids=beams.token_ids.index_select(0, best),
        logprobs=beams.raw_logprobs.index_select(0, best),
        alternative_ids=beams.alternative_ids.index_select(0, best),
        alternative_logprobs=beams.alternative_logprobs.index_select(0, best),
    )
    length = int(host["length"][0])
    logprobs = host["logprobs"][:length]
    check_finite("target", host["joint"])
    return bool(host["over"][0]), Decision(
        emitted=tuple(int(token) for token in host["token_ids"][:length]),
        emitted_logprobs=tuple(logprobs),
        final_kind="sampled",
        alternatives=alternatives(host, beams.alternative_ids.shape[-1], length),
    )


def _prune(target: CachedLM, slots: Tensor) -> Tensor:
    """Drops the cached nodes that no hypothesis descends from; renumbers the others."""
    live = sorted(set(slots.flatten().tolist()))
    target.retain(live)
    renumbered = torch.empty(live[-1] + 1, dtype=torch.int64, device=slots.device)
    renumbered[torch.tensor(live, device=slots.device)] = torch.arange(
        len(live), device=slots.device
    )
    return renumbered[slots]
