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
from mtad.sampling import Warped, draw_row, score, warp
from mtad.trace import Outcome
from mtad.verify import joint_accept_lengths, log_threshold


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
        block = draft_block(state, state.block_length())
        yield state.judge(longest_prefix, block, state.verify(block), 1)


def longest_prefix(
    config: DecodeConfig, block: Proposal, logits: Logits, chance: Tensor
) -> Verdict:
    """The longest prefix whose joint ratio exceeds τ, and a token from p behind it."""
    scored = score(logits, config)
    target_logprobs, accepted = joint_prefix(scored, block, config.accept_threshold)
    warped = scored if config.temperature > 0.0 else warp(logits, config)
    return Verdict(
        target_logprobs,
        accepted=accepted,
        final_token=draw_row(warped, accepted, chance),
        reference_logprobs=block.draft_logprobs,
    )


def joint_prefix(target: Warped, block: Proposal, threshold: float) -> tuple[Tensor, Tensor]:
    """Of the draft tokens log p [γ], and how many are accepted; in one go where the engine can."""
    nodes = block.token_ids, None, block.draft_logprobs, block.real
    rows = target.logprobs, target.token_ids
    found = target.search.joint_prefix(rows, nodes, log_threshold(threshold))
    if found is not None:
        return found
    target_logprobs = target.rows(0, block.levels).logprob_of(block.token_ids)
    return target_logprobs, joint_accept_lengths(
        target_logprobs, block.draft_logprobs, threshold, block.real
    )


def draft_block(state: State, length: int) -> Proposal:
    """The hypothesis with the largest joint q after γ steps of beam sampling on the draft."""
    if length == 0:
        return Proposal.nothing(state.target.device)
    waiting = state.draft_pending.shape[0]
    token_ids, logprobs, real, path = state.draft_beams(length).best_block(waiting)
    depth = token_ids.shape[0] - 1  # the last token is not read
    return Proposal.block(token_ids, logprobs, depth, real=real, draft_path=path)
