"""Multi-token assisted decoding: a block by beam sampling on q, one joint test on p.

Qin et al. 2025, arXiv 2407.09722. The longest prefix whose joint ratio p/q exceeds τ is kept,
so a token that the target finds unlikely can be rescued by what follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State, Verdict
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.sampling import draw_row, score, warp
from mtad.trace import Decision
from mtad.verify import joint_accept_lengths


def decode(
    target: CachedLM,
    draft: Drafter | None,
    prompt_ids: Sequence[int],
    config: DecodeConfig,
    generator: torch.Generator,
    *,
    eos_token_ids: Sequence[int] = (),
) -> Iterator[Decision]:
    """See `mtad.decoders.Decoder`."""
    state = State.begin(target, draft, prompt_ids, config, generator, eos_token_ids)
    while state.running:
        block = draft_block(state, state.block_length())
        yield state.judge(longest_prefix, block, state.verify(block), 1)


def longest_prefix(
    config: DecodeConfig, block: Proposal, logits: Logits, chance: Tensor
) -> Verdict:
    """The longest prefix whose joint ratio exceeds τ, and a token from p behind it."""
    length = block.levels
    scored = score(logits, config)
    target_logprobs = scored.rows(0, length).logprob_of(block.token_ids)
    accepted = joint_accept_lengths(
        target_logprobs, block.draft_logprobs, config.accept_threshold, block.real
    )
    warped = scored if config.temperature > 0.0 else warp(logits, config)
    return Verdict(
        target_logprobs,
        path=torch.arange(length, device=accepted.device),
        accepted=accepted,
        final_token=draw_row(warped, accepted, chance),
        reference_logprobs=block.draft_logprobs,
    )


def draft_block(state: State, length: int) -> Proposal:
    """The hypothesis with the largest joint q after γ steps of beam sampling on the draft."""
    if length == 0:
        return Proposal.nothing(state.target.device)
    beams = state.draft_beams(length)[-1]
    best = beams.best()
    return Proposal.block(
        beams.token_ids.index_select(0, best)[0],
        beams.logprobs.index_select(0, best)[0],
        cached_depth=length - 1,
        real=beams.real.index_select(0, best)[0],
        draft_nodes=beams.nodes.index_select(0, best)[0],
    )
