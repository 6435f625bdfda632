"""Typical acceptance: drafted as in speculative decoding, kept while typical for the target.

Cai et al. 2024 (Medusa), arXiv 2401.10774. Both p and its entropy are warped. Not lossless: it
trades the exact distribution for longer accepted prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State, Verdict
from mtad.decoders.speculative import draft_block
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.logits import Logits, wide
from mtad.sampling import draw_row, warp
from mtad.trace import Outcome
from mtad.verify import leading_run, typical_thresholds


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
        block, _ = draft_block(state, state.block_length())
        yield state.judge(while_typical, block, state.verify(block), 1)


def while_typical(config: DecodeConfig, block: Proposal, logits: Logits, chance: Tensor) -> Verdict:
    """Tokens up to the first that is not typical of p, and one from p behind them."""
    rows = warp(logits, config)
    before = rows.rows(0, block.levels)
    target_logprobs = before.logprob_of(block.token_ids)
    probabilities = wide(target_logprobs).exp()
    thresholds = typical_thresholds(before, config.typical_epsilon, config.typical_delta)
    accepted = leading_run(probabilities > thresholds)
    return Verdict(
        target_logprobs,
        accepted=accepted,
        final_token=draw_row(rows, accepted, chance),
        scores=probabilities,
        thresholds=thresholds,
    )
