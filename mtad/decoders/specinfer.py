"""Multi-candidate speculative decoding: a tree of draws, one rejection test a child.

Miao et al. 2023 (SpecInfer), arXiv 2305.09781; Yang et al. 2024, arXiv 2401.06706. The tokens
have exactly the distribution of sampling the target, with and without replacement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State, Verdict
from mtad.decoders.speculative import draft_block
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.pace import TreePace
from mtad.sampling import Warped, draw, draw_distinct, unwarped, warp
from mtad.trace import Decision
from mtad.verify import multi_candidate


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
    state = State.begin(target, draft, prompt_ids, config, generator, eos_token_ids, adapts=False)
    shape, pace = config.k_config, None
    if not isinstance(shape, tuple):
        pace = TreePace(config.tree_costs)
        shape = pace.tree
    while state.running:
        candidates = draw_tree(state, shape[: state.remaining - 1])
        tree = candidates.proposal
        logits = state.verify(tree)
        rows = warp(logits, config)
        target_logprobs = rows.select(tree.parents + 1).logprob_of(tree.token_ids)
        walk = walk_down(candidates, rows, state.uniforms(tree.token_ids.shape[0]), config)
        if pace is not None:
            pace.observe(walk.tests)
            shape = pace.tree
        device = target.device
        path = torch.zeros(tree.levels, dtype=torch.int64)
        path[: len(walk.path)] = torch.tensor(walk.path, dtype=torch.int64)
        yield state.conclude(
            tree,
            logits,
            Verdict(
                target_logprobs,
                path=path.to(device),
                accepted=torch.tensor(len(walk.path), device=device),
                final_token=draw(walk.final, state.uniforms(1)[0].cpu()).to(device),
                corrects=True,
                scores=walk.scores.to(device),
                thresholds=walk.thresholds.to(device),
            ),
        )


@dataclass
class Candidates:
    """A drafted tree.

    Attributes:
        proposal: the tree as columns over N nodes.
        draft_rows: [M, K] what the children were drawn from, one row for each expanded node:
            the root, then the nodes of every level but the last, in order.
    """

    proposal: Proposal
    draft_rows: Warped | None


def draw_tree(state: State, shape: Sequence[int]) -> Candidates:
    """shape[d] children below every node of depth d, drawn from q.

    With replacement the children are independent draws, so that a token may occur twice;
    without, they are distinct and fewer where the support ends. At temperature 0 they are the
    most probable tokens of the unfiltered q. A tree without branches is a block of `speculative`.
    """
    depth = len(shape)
    if depth == 0:
        return Candidates(Proposal.nothing(state.target.device), None)
    config, waiting = state.config, state.draft_pending.shape[0]
    greedy = config.temperature == 0.0
    if config.replacement and not greedy and max(shape) == 1:
        return Candidates(*draft_block(state, depth))
    logits = state.draft_logits(state.draft_pending)[-1:]
    token_ids: list[Tensor] = []
    parents: list[Tensor] = []
    logprobs: list[Tensor] = []
    real: list[Tensor] = []
    rows: list[Warped] = []
    level_start = -1  # the root
    for level in range(depth):
        row = unwarped(logits) if greedy else warp(logits, config)
        rows.append(row)
        tokens, children, exists = _children(row, config, state, shape[level])
        owner = torch.arange(tokens.shape[0], device=tokens.device) // children
        level_parents = level_start + owner
        above = real[-1][owner] if level else torch.ones_like(exists)
        token_ids.append(tokens)
        parents.append(level_parents)
        logprobs.append(row.select(owner).logprob_of(tokens))
        real.append(exists & above)
        if level + 1 < depth:
            in_cache = torch.where(level_parents < 0, waiting - 1, waiting + level_parents)
            logits = state.draft_logits(tokens, in_cache)
        level_start = sum(part.shape[0] for part in token_ids[:-1])
    proposal = Proposal(
        token_ids=torch.cat(token_ids),
        parents=torch.cat(parents),
        draft_logprobs=torch.cat(logprobs),
        cached_depth=depth - 1,
        levels=depth,
        real=torch.cat(real),
        chain=False,
    )
    draft_rows = Warped(
        torch.cat([row.token_ids for row in rows]),
        torch.cat([row.logprobs for row in rows]),
        rows[0].vocab_size,
    )
    return Candidates(proposal, draft_rows)


def _children(
    row: Warped, config: DecodeConfig, state: State, count: int
) -> tuple[Tensor, int, Tensor]:
    """[n · k] tokens, k, and [n · k] whether each was really drawn."""
    size, support = row.logprobs.shape
    if config.replacement and config.temperature > 0.0:
        repeated = Warped(
            row.token_ids.repeat_interleave(count, 0),
            row.logprobs.repeat_interleave(count, 0),
            row.vocab_size,
        )
        tokens = draw(repeated, state.uniforms(size * count))
        return tokens, count, torch.ones_like(tokens, dtype=torch.bool)
    count = min(count, support)
    if config.temperature == 0.0:
        columns = row.logprobs.topk(count, dim=-1).indices
    else:
        chance = state.uniforms(size * support).view(size, support)
        columns = torch.stack(
            [draw_distinct(row.logprobs[i], chance[i], count) for i in range(size)]
        )
    tokens = row.token_ids.gather(-1, columns).flatten()
    exists = (row.logprobs.gather(-1, columns) > -torch.inf).flatten()
    return tokens, count, exists


@dataclass
class Walk:
    """The outcome of the tests, on the host.

    Attributes:
        path: accepted nodes.
        final: what the last token is drawn from.
        scores: [N] p/q of each test, NaN for a node that was not tested.
        thresholds: [N] the uniforms, NaN likewise.
        tests: by depth, how many siblings were tested and whether the last of them was accepted.
    """

    path: list[int]
    final: Warped
    scores: Tensor
    thresholds: Tensor
    tests: list[tuple[int, bool]]


def walk_down(
    candidates: Candidates, target_rows: Warped, chance: Tensor, config: DecodeConfig
) -> Walk:
    """Tests the children of the root, then those of the accepted child, and so on."""
    tree = candidates.proposal
    token_ids, parents = tree.token_ids.tolist(), tree.parents.tolist()
    real = tree.real.tolist()
    uniform = chance.tolist()
    rows, drafted = (
        None if of is None else Warped(of.token_ids.cpu(), of.logprobs.cpu(), of.vocab_size)
        for of in (target_rows, candidates.draft_rows)
    )
    assert rows is not None
    scores = [math.nan] * len(token_ids)
    thresholds = list(scores)

    def walk(final: Warped) -> Walk:
        measured = torch.tensor([scores, thresholds], dtype=torch.float64)
        return Walk(path, final, measured[0], measured[1], tests)

    path: list[int] = []
    tests: list[tuple[int, bool]] = []
    node = -1
    while True:
        target = rows.with_(rows.token_ids[node + 1], rows.logprobs[node + 1])
        children = [i for i, parent in enumerate(parents) if parent == node and real[i]]
        if not children or drafted is None:
            return walk(target)
        tokens = [token_ids[child] for child in children]
        if config.temperature == 0.0:
            best = int(target.token_ids[0])
            ratios = [float(token == best) for token in tokens]
            chances = [0.0] * len(tokens)
            accepted = tokens.index(best) if best in tokens else None
            final = target
            ratios = ratios if accepted is None else ratios[: accepted + 1]
        else:
            chances = [uniform[child] for child in children]
            draft = drafted.with_(drafted.token_ids[node + 1], drafted.logprobs[node + 1])
            accepted, final, ratios = multi_candidate(
                target, draft, tokens, chances, config.replacement
            )
        tests.append((len(ratios), accepted is not None))
        for child, ratio, threshold in zip(children, ratios, chances, strict=False):
            scores[child], thresholds[child] = ratio, threshold
        if accepted is None:
            return walk(final)
        node = children[accepted]
        path.append(node)
