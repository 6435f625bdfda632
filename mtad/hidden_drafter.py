"""Walks a `HiddenDraft` along a tree of tokens: the `Drafter` that reads the target's states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtad import tree
from mtad.eager import Saved
from mtad.errors import PairError
from mtad.hidden_draft import Ends, HiddenDraft, Past, Proposed
from mtad.lm import PREFILL_CHUNK_TOKENS
from mtad.logits import Logits


class DraftPasses(Protocol):
    """A `HiddenDraft` with one cache, as an engine runs it; `HiddenDrafter` keeps the books.

    Attributes:
        zeros: [0, H] of the device and the dtype of all states.
    """

    zeros: Tensor

    def propose(self, token_ids: Tensor) -> None:
        """From now on [E] tokens that are not among the K can be proposed as well."""

    def read_target(self, hidden: Tensor) -> Tensor:
        """The target's hidden states [n, F·H] → the states [n, H] that the draft reads."""

    def forward(
        self,
        token_ids: Tensor,  # [n]
        states: Tensor,  # [n, H]
        positions: Tensor,  # [n]
        length: int,
        visible: Tensor,  # [n, nodes]
        skipped: int,
    ) -> tuple[Tensor, Tensor]:
        """Adds n tokens, the last of `nodes` slots that follow `length` slots.

        `visible` says who sees which of the nodes. Returns the states [n, H] after them, and
        logits [n − skipped, K + E] of all but the first.
        """

    def crop(self, length: int) -> None:
        """Drops all slots from `length` on."""

    def save(self, length: int) -> tuple[Tensor, ...]:
        """Copies of the first `length` slots."""

    def load(self, tensors: Sequence[Tensor], length: int) -> None:
        """Fills the first `length` slots of an empty cache from what `save` gave, or its begin."""


class RunnableDraft(Protocol):
    """A `HiddenDraft` made ready for an engine, with weights that many runs may share.

    Attributes:
        draft: what it was made from.
        weight_bytes: that a pass reads, the rows of the target's head among them.
    """

    @property
    def draft(self) -> HiddenDraft:
        """See above."""

    @property
    def weight_bytes(self) -> int:
        """See above."""

    def passes(self) -> DraftPasses:
        """It with an empty cache."""


class EagerDraft:
    """Any `HiddenDraft` through torch; see `RunnableDraft`."""

    def __init__(self, draft: HiddenDraft, ends: Ends) -> None:
        self.draft = draft
        self.ends = ends
        weights = (*draft.parameters(), ends.head)
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)

    def passes(self) -> EagerDraftPasses:
        """It with an empty cache."""
        return EagerDraftPasses(self.draft, self.ends)


class EagerDraftPasses:
    """See `DraftPasses`."""

    def __init__(self, draft: HiddenDraft, ends: Ends) -> None:
        self._draft = draft
        self._ends = ends
        self._more: tuple[Tensor, Tensor | None] | None = None
        self._past: Past | None = None
        self.zeros = draft.norm.new_zeros(0, draft.norm.shape[0])

    def propose(self, token_ids: Tensor) -> None:
        """See `DraftPasses.propose`."""
        self._more = self._ends.rows(token_ids)

    def read_target(self, hidden: Tensor) -> Tensor:
        """See `DraftPasses.read_target`."""
        return self._draft.read_target(hidden.to(self.zeros))

    def forward(
        self,
        token_ids: Tensor,
        states: Tensor,
        positions: Tensor,
        length: int,
        visible: Tensor,
        skipped: int,
    ) -> tuple[Tensor, Tensor]:
        """See `DraftPasses.forward`."""
        hidden = torch.where(visible, 0.0, torch.finfo(self.zeros.dtype).min)
        mask = F.pad(hidden, (length, 0)).to(self.zeros)
        embedded = self._ends.embed(token_ids).to(self.zeros)
        output, self._past = self._draft(
            embedded.unsqueeze(0), states.unsqueeze(0), positions, mask, self._past
        )
        found: Tensor = output[0]
        wanted = self._draft.head_input(found[skipped:])
        logits = F.linear(wanted, self._ends.head, self._ends.bias)
        if self._more is not None:
            logits = torch.cat([logits, F.linear(wanted, *self._more)], -1)
        return found, logits

    def crop(self, length: int) -> None:
        """See `DraftPasses.crop`."""
        if self._past is not None:
            self._past = [
                (keys[:, :, :length], values[:, :, :length]) for keys, values in self._past
            ]

    def save(self, length: int) -> tuple[Tensor, ...]:
        """See `DraftPasses.save`; keys and values in turn."""
        return tuple(part[:, :, :length].clone() for pair in self._past or () for part in pair)

    def load(self, tensors: Sequence[Tensor], length: int) -> None:
        """See `DraftPasses.load`."""
        cut = [part[:, :, :length] for part in tensors]
        self._past = list(zip(cut[::2], cut[1::2], strict=True)) or None


class HiddenDrafter:
    """Drafting from the target's hidden states.

    Token s is read together with a state: the target's own, of token s − 1, where the target has
    been; below that, the draft's. So a token that was drafted and accepted is read a second time,
    now with the target's state, in the same pass as the next token that comes in.

    Parents are nodes of earlier calls, and a kept path begins with the chain that was given
    first, as the decoders do it.
    """

    _passes: DraftPasses
    _unread: Tensor
    _states: Tensor
    _tokens: Tensor

    def __init__(self, runnable: RunnableDraft, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.target_layers = runnable.draft.config.target_layers
        self._runnable = runnable

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """Reads [n] tokens, each with the target's state [n, F·H] of the token before it."""
        # There is no state before the first token of a text, so that token is not read; as the
        # first token of an empty prefix it is, with zeros.
        self._begin_text(token_ids, min(token_ids.shape[0], 1))
        if token_ids.shape[0]:
            self._take(target_hidden)
            self._commit(token_ids[1:])

    def save(self) -> Saved | None:
        """See `Resumable.save`: as far as the text was read with the target's states."""
        position = self._length - self._unread.shape[0]
        # A text that began empty was read from its first token on, which no prompt is.
        if position != self._cached + 1:
            return None
        return Saved(position, self._passes.save(self._cached))

    def resume(
        self, saved: Saved, kept: int, token_ids: Tensor, target_hidden: Tensor | None
    ) -> None:
        """See `Resumable.resume`."""
        self._begin_text(token_ids, kept)
        self._cached = kept - 1
        self._passes.load(saved.tensors, self._cached)
        self._take(target_hidden)
        self._commit(token_ids[kept:])

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Logits:
        """See `Drafter.next_logits`."""
        if parents is not None:
            logits = self._read(token_ids, parents)
        else:
            # A chain is read at once as far as the target's states reach, then one by one.
            known = 0 if self._nodes else self._states.shape[0] - self._unread.shape[0]
            parts = [token_ids[:known], *token_ids[known:].unsqueeze(1)]
            logits = torch.cat([self._read(part, None) for part in parts if part.shape[0]])
        return Logits(logits, self._proposed.columns)

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """See `Drafter.keep`."""
        self._take(target_hidden)
        nodes = self._tokens[:path] if isinstance(path, int) else self._tokens[path]
        # What was read with the target's states stays, the beginning of the path; the rest of
        # it is read again.
        stay = min(nodes.shape[0], self._exact)
        self._cached += stay
        self._passes.crop(self._cached)
        self._length += nodes.shape[0]
        self._propose(nodes)
        self._states = self._states[stay:]
        self._unread = torch.cat([self._unread, nodes[stay:]])
        self._drop_nodes()

    def _begin_text(self, token_ids: Tensor, length: int) -> None:
        """An empty cache for a text of [n] tokens, the first `length` of which need not be read."""
        self._passes = self._runnable.passes()
        self._proposed = Proposed(self._runnable.draft.token_ids, self.vocab_size)
        self._propose(token_ids)
        self._cached = 0  # committed tokens in the draft's cache
        self._length = length  # committed tokens
        # Committed tokens that are not yet in it: the last ones of the text.
        self._unread = token_ids[:0]
        # The target's states from the token before `_unread` on, as far as they are known.
        none = self._passes.zeros
        self._states = none.new_zeros(0 if length else 1, none.shape[1])
        self._drop_nodes()

    def _commit(self, token_ids: Tensor) -> None:
        """Reads [n] tokens of the text, the states before them being known."""
        for start in range(0, token_ids.shape[0], PREFILL_CHUNK_TOKENS):
            chunk = token_ids[start : start + PREFILL_CHUNK_TOKENS]
            self._length += chunk.shape[0]
            self._unread = chunk
            self._read(chunk[:0], None)

    def _take(self, target_hidden: Tensor | None) -> None:
        if target_hidden is None:
            raise PairError(
                "This draft reads the target's hidden states, and was given none. Hand the states"
                " of its target_layers to prefill and keep."
            )
        self._states = torch.cat([self._states, self._passes.read_target(target_hidden)])

    def _propose(self, token_ids: Tensor) -> None:
        """Adds [n] tokens of the text to what can be proposed."""
        if self._proposed.read(token_ids):
            self._passes.propose(self._proposed.more)

    def _drop_nodes(self) -> None:
        self._nodes = 0
        self._exact = 0  # so many of the first nodes were read with the target's states
        self._tokens = self._unread[:0]
        # What a child of each node is read with.
        self._node_states = self._states[:0]
        self._ancestors: Tensor | None = None

    def _read(self, token_ids: Tensor, parents: Tensor | None) -> Tensor:
        """One pass over the unread tokens and n new nodes → logits [n, K] after the nodes."""
        count, unread, old = token_ids.shape[0], self._unread.shape[0], self._nodes
        after = self._states[unread:]
        known = after[:0]
        levels = 1
        if parents is not None:
            above = torch.cat([after[:1], self._node_states])[parents + 1]
        else:
            above = self._node_states[-1:] if old else after[:count]
            parents = torch.arange(old - 1, old - 1 + count, device=token_ids.device)
            levels = count
            if not old:
                self._exact = count
                known = after[1 : 1 + count]
        self._ancestors = tree.extend_ancestors(self._ancestors, parents, levels)
        depths = tree.node_depths(self._ancestors)[old:]
        before = torch.arange(self._length - unread, self._length, device=token_ids.device)
        states, logits = self._passes.forward(
            torch.cat([self._unread, token_ids]),
            torch.cat([self._states[:unread], above]),
            torch.cat([before, self._length + depths]),
            self._cached,
            self._visible(unread, count),
            unread,
        )
        found = states[unread:]
        self._cached += unread
        self._states, self._unread = after, self._unread[:0]
        self._nodes += count
        self._tokens = torch.cat([self._tokens, token_ids])
        self._node_states = torch.cat([self._node_states, known, found[known.shape[0] :]])
        return logits

    def _visible(self, unread: int, count: int) -> Tensor:
        """Bool [unread + count, unread + nodes]: the end of a text, and a tree below it."""
        assert self._ancestors is not None
        below = self._ancestors[self._ancestors.shape[0] - count :]
        if not unread:
            return below
        text = tree.chain_ancestors(unread, below.device)
        return torch.cat([F.pad(text, (0, below.shape[1])), F.pad(below, (unread, 0), value=True)])
