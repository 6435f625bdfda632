"""Multi-token joint decoding: choose γ tokens at once by their joint probability under p.

Qin et al. 2025, arXiv 2407.09722. `search="beam"` is beam sampling of width W on the target,
the procedure that `mtad` copies with q in place of p. `search="exact"` expands the whole tree
of blocks in the warped support and is the oracle that everything else is compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.beam import read_best
from mtad.decoders.beams import grow_beams
from mtad.decoders.common import NUM_ALTERNATIVES, State
from mtad.decoders.exact import search_exact
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.trace import Decision, Outcome


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
    step = _exact_step if config.search == "exact" else _beam_step
    while state.running:
        passes, positions = target.passes, target.positions
        decision, path = step(state, min(state.draft_length, state.remaining))
        target.keep(path)
        state.pending = torch.tensor(decision.emitted[-1:], device=target.device)
        state.remaining -= len(decision.emitted)
        state.ended = decision.emitted[-1] in state.eos_ids
        decision = dataclasses.replace(
            decision,
            target_passes=target.passes - passes,
            target_positions=target.positions - positions,
        )
        yield Outcome.of(decision)


def _beam_step(state: State, length: int) -> tuple[Decision, Tensor]:
    """The most probable of W sampled blocks, and its nodes in the target's cache."""
    target = state.target
    beams = grow_beams(
        lambda token_ids, parents: target.forward(token_ids, parents).logits,
        state.pending,
        length,
        state.config,
        state.uniforms,
        state.is_eos,
        record=NUM_ALTERNATIVES,
    )[-1]
    _, decision = read_best(beams, state.config)
    # The pending token is node 0; the last token of the block was never forwarded.
    nodes = 1 + beams.nodes.index_select(0, beams.best())[0, : len(decision.emitted) - 1]
    return decision, torch.cat([nodes.new_zeros(1), nodes])


def _exact_step(state: State, length: int) -> tuple[Decision, Tensor]:
    """A block drawn from p(block)^(1/T_J), or the most probable one, out of all blocks."""
    config = state.config
    blocks = search_exact(
        state.target, state.pending, length, config, state.is_eos, record=NUM_ALTERNATIVES
    )
    if config.temperature == 0.0:
        index = int(blocks.joint.argmax())
    else:
        index = blocks.choose(config.joint_temperature, state.uniforms(1))
    block = blocks.block(index)
    return (
        Decision(
            emitted=block.token_ids,
            emitted_logprobs=block.raw_logprobs,
            final_kind="sampled",
            alternatives=block.alternatives,
        ),
        torch.tensor((0, *block.nodes), dtype=torch.int64, device=state.target.device),
    )
