"""Walks a `CudaDraft` along a tree of tokens, a replay each step.

What `mtad.hidden_drafter` and `mtad.copy_drafter` do on any device; here the books lie where the
recorded steps read them, and every number that says how far something has got is the host's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtad.cuda.arena import MOST_ROWS, padded, power_of_two
from mtad.cuda.draft import CudaDraft
from mtad.eager import Saved
from mtad.errors import PairError
from mtad.logits import Logits

_CHUNK_TOKENS = 512
_FIRST_TEXT_BUCKET = 256


class CudaDrafter:
    """See `mtad.draft.Drafter`, `mtad.hidden_drafter.HiddenDrafter` and `mtad.cuda.draft.Books`.

    As with those, parents are nodes of earlier calls, and a kept path begins with the chain that
    was given first.
    """

    def __init__(self, made: CudaDraft, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.target_layers = made.draft.config.target_layers
        self._made = made
        self._copies = bool(made.draft.config.copy_weights)
        self._arena = made.arenas.lend(self)

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """Reads [n] tokens, each with the target's state [n, F·H] of the token before it."""
        # The first token of a text has none before it and is not read, except below an empty
        # prefix: then with zeros.
        self._begin_text(0, token_ids[:1])
        if token_ids.shape[0]:
            self._take(target_hidden)
            self._commit(token_ids[1:])

    def save(self) -> Saved | None:
        """See `Resumable.save`: as far as the text was read with the target's states."""
        # A text that began empty was read from its first token on, which no prompt is.
        if self._position != self._cached + 1:
            return None
        return Saved(self._position, self._arena.save(self._cached))

    def resume(
        self, saved: Saved, kept: int, token_ids: Tensor, target_hidden: Tensor | None
    ) -> None:
        """See `Resumable.resume`."""
        self._begin_text(kept - 1, token_ids[:kept])
        self._arena.load(saved.tensors, self._cached)
        self._take(target_hidden)
        self._commit(token_ids[kept:])

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Logits:
        """See `Drafter.next_logits`."""
        if parents is not None:
            if not self._entries and self._unread:
                self._read(0, chain=True)
            return self._add(token_ids, parents)
        # A chain is read at once as far as the target's states reach, then one by one.
        known = 0 if self._entries else self._states.shape[0] - self._unread
        parts = [token_ids[:known], *token_ids[known:].unsqueeze(1)]
        found = [self._add(part, None) for part in parts if part.shape[0]]
        if len(found) == 1:
            return found[0]
        return self._logits(torch.cat([logits.values for logits in found]))

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """See `Drafter.keep`."""
        self._take(target_hidden)
        unread, end = self._unread, max(self._unread, self._entries)
        nodes = self._arena.books.tokens[unread:end]
        # A copy: what comes next is written where they stand.
        nodes = nodes[:path].clone() if isinstance(path, int) else nodes[path]
        waiting = self._arena.books.tokens[:unread].clone()
        self._append(nodes)
        if self._entries:
            # What was read with the target's states stays; the rest of the path is read again.
            stay = min(nodes.shape[0], self._exact)
            self._drop(unread + stay)
            nodes, waiting = nodes[stay:], waiting[:0]
        self._begin(torch.cat([waiting, nodes]))

    @property
    def _width(self) -> int:
        return self._made.stack.width

    def _begin_text(self, cached: int, token_ids: Tensor) -> None:
        """An empty cache that is to hold `cached` tokens of a text, of which [n] are committed."""
        self._arena.wipe()
        self._cached = cached
        self._text = 0
        self._position = token_ids.shape[0]  # in the text, of an entry right below the prefix
        self._append(token_ids)
        self._begin(token_ids[:0])
        # The target's, from the prefix on.
        before = 0 if self._position else 1
        self._states = self._arena.books.states.new_zeros(before, self._width)

    def _commit(self, token_ids: Tensor) -> None:
        """Reads [n] tokens of the text, the states before them being known."""
        for start in range(0, token_ids.shape[0], _CHUNK_TOKENS):
            chunk = token_ids[start : start + _CHUNK_TOKENS]
            self._append(chunk)
            self._begin(chunk)
            self._read(0, chain=True)
            self._drop(chunk.shape[0])
        self._begin(token_ids[:0])

    def _take(self, target_hidden: Tensor | None) -> None:
        if target_hidden is None:
            raise PairError(
                "This draft reads the target's hidden states, and was given none. Hand the states"
                " of its target_layers to prefill and keep."
            )
        hidden = target_hidden.to(self._states)
        with torch.no_grad():
            self._states = torch.cat([self._states, self._made.draft.read_target(hidden)])

    def _append(self, tokens: Tensor) -> None:
        """Adds committed tokens to the text, whose tokens can be proposed and copied."""
        end = self._text + tokens.shape[0]
        self._arena.reserve_text(end)
        self._arena.append(tokens, self._text)
        self._text = end

    def _drop(self, count: int) -> None:
        """The first entries become a part of the prefix: their slots stay as they are."""
        self._cached += count
        self._position += count
        self._states = self._states[count:]

    def _begin(self, unread: Tensor) -> None:
        """No nodes, and [u] committed tokens to read, the last ones of the text."""
        self._unread = unread.shape[0]
        self._entries = 0  # that were read
        self._exact = 0  # so many of the first nodes were read with the target's states
        self._arena.reserve_entries(self._unread)
        books = self._arena.books
        books.tokens[: self._unread] = unread
        if self._copies:
            start = self._text - self._unread
            books.tails[0] = books.text[start : start + books.tails.shape[1]]

    def _add(self, token_ids: Tensor, parents: Tensor | None) -> Logits:
        """Reads [n] new nodes, and with them what is unread → [n, V]."""
        count, start = token_ids.shape[0], self._entries or self._unread
        chain = self._entries == 0 and parents is None
        self._arena.reserve_entries(start + padded(count))
        books = self._arena.books
        books.tokens[start : start + count] = token_ids
        if chain:
            self._exact = count
        elif parents is None:
            books.parents[start : start + count].fill_(start - 1)
        else:
            books.parents[start : start + count] = parents + self._unread
        return self._read(count, chain=chain)

    def _read(self, count: int, *, chain: bool) -> Logits:
        """Reads entries up to the last of n new ones → [n, V]; a chain is the first of them."""
        arena, old = self._arena, self._entries
        end = (old or self._unread) + count
        rows = padded(end - old)
        recorded = rows <= MOST_ROWS
        rows = rows if recorded else end - old
        arena.reserve_entries(old + rows)
        bucket = arena.reserve(self._cached + old + rows, self._cached + old)
        books = arena.books
        known = 0
        if not old:
            known = min(self._states.shape[0], 1 + self._unread + self._exact)
            books.states[:known] = self._states[:known]
        arena.set(old, self._cached, self._position, known, self._text)
        text = power_of_two(self._text, _FIRST_TEXT_BUCKET) if count else 0
        arena.reserve_text(text)
        vocab_size = self.vocab_size

        def step() -> Tensor:
            return arena.step(rows, bucket, text, vocab_size, chain)

        key = rows, bucket, text, vocab_size, chain
        values = arena.graphs.run(key, step) if recorded else arena.graphs.launch(step)
        self._entries = end
        asked = slice(end - old - count, end - old)
        # The next step writes where this one wrote.
        return self._logits(values[asked].clone())

    def _logits(self, values: Tensor) -> Logits:
        columns = self._arena.columns(self.vocab_size)
        return Logits(values, columns, search=self._arena.search)
