"""Single-token sampling: one target pass, one token from p. The reference of every claim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.sampling import draw, uniforms, warp
from mtad.trace import Decision


def decode(
    target: CachedLM,
    draft: Drafter | None,
    prompt_ids: Sequence[int],
    config: DecodeConfig,
    generator: torch.Generator,
    *,
    eos_token_ids: Sequence[int] = (),
) -> Iterator[Decision]:
    """See `mtad.decoders.Decoder`; the draft is not used."""
    state = State.begin(target, None, prompt_ids, config, generator, eos_token_ids)
    nothing = Proposal.nothing(target.device)
    while state.running:
        logits = state.verify(nothing)
        token = draw(warp(logits, config), uniforms(generator, 1))
        yield state.conclude(
            nothing,
            logits,
            nothing.draft_logprobs,
            path=nothing.token_ids,
            accepted=torch.zeros_like(token),
            final_token=token,
        )
