"""Speculative decoding: draft γ tokens, verify them in one pass, correct the first rejection.

Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318. The tokens have
exactly the distribution of sampling the target.
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
from mtad.sampling import Warped, draw, narrows, residual, warp
from mtad.trace import Outcome
from mtad.verify import leading_run, rejection_ratios


def decode(
    target: CachedLM,
    draft: Drafter | None,
    prompt_ids: Sequence[int],
    config: DecodeConfig,
    generator: torch.Generator,
    *,
    eos_token_ids: Sequence[int] = (),
) -> Iterator[Outcome]:
    """See `mtad.decoders.Decoder`."""
    state = State.begin(target, draft, prompt_ids, config, generator, eos_token_ids, stops=True)
    while state.running:
        block, draft_rows = draft_block(state, state.block_length())
        rows = () if draft_rows is None else (draft_rows.token_ids, draft_rows.logprobs)
        yield state.judge(while_kept, block, state.verify(block), block.levels + 1, *rows)


def while_kept(
    config: DecodeConfig,
    block: Proposal,
    logits: Logits,
    chance: Tensor,
    *drafted: Tensor,  # tokens and log q [γ, K] of the rows that the block was drawn from
) -> Verdict:
    """Tokens up to the first that a test rejects, and what replaces or follows it."""
    length = block.levels
    target = warp(logits, config)
    target_logprobs, ratios, accepted = kept_run(target, block, chance[:length])
    if drafted:
        token_ids, logprobs = drafted
        rows = Warped(token_ids, logprobs, target.vocab_size)
        final_token = draw_corrected_or_bonus(target, rows, accepted, chance[length])
    else:
        final_token = draw(target.row(accepted), chance[length])
    return Verdict(
        target_logprobs,
        accepted=accepted,
        final_token=final_token,
        corrects=True,
        scores=ratios,
        thresholds=chance[:length],
    )


def kept_run(target: Warped, block: Proposal, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each draft token log p and the ratio, [γ]; how many are kept before the first is not.

    In one go where the engine can.
    """
    nodes = block.token_ids, None, block.draft_logprobs, None
    found = target.search.kept_run((target.logprobs, target.token_ids), nodes, uniform)
    if found is not None:
        return found
    target_logprobs = target.rows(0, block.levels).logprob_of(block.token_ids)
    ratios = rejection_ratios(target_logprobs, block.draft_logprobs)
    return target_logprobs, ratios, leading_run(uniform < ratios)


def draft_block(state: State, length: int) -> tuple[Proposal, Warped | None]:
    """Up to γ tokens from q, one at a time, and the rows [γ, K] that they were drawn from."""
    if length == 0:
        return Proposal.nothing(state.target.device), None
    chance = state.uniforms(length)
    first = state.draft_logits(state.draft_pending)[-1:]
    drawn = state.draft_line(first, chance) or _line(state, first, chance, length)
    tokens, logprobs, ids, rows = drawn
    taken = tokens.shape[0]
    state.uniforms.give_back(length - taken)
    block = Proposal.block(tokens, logprobs, cached_depth=taken - 1)
    return block, Warped(ids, rows, first.vocab_size)


def _line(
    state: State, logits: Logits, chance: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `BlockDrafter.draft_line`; step by step."""
    drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    joint = 0.0
    for position in range(length):
        if position:
            token, logprob, *_ = drawn[-1]
            if state.floors:
                joint += float(logprob)
                if int(token) in state.eos_ids or joint < state.floors[position - 1]:
                    break
            logits = state.draft_logits(token)
        one = chance[position : position + 1]
        drawn.append(draw_next(logits, state.rule_config, one, position))
    tokens, logprobs, ids, rows = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return tokens, logprobs, ids, rows


def draw_next(
    logits: Logits, config: DecodeConfig, chance: Tensor, position: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A token [1] drawn from one row, its log q [1], the row's tokens and log q [1, K] each.

    What is drawn at one position of a block stays until that is drawn again.
    """
    if narrows(logits, config):
        found = logits.search.sample(logits, config.top_k, config.temperature, config.top_p, chance)
        if found is not None:
            return found

    def compute(logits: Logits, chance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row = warp(logits, config)
        token = draw(row, chance)
        return token, row.logprob_of(token), row.token_ids, row.logprobs

    return logits.stretch(("draw", config, position), compute, chance)


def draw_corrected_or_bonus(
    target: Warped,  # [γ + 1, K]
    draft: Warped,  # [γ, K']
    accepted: Tensor,
    uniform: Tensor,
) -> Tensor:
    """The final token []: drawn from `corrected_or_bonus`, in one go where the engine can."""
    p, q = (target.logprobs, target.token_ids), (draft.logprobs, draft.token_ids)
    found = target.search.draw_corrected(p, q, accepted, uniform)
    if found is not None:
        return found
    return draw(corrected_or_bonus(target.row(accepted), draft, accepted), uniform)


def corrected_or_bonus(target: Warped, draft: Warped, accepted: Tensor) -> Warped:
    """What the final token is drawn from.

    norm(max(p − q, 0)) at the first rejection, p after a whole block: beyond the block q counts
    as 0, which makes the second case one of the first.

    Args:
        target: [K] p at the accepted length.
        draft: [γ, K'] q at every position of the block.
        accepted: [] how many were accepted.
    """
    length = draft.logprobs.shape[0]
    rejected = draft.row(accepted.clamp_max(length - 1))
    logprobs = torch.where(accepted < length, rejected.logprobs, -torch.inf)
    return residual(target, draft.with_(rejected.token_ids, logprobs))
