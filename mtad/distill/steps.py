"""How the target writes many rows in lockstep: one token a pass, without padding or mask.

Any model through torch; a Llama on a CPU through kernels of its own, several times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mtad.inspection import cache_argument
from mtad.native.llama import NativeLlama

# One pass of the target over the next token of every row: [B] → logits [B, V] and the hidden
# states [B, F·H] that the draft will read, [B, 0] if none were asked for.
Step = Callable[[Tensor], tuple[Tensor, Tensor]]


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer of fixed capacity: a new token is written in place, nothing is copied."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, n, size] keys and values and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all_keys = _with_capacity(key_states, self._capacity)
            self._all_values = _with_capacity(value_states, self._capacity)
        start, self._length = self._length, self._length + key_states.shape[2]
        self._all_keys[:, :, start : self._length] = key_states
        self._all_values[:, :, start : self._length] = value_states
        self.keys = self._all_keys[:, :, : self._length]
        self.values = self._all_values[:, :, : self._length]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens written so far."""
        return self._length


def _with_capacity(states: Tensor, capacity: int) -> Tensor:
    batch, heads, _, size = states.shape
    return states.new_empty(batch, heads, capacity, size)


def torch_steps(model: PreTrainedModel, capacity: int, target_layers: Sequence[int]) -> Step:
    """Passes of any model, with an empty cache for rows of up to `capacity` tokens."""
    device = model.get_input_embeddings().weight.device
    count = model.config.get_text_config().num_hidden_layers
    cache = Cache(layers=[GrowingLayer(capacity) for _ in range(count)])
    given = {cache_argument(model) or "cache": cache}

    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        output = model(
            tokens.to(device).unsqueeze(1),
            use_cache=True,
            output_hidden_states=bool(target_layers),
            **given,
        )
        logits = output.logits[:, -1].float()
        hidden = [output.hidden_states[layer][:, -1] for layer in target_layers]
        return logits, torch.cat(hidden, -1) if hidden else logits[:, :0]

    return step


def native_steps(
    model: NativeLlama,
    rows: int,
    capacity: int,
    target_layers: Sequence[int],
) -> Step:
    """The same on the CPU's own kernels, several times as fast."""
    cache = model.model.cache(rows, capacity)
    written = 0

    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal written
        output = cache.forward(tokens, written, 1, layers=tuple(target_layers))
        written += 1
        assert output.logits is not None
        return output.logits, output.logits[:, :0] if output.tapped is None else output.tapped

    return step
