"""What every decoder shares: where decoding stands, and how an iteration is concluded.

An iteration of a block method is propose → one target pass → a rule → `State.conclude`. Up to
`conclude` everything stays on the device; `conclude` reads the outcome back in one packed
copy, which is the only synchronisation of the iteration, and brings both caches to the accepted
prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.draft import Drafter
from mtad.errors import PairError
from mtad.lm import CachedLM
from mtad.sampling import token_logprobs, top_alternatives, wide
from mtad.trace import Alternative, Decision, DraftTree, FinalKind

NUM_ALTERNATIVES = 5
MAX_AUTO_DRAFT_TOKENS = 16


@dataclass
class Proposal:
    """Draft tokens as columns over N nodes, all on the device, parents before children.

    Attributes:
        token_ids: [N] int64.
        parents: [N] int64, −1 for a child of the pending token.
        draft_logprobs: [N], log q of each token given its ancestors.
        cached_depth: how deep the nodes are that the draft has in its cache; −1 if not even the
            pending tokens were given to it.
        real: [N] bool, False for slots without a node; None if all are nodes.
        levels: the depth of the tree.
        chain: True if node i is the only child of node i − 1.
        draft_nodes: [N] int64, the same nodes in the draft's cache, counted after the pending
            tokens; read for nodes of a depth up to `cached_depth`. None if they are 0 … N − 1.
    """

    token_ids: Tensor
    parents: Tensor
    draft_logprobs: Tensor
    cached_depth: int
    levels: int
    real: Tensor | None = None
    chain: bool = True
    draft_nodes: Tensor | None = None

    @staticmethod
    def block(token_ids: Tensor, draft_logprobs: Tensor, cached_depth: int) -> Proposal:
        """A linear block of [γ] tokens that the draft wrote one after another."""
        size = token_ids.shape[0]
        parents = torch.arange(-1, size - 1, device=token_ids.device)
        return Proposal(token_ids, parents, draft_logprobs, cached_depth, size)

    @staticmethod
    def nothing(device: torch.device) -> Proposal:
        """No draft: the pass serves the pending token alone."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        return Proposal(none, none, none.float(), -1, 0)


@dataclass
class State:
    """Where decoding stands between two iterations.

    Attributes:
        target: its cache holds everything but the pending token.
        draft: its cache holds everything but the tokens in `draft_pending`; None without one.
        config: resolved.
        generator: makes every random choice, on the target's device.
        eos_ids: end-of-sequence tokens; empty with `ignore_eos`.
        eos: the same on the device.
        pending: [1] the last emitted token, not yet in the target's cache.
        draft_pending: [1 or more] tokens not yet in the draft's cache.
        remaining: tokens that may still be emitted.
        ended: True after an end-of-sequence.
        draft_length: γ of the next iteration, before it is cut to what remains.
        draft_passes: of the present iteration.
    """

    target: CachedLM
    draft: Drafter | None
    config: DecodeConfig
    generator: torch.Generator
    eos_ids: frozenset[int]
    eos: Tensor
    pending: Tensor
    draft_pending: Tensor
    remaining: int
    ended: bool = False
    draft_length: int = 4
    draft_passes: int = 0

    @staticmethod
    def begin(
        target: CachedLM,
        draft: Drafter | None,
        prompt_ids: Sequence[int],
        config: DecodeConfig,
        generator: torch.Generator,
        eos_token_ids: Sequence[int],
    ) -> State:
        """Prefills both caches with all of the prompt but its last token, which is pending."""
        eos_ids = frozenset(() if config.ignore_eos else eos_token_ids)
        prompt = torch.tensor(prompt_ids, dtype=torch.int64, device=target.device)
        target.prefill(prompt[:-1])
        if draft is not None:
            draft.prefill(prompt[:-1], None)
        length = config.num_draft_tokens
        return State(
            target=target,
            draft=draft,
            config=config,
            generator=generator,
            eos_ids=eos_ids,
            eos=torch.tensor(sorted(eos_ids), dtype=torch.int64, device=target.device),
            pending=prompt[-1:],
            draft_pending=prompt[-1:],
            remaining=config.max_new_tokens,
            draft_length=length if isinstance(length, int) else 4,
        )

    @property
    def running(self) -> bool:
        """False once an end-of-sequence or the last allowed token was emitted."""
        return self.remaining > 0 and not self.ended

    def block_length(self) -> int:
        """γ for the next block: near the end it leaves room for the token after the block."""
        return min(self.draft_length, self.remaining - 1)

    def draft_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """`Drafter.next_logits`, counted."""
        assert self.draft is not None, "this method needs a draft"
        self.draft_passes += 1
        return self.draft.next_logits(token_ids, parents)

    def is_eos(self, token_ids: Tensor) -> Tensor:
        """[...] bool."""
        return (token_ids.unsqueeze(-1) == self.eos).any(-1)

    def verify(self, proposal: Proposal) -> Tensor:
        """One target pass over the pending token and the draft → logits [1 + N, V].

        Row 0 follows the pending token, row 1 + i follows node i.
        """
        token_ids = torch.cat([self.pending, proposal.token_ids])
        if proposal.chain:
            return self.target.forward(token_ids).logits
        parents = torch.cat([proposal.parents.new_full((1,), -1), proposal.parents + 1])
        return self.target.forward(token_ids, parents, levels=proposal.levels + 1).logits

    def conclude(
        self,
        proposal: Proposal,
        logits: Tensor,  # [1 + N, V]
        target_logprobs: Tensor,  # [N]
        path: Tensor,  # [D]
        accepted: Tensor,  # []
        final_token: Tensor,  # []
        *,
        corrects: bool = False,
        reference_logprobs: Tensor | None = None,  # [D]
        scores: Tensor | None = None,  # [N]
        thresholds: Tensor | None = None,  # [N]
    ) -> Decision:
        """Reads the outcome back, rolls both caches to it and says what was decided.

        Args:
            proposal: what was offered.
            logits: raw logits of the verification pass.
            target_logprobs: log p of each node, warped.
            path: node at each depth; only the first `accepted` entries mean something.
            accepted: how many nodes of the path the rule accepted.
            final_token: what the target adds after them.
            corrects: the final token replaces a rejected one wherever there is one.
            reference_logprobs: see `Decision`.
            scores: see `DraftTree`.
            thresholds: see `DraftTree`.
        """
        size, depth = proposal.token_ids.shape[0], path.shape[0]
        rows = torch.cat([path.new_zeros(1), path + 1])
        followers = torch.cat([proposal.token_ids[path], final_token.view(1)])
        depths = torch.arange(depth + 1, device=path.device)
        emitted = torch.where(depths == accepted, final_token, followers)
        chosen = logits.index_select(0, rows)
        alternative_ids, alternative_logprobs = top_alternatives(chosen, NUM_ALTERNATIVES)
        real = proposal.real
        columns = Columns(
            accepted.view(1),
            final_token.view(1),
            proposal.token_ids,
            proposal.parents,
            real if real is not None else torch.ones_like(proposal.parents),
            proposal.draft_logprobs,
            target_logprobs,
            path,
            token_logprobs(chosen, emitted),
            alternative_ids.flatten(),
            alternative_logprobs.flatten(),
            *(x for x in (reference_logprobs, scores, thresholds) if x is not None),
        )
        accepted_length = columns.int()
        final_id = columns.int()
        token_ids, parents = columns.ints(size), columns.ints(size)
        is_real = columns.ints(size)
        draft_lp, target_lp = columns.floats(size), columns.floats(size)
        path_nodes = columns.ints(depth)
        emitted_lp = columns.floats(depth + 1)
        count = alternative_ids.shape[-1]
        alternatives = columns.alternatives(depth + 1, count)
        reference = columns.floats(depth) if reference_logprobs is not None else []
        score_column = columns.floats(size) if scores is not None else []
        threshold_column = columns.floats(size) if thresholds is not None else []

        # Nothing lives below an end-of-sequence: what the draft wrote there is dropped.
        new_index = {-1: -1}
        for node in range(size):
            parent = parents[node]
            alive = parent == -1 or (parent in new_index and token_ids[parent] not in self.eos_ids)
            if is_real[node] and alive:
                new_index[node] = len(new_index) - 1
        kept = [node for node in new_index if node >= 0]
        accepted_nodes = [node for node in path_nodes[:accepted_length] if node in new_index]
        accepted_length = len(accepted_nodes)
        leaf = accepted_nodes[-1] if accepted_nodes else -1
        stopped = leaf >= 0 and token_ids[leaf] in self.eos_ids
        new_tokens = [token_ids[node] for node in accepted_nodes]
        final_kind: FinalKind | None = None
        if not stopped:
            new_tokens.append(final_id)
            has_children = any(parents[node] == leaf for node in kept)
            final_kind = "corrected" if corrects and has_children else "bonus"
            if not kept:
                final_kind = "sampled"
        self._advance(proposal, path, accepted_length, final_token)
        self._adapt(accepted_length, max(proposal.levels, 0))
        self.remaining -= len(new_tokens)
        self.ended = new_tokens[-1] in self.eos_ids
        check_finite(emitted_lp[: len(new_tokens)])
        draft_passes, self.draft_passes = self.draft_passes, 0
        return Decision(
            tree=DraftTree(
                token_ids=tuple(token_ids[node] for node in kept),
                parents=tuple(new_index[parents[node]] for node in kept),
                draft_logprobs=tuple(draft_lp[node] for node in kept),
                target_logprobs=tuple(target_lp[node] for node in kept),
                scores=tuple(none_if_nan(score_column[node]) for node in kept)
                if score_column
                else (),
                thresholds=tuple(none_if_nan(threshold_column[node]) for node in kept)
                if threshold_column
                else (),
            ),
            reference_logprobs=tuple(reference),
            path=tuple(new_index[node] for node in accepted_nodes),
            emitted=tuple(new_tokens),
            emitted_logprobs=tuple(emitted_lp[: len(new_tokens)]),
            final_kind=final_kind,
            alternatives=tuple(alternatives[: len(new_tokens)]),
            target_passes=1,
            target_positions=1 + size,
            draft_passes=draft_passes,
        )

    def _advance(
        self, proposal: Proposal, path: Tensor, accepted: int, final_token: Tensor
    ) -> None:
        """Commits the accepted path in both caches and sets what is pending in each."""
        accepted_path = path[:accepted]
        if proposal.chain:
            self.target.keep(1 + accepted)
        else:
            self.target.keep(torch.cat([path.new_zeros(1), accepted_path + 1]))
        accepted_tokens = proposal.token_ids[accepted_path]
        self.pending = final_token.view(1)
        if self.draft is None:
            return
        if proposal.cached_depth < 0:
            self.draft_pending = torch.cat([self.draft_pending, self.pending])
            return
        waiting = self.draft_pending.shape[0]
        cached = min(accepted, proposal.cached_depth)
        if proposal.chain and proposal.draft_nodes is None:
            self.draft.keep(waiting + cached)
        else:
            nodes = accepted_path[:cached]
            if proposal.draft_nodes is not None:
                nodes = proposal.draft_nodes[nodes]
            fed = torch.arange(waiting, device=path.device)
            self.draft.keep(torch.cat([fed, waiting + nodes]))
        # After a whole block the draft is one token short: it never read the last one.
        self.draft_pending = torch.cat([accepted_tokens[cached:], self.pending])

    def _adapt(self, accepted: int, offered: int) -> None:
        """num_draft_tokens="auto": longer after a block that passed whole, shorter otherwise.

        The schedule of transformers' assisted generation: +2 or −1, here between 1 and 16.
        """
        if self.config.num_draft_tokens == "auto" and offered:
            grown = self.draft_length + (2 if accepted >= offered else -1)
            self.draft_length = max(1, min(grown, MAX_AUTO_DRAFT_TOKENS))


class Columns:
    """Device tensors read back in one copy and then taken off in order.

    float64 holds token ids and float32 values exactly. (On MPS float32 does, for vocabularies
    under 2^24.)
    """

    def __init__(self, *columns: Tensor) -> None:
        self._values: list[float] = torch.cat([wide(x.flatten()) for x in columns]).tolist()
        self._next = 0

    def floats(self, count: int) -> list[float]:
        """The next `count` values."""
        start, self._next = self._next, self._next + count
        return self._values[start : self._next]

    def ints(self, count: int) -> list[int]:
        """The next `count` values, which were integers."""
        return [int(value) for value in self.floats(count)]

    def int(self) -> int:
        """The next value."""
        return self.ints(1)[0]

    def alternatives(self, rows: int, count: int) -> list[tuple[Alternative, ...]]:
        """`rows` × `count` token ids, then as many log-probabilities."""
        ids, logprobs = self.ints(rows * count), self.floats(rows * count)
        return [
            tuple(
                Alternative(ids[i], logprobs[i]) for i in range(row * count, (row + 1) * count)
            )
            for row in range(rows)
        ]


def none_if_nan(value: float) -> float | None:
    """NaN marks a node that was not tested."""
    return None if math.isnan(value) else value


def check_finite(logprobs: Sequence[float]) -> None:
    """Refuses to go on with a model whose logits are not numbers.

    Raises:
        PairError: a log-probability of an emitted token is NaN.
    """
    if any(math.isnan(value) for value in logprobs):
        raise PairError(
            "The target's logits are not numbers (NaN). Load the pair in another dtype, such as"
            ' load_pair(name, dtype="float32").'
        )
