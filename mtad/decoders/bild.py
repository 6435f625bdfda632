"""Big little decoder: the draft writes while it is sure, the target rolls it back.

Kim et al. 2023, arXiv 2302.07863. Both thresholds look at unwarped probabilities at
temperature 1. Not lossless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State, Verdict
from mtad.decoders.readback import check_finite
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.logits import Logits, wide
from mtad.sampling import draw, token_logprobs, warp
from mtad.trace import Outcome
from mtad.verify import leading_run, rollback_keeps


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
    state = State.begin(target, draft, prompt_ids, config, generator, eos_token_ids)
    while state.running:
        block = write_while_sure(state, state.block_length())
        yield state.judge(while_likely, block, state.verify(block), 1)


def while_likely(config: DecodeConfig, block: Proposal, logits: Logits, chance: Tensor) -> Verdict:
    """Tokens up to the first that the target finds too unlikely, and one from p behind them."""
    rows = warp(logits, config)
    scores = token_logprobs(logits, block.token_ids)
    accepted = leading_run(rollback_keeps(scores, config.rollback_threshold))
    return Verdict(
        rows.rows(0, block.levels).logprob_of(block.token_ids),
        accepted=accepted,
        final_token=draw(rows.row(accepted), chance[0]),
        corrects=True,
        scores=scores,
        # In float64: rounded to float32 it would not be the number that was compared.
        thresholds=torch.full_like(wide(scores), -config.rollback_threshold),
    )


def write_while_sure(state: State, length: int) -> Proposal:
    """Up to γ tokens; the draft stops *before* a token whose distribution has no clear peak.

    Whether to go on is read back for every token: the fallback is a decision of the host.
    """
    if length == 0:
        return Proposal.nothing(state.target.device)
    token_ids: list[Tensor] = []
    logprobs: list[Tensor] = []
    unread = state.draft_pending
    sure = True
    while sure and len(token_ids) < length:
        logits = state.draft_logits(unread)[-1]
        peak = float((logits.best(1)[0][0] - logits.log_sums()).exp())
        check_finite("draft", [peak])
        sure = peak >= state.config.fallback_threshold
        if sure:
            row = warp(logits, state.config)
            unread = draw(row, state.uniforms(1)[0]).view(1)
            token_ids.append(unread)
            logprobs.append(row.logprob_of(unread[0]).view(1))
            sure = int(unread) not in state.eos_ids
    if not token_ids:
        return Proposal.nothing(state.target.device, cached_depth=0)
    # The draft has read its own tokens but for the last one, unless what stopped it was the
    # distribution *after* the last one.
    last_unread = sure or int(unread) in state.eos_ids
    return Proposal.block(
        torch.cat(token_ids), torch.cat(logprobs), cached_depth=len(token_ids) - int(last_unread)
    )
