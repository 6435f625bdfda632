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
from mtad.hidden_draft import NORM_EPS, Ends, HiddenDraft, Layer
from mtad.logits import Columns, Logits, TorchSearch

NO_TOKEN = -1
_FIRST_ENTRIES = 1024
_FIRST_TEXT = 1024


class CudaDraft:
    """A draft made ready for this engine; its weights stay its own.

    Attributes:
        draft: what it was made from.
        ends: of the target.
        stack: its layers.
        weight_bytes: that a step reads, the rows of the target's head among them.
        arenas: for `mtad.cuda.drafter.CudaDrafter`.
    """

    def __init__(self, draft: HiddenDraft, ends: Ends) -> None:
        config = draft.config
        size = config.hidden_size // config.num_heads
        weights = (*draft.parameters(), ends.head)
        self.draft = draft
        self.ends = ends
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
        self._columns: dict[int, Columns | None] = {}

    def columns(self, vocab_size: int) -> Columns | None:
        """What the columns of its logits stand for among V tokens."""
        if vocab_size not in self._columns:
            self._columns[vocab_size] = Columns.of(self.draft.token_ids, vocab_size)
        return self._columns[vocab_size]

    def joined(self, token_ids: Tensor, states: Tensor) -> Tensor:
        """[R] tokens and the states [R, H] that they are read with → [R, H] into the layers."""
        draft, stack = self.draft, self.stack
        embedded = stack.normed(self.ends.embed(token_ids).to(states), draft.token_norm)
        both = torch.cat([embedded, stack.normed(states, draft.state_norm)], -1)
        return F.linear(both, draft.join.weight)

    def logits(self, states: Tensor) -> Tensor:
        """[R, H] after the layers → [R, K]."""
        normed = self.stack.normed(states, self.stack.norm)
        return F.linear(normed, self.ends.head, self.ends.bias)


@dataclass(frozen=True)
class Books:
    """What a step reads, all of it on the device and in places that stay the same.

    An entry is a token that stands below the prefix that the cache holds: first the committed
    ones that it has yet to read, then the nodes. Rows above those of entries belong to the
    prefix itself.

    Attributes:
        tokens: [E] of the entries.
        parents: [E] the entry above each; −1 for the prefix.
        states: [1 + E, H] what tokens right below the prefix or an entry are read with.
        seen: [1 + E, E] bool, which entries an entry sees: those above it, and itself.
        tails: [1 + E, n] the last n tokens up to it, `NO_TOKEN` before the first one.
        text: [n + T] the committed text behind n times `NO_TOKEN`.
        scalars: [5, 1] entries that were read before; slots of the prefix; the position of an entry
            right below it; how many rows of `states` are the target's; tokens of the text.
    """

    tokens: Tensor
    parents: Tensor
    states: Tensor
    seen: Tensor
    tails: Tensor
    text: Tensor
    scalars: Tensor

    @staticmethod
    def of(entries: int, text: int, width: int, tail: int, like: Tensor) -> Books:
        """Empty ones: E entries, T tokens of text, H, n, and the dtype and device of states."""
        tokens, parents = torch.zeros(2, entries, dtype=torch.int64, device=like.device)
        return Books(
            tokens=tokens,
            parents=parents,
            states=like.new_zeros(1 + entries, width),
            seen=like.new_zeros(1 + entries, entries, dtype=torch.bool),
            tails=tokens.new_full((1 + entries, tail), NO_TOKEN),
            text=tokens.new_full((tail + text,), NO_TOKEN),
            scalars=tokens.new_zeros(5, 1),
        )


class DraftArena(Arena):
    """An arena with the books of a run, and the steps that are recorded over them."""

    def __init__(self, made: CudaDraft) -> None:
        super().__init__(made.stack)
        self._made = made
        weights = made.draft.config.copy_weights
        with ordinary_tensors():
            like = made.stack.norm
            self.books = Books.of(_FIRST_ENTRIES, _FIRST_TEXT, made.stack.width, len(weights), like)
            shares = torch.tensor((0.0, *weights), device=like.device)
            self._log_odds = shares.logit()
        self._scalars = [0] * self.books.scalars.shape[0]
        # A block is drawn from what each of its steps has left.
        self.search = TorchSearch(Graphs(like.device, most=256, share_memory=False))

    def wipe(self) -> None:
        """See `Arena.wipe`."""
        super().wipe()
        self.books.states.zero_()

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
                power_of_two(entries, _FIRST_ENTRIES),
                power_of_two(text, _FIRST_TEXT),
                self._made.stack.width,
                tail,
                old.states,
            )
            for name, values in vars(old).items():
                place = getattr(new, name)[tuple(slice(size) for size in values.shape)]
                place.copy_(values)
        self.books = new
        self.graphs.clear()

    def step(
        self, rows: int, bucket: int, text: int, vocab_size: int, chain: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Reads entries, as many as rows, from the first unread one on.

        Args:
            rows: R.
            bucket: slots that are looked at.
            text: tokens of the text that are looked at, a power of two; 0 copies nothing.
            vocab_size: V.
            chain: they are the first entries, each below the one before; else every one is
                below an entry that was read.

        Returns:
            The values and the extra tokens of `Logits` of R rows.
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
        logits = made.logits(states).float()
        if not books.tails.shape[1]:
            return logits, None
        tails = self._tails(tokens, above, chain)
        books.tails.index_copy_(0, entries + 1, tails)
        if not text:
            return logits, None
        copied = self._copied(tails, text, length)
        mixed = Logits(logits, made.columns(vocab_size)).mixed(*copied)
        return mixed.values, mixed.extra

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
