"""Mixes a copy distribution into a draft: what followed the last words where they stood before.

Small models repeat their prompts and themselves. Where the last n tokens of a branch have
occurred in the text, the token that followed them there gets a share of q that grows with n; the
rest of q stays the draft's. It costs no pass and no training, and reaches tokens that a draft
with a short head cannot propose. The idea is prompt lookup's (Saxena 2023), but as a part of
q, so that every acceptance rule stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtad.draft import Drafter

_NO_TOKEN = -1


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
        self.vocab_size = drafter.vocab_size
        self.target_layers = drafter.target_layers
        self.weights = tuple(weights)
        self._drafter = drafter

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """See `Drafter.prefill`."""
        self._drafter.prefill(token_ids, target_hidden)
        self._text = token_ids
        self._begin_tree()

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """See `Drafter.next_logits`; the result is log q itself."""
        logits = self._drafter.next_logits(token_ids, parents)
        new = token_ids.unsqueeze(1)
        if parents is None:
            line = torch.cat([self._tails[-1], token_ids])
            tails = line.unfold(0, len(self.weights), 1)[1:]
        else:
            tails = torch.cat([self._tails[parents + 1][:, 1:], new], 1)
        self._tails = torch.cat([self._tails, tails])
        self._tokens = torch.cat([self._tokens, token_ids])
        return self._mix(logits, tails)

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """See `Drafter.keep`."""
        self._drafter.keep(path, target_hidden)
        kept = self._tokens[:path] if isinstance(path, int) else self._tokens[path]
        self._text = torch.cat([self._text, kept])
        self._begin_tree()

    def _begin_tree(self) -> None:
        size = len(self.weights)
        padded = torch.cat([self._text.new_full((size,), _NO_TOKEN), self._text])
        self._tails = padded[-size:].unsqueeze(0)
        self._tokens = self._text[:0]

    def _mix(self, logits: Tensor, tails: Tensor) -> Tensor:
        """log((1 − weight)·q + weight·copied), row by row."""
        logprobs = logits.float().log_softmax(-1)
        if self._text.shape[0] < 2:
            return logprobs
        lengths, copied = longest_match(self._text, tails)
        shares = logprobs.new_tensor((0.0, *self.weights))[lengths].unsqueeze(1)
        mixed = logprobs + torch.log1p(-shares)
        token = copied.unsqueeze(1)
        return mixed.scatter(1, token, torch.logaddexp(mixed.gather(1, token), shares.log()))


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
    padded = torch.cat([text.new_full((size - 1,), _NO_TOKEN - 1), text])
    # windows[j, −i] stands i − 1 tokens before place j
    windows = padded.unfold(0, size, 1)[:ends]
    equal = (windows.unsqueeze(0) == tails.unsqueeze(1)).flip(-1)
    lengths = equal.int().cumprod(-1).sum(-1)  # [R, ends]
    places = torch.arange(ends, device=text.device)
    best = (lengths * ends + places).argmax(-1)
    return lengths.gather(1, best.unsqueeze(1)).squeeze(1), text[best + 1]
