"""What every decoder shares: where decoding stands, and how an iteration is concluded.

An iteration of a block method is propose → one target pass → `State.judge`, which has a rule
decide, reads the outcome back in one packed copy and brings both caches to the accepted prefix. For
`autoregressive`, `speculative`, `mtad`, `mtad_tree` and `typical` that copy is the only
synchronisation of the iteration, unless the draft asks for more (one on hidden states, where the
engine is eager, asks which tokens are new in the text). On a CPU a block with γ "auto" may end
after every draft token; `bild` asks for that everywhere, and `specinfer` walks down its tree on the
host, but for engines that can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtad.config import DEFAULT_WIDTH, DecodeConfig
from mtad.decoders.beams import grow_beams
from mtad.decoders.readback import (
    Host,
    Packed,
    alternatives,
    check_finite,
    offered_depths,
    pack,
    prune,
    unpack,
)
from mtad.draft import BlockDrafter, Drafter
from mtad.histories import Searched
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.pace import FloorPace, Pace, WidthPace
from mtad.sampling import Uniforms, narrows, recorded
from mtad.trace import Decision, Outcome

NUM_ALTERNATIVES = 5


@dataclass
class Proposal:
    """Draft tokens as columns over N nodes, all on the device, parents before children.

    Attributes:
        token_ids: [N] int64.
        draft_logprobs: [N], log q of each token given its ancestors.
        cached_depth: how deep the nodes are that the draft has in its cache; −1 if not even the
            pending tokens were given to it.
        levels: the depth of the tree.
        parents: [N] int64, −1 for a child of the pending token; None for a chain, in which node i
            is the only child of node i − 1.
        real: [N] bool, False for slots without a node; None if there are none. In a chain they
            are the last ones.
        draft_path: [w + N] int64, of a chain the way along it among the undecided nodes of the
            draft's cache: those of the w pending tokens, then its own, read up to `cached_depth`.
            None if they are the first ones.
    """

    token_ids: Tensor
    draft_logprobs: Tensor
    cached_depth: int
    levels: int
    parents: Tensor | None = None
    real: Tensor | None = None
    draft_path: Tensor | None = None

    @property
    def chain(self) -> bool:
        """Whether it is a linear block."""
        return self.parents is None

    @staticmethod
    def block(
        token_ids: Tensor,
        draft_logprobs: Tensor,
        cached_depth: int,
        *,
        real: Tensor | None = None,
        draft_path: Tensor | None = None,
    ) -> Proposal:
        """A linear block of [γ] tokens; all of them real unless said otherwise."""
        size = token_ids.shape[0]
        return Proposal(
            token_ids, draft_logprobs, cached_depth, size, real=real, draft_path=draft_path
        )

    @staticmethod
    def nothing(device: torch.device, cached_depth: int = -1) -> Proposal:
        """No draft: the pass serves the pending token alone."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        return Proposal(none, none.float(), cached_depth, 0)


@dataclass
class Verdict:
    """What a rule says of a proposal.

    Attributes:
        target_logprobs: [N] log p of each node, warped.
        accepted: [] how many nodes of the path are accepted.
        final_token: what the target adds after them, [] or [1].
        path: [D] node at each depth; only the first `accepted` entries mean something. None
            along a chain, whose path it is itself.
        corrects: the final token replaces a rejected one wherever there is one.
        reference_logprobs: [D], see `Decision`.
        scores: [N], see `DraftTree`.
        thresholds: [N], see `DraftTree`.
    """

    target_logprobs: Tensor
    accepted: Tensor
    final_token: Tensor
    path: Tensor | None = None
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
        floors: where its block ends before that, see `mtad.pace.FloorPace`; or empty.
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
    floors: Sequence[float] = ()
    pace: Pace | FloorPace | WidthPace | None = None
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
        stops: bool = False,
    ) -> State:
        """Prefills both caches with all of the prompt but its last token, which is pending.

        What the target's cache holds of the prompt already, it keeps. `adapts` is False where
        what "auto" means is the decoder's own business; with `stops` its blocks may end early.
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
            # A block ends early where that costs nothing to find out: on another device the host
            # would have to wait for each token.
            early = stops and target.device.type == "cpu"
            chain = FloorPace if early else Pace
            pace = WidthPace(costs) if config.beam_width == "auto" else chain(costs)
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
            self.draft_length, self.floors = pace.length, pace.floors
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
        found = self.block_draft.draft_line(
            logits, self.rule_config, uniform, self.eos, self.floors
        )
        if found is not None:
            self.draft_passes += found[0].shape[0] - 1
        return found

    def draft_beams(self, steps: int) -> Searched:
        """Beam sampling on the draft below its pending tokens: the hypotheses after each step.

        At once where the draft can, see `BlockDrafter.draft_beams`; else step by step.
        """
        config, first = self.block_config, self.draft_logits(self.draft_pending)[-1:]
        if self.block_draft is not None and narrows(first, config):
            found = self.block_draft.draft_beams(
                first, config, steps, self.uniforms, self.eos, self.floors
            )
            if found is not None:
                self.draft_passes += found.steps - 1
                return found

        def next_logits(token_ids: Tensor, parents: Tensor | None) -> Logits:
            return first if parents is None else self.draft_logits(token_ids, parents)

        return grow_beams(
            next_logits,
            self.draft_pending,
            steps,
            config,
            self.uniforms,
            self.is_eos,
            floors=self.floors,
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
        if proposal.parents is not None:
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
    ) -> Outcome:
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
        config, chance = self.rule_config, self.uniforms(chances)
        if logits.search.stretches is None:
            return self.conclude(proposal, logits, rule(config, proposal, logits, chance, *drafted))
        names = [name for name in _COLUMNS if getattr(proposal, name) is not None]

        def compute(logits: Logits, chance: Tensor, *tensors: Tensor) -> _Findings:
            columns = dict(zip(names, tensors, strict=False))
            offered = Proposal(
                token_ids=columns["token_ids"],
                draft_logprobs=columns["draft_logprobs"],
                cached_depth=proposal.cached_depth,  # no rule reads it
                levels=proposal.levels,
                parents=columns.get("parents"),
                real=columns.get("real"),
            )
            verdict = rule(config, offered, logits, chance, *tensors[len(names) :])
            return _find(offered, logits, verdict)

        key = rule, config, proposal.levels, *names
        columns = (getattr(proposal, name) for name in names)
        found = logits.stretch(key, compute, chance, *columns, *drafted)
        return self._settle(proposal, found, found.to_host().read())

    def conclude(self, proposal: Proposal, logits: Logits, verdict: Verdict) -> Outcome:
        """Carries out a verdict that was reached without `judge`."""
        found = _find(proposal, logits, verdict)
        return self._settle(proposal, found, found.to_host())

    def _settle(self, proposal: Proposal, found: _Findings, host: Host) -> Outcome:
        """Rolls both caches to the outcome and says what was decided."""
        check_finite("target", host["alternative_logprobs"] + host["target_logprobs"])
        check_finite("draft", host["draft_logprobs"] + host["reference_logprobs"])
        accepted, emitted = self._read_path(host)
        self._advance(proposal, found.rows, accepted, found.final_token)
        if self.pace is not None and (depth := max(offered_depths(host, self.eos_ids), default=0)):
            if isinstance(self.pace, FloorPace):
                logprobs = host["draft_logprobs"][:depth]
                self.pace.observe(accepted, logprobs, proposal.levels)
            else:
                self.pace.observe(accepted, depth)
            self.follow_pace()
        self.remaining -= len(emitted)
        self.ended = emitted[-1] in self.eos_ids
        draft_passes, self.draft_passes = self.draft_passes, 0
        positions, eos_ids = 1 + proposal.token_ids.shape[0], self.eos_ids

        def write(text_of: Callable[[int], str]) -> Decision:
            pruned = prune(host, eos_ids)
            path = pruned.path(host, accepted)
            return Decision(
                tree=pruned.tree,
                reference_logprobs=tuple(host["reference_logprobs"]),
                path=path,
                emitted=emitted,
                emitted_logprobs=tuple(host["emitted_logprobs"][: len(emitted)]),
                final_kind=pruned.final_kind(path, emitted, found.corrects),
                alternatives=alternatives(host, found.alternatives, len(emitted), text_of),
                target_passes=1,
                target_positions=positions,
                draft_passes=draft_passes,
            )

        return Outcome(emitted, write)

    def _read_path(self, host: Host) -> tuple[int, tuple[int, ...]]:
        """How many nodes are accepted, and all tokens that this iteration adds.

        Nothing lives below an end-of-sequence: what was accepted there is not.
        """
        accepted = int(host["accepted"][0])
        tokens = host["token_ids"]
        path = host["path"]
        emitted: list[int] = []
        for depth in range(accepted):
            emitted.append(int(tokens[int(path[depth]) if path else depth]))
            if emitted[-1] in self.eos_ids:
                return depth + 1, tuple(emitted)
        return accepted, (*emitted, int(host["final_token"][0]))

    def _advance(
        self, proposal: Proposal, rows: Tensor | None, accepted: int, final_token: Tensor
    ) -> None:
        """Commits the accepted path in both caches and sets what is pending in each."""
        if rows is None:
            # A path along a chain is its begin.
            self.target.keep(1 + accepted)
            hidden = None if self.hidden is None else self.hidden[: 1 + accepted]
        else:
            rows = rows[: 1 + accepted]
            self.target.keep(rows)
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
        if rows is not None and cached:
            fed = torch.arange(waiting, device=rows.device)
            self.draft.keep(torch.cat([fed, rows[1 : 1 + cached] + (waiting - 1)]), hidden)
        elif proposal.draft_path is not None:
            self.draft.keep(proposal.draft_path[: waiting + cached], hidden)
        else:
            self.draft.keep(waiting + cached, hidden)
        # After a whole block the draft is one token short: it never read the last one.
        self.draft_pending = self.pending
        if accepted > cached:
            tokens = proposal.token_ids
            unread = tokens[cached:accepted] if rows is None else tokens[rows[1 + cached :] - 1]
            self.draft_pending = torch.cat([unread, self.pending])


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


# What a rule sees of a proposal.
_COLUMNS = "token_ids", "draft_logprobs", "parents", "real"


@dataclass
class _Findings:
    """All that is read back of a pass, on the device.

    Attributes:
        rows: [1 + D] those of the pass along the path, the pending token's first; as many mean
            something as are accepted, and that one. None along a chain.
        final_token: of the verdict.
        corrects: of the verdict.
        alternatives: how many are recorded at each position.
        packed: see `pack`.
    """

    rows: Tensor | None
    final_token: Tensor
    corrects: bool
    alternatives: int
    packed: Packed

    def to_host(self) -> Host:
        """What was packed."""
        return unpack(self.packed)


def _find(
    proposal: Proposal,
    logits: Logits,  # [1 + N, V]
    verdict: Verdict,
) -> _Findings:
    path, final_token = verdict.path, verdict.final_token
    tokens, rows = proposal.token_ids, None
    if path is not None:
        tokens, rows = tokens[path], torch.cat([path.new_zeros(1), path + 1])
    emitted_logprobs, alternative_ids, alternative_logprobs = recorded(
        logits, NUM_ALTERNATIVES, tokens, verdict.accepted, final_token, rows
    )
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
        reference_logprobs=verdict.reference_logprobs,
        scores=verdict.scores,
        thresholds=verdict.thresholds,
    )
    count = alternative_ids.shape[-1]
    return _Findings(rows, final_token, verdict.corrects, count, packed)
