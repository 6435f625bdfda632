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
from mtad.trace import Outcome
from mtad.verify import multi_candidate


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
        walk = walk_down(candidates, rows, state.uniforms(tree.token_ids.shape[0] + 1), config)
        if pace is not None:
            pace.observe(walk.tests)
            shape = pace.tree
        yield state.conclude(tree, logits, walk.verdict)


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
    """The outcome of the tests.

    Attributes:
        verdict: scores are p/q of each test and thresholds its uniform, NaN for a node that was
            not tested.
        tests: by depth, how many siblings were tested and whether the last of them was accepted.
    """

    verdict: Verdict
    tests: list[tuple[int, bool]]


def walk_down(
    candidates: Candidates, target_rows: Warped, chance: Tensor, config: DecodeConfig
) -> Walk:
    """Tests the children of the root, then those of the accepted child, and so on.

    In one go where the engine can, else on the host.

    Args:
        candidates: the tree.
        target_rows: [1 + N, K].
        chance: [N + 1] uniforms, of each node's test and of the final draw.
        config: temperature and replacement are read.
    """
    tree, drafted = candidates.proposal, candidates.draft_rows
    if config.temperature > 0.0 and drafted is not None:
        nodes = tree.token_ids, tree.parents, tree.draft_logprobs, tree.real
        found = target_rows.search.walk(
            (target_rows.logprobs, target_rows.token_ids),
            (drafted.logprobs, drafted.token_ids),
            nodes,
            tree.levels,
            chance,
            config.replacement,
        )
        if found is not None:
            target_logprobs, path, accepted, tests, scores, thresholds, final_token = found
            verdict = Verdict(
                target_logprobs,
                accepted=accepted,
                final_token=final_token,
                path=None if tree.chain else path,
                corrects=True,
                scores=scores,
                thresholds=thresholds,
            )
            counts: list[int] = tests.tolist()
            depth = int(accepted)
            made = [(count, at < depth) for at, count in enumerate(counts) if count]
            return Walk(verdict, made)
    return _walk_on_host(candidates, target_rows, chance, config)


def _walk_on_host(
    candidates: Candidates, target_rows: Warped, chance: Tensor, config: DecodeConfig
) -> Walk:
    """See `walk_down`."""
    tree, device = candidates.proposal, target_rows.logprobs.device
    token_ids, size = tree.token_ids.tolist(), tree.token_ids.shape[0]
    parents = list(range(-1, size - 1)) if tree.parents is None else tree.parents.tolist()
    real = [True] * size if tree.real is None else tree.real.tolist()
    uniform = chance.tolist()
    rows, drafted = (
        None if of is None else Warped(of.token_ids.cpu(), of.logprobs.cpu(), of.vocab_size)
        for of in (target_rows, candidates.draft_rows)
    )
    assert rows is not None
    scores = [math.nan] * size
    thresholds = list(scores)
    path: list[int] = []
    tests: list[tuple[int, bool]] = []
    node = -1
    while True:
        final = rows.with_(rows.token_ids[node + 1], rows.logprobs[node + 1])
        children = [i for i, parent in enumerate(parents) if parent == node and real[i]]
        if not children or drafted is None:
            break
        tokens = [token_ids[child] for child in children]
        if config.temperature == 0.0:
            best = int(final.token_ids[0])
            ratios = [float(token == best) for token in tokens]
            chances = [0.0] * len(tokens)
            accepted = tokens.index(best) if best in tokens else None
            ratios = ratios if accepted is None else ratios[: accepted + 1]
        else:
            chances = [uniform[child] for child in children]
            draft = drafted.with_(drafted.token_ids[node + 1], drafted.logprobs[node + 1])
            accepted, final, ratios = multi_candidate(
                final, draft, tokens, chances, config.replacement
            )
        tests.append((len(ratios), accepted is not None))
        for child, ratio, threshold in zip(children, ratios, chances, strict=False):
            scores[child], thresholds[child] = ratio, threshold
        if accepted is None:
            break
        node = children[accepted]
        path.append(node)
    before = torch.tensor(parents, dtype=torch.int64) + 1
    measured = torch.tensor([scores, thresholds], dtype=torch.float64).to(device)
    whole = torch.tensor(path + [0] * (tree.levels - len(path)), dtype=torch.int64)
    verdict = Verdict(
        rows.select(before).logprob_of(tree.token_ids.cpu()).to(device),
        accepted=torch.tensor(len(path), device=device),
        final_token=draw(final, chance[-1].cpu()).to(device),
        path=None if tree.chain else whole.to(device),
        corrects=True,
        scores=measured[0],
        thresholds=measured[1],
    )
    return Walk(verdict, tests)
