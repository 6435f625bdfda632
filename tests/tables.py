"""A language model that is a table, for tests that enumerate every branch of a decoder.

It has the verbs of CachedLM and Drafter and gives each context its own random distribution, so
that a law over sequences is known exactly and a pass costs microseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mtad.lm import Output


class TableLM:
    """log p(· | context) = the logits that a hash of the context seeds."""

    def __init__(self, vocab_size: int, seed: int, sharpness: float = 1.5) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device("cpu")
        self.passes = 0
        self.positions = 0
        self.target_layers: tuple[int, ...] = ()
        self._seed = seed
        self._sharpness = sharpness
        self._prefix: tuple[int, ...] = ()
        self._nodes: list[tuple[int, ...]] = []
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def fresh(self) -> TableLM:
        """The same model with an empty cache."""
        other = TableLM(self.vocab_size, self._seed, self._sharpness)
        other._rows = self._rows
        return other

    @property
    def nodes(self) -> int:
        return len(self._nodes)

    @property
    def length(self) -> int:
        return len(self._prefix)

    def logits_after(self, context: Sequence[int]) -> Tensor:
        key = tuple(context)
        if key not in self._rows:
            digest = hashlib.sha256(repr((self._seed, key)).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            row = torch.randn(self.vocab_size, generator=generator) * self._sharpness
            self._rows[key] = row
        return self._rows[key]

    def prefill(self, token_ids: Tensor, target_hidden: object = None) -> None:
        """The second argument is a target's layers or a draft's hidden states: neither is read."""
        self._prefix, self._nodes = tuple(token_ids.tolist()), []

    def forward(
        self,
        token_ids: Tensor,
        parents: Tensor | None = None,
        *,
        levels: int = 1,
        layers: Sequence[int] = (),
    ) -> Output:
        assert levels >= 1 and not layers
        self.passes += 1
        self.positions += token_ids.shape[0]
        first = len(self._nodes)
        above = (
            range(first - 1, first - 1 + token_ids.shape[0])
            if parents is None
            else parents.tolist()
        )
        for token, parent in zip(token_ids.tolist(), above, strict=True):
            before = self._prefix if parent < 0 else self._nodes[parent]
            self._nodes.append((*before, token))
        return Output(torch.stack([self.logits_after(c) for c in self._nodes[first:]]), None)

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Tensor:
        return self.forward(token_ids, parents).logits

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        kept = list(range(path)) if isinstance(path, int) else path.tolist()
        for node in kept:
            context = self._nodes[node]
            assert context[:-1] == self._prefix, "keep was given something that is no path"
            self._prefix = context
        self._nodes = []
