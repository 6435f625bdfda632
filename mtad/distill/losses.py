"""How far a draft's distribution q is from the target's p. Pure functions of log-probabilities.

The target's side is known for its K most probable tokens only, so every function takes, for N
positions, [N, K] log p of those tokens and [N, K] log q of the same tokens, −∞ where the draft
cannot propose the token. All return [N] values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.distill.recipe import Losses
from mtad.sampling import warp

# Where the draft can propose next to nothing of the target's mass, what is left of it must not
# be blown up to a whole distribution.
_LEAST_MASS = 0.05


def forward_kl(target_logprobs: Tensor, draft_logprobs: Tensor) -> Tensor:
    """−Σ p log q over the tokens that the draft can propose, p renormalised to them.

    Soft cross-entropy: KL(p ‖ q) but for a constant. A token outside the head would have
    infinite loss whatever the draft does, so it is left out.
    """
    proposable = draft_logprobs > -torch.inf
    probs = torch.where(proposable, target_logprobs.exp(), 0.0)
    terms = probs * torch.where(proposable, draft_logprobs, 0.0)
    return -terms.sum(-1) / probs.sum(-1).clamp(min=_LEAST_MASS)


def reverse_kl(target_logprobs: Tensor, draft_logprobs: Tensor) -> Tensor:
    """KL(q ‖ p), where all tokens beyond the K count as one.

    Lumping tokens together can only lower a divergence: this is a lower bound of the true one.
    """
    probs = draft_logprobs.exp()
    shown = probs > 0
    ratio = torch.where(shown, draft_logprobs - target_logprobs, 0.0)
    rest = (1 - probs.sum(-1)).clamp(min=1e-6)
    target_rest = (1 - target_logprobs.exp().sum(-1)).clamp(min=1e-6)
    return (probs * ratio).sum(-1) + rest * (rest / target_rest).log()


def overlap(target_logprobs: Tensor, draft_logprobs: Tensor) -> Tensor:
    """α = Σ min(p, q), the chance that speculative sampling accepts a token.

    What both give to tokens beyond the K is missing from it.
    """
    return torch.minimum(target_logprobs, draft_logprobs).exp().sum(-1)


def total_variation(target_logprobs: Tensor, draft_logprobs: Tensor) -> Tensor:
    """½ Σ |p − q| = 1 − α."""
    return 1 - overlap(target_logprobs, draft_logprobs)


def warped_target(target_logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """[N, K] log p after top-k and top-p, renormalised; −∞ for tokens that are filtered out."""
    return warp(target_logprobs, DecodeConfig(top_k=top_k, top_p=top_p)).dense()


def weighted(
    weights: Losses, target_logprobs: Tensor, draft_logprobs: Tensor, top_k: int, top_p: float
) -> Tensor:
    """[N]: the sum of the terms that have a weight."""
    total = torch.zeros_like(draft_logprobs[:, 0])
    if weights.forward_kl:
        total = total + weights.forward_kl * forward_kl(target_logprobs, draft_logprobs)
    if weights.reverse_kl:
        total = total + weights.reverse_kl * reverse_kl(target_logprobs, draft_logprobs)
    if weights.total_variation:
        total = total + weights.total_variation * total_variation(target_logprobs, draft_logprobs)
    if weights.warped:
        narrow = warped_target(target_logprobs, top_k, top_p)
        total = total + weights.warped * forward_kl(narrow, draft_logprobs)
    return total
