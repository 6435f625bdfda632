"""From logits to choices: warped distributions, residuals, draws from explicit uniforms.

Pure functions on tensors. None owns a generator or knows a model: randomness comes in as uniforms
in [0, 1), so that a test can enumerate it; a run has one `Uniforms` to get them from. No function
reads a value back to the host, so that a whole draft can be written without a synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.logits import TORCH_SEARCH, Logits, Search, wide

_AT_ONCE = 1024


class Uniforms:
    """Gives uniforms in [0, 1) on a generator's device, float64 where there is one.

    They are drawn many at a time, since a call of the generator takes as long as a small step of a
    rule; it is ahead of what was given. A CPU's are the numbers that it would give one by one.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._drawn = self._draw(0)
        self._used = 0

    def __call__(self, count: int) -> Tensor:
        """The next ones, [count]."""
        missing = self._used + count - self._drawn.shape[0]
        if missing > 0:
            more = self._draw(max(missing, _AT_ONCE))
            self._drawn, self._used = torch.cat([self._drawn[self._used :], more]), 0
        start, self._used = self._used, self._used + count
        return self._drawn[start : self._used]

    def give_back(self, count: int) -> None:
        """The last ones that were given will be given again: they were not needed."""
        self._used -= count

    def _draw(self, count: int) -> Tensor:
        device = self._generator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.rand(count, generator=self._generator, device=device, dtype=dtype)


# Up to so many pairs of tokens are compared, so that two small supports need no dense row.
_MOST_PAIRS = 4096


@dataclass(frozen=True)
class Warped:
    """Next-token distributions, each on a support of K tokens.

    With top-k the support is small, so everything after the warp costs next to nothing even
    for a large vocabulary.

    Attributes:
        token_ids: [..., K] int64, distinct within a row but for those of probability 0.
        logprobs: [..., K], normalised; −∞ for a token of the support that was filtered out.
        vocab_size: V; tokens outside the support have probability 0.
        search: how the engine that they come from reads them.
    """

    token_ids: Tensor
    logprobs: Tensor
    vocab_size: int
    search: Search = TORCH_SEARCH

    def logprob_of(self, tokens: Tensor) -> Tensor:
        """[...] tokens, one a row → [...] their log-probabilities, −∞ outside the support."""
        return self.search.pick(self.logprobs, self.token_ids, tokens)

    def dense(self) -> Tensor:
        """[..., V] log-probabilities over the whole vocabulary."""
        shape = (*self.logprobs.shape[:-1], self.vocab_size)
        nothing = self.logprobs.new_full(shape, -torch.inf)
        return nothing.scatter_reduce(-1, self.token_ids, self.logprobs, "amax")

    def row(self, index: Tensor) -> Warped:
        """One row of a [rows, K] distribution, by a tensor of one element (no host read)."""
        picked = self.select(index.view(1))
        return self.with_(picked.token_ids[0], picked.logprobs[0])

    def select(self, index: Tensor) -> Warped:
        """[n] rows of a [rows, K] distribution, by an index tensor."""
        return self.with_(
            self.token_ids.index_select(0, index), self.logprobs.index_select(0, index)
        )

    def rows(self, start: int, stop: int) -> Warped:
        """Rows start to stop of a [rows, K] distribution."""
        return self.with_(self.token_ids[start:stop], self.logprobs[start:stop])

    def with_(self, token_ids: Tensor, logprobs: Tensor) -> Warped:
        """Other distributions over the same vocabulary, read by the same engine."""
        return Warped(token_ids, logprobs, self.vocab_size, self.search)

    def mass_of(self, tokens: Tensor) -> Tensor:
        """[K] one distribution, [n] tokens → [n] their probabilities in float64."""
        if tokens.shape[0] * self.token_ids.shape[0] > _MOST_PAIRS:
            return wide(self.dense().gather(-1, tokens)).exp()
        hits = self.token_ids == tokens.unsqueeze(-1)
        return torch.where(hits, wide(self.logprobs).exp(), 0.0).sum(-1)

    def entropy(self) -> Tensor:
        """[...] entropy of each row, in nats."""
        terms = self.logprobs.exp() * self.logprobs
        return -torch.where(self.logprobs == -torch.inf, 0.0, terms).sum(-1)


def narrows(logits: Logits, config: DecodeConfig) -> bool:
    """Whether `warp` gives a support of top_k tokens, and not of all columns."""
    return config.temperature > 0.0 and 0 < config.top_k < logits.values.shape[-1]


def warp(logits: Tensor | Logits, config: DecodeConfig) -> Warped:
    """The conditionals that every rule works on: temperature, top-k, top-p, renormalised.

    In float32. The token that crosses top_p is kept. At temperature 0 the distribution is a
    one-hot at the argmax (ties: lowest id).

    Args:
        logits: [..., V], raw.
        config: temperature, top_k and top_p are read.
    """
    logits = Logits.of(logits)
    if config.temperature == 0.0:
        best = logits.tokens_at(logits.values.argmax(-1, keepdim=True))
        return Warped(best, torch.zeros_like(best, dtype=torch.float32), logits.vocab_size)
    if narrows(logits, config):
        token_ids, logprobs = logits.choices(config.top_k, config.temperature, config.top_p)
        return Warped(token_ids, logprobs, logits.vocab_size, logits.search)
    if config.top_p < 1.0:
        values, columns = logits.values.float().sort(dim=-1, descending=True, stable=True)
        token_ids = logits.tokens_at(columns)
    else:
        values, token_ids = logits.values.float(), logits.tokens()
    logprobs = logits.search.warp(values, config.temperature, config.top_p)
    return Warped(token_ids, logprobs, logits.vocab_size, logits.search)


def score(logits: Tensor | Logits, config: DecodeConfig) -> Warped:
    """What the joint methods (`beam`, `mtjd`, `mtad`, `mtad_tree`) score blocks with.

    The warped conditionals; at temperature 0, where they choose by maximum instead of by draw,
    the unfiltered log-softmax at temperature 1, so that joints and ratios stay finite.
    """
    if config.temperature > 0.0:
        return warp(logits, config)
    return unwarped(logits)


def unwarped(logits: Tensor | Logits) -> Warped:
    """[..., V] logits → the model's own distribution: temperature 1, no filter."""
    logits = Logits.of(logits)
    return Warped(logits.tokens(), logits.values.float().log_softmax(-1), logits.vocab_size)


def draw(distribution: Warped, uniform: Tensor) -> Tensor:
    """[...] rows and as many uniforms → [...] tokens, see `Search.draw`."""
    return distribution.search.draw(distribution.logprobs, distribution.token_ids, uniform)


def draw_row(distribution: Warped, row: Tensor, uniform: Tensor) -> Tensor:
    """A token [] from a row of a [rows, K] distribution, see `Search.draw_row` (no host read)."""
    of = distribution
    return of.search.draw_row(of.logprobs, of.token_ids, row, uniform)


def draw_distinct(logprobs: Tensor, uniform: Tensor, count: int) -> Tensor:
    """`count` distinct indices drawn one after another with probability ∝ exp(logprobs).

    An exponential race: the index with the smallest E/weight wins, E = −log(1 − u), which is the
    same law as drawing without replacement and renormalising after each draw. Entries of
    probability 0 come last; where fewer than `count` entries are positive, the caller must look
    at `logprobs` of what came back. (`torch.multinomial` would return them silently.)

    Args:
        logprobs: [n] log-weights, not necessarily normalised; −∞ allowed.
        uniform: [n] uniforms in [0, 1).
        count: how many; at most n.

    Returns:
        [count] int64, in the order of the draw.
    """
    exponentials = -torch.log1p(-wide(uniform))
    # A uniform of exactly 0 wins its race, but not for an entry of probability 0.
    races = exponentials.clamp_min(torch.finfo(exponentials.dtype).tiny).log()
    return (wide(logprobs) - races).topk(count).indices


def residual(target: Warped, draft: Warped) -> Warped:
    """norm(max(p − q, 0)) for single rows ([K]); p itself where that mass rounds to 0.

    Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, equation 2.
    """
    target_mass = wide(target.logprobs).exp()
    left = (target_mass - draft.mass_of(target.token_ids)).clamp_min(0.0)
    left = torch.where(left.sum(-1, keepdim=True) > 0.0, left, target_mass)
    return target.with_(target.token_ids, (left / left.sum(-1, keepdim=True)).log())


def token_logprobs(logits: Tensor | Logits, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """[rows, V] raw logits, [n] tokens → [n] log p at temperature 1 without filters.

    `rows` says after which row each token stands; one after the other by default.
    """
    logits = Logits.of(logits)
    if rows is None:
        count = tokens.shape[0]
        found = logits.values[:count].gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return found.float() - logits.log_sums()[:count]
    return logits.values[rows, tokens].float() - logits.log_sums()[rows]


def top_alternatives(
    logits: Tensor | Logits, count: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[rows, V] raw logits → the `count` best tokens and their log p at temperature 1.

    Of all rows, or of those that `rows` [n] lists.
    """
    logits = Logits.of(logits)
    values, token_ids = logits.best(min(count, logits.values.shape[-1]))
    logprobs = values - logits.log_sums().unsqueeze(-1)
    return (token_ids, logprobs) if rows is None else (token_ids[rows], logprobs[rows])


def recorded(
    logits: Logits,
    count: int,
    tokens: Tensor,  # [D]
    accepted: Tensor,  # []
    final: Tensor,  # [] or [1]
    rows: Tensor | None = None,  # [1 + D]
) -> tuple[Tensor, Tensor, Tensor]:
    """What a trace keeps of a pass, at temperature 1 without filters.

    Args:
        logits: [rows, V], raw.
        count: alternatives, at most V of them.
        tokens: along the path.
        accepted: so many of them were emitted.
        final: what was emitted after those.
        rows: before each depth; one after the other by default.

    Returns:
        [1 + D] log p of what was emitted at each depth, of `tokens` beyond that; the `count` most
        probable tokens there, [1 + D, count], and their log p.
    """
    count = min(count, logits.values.shape[-1])
    found = logits.search.record(logits, count, tokens, accepted, final, rows)
    if found is not None:
        return found
    emitted = final.view(1)
    if tokens.shape[0]:
        depths = torch.arange(tokens.shape[0] + 1, device=tokens.device)
        emitted = torch.where(depths == accepted, final, torch.cat([tokens, emitted]))
    return token_logprobs(logits, emitted, rows), *top_alternatives(logits, count, rows)
