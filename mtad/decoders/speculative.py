"""Speculative decoding: draft γ tokens, verify them in one pass, correct the first rejection.

Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318. The tokens have
exactly the distribution of sampling the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.sampling import Warped, draw, residual, uniforms, warp
from mtad.trace import Decision
from mtad.verify import leading_run, rejection_ratios


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
        block, draft_rows = draft_block(state, state.block_length())
        logits = state.verify(block)
        target_rows = warp(logits, config)
        length = block.levels
        target_logprobs = target_rows.rows(0, length).logprob_of(block.token_ids)
        chance = uniforms(generator, length + 1)
        ratios = rejection_ratios(target_logprobs, block.draft_logprobs)
        accepted = leading_run(chance[:length] < ratios)
        final = draw(corrected_or_bonus(target_rows, draft_rows, accepted), chance[length])
        yield state.conclude(
            block,
            logits,
            target_logprobs,
            path=torch.arange(length, device=target.device),
            accepted=accepted,
            final_token=final,
            corrects=True,
            scores=ratios,
            thresholds=chance[:length],
        )


def draft_block(state: State, length: int) -> tuple[Proposal, list[Warped]]:
    """γ tokens from q, one at a time, and the γ distributions they were drawn from."""
    if length == 0:
        return Proposal.nothing(state.target.device), []
    rows: list[Warped] = []
    token_ids: list[Tensor] = []
    chance = uniforms(state.generator, length)
    unread = state.draft_pending
    for position in range(length):
        row = warp(state.draft_logits(unread)[-1], state.config)
        unread = draw(row, chance[position]).view(1)
        rows.append(row)
        token_ids.append(unread)
    tokens = torch.cat(token_ids)
    logprobs = torch.stack(
        [row.logprob_of(token[0]) for row, token in zip(rows, token_ids, strict=True)]
    )
    return Proposal.block(tokens, logprobs, cached_depth=length - 1), rows


def corrected_or_bonus(target: Warped, draft: list[Warped], accepted: Tensor) -> Warped:
    """What the final token is drawn from.

    norm(max(p − q, 0)) at the first rejection, p after a whole block: beyond the block q counts
    as 0, which makes the second case one of the first.
    """
    last = draft[-1] if draft else target.row(accepted)
    rows = [*(row.logprobs for row in draft), torch.full_like(last.logprobs, -torch.inf)]
    draft_ids = torch.stack([*(row.token_ids for row in draft), last.token_ids])
    padded = Warped(draft_ids, torch.stack(rows), target.vocab_size)
    return residual(target.row(accepted), padded.row(accepted))
