"""Walks a `NativeDraft` along a tree of tokens, a call of the kernels each step or each block.

What `mtad.hidden_drafter` and `mtad.copy_drafter` do on any device; here the books lie where the
kernels read them, and every number that says how far something has got is the host's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.eager import Saved
from mtad.errors import PairError
from mtad.hidden_draft import Proposed, copy_log_odds
from mtad.histories import BeamBlock, BeamTree
from mtad.logits import NO_TOKEN, Logits
from mtad.native import abi, library
from mtad.native.draft import NativeDraft
from mtad.native.memory import floats
from mtad.native.packing import BLOCK
from mtad.native.rows import NATIVE_SEARCH
from mtad.native.rules import NARROW
from mtad.native.threads import context
from mtad.sampling import Uniforms

_CHUNK_TOKENS = 512
_FIRST_TEXT = 512
_FIRST_STATES = 64
_NO_NODE = 2  # what `mtad_keep` says of a path


def _ids(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.int64)


class NativeDrafter:
    """See `mtad.draft.Drafter`, `mtad.hidden_drafter.HiddenDrafter` and `mtad.draft.BlockDrafter`.

    The draft's cache holds a prefix of the text. Below it stand entries: the committed tokens that
    are not yet in it, a chain, then the nodes. An entry has a token, the entry above it (−1 for
    the prefix), the state that tokens right below it are read with (the target's where the target
    has been, else the draft's own), and the last tokens up to it, by which it is known what is
    copied.
    """

    def __init__(self, native: NativeDraft, vocab_size: int) -> None:
        config = native.draft.config
        self.vocab_size = vocab_size
        self.target_layers = config.target_layers
        self._native = native
        self._width = native.model.width
        self._tail = len(config.copy_weights)
        self._odds = copy_log_odds(config.copy_weights)
        self._books = abi.Books(
            embedding=native.embedding.data_ptr(),
            size=self._tail,
            odds=self._odds.data_ptr(),
            from_=native.draft.token_ids.shape[0],
        )
        self._known = self._unread = self._entries = self._exact = 0

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """Reads [n] tokens, each with the target's state [n, F·H] of the token before it."""
        # The first token of a text has none before it and is not read, except below an empty
        # prefix: then with zeros.
        first = min(token_ids.shape[0], 1)
        self._begin_text(0, first, token_ids)
        if first:
            self._take(target_hidden)
            self._commit(token_ids[1:])

    def save(self) -> Saved | None:
        """See `Resumable.save`: as far as the text was read with the target's states."""
        # A text that began empty was read from its first token on, which no prompt is.
        if self._books.position != self._books.prefix + 1:
            return None
        return Saved(self._books.position, self._cache.save(self._books.prefix))

    def resume(
        self, saved: Saved, kept: int, token_ids: Tensor, target_hidden: Tensor | None
    ) -> None:
        """See `Resumable.resume`."""
        self._begin_text(kept - 1, kept, token_ids)
        self._cache.load(saved.tensors, kept - 1)
        self._take(target_hidden)
        self._commit(token_ids[kept:])

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Logits:
        """See `Drafter.next_logits`."""
        if parents is not None:
            logits = self._read(token_ids, parents)
        else:
            # A chain is read at once as far as the target's states reach, then one by one.
            known = 0 if self._entries else self._known - self._unread
            if token_ids.shape[0] <= max(known, 1):
                logits = self._read(token_ids, None)
            else:
                parts = [token_ids[:known], *token_ids[known:].unsqueeze(1)]
                logits = torch.cat([self._read(part, None) for part in parts if part.shape[0]])
        values = logits[:, : self._books.columns]
        return Logits(values, self._proposed.columns, search=NATIVE_SEARCH)

    def draft_line(
        self,
        logits: Logits,
        config: DecodeConfig,
        uniform: Tensor,
        ends: Tensor,
        floors: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """See `BlockDrafter.draft_line`."""
        if not self._draws(config):
            return None
        steps, choices = uniform.shape[0], config.top_k
        block, held = self._block(logits, config, steps, 1, ends, floors)
        token_ids, drawn = _ids(steps, choices), _ids(steps)
        values, logprobs, picked = floats(steps, choices), floats(steps, choices), floats(steps)
        uniform = uniform.contiguous()
        results = uniform, drawn, picked, values, token_ids, logprobs
        self._call("mtad_line", abi.Line(block, *(each.data_ptr() for each in results)))
        taken = held.taken.value
        self._entries += taken - 1
        if taken < steps:
            return drawn[:taken], picked[:taken], token_ids[:taken], logprobs[:taken]
        return drawn, picked, token_ids, logprobs

    def draft_beams(
        self,
        logits: Logits,
        config: DecodeConfig,
        steps: int,
        chance: Uniforms,
        ends: Tensor,
        floors: Sequence[float] = (),
    ) -> Results | None:
        """See `BlockDrafter.draft_beams`."""
        if not self._draws(config):
            return None
        width, choices = config.width, config.top_k
        block, held = self._block(logits, config, steps, width, ends, floors)
        candidates = width * choices
        uniform = chance(max(choices, width) + (steps - 1) * candidates)
        values, warped = floats(candidates), floats(candidates)
        best = _ids(candidates)
        races = torch.empty(candidates, dtype=torch.float64)
        tokens, parents = _ids(width), _ids(width)
        results = Results(steps, width)
        spare = values, best, warped, races, tokens, parents
        self._call(
            "mtad_search",
            abi.Search(
                *(block, width, uniform.data_ptr()),
                *(each.data_ptr() for each in spare),
                *results.pointers(),
            ),
        )
        results.steps = held.taken.value
        chance.give_back((steps - results.steps) * candidates)
        self._entries += (results.steps - 1) * width
        return results

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """See `Drafter.keep`."""
        hidden = _given(target_hidden)
        if isinstance(path, int):
            length, nodes = min(path, max(0, self._entries - self._unread)), None
        else:
            length, nodes = path.shape[0], path.long().contiguous()
        self._reserve_text(length)
        self._reserve_states(hidden.shape[0])
        self._reserve(self._unread + length)
        kept = _ids(length)
        keep = abi.Keep(
            *(hidden.data_ptr(), self._states.data_ptr()),
            *(None if nodes is None else nodes.data_ptr(), kept.data_ptr()),
            *(hidden.shape[0], self._known, length),
            *(self._unread, self._entries, self._exact),
        )
        threads = context()
        failed = threads.library.mtad_keep(
            threads.pointer,
            ctypes.byref(self._native.struct),
            ctypes.byref(self._books),
            ctypes.byref(keep),
        )
        if failed == _NO_NODE:
            count = max(0, self._entries - self._unread)
            raise IndexError(f"the path {path} names a node that is none of {count}")
        if failed:
            raise MemoryError(f"no memory for {hidden.shape[0]:,} rows")
        self._known, self._unread = keep.known, keep.unread
        self._entries = self._exact = 0
        self._propose(kept)

    def _begin_text(self, cached: int, position: int, token_ids: Tensor) -> None:
        """An empty cache that is to hold `cached` tokens, the next one standing at `position`.

        [n] tokens of the text are known, `position` of which are not read.
        """
        self._cache = self._native.model.cache()
        books = self._books
        books.prefix, books.position, books.count = cached, position, 0
        self._proposed = Proposed(self._native.draft.token_ids, self.vocab_size)
        self._more: abi.Matrix | None = None
        self._more_data = self._native.empty_rows.data.repeat(0, 1)  # blocks of its rows
        self._name_columns()
        size = self._tail
        self._text = torch.full((size + _FIRST_TEXT,), NO_TOKEN)
        books.text = self._text[size:].data_ptr()
        self._tokens = self._parents = torch.empty(0, dtype=torch.int64)
        self._tails = torch.empty(0, size, dtype=torch.int64)
        self._given = floats(0, self._width)  # of the prefix, then of each entry
        # The target's, from there, so many as are known: zeros before the first token of a text.
        self._states = torch.zeros(_FIRST_STATES, self._width, dtype=torch.float32)
        self._known = 0 if position else 1
        self._propose(token_ids)  # all at once: columns stand as they would for a whole prompt
        self._append(token_ids[:position])
        self._begin(self._tokens)

    def _commit(self, token_ids: Tensor) -> None:
        """Reads [n] tokens of the text, the states before them being known."""
        for start in range(0, token_ids.shape[0], _CHUNK_TOKENS):
            chunk = token_ids[start : start + _CHUNK_TOKENS]
            self._append(chunk)
            self._begin(chunk)
            self._read(token_ids[:0], None)
            self._drop(self._unread)
            self._begin(token_ids[:0])

    def _take(self, target_hidden: Tensor | None) -> None:
        hidden = _given(target_hidden)
        self._reserve_states(hidden.shape[0])
        for part in torch.split(hidden, _CHUNK_TOKENS):
            self._native.read_target(part, self._states[self._known :])
            self._known += part.shape[0]

    def _append(self, token_ids: Tensor) -> None:
        """Adds [n] committed tokens to the text: they can be proposed and copied."""
        count = token_ids.shape[0]
        self._reserve_text(count)
        start = self._tail + self._books.count
        self._text[start : start + count] = token_ids
        self._books.count += count
        self._propose(token_ids)

    def _propose(self, token_ids: Tensor) -> None:
        """Adds [n] tokens of the text to what can be proposed."""
        known = self._proposed.more.shape[0]
        if not self._proposed.read(token_ids):
            return
        rows, empty = self._native.head_rows(self._proposed.more[known:]), self._native.empty_rows
        blocks, room = -(-(known + rows.shape[0]) // BLOCK), self._more_data.shape[0]
        if blocks > room:
            data = empty.data.repeat(2 * blocks, 1)
            data[:room] = self._more_data
            self._more_data = data
        place = self._more_data.data_ptr()
        self._more = abi.Matrix(empty.kind, blocks * BLOCK, empty.columns, 0, place)
        library.load().mtad_write_rows(
            ctypes.byref(self._more), known, rows.shape[0], rows.data_ptr(), place
        )
        self._name_columns()

    def _name_columns(self) -> None:
        """Tells the kernels what the columns of the logits stand for."""
        books, columns = self._books, self._proposed.columns
        if columns is None:
            books.columns, books.names, books.places = self.vocab_size, None, None
        else:
            books.columns = columns.token_ids.shape[0]
            books.names, books.places = columns.token_ids.data_ptr(), columns.places.data_ptr()
        books.more = None if self._more is None else ctypes.pointer(self._more)
        more = 0 if self._more is None else self._more.rows
        self._stride = self._native.model.head_rows + more
        self._scratch = floats(0)

    def _drop(self, count: int) -> None:
        """The first entries become a part of the prefix: their slots stay as they are."""
        self._books.prefix += count
        self._books.position += count
        self._known = max(0, self._known - count)
        self._states[: self._known] = self._states[count : count + self._known].clone()

    def _begin(self, unread: Tensor) -> None:
        """No nodes, and [u] committed tokens to read, the last ones of the text."""
        self._unread = unread.shape[0]
        self._entries = 0  # that were read
        self._exact = 0  # so many of the first nodes were read with the target's states
        self._reserve(self._unread)
        if self._unread:
            self._tokens[: self._unread] = unread
            self._parents[: self._unread] = self._chain[: self._unread]
        if self._tail:
            start = self._books.count - self._unread
            self._tails[0] = self._text[start : start + self._tail]

    def _read(self, token_ids: Tensor, parents: Tensor | None) -> Tensor:
        """One pass over the unread tokens and n new nodes → logits [n, C] after the nodes.

        Columns behind those that can be proposed are not.

        Args:
            token_ids: [n].
            parents: [n] nodes, −1 for the committed text; None for a chain below the last entry.
        """
        count, old, known = token_ids.shape[0], self._entries, 0
        end = (old or self._unread) + count
        self._reserve(end)
        if not old:
            self._exact = 0 if parents is not None else count
            known = min(self._known, 1 + self._unread + self._exact)
        logits = floats(count, self._stride)
        self._cache.reserve(self._books.prefix + end, self._books.prefix + old)
        token_ids = token_ids.contiguous()
        parents = None if parents is None else parents.contiguous()
        self._call(
            "mtad_draft",
            abi.Step(
                *(old, end - old, count, token_ids.data_ptr()),
                None if parents is None else parents.data_ptr(),
                *(self._unread, self._states.data_ptr(), known),
                logits.data_ptr() if count else None,
            ),
        )
        self._entries = end
        return logits

    def _block(
        self,
        logits: Logits,
        config: DecodeConfig,
        steps: int,
        width: int,
        ends: Tensor,
        floors: Sequence[float],
    ) -> tuple[abi.Block, _Held]:
        """What both kinds of blocks have in common, and what must live as long."""
        first = self._entries
        end = first + (steps - 1) * width
        self._reserve(end)
        self._cache.reserve(self._books.prefix + end, self._books.prefix + first)
        if self._scratch.shape[0] < width * self._stride:
            self._scratch = floats(width * self._stride)
        bounds = (ctypes.c_double * len(floors))(*floors) if floors else None
        held = _Held(logits.values.contiguous(), ends, bounds, ctypes.c_int32())
        block = abi.Block(
            *(steps, first, None if bounds is None else ctypes.addressof(bounds)),
            *(ends.data_ptr(), ends.shape[0], ctypes.addressof(held.taken)),
            *(config.top_k, config.temperature, config.top_p),
            *(held.row.data_ptr(), self._scratch.data_ptr()),
        )
        return block, held

    def _draws(self, config: DecodeConfig) -> bool:
        """Whether the kernels draw from a row as a config says."""
        in_force = config.temperature > 0.0 and 0 < config.top_k < self._books.columns
        return in_force and config.top_k <= NARROW

    def _call(self, function: str, argument: ctypes.Structure) -> None:
        threads = context()
        failed = getattr(threads.library, function)(
            threads.pointer,
            ctypes.byref(self._native.struct),
            ctypes.byref(self._cache.struct),
            ctypes.byref(self._books),
            ctypes.byref(argument),
        )
        if failed:
            raise MemoryError("no memory for a step of the draft")

    def _reserve_text(self, count: int) -> None:
        """Makes room for so many more tokens of the text."""
        end = self._tail + self._books.count
        if end + count > self._text.shape[0]:
            text = torch.full((2 * (end + count),), NO_TOKEN)
            text[:end] = self._text[:end]
            self._text = text
            self._books.text = self._text[self._tail :].data_ptr()

    def _reserve_states(self, count: int) -> None:
        """Makes room for so many more states of the target."""
        end = self._known + count
        if end > self._states.shape[0]:
            states = floats(2 * end, self._width)
            states[: self._known] = self._states[: self._known]
            self._states = states

    def _reserve(self, entries: int) -> None:
        """Makes room for so many entries."""
        size = self._tokens.shape[0]
        if entries < size:
            return
        size, old = 2 * entries + 64, size
        tokens, parents, given, tails = self._tokens, self._parents, self._given, self._tails
        self._tokens, self._parents = _ids(size), _ids(size)
        self._chain = torch.arange(-1, size - 1)
        self._given = floats(size, self._width)
        self._tails = torch.empty(size, self._tail, dtype=torch.int64)
        self._tokens[:old], self._parents[:old] = tokens, parents
        self._given[:old], self._tails[:old] = given, tails
        books = self._books
        books.tokens, books.parents = self._tokens.data_ptr(), self._parents.data_ptr()
        books.given, books.tails = self._given.data_ptr(), self._tails.data_ptr()


def _given(target_hidden: Tensor | None) -> Tensor:
    """[n, F·H] as the kernels read them."""
    if target_hidden is None:
        raise PairError(
            "This draft reads the target's hidden states, and was given none. Hand the states"
            " of its target_layers to prefill and keep."
        )
    return target_hidden.float().contiguous()


class _Held(NamedTuple):
    """What a block points to."""

    row: Tensor
    ends: Tensor
    floors: ctypes.Array[ctypes.c_double] | None
    taken: ctypes.c_int32


class Results:
    """See `Searched`: the histories after each step, one behind the other in a few tensors.

    Attributes:
        steps: of those there is room for, so many there were.
    """

    def __init__(self, steps: int, width: int) -> None:
        self.steps, self._width = steps, width
        wide, flat = width * steps * (steps + 1) // 2, width * steps
        sizes = {name: wide for name in _WIDE} | {name: flat for name in _FLAT}
        self.tensors = {name: torch.empty(sizes[name], dtype=_KINDS[name]) for name in _KINDS}

    def pointers(self) -> list[int]:
        """Where they are written, in the order of `abi.HISTORIES`."""
        return [self.tensors[name].data_ptr() for name in abi.HISTORIES]

    def best_block(self, waiting: int) -> BeamBlock:
        """See `Searched.best_block`."""
        steps = self.steps
        block = BeamBlock(
            token_ids=_ids(steps),
            logprobs=floats(steps),
            real=torch.empty(steps, dtype=torch.bool),
            path=_ids(waiting + steps),
        )
        library.load().mtad_best_block(
            ctypes.byref(self._struct()), waiting, *(column.data_ptr() for column in block)
        )
        return block

    def tree(self) -> BeamTree:
        """See `Searched.tree`."""
        steps, size = self.steps, self._width * self.steps
        tree = BeamTree(
            token_ids=_ids(size),
            parents=_ids(size),
            logprobs=floats(size),
            real=torch.empty(size, dtype=torch.bool),
            paths=_ids(size, steps),
            reference=floats(steps),
        )
        library.load().mtad_beam_tree(
            ctypes.byref(self._struct()), *(column.data_ptr() for column in tree)
        )
        return tree

    def _struct(self) -> abi.Beams:
        columns = (self.tensors[name].data_ptr() for name, _ in abi.Beams._fields_[2:])
        return abi.Beams(self.steps, self._width, *columns)


_KINDS = {
    "token_ids": torch.int64,
    "logprobs": torch.float32,
    "nodes": torch.int64,
    "real": torch.bool,
    "joint": torch.float64,
    "finished": torch.bool,
    "came_from": torch.int64,
}
_WIDE, _FLAT = ("token_ids", "logprobs", "nodes", "real"), ("joint", "finished", "came_from")
