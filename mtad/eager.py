"""The engine that runs any Hugging Face model: transformers' own code and cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mtad import inspection, tree
from mtad.errors import PairError
from mtad.logits import TORCH_SEARCH, Search


class Output(NamedTuple):
    """What a pass gives for n new nodes.

    Attributes:
        logits: [n, V].
        hidden: [n, F·H], the hidden states of the F layers that were asked for, one after the
            other; None if none were.
        search: how this engine reads wide rows.
    """

    logits: Tensor
    hidden: Tensor | None
    search: Search = TORCH_SEARCH


@dataclass(frozen=True)
class Saved:
    """What a text has left in a cache, copied, so that it outlives the run. Nobody writes to it.

    Attributes:
        length: tokens of the text, counted from its first.
        tensors: laid out as the one who made them wants them back.
    """

    length: int
    tensors: tuple[Tensor, ...]

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class Passes(Protocol):
    """One model with one cache, as an engine runs it; `mtad.lm.CachedLM` keeps the books.

    The cache is a row of slots: those of the committed prefix, then those of the nodes.

    Attributes:
        device: where token ids go in.
        vocab_size: columns of the logits.
    """

    device: torch.device
    vocab_size: int

    def read(self, token_ids: Tensor, length: int, layers: Sequence[int]) -> Tensor | None:
        """Adds [n] tokens behind `length` slots without logits → the hidden states [n, F·H]."""

    def forward(
        self,
        token_ids: Tensor,  # [n]
        positions: Tensor | None,  # [n]
        length: int,
        nodes: int,
        ancestors: Tensor | None,  # [nodes + n, nodes + n]
        layers: Sequence[int],
    ) -> Output:
        """Adds n nodes behind the `length` slots of the prefix and the `nodes` that are there.

        `ancestors` is True where column is row or above it, over all nodes, the new ones last.
        While all of them are a chain it is None, and so are the positions in the text, which are
        those of the slots. Logits may be on another device.
        """

    def grow_tree(
        self,
        ancestors: Tensor | None,  # [nodes, nodes]
        parents: Tensor,  # [n]
        levels: int,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """`mtad.tree.grown` of n nodes above a prefix of `length` tokens."""

    def crop(self, length: int) -> None:
        """Drops all slots from `length` on."""

    def select(self, length: int, nodes: Tensor) -> None:
        """Keeps the prefix and, behind it, these of the nodes (ascending [k]); drops the rest."""

    def save(self, length: int) -> tuple[Tensor, ...]:
        """Copies of the first `length` slots."""

    def load(self, tensors: Sequence[Tensor], length: int) -> None:
        """Fills the first `length` slots of an empty cache from what `save` gave, or its begin."""


class EagerPasses:
    """See `Passes`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.device = model.get_input_embeddings().weight.device
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._model = model
        self._dtype = model.dtype
        # Without its config the cache keeps everything, also in sliding-window layers, so that
        # every layer can roll back; the masks still apply the window.
        self._cache = DynamicCache()
        self._windows = _attention_windows(model)
        self._cache_argument = {inspection.cache_argument(model) or "cache": self._cache}
        accepted = inspect.signature(model.forward).parameters
        self._last_logit_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def read(self, token_ids: Tensor, length: int, layers: Sequence[int]) -> Tensor | None:
        """See `Passes.read`."""
        positions = self._slots(length, token_ids)
        output = self._call(token_ids, None, positions, layers, **self._last_logit_only)
        return self._states(output, layers)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor | None,
        length: int,
        nodes: int,
        ancestors: Tensor | None,
        layers: Sequence[int],
    ) -> Output:
        """See `Passes.forward`."""
        if positions is None:
            positions = self._slots(length + nodes, token_ids)
        mask: Tensor | dict[str, Tensor] | None = None
        if ancestors is not None:
            masks = {
                kind: tree.additive_mask(ancestors, length, token_ids.shape[0], self._dtype, window)
                for kind, window in self._windows.items()
            }
            mask = masks if len(masks) > 1 else next(iter(masks.values()))
        output = self._call(token_ids, mask, positions, layers)
        return Output(output.logits[0], self._states(output, layers))

    grow_tree = staticmethod(tree.grown)

    def crop(self, length: int) -> None:
        """See `Passes.crop`."""
        for layer in self._layers():
            layer.keys = layer.keys[:, :, :length]
            layer.values = layer.values[:, :, :length]

    def select(self, length: int, nodes: Tensor) -> None:
        """See `Passes.select`."""
        prefix = torch.arange(length, device=self.device)
        index = torch.cat([prefix, length + nodes])
        for layer in self._layers():
            there = index.to(layer.keys.device)
            layer.keys = layer.keys.index_select(2, there)
            layer.values = layer.values.index_select(2, there)

    def save(self, length: int) -> tuple[Tensor, ...]:
        """See `Passes.save`; keys and values in turn, empty for a layer that has none."""
        list(self._layers())  # refuses a cache that cannot be cut
        saved: list[Tensor] = []
        for layer in self._cache.layers:
            held = layer.is_initialized
            for states in (layer.keys, layer.values) if held else (torch.empty(0),) * 2:
                saved.append(states[:, :, :length].clone() if held else states)
        return tuple(saved)

    def load(self, tensors: Sequence[Tensor], length: int) -> None:
        """See `Passes.load`."""
        for index, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
            if keys.numel():
                self._cache.update(keys[:, :, :length], values[:, :, :length], index)

    def _slots(self, first: int, token_ids: Tensor) -> Tensor:
        return torch.arange(first, first + token_ids.shape[0], device=self.device)

    def _states(self, output: Any, layers: Sequence[int]) -> Tensor | None:
        if not layers:
            return None
        return torch.cat([output.hidden_states[i][0].to(self.device) for i in layers], -1)

    @torch.no_grad()
    def _call(
        self,
        token_ids: Tensor,
        mask: Tensor | dict[str, Tensor] | None,
        positions: Tensor,
        layers: Sequence[int],
        **kwargs: Any,
    ) -> Any:
        return self._model(
            input_ids=token_ids.unsqueeze(0),
            attention_mask=mask,
            position_ids=positions.unsqueeze(0),
            use_cache=True,
            output_hidden_states=bool(layers),
            **self._cache_argument,
            **kwargs,
        )

    def _layers(self) -> Iterator[DynamicLayer]:
        for layer in self._cache.layers:
            if type(layer) is not DynamicLayer:
                raise PairError(
                    f"{type(self._model).__name__} keeps a {type(layer).__name__} in its cache,"
                    " which cannot roll back. Choose a model with plain attention layers."
                )
            if layer.is_initialized:
                yield layer


def _attention_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """The kinds of attention layer of a model and their sliding windows in tokens.

    A model with one kind takes one mask; a model that mixes kinds takes a mask for each.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"full_attention" if window is None else "sliding_attention"}
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise PairError(
            f"{type(model).__name__} has layers of kind {', '.join(sorted(unknown))}, whose"
            " cache cannot roll back. Choose a model with plain attention layers."
        )
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: windows[kind] for kind in sorted(kinds)}
