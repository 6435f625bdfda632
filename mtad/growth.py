"""A step of beam sampling: operations on tensors whose shapes do not depend on what is in them."""

from __future__ import annotations

import torch
from torch import Tensor

from mtad.histories import Histories
from mtad.sampling import Warped, draw_distinct


def beam_weights(joint_logprobs: Tensor) -> Tensor:
    """Joint log-probabilities → log-weights of the same ratios that sum to one.

    [W] hypotheses, or all their [W · K] continuations. The probabilities themselves are
    renormalised, which changes no ratio between them.
    """
    return joint_logprobs - joint_logprobs.logsumexp(-1)


def grown(old: Histories, scored: Warped, width: int, chance: Tensor | None) -> Histories:
    """The next step of W' hypotheses: `width` distinct continuations of them.

    They are drawn with probability proportional to beam weight × conditional; the largest are
    taken without `chance`. A finished hypothesis continues only to itself, with log-probability 0,
    and competes by its joint.

    Args:
        old: the hypotheses.
        scored: [W' or 1, K] what may follow each.
        width: W.
        chance: [max(W' · K, W)] uniforms.

    Returns:
        The next ones. `finished` says which were, or are dead: not whether the latest token is
        an end-of-sequence.
    """
    choices = _continuations(old.finished, scored)  # [W', K], log-probabilities
    candidates = (old.joint.unsqueeze(-1) + choices).flatten()
    if candidates.shape[0] < width:
        missing = width - candidates.shape[0]
        candidates = torch.nn.functional.pad(candidates, (0, missing), value=-torch.inf)
    if chance is None:
        picked = candidates.topk(width).indices
    else:
        picked = draw_distinct(beam_weights(candidates), chance, width)
    # A NaN anywhere makes every choice of this step meaningless: it must not go unseen.
    broken = candidates.isnan().any()
    joint = torch.where(broken, torch.nan, candidates.index_select(0, picked))
    picked = picked.clamp_max(choices.numel() - 1)  # padding points nowhere; its joint is −∞
    slot = picked // choices.shape[-1]
    token = scored.token_ids.flatten().index_select(0, picked)
    was_finished = old.finished.index_select(0, slot)
    token_ids = old.token_ids.index_select(0, slot)
    if old.steps:
        token = torch.where(was_finished, token_ids[:, -1], token)
    logprob = choices.flatten().index_select(0, picked).float()
    logprob = torch.where(broken, torch.nan, logprob)
    alive = joint > -torch.inf
    first_node = old.steps * width
    here = torch.arange(first_node, first_node + width, device=slot.device)
    return Histories(
        token_ids=append(token_ids, token),
        logprobs=append(old.logprobs.index_select(0, slot), logprob),
        nodes=append(old.nodes.index_select(0, slot), here),
        real=append(old.real.index_select(0, slot), alive & ~was_finished),
        joint=joint,
        finished=was_finished | ~alive,
        came_from=slot,
    )


def append(history: Tensor, latest: Tensor) -> Tensor:
    """[W, s] and [W] → [W, s + 1]."""
    return torch.cat([history, latest.unsqueeze(-1)], dim=-1)


def _continuations(finished: Tensor, scored: Warped) -> Tensor:
    """[W, K] log-probabilities: a finished hypothesis has one continuation, itself."""
    first = torch.zeros_like(scored.logprobs[:, :1])
    others = torch.full_like(scored.logprobs[:, 1:], -torch.inf)
    itself = torch.cat([first, others], dim=-1)
    return torch.where(finished.unsqueeze(-1), itself, scored.logprobs)
