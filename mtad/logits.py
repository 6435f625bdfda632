"""Raw next-token logits, and what several rules ask of the same rows, found once.

A wide row is read as seldom as possible: with top-k 10, all that the rules, the trace and the
perplexity need of 49,152 logits are the ten largest and the logarithm of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mtad.histories import Histories

T = TypeVar("T")


def wide(values: Tensor) -> Tensor:
    """`values` in float64, the type in which joints are summed and masses compared.

    Apple's MPS has no float64 and stays in float32 (untested).
    """
    return values.float() if values.device.type == "mps" else values.double()


class Stretches(Protocol):
    """Runs what stands between two passes: functions of tensors that never ask what is in them."""

    def run(self, key: Hashable, compute: Callable[..., T], *tensors: Tensor) -> T:
        """What `compute(*tensors)` gives, perhaps recorded at an earlier call.

        Args:
            key: everything but the tensors' shapes and contents that the result depends on.
            compute: may be called any number of times, with tensors of these shapes.
            tensors: what it reads.

        Returns:
            Its result; tensors in it are good until the next call with the same key.
        """


Rows = tuple[Tensor, Tensor]
"""[R, K] log-probabilities, and the tokens they are of."""

Nodes = tuple[Tensor, "Tensor | None", Tensor, "Tensor | None"]
"""Of N nodes of a draft tree, parents before children: [N] tokens; [N] parents, −1 for a child of
the token before the tree, None for a chain; [N] log q; [N] bool, which slots hold a node, None if
all do. Row 0 of p is that before the tree, row 1 + i that behind node i."""


class Rules(Protocol):
    """Acceptance rules in one go, each beginning with the look-up of log p [N] of the nodes.

    None from an engine without code of its own for it: then it is what `mtad.verify` says.
    """

    def joint_prefix(
        self, target: Rows, nodes: Nodes, log_threshold: float
    ) -> tuple[Tensor, Tensor] | None:
        """`mtad.verify.joint_accept_lengths` of a chain → log p [N], the accepted length []."""

    def kept_run(
        self, target: Rows, nodes: Nodes, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """`mtad.verify.rejection_ratios` of a chain, tested with [N] uniforms in turn.

        Returns:
            log p [N], the ratios [N], the length [] of the run that is kept.
        """

    def joint_path(
        self, target: Rows, nodes: Nodes, reference: Tensor, paths: Tensor, log_threshold: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """`mtad.verify.joint_tree_path` → log p [N], the accepted length [], the path [D]."""

    def walk(
        self,
        target: Rows,
        draft: Rows,
        nodes: Nodes,
        levels: int,
        uniform: Tensor,
        replacement: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """`mtad.verify.multi_candidate` from the root of a tree down to what is accepted.

        Args:
            target: log p of each row.
            draft: [M, K'] log q of what children were drawn from, rows as those of p.
            nodes: of `levels` levels.
            levels: D.
            uniform: [N + 1], one for the test of each node and one for the final draw.
            replacement: whether children were drawn with replacement.

        Returns:
            log p [N]; the accepted nodes [D] and how many []; how many siblings were tested
            below each of them [D]; ratios and uniforms of the tests [N], NaN for none; the final
            token [].
        """


class Search(Rules, Protocol):
    """How an engine reads rows of logits. All work in float32 and leave NaN visible.

    Attributes:
        stretches: records what follows the reading; None where nothing is gained by that.
    """

    stretches: Stretches | None

    def best(self, values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """[rows, K] → the largest `count`, descending, and their columns, [rows, count] each.

        A NaN counts as the largest. The third is what `log_sums` would give, from an engine that
        finds it at the same reading.
        """

    def log_sums(self, values: Tensor) -> Tensor:
        """[rows, K] → [rows] log Σ exp."""

    def warp(self, values: Tensor, temperature: float, top_p: float) -> Tensor:
        """[..., K] logits, descending if top_p < 1 → their warped log-probabilities.

        Normalised over the K; −∞ where top_p filters a token out. The one that crosses top_p
        stays, and so does the first one.

        Args:
            values: float32.
            temperature: above 0.
            top_p: in (0, 1].
        """

    def draw(self, logprobs: Tensor, token_ids: Tensor, uniform: Tensor) -> Tensor:
        """[..., K] log-probabilities and tokens, [...] uniforms → [...] tokens.

        By inverting the cumulative mass, so that a token of probability 0 is never drawn: the
        mass does not rise there.
        """

    def draw_row(self, logprobs: Tensor, token_ids: Tensor, row: Tensor, uniform: Tensor) -> Tensor:
        """`draw` from one of [rows, K], which a tensor of one element names → [] its token."""

    def pick(self, logprobs: Tensor, token_ids: Tensor, tokens: Tensor) -> Tensor:
        """[..., K] log-probabilities and tokens, [...] tokens → [...] theirs, −∞ without."""

    def choose(
        self, logits: Logits, count: int, temperature: float, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """`best`, `log_sums` and `warp` in one go; None without code of its own for it.

        Args:
            logits: [R, V].
            count: K, fewer than the row has.
            temperature: as for `warp`.
            top_p: as for `warp`.

        Returns:
            [R, K] the largest, descending, and their tokens; [R] log-sums; [R, K] the warped
            log-probabilities.
        """

    def grow(
        self,
        histories: Histories,
        logits: Logits,
        top_k: int,
        width: int,
        temperature: float,
        top_p: float,
        chance: Tensor,
    ) -> Histories | None:
        """A step of beam sampling in one go; None if the engine has no code of its own for it.

        It does what `mtad.growth` does, which says what these are.

        Args:
            histories: of R slots, each tensor side by side.
            logits: [R, V].
            top_k: how many of a row's largest are left; fewer than the row has.
            width: W of the next step.
            temperature: as for `warp`.
            top_p: as for `warp`.
            chance: [max(R · top_k, W)] uniforms, float64.
        """

    def draw_corrected(
        self,
        target: tuple[Tensor, Tensor],
        draft: tuple[Tensor, Tensor],
        accepted: Tensor,
        uniform: Tensor,
    ) -> Tensor | None:
        """What follows the accepted tokens in speculative sampling, in one go; None without code.

        It does what `mtad.decoders.speculative` does with `corrected_or_bonus`.

        Args:
            target: log p and tokens, [γ + 1, K] each.
            draft: log q and tokens, [γ, K'] each.
            accepted: [] from 0 to γ.
            uniform: [].

        Returns:
            [] the token.
        """

    def record(
        self,
        logits: Logits,
        count: int,
        tokens: Tensor,
        accepted: Tensor,
        final: Tensor,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """`mtad.sampling.recorded` in one go; None without code of its own for it."""

    def sample(
        self, logits: Logits, top_k: int, temperature: float, top_p: float, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """A token of each row in one go; None if the engine has no code of its own for it.

        Args:
            logits: [R, V].
            top_k: how many of a row's largest are left; fewer than the row has.
            temperature: as for `warp`.
            top_p: as for `warp`.
            uniform: [R], float64, side by side.

        Returns:
            [R] tokens and their log-probabilities; what they were drawn from, [R, top_k] tokens
            and warped log-probabilities.
        """


class TorchSearch:
    """See `Search`; on any device."""

    def __init__(self, stretches: Stretches | None = None) -> None:
        self.stretches = stretches

    def best(self, values: Tensor, count: int) -> tuple[Tensor, Tensor, None]:
        """See `Search.best`."""
        found = values.float().topk(count, dim=-1)
        return found.values, found.indices, None

    def log_sums(self, values: Tensor) -> Tensor:
        """See `Search.log_sums`."""
        return values.float().logsumexp(-1)

    def warp(self, values: Tensor, temperature: float, top_p: float) -> Tensor:
        """See `Search.warp`."""
        # The maximum goes first: a tiny temperature must not overflow.
        scaled = (values - values.amax(-1, keepdim=True)) / temperature
        logprobs = scaled.log_softmax(-1)
        if top_p < 1.0:
            mass_before = logprobs.exp().cumsum(-1)[..., :-1]
            # The first stays whatever top_p is: one that float32 rounds to 0 keeps it alone.
            dropped = (mass_before >= top_p) & (mass_before > 0.0)
            logprobs[..., 1:].masked_fill_(dropped, -torch.inf)
            logprobs = logprobs.log_softmax(-1)
        return logprobs

    def draw(self, logprobs: Tensor, token_ids: Tensor, uniform: Tensor) -> Tensor:
        """See `Search.draw`."""
        mass = wide(logprobs).exp().cumsum(-1)
        level = (uniform.to(mass.dtype) * mass[..., -1]).unsqueeze(-1)
        index = torch.searchsorted(mass, level, right=True).clamp_max(mass.shape[-1] - 1)
        return token_ids.gather(-1, index).squeeze(-1)

    def draw_row(self, logprobs: Tensor, token_ids: Tensor, row: Tensor, uniform: Tensor) -> Tensor:
        """See `Search.draw_row`."""
        row = row.view(1)
        picked = logprobs.index_select(0, row), token_ids.index_select(0, row)
        return self.draw(*picked, uniform.view(1))[0]

    def pick(self, logprobs: Tensor, token_ids: Tensor, tokens: Tensor) -> Tensor:
        """See `Search.pick`."""
        hits = token_ids == tokens.unsqueeze(-1)
        return torch.where(hits, logprobs, -torch.inf).amax(-1)

    def _no_code(self, *_: object) -> None:
        """Each of these is what torch does otherwise."""

    choose = grow = sample = draw_corrected = record = _no_code
    joint_prefix = kept_run = joint_path = walk = _no_code


TORCH_SEARCH = TorchSearch()

NO_COLUMN = 2**31 - 1
NO_TOKEN = -1


@dataclass(frozen=True)
class Columns:
    """What the columns of narrow logits stand for.

    Attributes:
        token_ids: the tokens of the K columns, at least [K], side by side.
        places: [V] the column of each token; `NO_COLUMN`, or any beyond the K, for none.
    """

    token_ids: Tensor
    places: Tensor

    @staticmethod
    def of(token_ids: Tensor, vocab_size: int) -> Columns | None:
        """Of [K] tokens; None if column i is token i of all of them."""
        count = token_ids.shape[0]
        order = torch.arange(count, device=token_ids.device)
        if count == vocab_size and torch.equal(token_ids, order):
            return None
        places = token_ids.new_full((vocab_size,), NO_COLUMN)
        places[token_ids] = order
        return Columns(token_ids.contiguous(), places)

    def with_tokens(self, token_ids: Tensor) -> Columns:
        """With columns behind the K for [n] tokens that had none.

        `places` is the same tensor: to these columns the new tokens lie beyond the K.
        """
        start = self.token_ids.shape[0]
        order = torch.arange(start, start + token_ids.shape[0], device=token_ids.device)
        self.places[token_ids] = order
        return Columns(torch.cat([self.token_ids, token_ids]), self.places)


class Logits:
    """Rows of raw logits over the vocabulary, or over fewer tokens with −∞ for the rest.

    Attributes:
        values: [..., K] in the model's dtype.
        columns: what they stand for; None if column i is token i.
        vocab_size: V.
        search: how the rows are read.
    """

    def __init__(
        self,
        values: Tensor,
        columns: Columns | None = None,
        *,
        search: Search = TORCH_SEARCH,
    ) -> None:
        self.values = values
        self.columns = columns
        self.vocab_size = values.shape[-1] if columns is None else columns.places.shape[0]
        self.search = search
        self._best: tuple[Tensor, Tensor] | None = None
        self._log_sums: Tensor | None = None

    @staticmethod
    def of(logits: Tensor | Logits) -> Logits:
        """Wraps a tensor [..., V]."""
        return logits if isinstance(logits, Logits) else Logits(logits)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., V], as if they were dense."""
        return (*self.values.shape[:-1], self.vocab_size)

    def cut(self, vocab_size: int) -> Logits:
        """The rows over the first tokens only."""
        if vocab_size == self.vocab_size:
            return self
        return Logits(self.dense()[..., :vocab_size], search=self.search)

    def __getitem__(self, index: int | slice) -> Logits:
        """Some of the rows."""
        return Logits(self.values[index], self.columns, search=self.search)

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The largest `count` logits in float32, descending, and their tokens: [..., count]."""
        values, tokens = self.leading(count)
        if values.shape[-1] == count:
            return values, tokens
        return values[..., :count], tokens[..., :count]

    def leading(self, count: int) -> tuple[Tensor, Tensor]:
        """`best` of as many as are known, `count` or more."""
        if self._best is None or self._best[0].shape[-1] < count:
            values, places, sums = self.search.best(self._rows(), count)
            if sums is not None:
                self._log_sums = sums.view(self.values.shape[:-1])
            shape = (*self.values.shape[:-1], count)
            self._best = values.view(shape), self.tokens_at(places.view(shape))
        return self._best

    def choices(self, count: int, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
        """The tokens of `best` and their warped log-probabilities (`Search.warp`), [..., count]."""
        if self._best is None and self.values.dim() == 2:
            found = self.search.choose(self, count, temperature, top_p)
            if found is not None:
                values, tokens, self._log_sums, logprobs = found
                self._best = values, tokens
                return tokens, logprobs
        values, tokens = self.best(count)
        return tokens, self.search.warp(values, temperature, top_p)

    def log_sums(self) -> Tensor:
        """[...] log Σ exp of each row, float32: what a logit is above it is log p."""
        if self._log_sums is None:
            self._log_sums = self.search.log_sums(self._rows()).view(self.values.shape[:-1])
        return self._log_sums

    def tokens_at(self, places: Tensor) -> Tensor:
        """[..., n] columns → their tokens."""
        return places if self.columns is None else self.columns.token_ids[places]

    def tokens(self) -> Tensor:
        """[..., K] the token of every column."""
        places = torch.arange(self.values.shape[-1], device=self.values.device)
        return self.tokens_at(places.expand(self.values.shape))

    def dense(self) -> Tensor:
        """[..., V] logits of the whole vocabulary."""
        if self.columns is None:
            return self.values
        nothing = self.values.new_full(self.shape, -torch.inf)
        return nothing.scatter_reduce(-1, self.tokens(), self.values, "amax")

    def mixed(self, tokens: Tensor, log_odds: Tensor) -> Logits:
        """The rows of (1 − share) · softmax + share · one token each, in float32.

        Up to a constant that is one logit a row: its mass grows by Σ exp · share / (1 − share).

        Args:
            tokens: [rows]; a row stays as it is if its token has no column.
            log_odds: [rows] log(share / (1 − share)); −∞ leaves a row as it is.
        """
        values, places = self.values.float(), tokens
        if self.columns is not None:
            places = self.columns.places[tokens]
            last = values.shape[-1] - 1
            log_odds = torch.where(places > last, -torch.inf, log_odds)
            places = places.clamp_max(last)
        places = places.unsqueeze(-1)
        added = (self.log_sums() + log_odds).unsqueeze(-1)
        mixture = values.scatter(-1, places, torch.logaddexp(values.gather(-1, places), added))
        return Logits(mixture, self.columns, search=self.search)

    def stretch(self, key: tuple[Hashable, ...], compute: Callable[..., T], *tensors: Tensor) -> T:
        """`compute(logits, *tensors)` for these logits, see `Stretches.run`."""
        stretches, columns = self.search.stretches, self.columns
        if stretches is None:
            return compute(self, *tensors)

        def again(values: Tensor, *rest: Tensor) -> T:
            return compute(Logits(values, columns, search=TORCH_SEARCH), *rest)

        whole = (*key, None if columns is None else id(columns))
        return stretches.run(whole, again, self.values, *tensors)

    def _rows(self) -> Tensor:
        return self.values.reshape(-1, self.values.shape[-1])
