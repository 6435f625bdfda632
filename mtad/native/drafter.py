"""Walks a `NativeDraft` along a tree of tokens, a call of the kernels each step.

What `mtad.hidden_drafter` does on any device; here the books lie where the kernels read them, and
every number that says how far something has got is the host's own.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mtad.eager import Saved
from mtad.errors import PairError
from mtad.hidden_draft import Proposed
from mtad.logits import Logits
from mtad.native import abi
from mtad.native.draft import NativeDraft
from mtad.native.packing import BLOCK
from mtad.native.rows import NATIVE_SEARCH
from mtad.native.threads import context

_CHUNK_TOKENS = 512


class NativeDrafter:
    """See `mtad.draft.Drafter` and `mtad.hidden_drafter.HiddenDrafter`.

    The draft's cache holds a prefix of the text. Below it stand entries: the committed tokens that
    are not yet in it, a chain, then the nodes. An entry has a token, the entry above it (−1 for
    the prefix), and the state that tokens right below it are read with: the target's where the
    target has been, else the draft's own.
    """

    def __init__(self, native: NativeDraft, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.target_layers = native.draft.config.target_layers
        self._native = native
        self._width = native.model.width

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """Reads [n] tokens, each with the target's state [n, F·H] of the token before it."""
        # The first token of a text has none before it and is not read, except below an empty
        # prefix: then with zeros.
        self._begin_text(0, min(token_ids.shape[0], 1), token_ids)
        if token_ids.shape[0]:
            self._take(target_hidden)
            self._commit(token_ids[1:])

    def save(self) -> Saved | None:
        """See `Resumable.save`: as far as the text was read with the target's states."""
        # A text that began empty was read from its first token on, which no prompt is.
        if self._position != self._cached + 1:
            return None
        return Saved(self._position, self._cache.save(self._cached))

    def resume(
        self, saved: Saved, kept: int, token_ids: Tensor, target_hidden: Tensor | None
    ) -> None:
        """See `Resumable.resume`."""
        self._begin_text(kept - 1, kept, token_ids)
        self._cache.load(saved.tensors, self._cached)
        self._take(target_hidden)
        self._commit(token_ids[kept:])

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Logits:
        """See `Drafter.next_logits`."""
        if parents is not None:
            logits = self._read(token_ids, parents + self._unread)
        else:
            # A chain is read at once as far as the target's states reach, then one by one.
            known = 0 if self._entries else self._states.shape[0] - self._unread
            parts = [token_ids[:known], *token_ids[known:].unsqueeze(1)]
            found = [self._read(part, None) for part in parts if part.shape[0]]
            logits = found[0] if len(found) == 1 else torch.cat(found)
        columns = self._proposed.columns
        width = self.vocab_size if columns is None else columns.token_ids.shape[0]
        return Logits(logits[:, :width], columns, search=NATIVE_SEARCH)

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """See `Drafter.keep`."""
        self._take(target_hidden)
        unread = self._unread
        nodes = self._tokens[unread : max(unread, self._entries)]
        nodes = nodes[:path] if isinstance(path, int) else nodes[path]
        waiting = self._tokens[:unread]
        self._propose(nodes)
        if self._entries:
            # What was read with the target's states stays; the rest of the path is read again.
            stay = min(nodes.shape[0], self._exact)
            self._drop(unread + stay)
            nodes, waiting = nodes[stay:], waiting[:0]
        self._begin(torch.cat([waiting, nodes]))

    def _begin_text(self, cached: int, position: int, token_ids: Tensor) -> None:
        """An empty cache that is to hold `cached` tokens, the next one standing at `position`.

        [n] tokens of the text are known, more than those perhaps.
        """
        self._cache = self._native.model.cache()
        self._proposed = Proposed(self._native.draft.token_ids, self.vocab_size)
        self._more: abi.Matrix | None = None
        self._more_data = torch.empty(0, dtype=torch.uint8)  # the kernels read from it
        self._propose(token_ids)
        self._cached = cached
        self._position = position  # in the text, of an entry right below the prefix
        self._tokens = self._parents = torch.empty(0, dtype=torch.int64)
        self._given = _floats(0, self._width)  # of the prefix, then of each entry
        # The target's, from there: zeros before the first token of a text.
        self._states = _floats(0 if position else 1, self._width).zero_()
        self._begin(self._tokens)

    def _commit(self, token_ids: Tensor) -> None:
        """Reads [n] tokens of the text, the states before them being known."""
        for start in range(0, token_ids.shape[0], _CHUNK_TOKENS):
            self._begin(token_ids[start : start + _CHUNK_TOKENS])
            self._read(token_ids[:0], None)
            self._drop(self._unread)
            self._begin(token_ids[:0])

    def _take(self, target_hidden: Tensor | None) -> None:
        if target_hidden is None:
            raise PairError(
                "This draft reads the target's hidden states, and was given none. Hand the states"
                " of its target_layers to prefill and keep."
            )
        starts = range(0, target_hidden.shape[0], _CHUNK_TOKENS)
        parts = (target_hidden[start : start + _CHUNK_TOKENS] for start in starts)
        read = [self._native.read_target(part) for part in parts]
        self._states = torch.cat([self._states, *read])

    def _propose(self, token_ids: Tensor) -> None:
        """Adds [n] tokens of the text to what can be proposed."""
        known = self._proposed.more.shape[0]
        if not self._proposed.read(token_ids):
            return
        whole = known // BLOCK * BLOCK  # of a block that is not full all rows are packed again
        packed = self._native.packed_rows(self._proposed.more[whole:])
        row_bytes = packed.data.shape[0] // packed.rows
        self._more_data = torch.cat([self._more_data[: whole * row_bytes], packed.data])
        self._more = abi.Matrix(
            packed.kind, whole + packed.rows, packed.columns, 0, self._more_data.data_ptr()
        )

    def _drop(self, count: int) -> None:
        """The first entries become a part of the prefix: their slots stay as they are."""
        self._cached += count
        self._position += count
        self._states = self._states[count:]

    def _begin(self, unread: Tensor) -> None:
        """No nodes, and [u] committed tokens to read."""
        self._unread = unread.shape[0]
        self._entries = 0  # that were read
        self._exact = 0  # so many of the first nodes were read with the target's states
        self._reserve(self._unread)
        self._tokens[: self._unread] = unread
        torch.arange(-1, self._unread - 1, out=self._parents[: self._unread])

    def _read(self, token_ids: Tensor, parents: Tensor | None) -> Tensor:
        """One pass over the unread tokens and n new nodes → logits [n, C] after the nodes.

        Columns behind those that can be proposed are not.

        Args:
            token_ids: [n].
            parents: [n] entries; None for a chain below the last one.
        """
        count, old, known = token_ids.shape[0], self._entries, 0
        start = old or self._unread
        end = start + count
        self._reserve(end)
        self._tokens[start:end] = token_ids
        if parents is None:
            torch.arange(start - 1, end - 1, out=self._parents[start:end])
        else:
            self._parents[start:end] = parents
        if not old:
            self._exact = 0 if parents is not None else count
            known = min(self._states.shape[0], 1 + self._unread + self._exact)
            self._given[:known] = self._states[:known]
        embedded = self._native.embed(self._tokens[old:end])
        more = self._more
        columns = self._native.model.head_rows + (0 if more is None else more.rows)
        logits = self._given.new_empty(count, columns)
        self._cache.reserve(self._cached + end, self._cached + old)
        threads = context()
        failed = threads.library.mtad_draft(
            threads.pointer,
            ctypes.byref(self._native.struct),
            ctypes.byref(self._cache.struct),
            ctypes.byref(
                abi.Step(
                    self._cached,
                    old,
                    end - old,
                    self._position,
                    embedded.data_ptr(),
                    self._parents.data_ptr(),
                    self._given.data_ptr(),
                    known,
                    start - old,
                    logits.data_ptr() if count else None,
                    None if more is None else ctypes.pointer(more),
                    self._native.draft.token_ids.shape[0],
                )
            ),
        )
        if failed:
            raise MemoryError(f"no memory for a step of {end - old:,} rows")
        self._entries = end
        return logits

    def _reserve(self, entries: int) -> None:
        """Makes room for so many entries."""
        size = self._tokens.shape[0]
        if entries < size:
            return
        size, old = 2 * entries + 64, size
        tokens, parents, given = self._tokens, self._parents, self._given
        self._tokens, self._parents = torch.empty(2, size, dtype=torch.int64)
        self._given = _floats(size, self._width)
        self._tokens[:old], self._parents[:old], self._given[:old] = tokens, parents, given


def _floats(rows: int, width: int) -> Tensor:
    """Not of torch's default type, which another thread changes while it loads a model."""
    return torch.empty(rows, width, dtype=torch.float32)
