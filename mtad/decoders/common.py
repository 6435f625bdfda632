"""What every decoder shares: where decoding stands, and how an iteration is concluded.

An iteration of a block method is propose → one target pass → `State.judge`, which has a rule
decide, reads the outcome back in one packed copy and brings both caches to the accepted prefix. For
`autoregressive`, `speculative`, `mtad`, `mtad_tree` and `typical` that copy is the only
synchronisation of the iteration, unless the draft asks for more (one on hidden states, where the
engine is eager, asks which tokens are new in the text); `bild` also asks after every draft token
whether to go on, and `specinfer` tests its tree on the host.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mtad.config import DEFAULT_WIDTH, DecodeConfig
from mtad.decoders.beams import grow_beams
from mtad.draft import BlockDrafter, Drafter
from mtad.errors import PairError
from mtad.histories import Histories
from mtad.lm import CachedLM
from mtad.logits import Logits, wide
from mtad.pace import Pace, WidthPace
from mtad.sampling import Uniforms, narrows, recorded
from mtad.trace import Alternative, Decision, DraftTree, FinalKind

NUM_ALTERNATIVES = 5


@dataclass
class Proposal:
    """Draft tokens as columns over N nodes, all on the device, parents before children.

    Attributes:
        token_ids: [N] int64.
        parents: [N] int64, −1 for a child of the pending token.
        draft_logprobs: [N], log q of each token given its ancestors.
        cached_depth: how deep the nodes are that the draft has in its cache; −1 if not even the
            pending tokens were given to it.
        levels: the depth of the tree.
        real: [N] bool, False for slots without a node.
        chain: True if node i is the only child of node i − 1.
        draft_nodes: [N] int64, the same nodes in the draft's cache, counted after the pending
            tokens; read for nodes of a depth up to `cached_depth`. None if they are 0 … N − 1.
    """

    token_ids: Tensor
    parents: Tensor
    draft_logprobs: Tensor
    cached_depth: int
    levels: int
    real: Tensor
    chain: bool = True
    draft_nodes: Tensor | None = None

    @staticmethod
    def block(
        token_ids: Tensor,
        draft_logprobs: Tensor,
        cached_depth: int,
        *,
        real: Tensor | None = None,
        draft_nodes: Tensor | None = None,
    ) -> Proposal:
        """A linear block of [γ] tokens; all of them real unless said otherwise."""
        size = token_ids.shape[0]
        parents = torch.arange(-1, size - 1, device=token_ids.device)
        if real is None:
            real = torch.ones_like(parents, dtype=torch.bool)
        return Proposal(
            token_ids, parents, draft_logprobs, cached_depth, size, real, draft_nodes=draft_nodes
        )

    @staticmethod
    def nothing(device: torch.device, cached_depth: int = -1) -> Proposal:
        """No draft: the pass serves the pending token alone."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        return Proposal(none, none, none.float(), cached_depth, 0, none.bool())


@dataclass
class Verdict:
    """What a rule says of a proposal.

    Attributes:
        target_logprobs: [N] log p of each node, warped.
        path: [D] node at each depth; only the first `accepted` entries mean something.
        accepted: [] how many nodes of the path are accepted.
        final_token: what the target adds after them, [] or [1].
        corrects: the final token replaces a rejected one wherever there is one.
        reference_logprobs: [D], see `Decision`.
        scores: [N], see `DraftTree`.
        thresholds: [N], see `DraftTree`.
    """

    target_logprobs: Tensor
    path: Tensor
    accepted: Tensor
    final_token: Tensor
    corrects: bool = False
    reference_logprobs: Tensor | None = None
    scores: Tensor | None = None
    thresholds: Tensor | None = None


Rule = Callable[..., Verdict]
"""(config, proposal, logits, chance, *drafted) → Verdict, reading nothing back to the host.

`chance` are uniforms [n], `drafted` what the rule wants to know of the draft besides.
"""


@dataclass
class State:
    """Where decoding stands between two iterations.

    Attributes:
        target: its cache holds everything but the pending token.
        draft: its cache holds everything but the tokens in `draft_pending`; None without one.
        block_draft: the same, if it can draft whole blocks.
        config: resolved.
        block_config: the same with the W of the next block.
        rule_config: the same without what no rule reads, such as the seed.
        uniforms: of which every random choice is made, on the target's device.
        eos_ids: end-of-sequence tokens; empty with `ignore_eos`.
        eos: the same on the device.
        pending: [1] the last emitted token, not yet in the target's cache.
        draft_pending: [1 or more] tokens not yet in the draft's cache.
        remaining: tokens that may still be emitted.
        ended: True after an end-of-sequence.
        draft_length: γ of the next iteration, before it is cut to what remains.
        pace: chooses it with num_draft_tokens="auto", and W with beam_width="auto"; else None.
        draft_passes: of the present iteration.
        hidden: [1 + N, F·H] what the draft wants to know of the last verification pass; None if
            it reads no hidden states.
    """

    target: CachedLM
    draft: Drafter | None
    config: DecodeConfig
    block_config: DecodeConfig
    rule_config: DecodeConfig
    uniforms: Uniforms
    eos_ids: frozenset[int]
    eos: Tensor
    pending: Tensor
    draft_pending: Tensor
    remaining: int
    ended: bool = False
    block_draft: BlockDrafter | None = None
    draft_length: int = 4
    pace: Pace | WidthPace | None = None
    draft_passes: int = 0
    hidden: Tensor | None = None

    @staticmethod
    def begin(
        target: CachedLM,
        draft: Drafter | None,
        prompt_ids: Sequence[int],
        config: DecodeConfig,
        generator: torch.Generator,
        eos_token_ids: Sequence[int],
        *,
        adapts: bool = True,
    ) -> State:
        """Prefills both caches with all of the prompt but its last token, which is pending.

        What the target's cache holds of the prompt already, it keeps. `adapts` is False where
        what "auto" means is the decoder's own business.
        """
        eos_ids = frozenset(() if config.ignore_eos else eos_token_ids)
        prompt = torch.tensor(prompt_ids, dtype=torch.int64, device=target.device)
        layers = draft.target_layers if draft is not None else ()
        hidden = target.prefill(prompt[target.length : -1], layers)
        if draft is not None:
            draft.prefill(prompt[:-1], hidden)
        length, pace = config.num_draft_tokens, None
        if length == "auto" and draft is not None and adapts:
            costs: Any = config.iteration_costs
            pace = WidthPace(costs) if config.beam_width == "auto" else Pace(costs)
        state = State(
            target=target,
            draft=draft,
            config=config,
            block_config=dataclasses.replace(config, beam_width=config.width, iteration_costs=None),
            rule_config=_for_rules(config),
            uniforms=Uniforms(generator),
            eos_ids=eos_ids,
            eos=torch.tensor(sorted(eos_ids), dtype=torch.int64, device=target.device),
            pending=prompt[-1:],
            draft_pending=prompt[-1:],
            remaining=config.max_new_tokens,
            block_draft=draft if isinstance(draft, BlockDrafter) else None,
            draft_length=length if isinstance(length, int) else 4,
            pace=pace,
        )
        state.follow_pace()
        return state

    @property
    def running(self) -> bool:
        """False once an end-of-sequence or the last allowed token was emitted."""
        return self.remaining > 0 and not self.ended

    def follow_pace(self) -> None:
        """The shape of the next block."""
        pace = self.pace
        if pace is not None:
            self.draft_length = pace.length
        if isinstance(pace, WidthPace) and pace.width != self.block_config.width:
            self.block_config = dataclasses.replace(self.block_config, beam_width=pace.width)

    def block_length(self) -> int:
        """γ for the next block: near the end it leaves room for the token after the block."""
        return min(self.draft_length, self.remaining - 1)

    def draft_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Logits:
        """`Drafter.next_logits`, counted."""
        assert self.draft is not None, "this method needs a draft"
        self.draft_passes += 1
        return Logits.of(self.draft.next_logits(token_ids, parents))

    def draft_line(
        self, logits: Logits, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """`BlockDrafter.draft_line`, counted; None where a block is drafted step by step."""
        if self.block_draft is None or not narrows(logits, self.rule_config):
            return None
        found = self.block_draft.draft_line(logits, self.rule_config, uniform)
        if found is not None:
            self.draft_passes += uniform.shape[0] - 1
        return found

    def draft_beams(self, steps: int) -> Sequence[Histories]:
        """Beam sampling on the draft below its pending tokens: the hypotheses after each step.

        At once where the draft can, see `BlockDrafter.draft_beams`; else step by step.
        """
        config, first = self.block_config, self.draft_logits(self.draft_pending)[-1:]
        if self.block_draft is not None and narrows(first, config):
            found = self.block_draft.draft_beams(first, config, steps, self.uniforms, self.eos)
            if found is not None:
                self.draft_passes += steps - 1
                return found

        def next_logits(token_ids: Tensor, parents: Tensor | None) -> Logits:
            return first if parents is None else self.draft_logits(token_ids, parents)

        return grow_beams(
            next_logits, self.draft_pending, steps, config, self.uniforms, self.is_eos
        )

    def is_eos(self, token_ids: Tensor) -> Tensor:
        """[...] bool."""
        if len(self.eos_ids) == 1:
            return token_ids == self.eos
        return (token_ids.unsqueeze(-1) == self.eos).any(-1)

    def verify(self, proposal: Proposal) -> Logits:
        """One target pass over the pending token and the draft → logits [1 + N, V].

        Row 0 follows the pending token, row 1 + i follows node i.
        """
        token_ids, parents = self.pending, None
        if proposal.levels:
            token_ids = torch.cat([self.pending, proposal.token_ids])
        if not proposal.chain:
            parents = torch.cat([proposal.parents.new_full((1,), -1), proposal.parents + 1])
        layers = self.draft.target_layers if self.draft is not None else ()
        output = self.target.forward(token_ids, parents, levels=proposal.levels + 1, layers=layers)
        self.hidden = output.hidden
        return Logits(output.logits, search=output.search)

    def judge(
        self,
        rule: Rule,
        proposal: Proposal,
        logits: Logits,  # [1 + N, V]
        chances: int,
        *drafted: Tensor,
    ) -> Decision:
        """Has a rule decide and carries it out.

        The rule and all that is recorded of the pass are one stretch, so that an engine may record
        them.

        Args:
            rule: see `Rule`.
            proposal: what was offered.
            logits: raw logits of the verification pass.
            chances: how many uniforms the rule gets.
            drafted: passed on to the rule.
        """
        config = self.rule_config

        def compute(logits: Logits, chance: Tensor, *tensors: Tensor) -> _Findings:
            tokens, parents, draft_logprobs, real, *rest = tensors
            shape = proposal.cached_depth, proposal.levels
            offered = Proposal(tokens, parents, draft_logprobs, *shape, real, proposal.chain)
            verdict = rule(config, offered, logits, chance, *rest)
            return _find(offered, logits, verdict)

        columns = (getattr(proposal, name) for name in _COLUMNS)
        key = rule, config, proposal.levels, proposal.chain
        chance = self.uniforms(chances)
        return self._settle(proposal, logits.stretch(key, compute, chance, *columns, *drafted))

    def conclude(self, proposal: Proposal, logits: Logits, verdict: Verdict) -> Decision:
        """Carries out a verdict that was reached on the host."""
        return self._settle(proposal, _find(proposal, logits, verdict))

    def _settle(self, proposal: Proposal, found: _Findings) -> Decision:
        """Reads the outcome back, rolls both caches to it and says what was decided."""
        host = found.to_host()
        check_finite("target", host["alternative_logprobs"] + host["target_logprobs"])
        check_finite("draft", host["draft_logprobs"] + host["reference_logprobs"])
        tree, new_index = prune(host, self.eos_ids)
        path_nodes = [int(node) for node in host["path"][: int(host["accepted"][0])]]
        accepted_path = tuple(new_index[node] for node in path_nodes if node in new_index)
        new_tokens = [tree.token_ids[node] for node in accepted_path]
        final_kind: FinalKind | None = None
        if not new_tokens or new_tokens[-1] not in self.eos_ids:
            new_tokens.append(int(host["final_token"][0]))
            last = accepted_path[-1] if accepted_path else -1
            rejected_something = last in tree.parents
            final_kind = "corrected" if found.corrects and rejected_something else "bonus"
            if not tree.token_ids:
                final_kind = "sampled"
        self._advance(proposal, found.path, len(accepted_path), found.final_token)
        if self.pace is not None and tree.depth:
            self.pace.observe(len(accepted_path), tree.depth)
            self.follow_pace()
        self.remaining -= len(new_tokens)
        self.ended = new_tokens[-1] in self.eos_ids
        draft_passes, self.draft_passes = self.draft_passes, 0
        return Decision(
            tree=tree,
            reference_logprobs=tuple(host["reference_logprobs"]),
            path=accepted_path,
            emitted=tuple(new_tokens),
            emitted_logprobs=tuple(host["emitted_logprobs"][: len(new_tokens)]),
            final_kind=final_kind,
            alternatives=alternatives(host, found.alternatives, len(new_tokens)),
            target_passes=1,
            target_positions=1 + proposal.token_ids.shape[0],
            draft_passes=draft_passes,
        )

    def _advance(
        self, proposal: Proposal, path: Tensor, accepted: int, final_token: Tensor
    ) -> None:
        """Commits the accepted path in both caches and sets what is pending in each."""
        accepted_path = path[:accepted]
        if proposal.chain:
            # A path along a chain is its begin.
            self.target.keep(1 + accepted)
            tokens = proposal.token_ids[:accepted]
            hidden = None if self.hidden is None else self.hidden[: 1 + accepted]
        else:
            rows = torch.cat([path.new_zeros(1), accepted_path + 1])
            self.target.keep(rows)
            tokens = proposal.token_ids.index_select(0, accepted_path)
            hidden = None if self.hidden is None else self.hidden.index_select(0, rows)
        self.pending = final_token.view(1)
        if self.draft is None:
            return
        if proposal.cached_depth < 0:
            self.draft.keep(0, hidden)
            self.draft_pending = torch.cat([self.draft_pending, self.pending])
            return
        waiting = self.draft_pending.shape[0]
        cached = min(accepted, proposal.cached_depth)
        if proposal.chain and proposal.draft_nodes is None:
            self.draft.keep(waiting + cached, hidden)
        else:
            nodes = accepted_path[:cached]
            if proposal.draft_nodes is not None:
                nodes = proposal.draft_nodes[:cached]
            fed = torch.arange(waiting, device=path.device)
            self.draft.keep(torch.cat([fed, waiting + nodes]), hidden)
        # After a whole block the draft is one token short: it never read the last one.
        self.draft_pending = self.pending
        if accepted > cached:
            self.draft_pending = torch.cat([tokens[cached:], self.pending])


def _for_rules(config: DecodeConfig) -> DecodeConfig:
    """A key of what is recorded: runs that differ in nothing that a rule reads share it."""
    return dataclasses.replace(
        config,
        max_new_tokens=1,
        num_draft_tokens=None,
        beam_width=DEFAULT_WIDTH,
        iteration_costs=None,
        tree_costs=None,
        seed=0,
        stop=(),
    )


# Tensors by name; or their sizes, and all their elements one after the other.
_Packed: TypeAlias = "dict[str, Tensor] | tuple[dict[str, int], Tensor]"

# What a rule sees of a proposal.
_COLUMNS = "token_ids", "parents", "draft_logprobs", "real"


@dataclass
class _Findings:
    """All that is read back of a pass, on the device.

    Attributes:
        path: of the verdict.
        final_token: of the verdict.
        corrects: of the verdict.
        alternatives: how many are recorded at each position.
        packed: see `pack`.
    """

    path: Tensor
    final_token: Tensor
    corrects: bool
    alternatives: int
    packed: _Packed

    def to_host(self) -> dict[str, list[float]]:
        """What was packed."""
        return unpack(self.packed)


def _find(
    proposal: Proposal,
    logits: Logits,  # [1 + N, V]
    verdict: Verdict,
) -> _Findings:
    path, final_token = verdict.path, verdict.final_token
    # The path along a chain is the chain.
    rows = None if proposal.chain else torch.cat([path.new_zeros(1), path + 1])
    tokens = proposal.token_ids if proposal.chain else proposal.token_ids[path]
    emitted_logprobs, alternative_ids, alternative_logprobs = recorded(
        logits, NUM_ALTERNATIVES, tokens, verdict.accepted, final_token, rows
    )
    optional = {
        name: value
        for name in ("reference_logprobs", "scores", "thresholds")
        if (value := getattr(verdict, name)) is not None
    }
    packed = pack(
        accepted=verdict.accepted,
        final_token=final_token,
        token_ids=proposal.token_ids,
        parents=proposal.parents,
        real=proposal.real,
        draft_logprobs=proposal.draft_logprobs,
        target_logprobs=verdict.target_logprobs,
        path=path,
        emitted_logprobs=emitted_logprobs,
        alternative_ids=alternative_ids,
        alternative_logprobs=alternative_logprobs,
        **optional,
    )
    count = alternative_ids.shape[-1]
    return _Findings(path, final_token, verdict.corrects, count, packed)


def to_host(**columns: Tensor) -> dict[str, list[float]]:
    """Reads tensors back in one copy, flattened, under the names they were given."""
    return unpack(pack(**columns))


def pack(**columns: Tensor) -> _Packed:
    """Tensors by name, so that one copy brings them all to the host.

    On a device all elements go one after the other into one tensor. float64 holds token ids and
    float32 values exactly. (On MPS float32 does, for vocabularies under 2^24.)
    """
    if _on_host(next(iter(columns.values()))):
        return columns
    flat = {name: column.flatten() for name, column in columns.items()}
    first, *others = flat.values()
    sizes = {name: column.shape[0] for name, column in flat.items()}
    return sizes, torch.cat([wide(first), *others])


def _on_host(tensor: Tensor) -> bool:
    """Whether several reads are no dearer than one."""
    return tensor.is_cpu


def unpack(packed: _Packed) -> dict[str, list[float]]:
    """Reads back what `pack` gave, flattened; a name that it was not given is an empty list."""
    host: dict[str, list[float]] = defaultdict(list)
    if isinstance(packed, dict):
        for name, column in packed.items():
            host[name] = column.flatten().tolist()
        return host
    sizes, together = packed
    values: list[float] = together.tolist()
    start = 0
    for name, size in sizes.items():
        host[name] = values[start : start + size]
        start += size
    return host


_NO_TREE = DraftTree()


def prune(
    host: Mapping[str, list[float]], eos_ids: Collection[int]
) -> tuple[DraftTree, dict[int, int]]:
    """The tree that was really offered, and where each of its nodes came from.

    Slots without a node go, and so does what a draft wrote below an end-of-sequence: nothing
    lives there.
    """
    new_index = {-1: -1}
    if not host["token_ids"]:
        return _NO_TREE, new_index
    token_ids = [int(token) for token in host["token_ids"]]
    parents = [int(parent) for parent in host["parents"]]
    for node, parent in enumerate(parents):
        below_eos = parent >= 0 and token_ids[parent] in eos_ids
        if host["real"][node] and parent in new_index and not below_eos:
            new_index[node] = len(new_index) - 1
    kept = [node for node in new_index if node >= 0]

    def tested(column: list[float]) -> tuple[float | None, ...]:
        """NaN marks a node that was not tested."""
        values = [column[node] for node in kept] if column else []
        return tuple(None if math.isnan(value) else value for value in values)

    tree = DraftTree(
        token_ids=tuple(token_ids[node] for node in kept),
        parents=tuple(new_index[parents[node]] for node in kept),
        draft_logprobs=tuple(host["draft_logprobs"][node] for node in kept),
        target_logprobs=tuple(host["target_logprobs"][node] for node in kept),
        scores=tested(host["scores"]),
        thresholds=tested(host["thresholds"]),
    )
    return tree, new_index


def alternatives(
    host: Mapping[str, list[float]], count: int, positions: int
) -> tuple[tuple[Alternative, ...], ...]:
    """The recorded alternatives of the first positions, `count` each."""
    end = count * positions
    pairs = zip(host["alternative_ids"][:end], host["alternative_logprobs"][:end], strict=True)
    flat = [Alternative(int(token), logprob) for token, logprob in pairs]
    return tuple(tuple(flat[i : i + count]) for i in range(0, len(flat), count))


def check_finite(model: str, logprobs: Sequence[float]) -> None:
    """Refuses to go on with a model whose logits are not numbers.

    Raises:
        PairError: a log-probability is NaN.
    """
    if math.isnan(sum(logprobs)):  # none of them is +∞, so that only a NaN makes one
        raise PairError(
            f"The {model}'s logits are not numbers (NaN). Load the pair in another dtype, such as"
            ' load_pair(name, dtype="float32").'
        )
