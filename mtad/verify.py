"""The acceptance rules, each a pure function named after its source.

Vocabulary: the *target* p is the model whose distribution counts, the *draft* q proposed the
tokens. *Accepted* tokens are draft tokens that a rule keeps. Every pass ends with one token of the
target's own. Where a rule rejects a single token, that is the *corrected* token in its place; a
*bonus* token follows the accepted ones. The joint rules and `typical` draw it from plain p
whatever was rejected, so theirs is always a bonus.
All log-probabilities are natural logarithms of the warped conditionals. Rules run on the
device of their arguments and read nothing back to the host, `multi_candidate` excepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtad.errors import ConfigError
from mtad.logits import wide
from mtad.sampling import Warped


def running_sums(logprobs: Tensor) -> Tensor:
    """[..., γ] conditionals → [..., γ] joints of the prefixes, in float64.

    Added one by one in order of depth, as the CPU's scan does and a parallel one does not, so that
    a recomputation from a trace gives the same bits on every device.
    """
    if logprobs.is_cpu:
        return logprobs.cumsum(-1, dtype=torch.float64)
    columns = wide(logprobs).unbind(-1)
    sums = [torch.zeros_like(columns[0])] if columns else []
    for column in columns:
        sums.append(sums[-1] + column)
    return torch.stack(sums[1:], dim=-1) if columns else wide(logprobs)


def joint_log_ratios(
    target_logprobs: Tensor,  # [..., γ]
    draft_logprobs: Tensor,  # [..., γ]
) -> Tensor:
    """[..., γ]: r_i = Σ_{j≤i} log p_j − Σ_{j≤i} log q_j, float64; −∞ from the first p = 0 on."""
    return running_sums(target_logprobs) - running_sums(draft_logprobs)


def joint_accept_lengths(
    target_logprobs: Tensor,  # [..., γ]
    draft_logprobs: Tensor,  # [..., γ]
    threshold: float,
    real: Tensor | None = None,  # [..., γ]
) -> Tensor:
    """MTAD's rule: the *longest* prefix whose joint ratio p/q exceeds the threshold.

    A later pass rescues an earlier dip: what counts is the last depth that passes, not the
    first that fails. With τ ≥ 1 a prefix passes only where the target finds it likelier than the
    draft does. Source: Qin et al. 2025 (arXiv 2407.09722).

    Args:
        target_logprobs: log p of each draft token given the tokens before it.
        draft_logprobs: log q of the same tokens along the block's own ancestry.
        threshold: τ, finite and > 0.
        real: False for padding, which is never accepted; none by default.

    Returns:
        [...] int64, each from 0 to γ.

    Raises:
        ConfigError: τ is not finite and positive, or the shapes differ.
    """
    level = log_threshold(threshold)
    if target_logprobs.shape != draft_logprobs.shape or not target_logprobs.ndim:
        raise ConfigError(
            f"target_logprobs has shape {tuple(target_logprobs.shape)} and draft_logprobs"
            f" {tuple(draft_logprobs.shape)}, but both must be the same [..., γ]."
        )
    passes = joint_log_ratios(target_logprobs, draft_logprobs) > level
    passes = passes if real is None else passes & real
    depths = torch.arange(1, passes.shape[-1] + 1, device=passes.device)
    if not depths.shape[0]:
        return depths.new_zeros(passes.shape[:-1])
    return (depths * passes).amax(-1)


def joint_accept_length(
    target_logprobs: Tensor | Sequence[float],
    draft_logprobs: Tensor | Sequence[float],
    threshold: float,
) -> int:
    """`joint_accept_lengths` for one block of γ tokens, read back as an int."""
    target = torch.as_tensor(target_logprobs, dtype=torch.float64).flatten()
    draft = torch.as_tensor(draft_logprobs, dtype=torch.float64).flatten()
    return int(joint_accept_lengths(target, draft, threshold).item())


def joint_tree_path(
    target_logprobs: Tensor,  # [N]
    reference_logprobs: Tensor,  # [D]
    paths: Tensor,  # [N, D]
    real: Tensor,  # [N]
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """MTAD's rule on a token tree.

    A node at depth i passes if log p(path to it) − log q(first i tokens of the reference block)
    exceeds log τ. The deepest passing depth wins; at that depth the node with the largest
    log p (the first on a tie).

    Args:
        target_logprobs: log p of each node given its ancestors.
        reference_logprobs: log q by depth of the best final beam, 0 after its end.
        paths: the node at each depth on the way to every node, −1 below it.
        real: False for a slot that holds no node.
        threshold: τ, finite and > 0.

    Returns:
        The accepted length (no dimensions, int64) and the path [D], of which only the first
        that many entries mean something.
    """
    level = log_threshold(threshold)
    if paths.shape[0] == 0:
        return paths.sum(), paths.new_empty(0)
    on_path = paths >= 0
    conditionals = torch.where(on_path, target_logprobs[paths.clamp_min(0)], 0.0)
    joint_target = running_sums(conditionals)[:, -1]  # a node's own pads add exactly 0
    depths = on_path.sum(-1)
    joint_reference = running_sums(reference_logprobs)[depths - 1]
    passing = ((joint_target - joint_reference) > level) & real
    best_depth = (depths * passing).amax()
    ranked = torch.where(passing & (depths == best_depth), joint_target, -torch.inf)
    return best_depth, paths.index_select(0, ranked.argmax().view(1)).squeeze(0).clamp_min(0)


def leading_run(accepted: Tensor) -> Tensor:
    """[..., γ] bool → [...] int64: how many are True before the first False."""
    return accepted.long().cumprod(-1).sum(-1)


def rejection_ratios(
    target_logprobs: Tensor,  # [γ]
    draft_logprobs: Tensor,  # [γ]
) -> Tensor:
    """[γ] float64: p/q of each draft token. A draft token is kept while u < p/q.

    u may be exactly 0, so the comparison is strict: a token with p = 0 never passes.
    Source: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1.
    """
    return (wide(target_logprobs) - wide(draft_logprobs)).exp()


def typical_thresholds(target: Warped, epsilon: float, delta: float) -> Tensor:
    """[γ] float64: min(ε, δ·exp(−H(p))); a draft token is kept while p(x) exceeds it.

    p and its entropy H are warped. Source: Cai et al. 2024 (arXiv 2401.10774), typical
    acceptance.
    """
    return (delta * torch.exp(-wide(target.entropy()))).clamp_max(epsilon)


def rollback_keeps(target_logprobs: Tensor, rollback_threshold: float) -> Tensor:
    """[γ] bool: BiLD keeps a token unless −log p(x) exceeds the rollback threshold.

    log p is unwarped, at temperature 1. Source: Kim et al. 2023 (arXiv 2302.07863), rollback
    policy.
    """
    return wide(target_logprobs) >= -rollback_threshold


def multi_candidate(
    target: Warped,  # [K]
    draft: Warped,  # [K']
    candidates: Sequence[int],
    uniforms: Sequence[float],
    replacement: bool,
) -> tuple[int | None, Warped, list[float]]:
    """One rejection test for each of several candidates for one position, in draw order.

    After a rejection p ← norm(max(p − q, 0)). With replacement q stays; without, the rejected
    token is taken out of q and q is renormalised. Source: Miao et al. 2023 (arXiv 2305.09781),
    algorithm 2; Yang et al. 2024 (arXiv 2401.06706).

    Args:
        target: p at this position, a single row on the CPU.
        draft: q at this position, a single row on the CPU.
        candidates: tokens drawn from q.
        uniforms: one for each candidate.
        replacement: whether the candidates were drawn with replacement.

    Returns:
        Index of the accepted candidate or None; what the next token is drawn from if none was
        accepted; the ratio p/q of each test that was made.
    """
    mass, draft_mass = wide(target.logprobs).exp(), wide(draft.logprobs).exp()
    on_support = draft.mass_of(target.token_ids)  # q of the tokens that p is about
    ratios: list[float] = []
    for index, (token, uniform) in enumerate(zip(candidates, uniforms, strict=True)):
        here = target.token_ids == token
        target_probability = float(mass[here].sum())
        draft_probability = float(draft_mass[draft.token_ids == token].sum())
        ratio = target_probability / draft_probability if draft_probability > 0.0 else 0.0
        ratios.append(ratio)
        if uniform < ratio:
            return index, target.with_(target.token_ids, mass.log()), ratios
        left = (mass - on_support).clamp_min(0.0)
        total = float(left.sum())
        if total > 0.0:
            mass = left / total
        if not replacement:
            draft_mass = draft_mass.masked_fill(draft.token_ids == token, 0.0)
            on_support = on_support.masked_fill(here, 0.0)
            total = float(draft_mass.sum())
            if total > 0.0:
                draft_mass, on_support = draft_mass / total, on_support / total
    return None, target.with_(target.token_ids, mass.log()), ratios


def log_threshold(threshold: float) -> float:
    """The natural logarithm of τ.

    Raises:
        ConfigError: τ is not finite and positive.
    """
    if not (math.isfinite(threshold) and threshold > 0.0):
        raise ConfigError(
            f"accept_threshold is {threshold!r}, but must be a number greater than 0 and finite."
        )
    return math.log(threshold)
