"""Typical acceptance: drafted as in speculative decoding, kept while typical for the target.

Cai et al. 2024 (Medusa), arXiv 2401.10774. Both p and its entropy are warped. Not lossless: it
trades the exact distribution for longer accepted prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mtad.config import DecodeConfig
from mtad.decoders.common import State
from mtad.decoders.speculative import draft_block
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.sampling import draw, uniforms, warp, wide
from mtad.trace import Decision
from mtad.verify import leading_run, typical_thresholds


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
        block, _ = draft_block(state, state.block_length())
        logits = state.verify(block)
        rows = warp(logits, config)
        length = block.levels
        target_logprobs = rows.rows(0, length).logprob_of(block.token_ids)
        probabilities = wide(target_logprobs).exp()
        thresholds = typical_thresholds(
            rows.rows(0, length), config.typical_epsilon, config.typical_delta
        )
        accepted = leading_run(probabilities > thresholds)
        yield state.conclude(
            block,
            logits,
            target_logprobs,
            path=torch.arange(length, device=target.device),
            accepted=accepted,
            final_token=draw(rows.row(accepted), uniforms(generator, 1)[0]),
            scores=probabilities,
            thresholds=thresholds,
        )
