"""Single-token sampling: one target pass, one token from p. The reference of every claim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State, Verdict
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.sampling import draw_row, warp
from mtad.trace import Outcome


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
    nothing = Proposal.nothing(target.device)
    none = torch.zeros((), dtype=torch.int64, device=target.device)
    while state.running:
        yield state.judge(sample, nothing, state.verify(nothing), 1, none)


def sample(
    config: DecodeConfig, proposal: Proposal, logits: Logits, chance: Tensor, none: Tensor
) -> Verdict:
    """A token from p; `none` [] is the 0."""
    return Verdict(
        proposal.draft_logprobs,
        accepted=none,
        final_token=draw_row(warp(logits, config), none, chance),
    )
