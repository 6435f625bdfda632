"""A `HiddenDraft` on this engine: its weights, and one step of it over fixed buffers.

A step is more than a pass of the layers: who sees whom follows from the parents, and the copy
distribution from the text. As separate kernels all that would take longer than the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtad.cuda.arena import Arena, Lender, power_of_two
from mtad.cuda.graphs import Graphs, ordinary_tensors
from mtad.cuda.llama import seen_below
from mtad.cuda.stack import LayerWeights, Stack
from mtad.hidden_draft import NORM_EPS, Ends, HiddenDraft, Layer, copy_log_odds
from mtad.logits import NO_COLUMN, NO_TOKEN, Columns, Logits, TorchSearch

_FIRST_ENTRIES = 1024
_FIRST_TEXT = 1024


class CudaDraft:
    """A draft made ready for this engine; its weights stay its own.

    Attributes:
        draft: what it was made from.
        ends: of the target.
        stack: its layers.
        proposed: K.
        weight_bytes: that a step reads, the rows of the target's head among them.
        arenas: for `mtad.cuda.drafter.CudaDrafter`.
    """

    def __init__(self, draft: HiddenDraft, ends: Ends) -> None:
        config = draft.config
        size = config.hidden_size // config.num_heads
        weights = (*draft.parameters(), ends.head)
        self.draft = draft
        self.ends = ends
        self.proposed = int(draft.token_ids.shape[0])
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        with ordinary_tensors():
            powers = torch.arange(0, size, 2, device=draft.norm.device).float() / size
            self.stack = Stack(
                layers=[_layer_of(layer) for layer in draft.layers],  # type: ignore[arg-type]
                norm=draft.norm.detach(),
                heads=config.num_heads,
                kv_heads=config.num_key_value_heads,
                eps=NORM_EPS,
                frequencies=1.0 / config.rope_theta**powers,
            )
        self.arenas = Lender(lambda: DraftArena(self))

    def joined(self, token_ids: Tensor, states: Tensor) -> Tensor:
        """[R] tokens and the states [R, H] that they are read with → [R, H] into the layers."""
        draft, stack = self.draft, self.stack
        embedded = stack.normed(self.ends.embed(token_ids).to(states), draft.token_norm)
        both = torch.cat([embedded, stack.normed(states, draft.state_norm)], -1)
        return F.linear(both, draft.join.weight)

    def logits(self, states: Tensor, rows: Tensor, biases: Tensor) -> Tensor:
        """[R, H] after the layers → [R, K + E]; with [E, H] more rows of the head, and [E]."""
        normed = self.stack.normed(states, self.stack.norm)
        own = F.linear(normed, self.ends.head, self.ends.bias)
        return torch.cat([own, F.linear(normed, rows, biases)], -1).float()


@dataclass(frozen=True)
class Books:
    """What a step reads, all of it on the device and in places that stay the same.

    An entry is a token that stands below the prefix that the cache holds: first the committed
    ones that it has yet to read, then the nodes. Rows above those of entries belong to the
    prefix itself.

    Every place of the text is a column of the logits, behind the K of the draft. A token has the
    first of those that stand for it, all others are −∞: so nothing depends on how many there are,
    which the host does not know.

    Attributes:
        tokens: [E] of the entries.
        parents: [E] the entry above each; −1 for the prefix.
        states: [1 + E, H] what tokens right below the prefix or an entry are read with.
        seen: [1 + E, E] bool, which entries an entry sees: those above it, and itself.
        tails: [1 + E, n] the last n tokens up to it, `NO_TOKEN` before the first one.
        text: [n + T] the committed text behind n times `NO_TOKEN`.
        names: [K + T] the tokens of the columns.
        places: [V] the column of each token, or `NO_COLUMN`.
        rows: [T, H] the rows of the target's head for the text.
        biases: [T] theirs; 0 if the head has none.
        scalars: [5, 1] entries that were read before; slots of the prefix; the position of an entry
            right below it; how many rows of `states` are the target's; tokens of the text.
    """

    tokens: Tensor
    parents: Tensor
    states: Tensor
    seen: Tensor
    tails: Tensor
    text: Tensor
    names: Tensor
    places: Tensor
    rows: Tensor
    biases: Tensor
    scalars: Tensor

    @staticmethod
    def of(made: CudaDraft, entries: int, text: int) -> Books:
        """Empty ones: E entries, T tokens of text."""
        like, width = made.stack.norm, made.stack.width
        tail = len(made.draft.config.copy_weights)
        tokens, parents = torch.zeros(2, entries, dtype=torch.int64, device=like.device)
        books = Books(
            tokens=tokens,
            parents=parents,
            states=like.new_zeros(1 + entries, width),
            seen=like.new_zeros(1 + entries, entries, dtype=torch.bool),
            tails=tokens.new_full((1 + entries, tail), NO_TOKEN),
            text=tokens.new_full((tail + text,), NO_TOKEN),
            names=tokens.new_zeros(made.proposed + text),
            places=tokens.new_full((made.ends.whole.shape[0],), NO_COLUMN),
            rows=like.new_zeros(text, width),
            biases=like.new_zeros(text),
            scalars=tokens.new_zeros(5, 1),
        )
        books.names[: made.proposed] = made.draft.token_ids
        books.forget(made)
        return books

    def forget(self, made: CudaDraft) -> None:
        """For a new text."""
        self.states.zero_()
        self.names[made.proposed :] = 0
        self.places.fill_(NO_COLUMN)
        columns = torch.arange(made.proposed, device=self.places.device)
        self.places.index_copy_(0, made.draft.token_ids, columns)


class DraftArena(Arena):
    """An arena with the books of a run, and the steps that are recorded over them."""

    def __init__(self, made: CudaDraft) -> None:
        super().__init__(made.stack)
        self._made = made
        weights = made.draft.config.copy_weights
        with ordinary_tensors():
            like = made.stack.norm
            self.books = Books.of(made, _FIRST_ENTRIES, _FIRST_TEXT)
            self._log_odds = copy_log_odds(weights).to(like.device)
        self._columns: dict[tuple[int, ...], Columns] = {}
        self._scalars = [0] * self.books.scalars.shape[0]
        # A block is drawn from what each of its steps has left.
        self.search = TorchSearch(Graphs(like.device, most=256, share_memory=False))

    def wipe(self) -> None:
        """See `Arena.wipe`."""
        super().wipe()
        self.books.forget(self._made)

    def columns(self, vocab_size: int) -> Columns:
        """What the columns of the logits stand for among V tokens.

        One object as long as it holds, and kept after that: what was recorded over it goes by its
        identity.
        """
        books = self.books
        key = vocab_size, books.tokens.shape[0], books.names.shape[0]
        if key not in self._columns:
            self._columns[key] = Columns(books.names, books.places[:vocab_size])
        return self._columns[key]

    def append(self, tokens: Tensor, start: int) -> None:
        """Writes [n] tokens of the text from a place on, for which there is room."""
        books, made, end = self.books, self._made, start + tokens.shape[0]
        tail, first = books.tails.shape[1], made.proposed
        books.text[tail + start : tail + end] = tokens
        books.names[first + start : first + end] = tokens
        columns = torch.arange(first + start, first + end, device=tokens.device)
        books.places.scatter_reduce_(0, tokens, columns, "amin")
        books.rows[start:end], biases = made.ends.rows(tokens)
        if biases is not None:
            books.biases[start:end] = biases

    def set(self, *scalars: int) -> None:
        """See `Books.scalars`."""
        for place, (old, new) in enumerate(zip(self._scalars, scalars, strict=True)):
            if old != new:
                self.books.scalars[place].fill_(new)
        self._scalars = list(scalars)

    def reserve_entries(self, entries: int) -> None:
        """Makes room for so many entries, keeping those that are there."""
        self._grow(entries, self.books.text.shape[0] - self.books.tails.shape[1])

    def reserve_text(self, tokens: int) -> None:
        """Makes room for so many tokens of text, keeping those that are there."""
        self._grow(self.books.tokens.shape[0], tokens)

    def _grow(self, entries: int, text: int) -> None:
        old = self.books
        tail = old.tails.shape[1]
        if entries <= old.tokens.shape[0] and tail + text <= old.text.shape[0]:
            return
        with ordinary_tensors():
            new = Books.of(
                self._made, power_of_two(entries, _FIRST_ENTRIES), power_of_two(text, _FIRST_TEXT)
            )
            for name, values in vars(old).items():
                place = getattr(new, name)[tuple(slice(size) for size in values.shape)]
                place.copy_(values)
        self.books = new
        self.graphs.clear()

    def step(self, rows: int, bucket: int, text: int, vocab_size: int, chain: bool) -> Tensor:
        """Reads entries, as many as rows, from the first unread one on.

        Args:
            rows: R.
            bucket: slots that are looked at.
            text: tokens of the text that are looked at, a power of two; 0 if no logits are wanted.
            vocab_size: V.
            chain: they are the first entries, each below the one before; else every one is
                below an entry that was read.

        Returns:
            The values of `Logits` of R rows, [R, K + text].
        """
        books, made = self.books, self._made
        old, cached, position, known, length = books.scalars
        steps = self.slots[:rows]
        entries = old + steps
        tokens = books.tokens.index_select(0, entries)
        columns = torch.arange(books.tokens.shape[0], device=tokens.device)
        if chain:
            above = entries
            seen = columns <= entries.unsqueeze(1)
        else:
            above = books.parents.index_select(0, entries) + 1
            seen = books.seen.index_select(0, above) | (columns == entries.unsqueeze(1))
        books.seen.index_copy_(0, entries + 1, seen)
        read_with = books.states.index_select(0, above)
        own = cached + entries
        states, _ = made.stack.forward(
            made.joined(tokens, read_with),
            position + seen.sum(-1) - 1,
            own,
            seen_below(seen, self.slots[:bucket] - cached),
            self.cache,
        )
        # Where the target has been, its state stays.
        given = (entries + 1 < known).unsqueeze(1)
        after = torch.where(given, books.states.index_select(0, entries + 1), states)
        books.states.index_copy_(0, entries + 1, after)
        if books.tails.shape[1]:
            tails = self._tails(tokens, above, chain)
            books.tails.index_copy_(0, entries + 1, tails)
        first = made.proposed
        logits = made.logits(states, books.rows[:text], books.biases[:text])
        own = torch.arange(first, first + text, device=tokens.device)
        named = books.places.index_select(0, books.names[first : first + text])
        logits[:, first:].masked_fill_(named != own, -torch.inf)
        if not (text and books.tails.shape[1]):
            return logits
        copied = self._copied(tails, text, length)
        return Logits(logits, self.columns(vocab_size)).mixed(*copied).values

    def _tails(self, tokens: Tensor, above: Tensor, chain: bool) -> Tensor:
        tails = self.books.tails
        if chain:
            line = torch.cat([tails[0], tokens])
            return line.unfold(0, tails.shape[1], 1)[1:]
        return torch.cat([tails.index_select(0, above)[:, 1:], tokens.unsqueeze(1)], 1)

    def _copied(self, tails: Tensor, text: int, length: Tensor) -> tuple[Tensor, Tensor]:
        """[R] tokens that `mtad.copy_drafter` would copy, and the log odds that it does.

        The length of the text is on the device.
        """
        size, padded_text = tails.shape[1], self.books.text
        # windows[j, −i] stands i − 1 tokens before place j; behind a match a token must follow.
        windows = padded_text[1 : size + text].unfold(0, size, 1)
        places = torch.arange(text, device=length.device)
        equal = (windows.unsqueeze(0) == tails.unsqueeze(1)) & (tails >= 0).unsqueeze(1)
        lengths = equal.flip(-1).int().cumprod(-1).sum(-1)
        lengths = torch.where(places < length - 1, lengths, -1)
        best = (lengths * text + places).argmax(-1)
        found = lengths.gather(1, best.unsqueeze(1)).clamp_min(0).view(-1)
        after = (best + size + 1).clamp_max(padded_text.shape[0] - 1)
        token = padded_text.index_select(0, after).clamp_min(0)
        return token, self._log_odds.index_select(0, found)


def _layer_of(layer: Layer) -> LayerWeights:
    return LayerWeights(
        attention_norm=layer.norm.detach(),
        qkv=layer.qkv.weight.detach(),
        out=layer.out.weight.detach(),
        mlp_norm=layer.mlp_norm.detach(),
        gate_up=layer.gate_up.weight.detach(),
        down=layer.down.weight.detach(),
    )
