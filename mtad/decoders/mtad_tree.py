"""Multi-candidate MTAD: every beam of every draft step, verified at once as a token tree.

After the multi-candidate form of Qin et al. 2025, arXiv 2407.09722. The rule is that of `mtad`,
with the best final beam as the reference: a node passes if its joint log p exceeds the
reference's joint log q at its depth by more than log τ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State, Verdict
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.sampling import draw_row, score, warp
from mtad.trace import Decision
from mtad.verify import joint_tree_path


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
    # Row 0 of the pass follows the pending token, row 1 + i follows node i.
    before = score(logits, config).select(tree.parents + 1)
    target_logprobs = before.logprob_of(tree.token_ids)
    accepted, path = joint_tree_path(
        target_logprobs, reference, paths, tree.real, config.accept_threshold
    )
    last_row = torch.cat([path.new_zeros(1), path + 1]).index_select(0, accepted.view(1))
    return Verdict(
        target_logprobs,
        path=path,
        accepted=accepted,
        final_token=draw_row(warp(logits, config), last_row, chance),
        reference_logprobs=reference,
    )


def draft_tree(state: State, length: int) -> tuple[Proposal, Tensor, Tensor]:
    """The W·γ beams of all γ draft steps as nodes, level by level.

    Returns:
        The tree; log q by depth of the best final beam [γ], 0 after its end; and for each node
        the node at every depth on the way to it [W·γ, γ], −1 below it.
    """
    if length == 0:
        nothing = Proposal.nothing(state.target.device)
        return nothing, nothing.draft_logprobs, nothing.parents.view(0, 0)
    history = state.draft_beams(length)
    roots = torch.full_like(history[0].nodes[:, -1], -1)
    tree = Proposal(
        token_ids=torch.cat([beams.token_ids[:, -1] for beams in history]),
        parents=torch.cat([roots] + [beams.nodes[:, -2] for beams in history[1:]]),
        draft_logprobs=torch.cat([beams.logprobs[:, -1] for beams in history]),
        cached_depth=length - 1,
        levels=length,
        real=torch.cat([beams.real[:, -1] for beams in history]),
        chain=False,
    )
    paths = torch.cat([pad(beams.nodes, (0, length - beams.steps), value=-1) for beams in history])
    final = history[-1]
    return tree, final.logprobs.index_select(0, final.best())[0], paths
