"""Multi-candidate MTAD: every beam of every draft step, verified at once as a token tree.

After the multi-candidate form of Qin et al. 2025, arXiv 2407.09722. The rule is that of `mtad`,
with the best final beam as the reference: a node passes if its joint log p exceeds the
reference's joint log q at its depth by more than log τ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State, Verdict
from mtad.decoders.mtad import longest_prefix
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.sampling import Warped, draw_row, score, warp
from mtad.trace import Outcome
from mtad.verify import joint_tree_path, log_threshold


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
        tree, reference, paths = draft_tree(state, state.block_length())
        yield state.judge(deepest_node, tree, state.verify(tree), 1, reference, paths)


def deepest_node(
    config: DecodeConfig,
    tree: Proposal,
    logits: Logits,
    chance: Tensor,
    reference: Tensor,  # [γ]
    paths: Tensor,  # [W·γ, γ]
) -> Verdict:
    """The deepest node that passes, and a token from p behind it; see `draft_tree`."""
    if tree.chain:  # at the end of a run no node fits
        return longest_prefix(config, tree, logits, chance)
    scored = score(logits, config)
    target_logprobs, accepted, path = joint_path(
        scored, tree, reference, paths, config.accept_threshold
    )
    warped = scored if config.temperature > 0.0 else warp(logits, config)
    last_row = torch.cat([path.new_zeros(1), path + 1]).index_select(0, accepted.view(1))
    return Verdict(
        target_logprobs,
        path=path,
        accepted=accepted,
        final_token=draw_row(warped, last_row, chance),
        reference_logprobs=reference,
    )


def joint_path(
    target: Warped, tree: Proposal, reference: Tensor, paths: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each node log p [N]; the accepted length [] and path [γ]. In one go where that can be."""
    nodes = tree.token_ids, tree.parents, tree.draft_logprobs, tree.real
    rows = target.logprobs, target.token_ids
    found = target.search.joint_path(rows, nodes, reference, paths, log_threshold(threshold))
    if found is not None:
        return found
    assert tree.parents is not None and tree.real is not None
    # Row 0 of the pass follows the pending token, row 1 + i follows node i.
    target_logprobs = target.select(tree.parents + 1).logprob_of(tree.token_ids)
    accepted, path = joint_tree_path(target_logprobs, reference, paths, tree.real, threshold)
    return target_logprobs, accepted, path


def draft_tree(state: State, length: int) -> tuple[Proposal, Tensor, Tensor]:
    """The W·γ beams of all γ draft steps as nodes, level by level.

    Returns:
        The tree; log q by depth of the best final beam [γ], 0 after its end; and for each node
        the node at every depth on the way to it [W·γ, γ], −1 below it.
    """
    if length == 0:
        nothing = Proposal.nothing(state.target.device)
        return nothing, nothing.draft_logprobs, nothing.token_ids.view(0, 0)
    beams = state.draft_beams(length).tree()
    tree = Proposal(
        token_ids=beams.token_ids,
        draft_logprobs=beams.logprobs,
        cached_depth=length - 1,
        levels=length,
        parents=beams.parents,
        real=beams.real,
    )
    return tree, beams.reference, beams.paths
