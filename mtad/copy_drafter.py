"""Mixes a copy distribution into a draft: what followed the last words where they stood before.

Small models repeat their prompts and themselves. Where the last n tokens of a branch have
occurred in the text, the token that followed them there gets a share of q that grows with n; the
rest of q stays the draft's. It costs no pass and no training. The idea is prompt lookup's (Saxena
2023), but as a part of q, so that every acceptance rule stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtad.draft import Drafter, Resumable
from mtad.eager import Saved
from mtad.hidden_draft import copy_log_odds
from mtad.logits import NO_TOKEN, Logits


class CopyDrafter:
    """Another drafter, with a copy distribution mixed into what it proposes.

    Attributes:
        weights: the share of q that goes to the copied token, by the length of the longest match:
            `weights[n − 1]` for n tokens, the last one for all longer matches. At least 0, below 1.
    """

    _text: Tensor  # [C] committed tokens
    _tails: Tensor  # [1 + nodes, n] the last tokens up to the committed text, then to each node
    _tokens: Tensor  # [nodes]

    def __init__(self, drafter: Drafter, weights: Sequence[float]) -> None:
        """Wraps a drafter."""
        self.vocab_size = drafter.vocab_size
        self.target_layers = drafter.target_layers
        self.weights = tuple(weights)
        self._drafter = drafter
        self._log_odds = copy_log_odds(weights)

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """See `Drafter.prefill`."""
        self._drafter.prefill(token_ids, target_hidden)
        self._begin_text(token_ids)

    def save(self) -> Saved | None:
        """See `Resumable.save`: what the other drafter says."""
        return self._drafter.save() if isinstance(self._drafter, Resumable) else None

    def resume(
        self, saved: Saved, kept: int, token_ids: Tensor, target_hidden: Tensor | None
    ) -> None:
        """See `Resumable.resume`."""
        assert isinstance(self._drafter, Resumable)
        self._drafter.resume(saved, kept, token_ids, target_hidden)
        self._begin_text(token_ids)

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Logits:
        """See `Drafter.next_logits`."""
        logits = Logits.of(self._drafter.next_logits(token_ids, parents))
        new = token_ids.unsqueeze(1)
        if parents is None:
            line = torch.cat([self._tails[-1], token_ids])
            tails = line.unfold(0, len(self.weights), 1)[1:]
        else:
            tails = torch.cat([self._tails[parents + 1][:, 1:], new], 1)
        self._tails = torch.cat([self._tails, tails])
        self._tokens = torch.cat([self._tokens, token_ids])
        if self._text.shape[0] < 2:
            return logits
        return mixed(logits, self._text, tails, self._odds)

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """See `Drafter.keep`."""
        self._drafter.keep(path, target_hidden)
        kept = self._tokens[:path] if isinstance(path, int) else self._tokens[path]
        self._text = torch.cat([self._text, kept])
        self._begin_tree()

    def _begin_text(self, token_ids: Tensor) -> None:
        self._text = token_ids
        self._odds = self._log_odds.to(token_ids.device)
        self._begin_tree()

    def _begin_tree(self) -> None:
        size = len(self.weights)
        tail = self._text[-size:]
        if tail.shape[0] < size:
            tail = torch.cat([tail.new_full((size - tail.shape[0],), NO_TOKEN), tail])
        self._tails = tail.unsqueeze(0)
        self._tokens = self._text[:0]


def mixed(logits: Logits, text: Tensor, tails: Tensor, log_odds: Tensor) -> Logits:
    """Rows that propose with a share of their mass what follows the longest match.

    A row stays as it is if that token has no column.

    Args:
        logits: [R, V].
        text: [C] token ids, C at least 2.
        tails: [R, n] token ids; −1 where there is none.
        log_odds: [n + 1] log(share / (1 − share)) by the length of a match.
    """
    lengths, copied = longest_match(text, tails)
    return logits.mixed(copied, log_odds[lengths])


def longest_match(text: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
    """Where in a text the longest end of each tail stands, the latest such place.

    Args:
        text: [C] token ids, C at least 2.
        tails: [R, n] token ids; −1 where there is none.

    Returns:
        [R] lengths of the longest match, 0 to n, and [R] the token after it (any token where
        the length is 0). Neither is read back to the host.
    """
    size = tails.shape[1]
    ends = text.shape[0] - 1  # a match ends at 0 … ends − 1, so that a token follows
    padded = torch.cat([text.new_full((size - 1,), NO_TOKEN - 1), text])
    # windows[j, −i] stands i − 1 tokens before place j
    windows = padded.unfold(0, size, 1)[:ends]
    equal = (windows.unsqueeze(0) == tails.unsqueeze(1)).flip(-1)
    lengths = equal.int().cumprod(-1).sum(-1)  # [R, ends]
    places = torch.arange(ends, device=text.device)
    best = (lengths * ends + places).argmax(-1)
    return lengths.gather(1, best.unsqueeze(1)).squeeze(1), text[best + 1]
