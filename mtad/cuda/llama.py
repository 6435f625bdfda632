"""A Hugging Face Llama on this engine, and how a run walks through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from mtad import tree
from mtad.cuda.arena import MOST_ROWS, Arena, Lender, padded
from mtad.cuda.graphs import Graphs, ordinary_tensors
from mtad.cuda.stack import LayerWeights, Stack, fused
from mtad.eager import Output
from mtad.errors import PairError
from mtad.logits import TorchSearch

_MOST_NODES = 256


class CudaLlama:
    """A model made ready for this engine; see `mtad.lm.Runnable`.

    There is one copy of its weights: those of the model become views of fused ones, so that the
    model can be used as before.

    Attributes:
        stack: its layers.
        embedding: [V, H].
        head: [V, H].
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Fuses the weights of a LlamaForCausalLM, wherever it stands.

        Raises:
            PairError: the model is not one that this engine knows.
        """
        reason = unsupported_reason(model)
        if reason:
            raise PairError(reason)
        config, rotary = model.config, model.model.rotary_emb
        with ordinary_tensors():
            self.embedding: Tensor = model.get_input_embeddings().weight.detach()
            self.head: Tensor = model.lm_head.weight.detach()
            self.stack = Stack(
                layers=[_layer_of(layer) for layer in model.model.layers],
                norm=model.model.norm.weight.detach(),
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                eps=config.rms_norm_eps,
                frequencies=rotary.inv_freq.float().to(self.embedding.device),
                scaling=rotary.attention_scaling,
            )
        self._arenas = Lender(lambda: _LlamaArena(self.stack))

    def passes(self) -> CudaPasses:
        """It with an empty cache."""
        return CudaPasses(self, self._arenas)


@dataclass(frozen=True)
class _Inputs:
    """What changes from pass to pass.

    Attributes:
        token_ids: [R].
        first: [1] slot of the first row.
        length: [1] slots that every row sees.
        positions: [R] of the rows in the text; None where they are those of the slots.
        visible: [R, nodes] which of the slots behind `length` each row sees; None for a chain.
    """

    token_ids: Tensor
    first: Tensor
    length: Tensor
    positions: Tensor | None = None
    visible: Tensor | None = None


class _LlamaArena(Arena):
    """An arena with buffers for the inputs of recorded passes."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        with ordinary_tensors():
            token_ids, positions = self.slots.new_zeros(2, MOST_ROWS)
            first, length = self.slots.new_zeros(2, 1)
            visible = self.slots.new_zeros(MOST_ROWS, _MOST_NODES, dtype=torch.bool)
        self._inputs = _Inputs(token_ids, first, length, positions, visible)
        # What follows a pass is read before the next pass.
        self.search = TorchSearch(Graphs(stack.norm.device))

    def fill(
        self,
        token_ids: Tensor,  # [n]
        rows: int,
        first: int,
        length: int,
        positions: Tensor | None,  # [n]
        visible: Tensor | None,  # [n, nodes]
    ) -> _Inputs:
        """The inputs of a pass of n rows, padded to `rows`, in places that stay the same."""
        whole, count = self._inputs, token_ids.shape[0]
        assert whole.positions is not None and whole.visible is not None
        whole.token_ids[:count] = token_ids
        whole.first.fill_(first)
        ids = whole.token_ids[:rows]
        if visible is None:
            return _Inputs(ids, whole.first, whole.length)
        assert positions is not None, "a tree says where its tokens stand"
        whole.length.fill_(length)
        whole.positions[:count] = positions
        seen = whole.visible[:rows, : padded(visible.shape[1])]
        seen.zero_()
        seen[:count, : visible.shape[1]] = visible
        return _Inputs(ids, whole.first, whole.length, whole.positions[:rows], seen)


class CudaPasses:
    """See `mtad.eager.Passes`. A slot that is dropped is simply written again."""

    def __init__(self, llama: CudaLlama, arenas: Lender[_LlamaArena]) -> None:
        self.device = llama.embedding.device
        self.vocab_size = int(llama.head.shape[0])
        self._llama = llama
        self._arena = arenas.lend(self)

    def read(self, token_ids: Tensor, length: int, layers: Sequence[int]) -> Tensor | None:
        """See `Passes.read`. The number of tokens is any, so that it is not recorded."""
        bucket = self._arena.reserve(length + token_ids.shape[0], length)
        inputs = self._given(token_ids, length, length, None, None)
        return self._arena.graphs.launch(lambda: self._states(inputs, bucket, tuple(layers)))[1]

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
        arena, count, first, taps = self._arena, token_ids.shape[0], length + nodes, tuple(layers)
        visible = None if ancestors is None else ancestors[-count:]
        rows = padded(count)
        spread = 0 if visible is None else padded(visible.shape[1])
        recorded = rows <= MOST_ROWS and spread <= _MOST_NODES
        bucket = arena.reserve(first + (rows if recorded else count), first)
        if recorded:
            inputs = arena.fill(token_ids, rows, first, length, positions, visible)
            key = rows, spread, bucket, taps
            found = arena.graphs.run(key, lambda: self._outputs(inputs, bucket, taps))
        else:
            inputs = self._given(token_ids, first, length, positions, visible)
            found = arena.graphs.launch(lambda: self._outputs(inputs, bucket, taps))
        logits, hidden = found
        assert logits is not None
        # The next pass of these shapes writes where this one wrote.
        hidden = None if hidden is None else hidden[:count].clone()
        return Output(logits[:count].clone(), hidden, arena.search)

    grow_tree = staticmethod(tree.grown)

    def crop(self, length: int) -> None:
        """See `Passes.crop`."""

    def select(self, length: int, nodes: Tensor) -> None:
        """See `Passes.select`."""
        self._arena.move(length + nodes, length)

    def save(self, length: int) -> tuple[Tensor, ...]:
        """See `Passes.save`. A copy: the arena and its graphs are lent to the next run."""
        return self._arena.save(length)

    def load(self, tensors: Sequence[Tensor], length: int) -> None:
        """See `Passes.load`."""
        self._arena.load(tensors, length)

    def _given(
        self,
        token_ids: Tensor,
        first: int,
        length: int,
        positions: Tensor | None,
        visible: Tensor | None,
    ) -> _Inputs:
        start = torch.full((1,), first, device=self.device)
        end = torch.full((1,), length, device=self.device)
        return _Inputs(token_ids, start, end, positions, visible)

    def _outputs(
        self, inputs: _Inputs, bucket: int, taps: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [R, V] and the hidden states asked for [R, F·H]."""
        llama = self._llama
        states, hidden = self._states(inputs, bucket, taps)
        return F.linear(llama.stack.normed(states, llama.stack.norm), llama.head), hidden

    def _states(
        self, inputs: _Inputs, bucket: int, taps: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        slots = self._arena.slots
        own = inputs.first + slots[: inputs.token_ids.shape[0]]
        positions = own if inputs.positions is None else inputs.positions
        if inputs.visible is None:
            visible = slots[:bucket] <= own.unsqueeze(1)
        else:
            visible = seen_below(inputs.visible, slots[:bucket] - inputs.length)
        x = F.embedding(inputs.token_ids, self._llama.embedding)
        return self._llama.stack.forward(x, positions, own, visible, self._arena.cache, taps)


def seen_below(visible: Tensor, places: Tensor) -> Tensor:
    """Everything of the prefix, and of the nodes behind it those that are visible.

    Args:
        visible: [R, nodes] bool.
        places: [S] of slots, counted from the end of the prefix.

    Returns:
        [R, S] bool.
    """
    nodes = visible.shape[1]
    found = visible.index_select(1, places.clamp(0, nodes - 1)) & (places < nodes)
    return found | (places < 0)


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why this engine cannot run a model; None if it can."""
    name = type(model).__name__
    if type(model) is not LlamaForCausalLM:
        return f"The CUDA engine runs Llama models; this one is a {name}."
    config = model.config
    places = {str(weight.device) for weight in model.parameters()}
    if len(places) > 1 or "meta" in places:
        return (
            f"The CUDA engine runs models on one device; this {name} is spread over"
            f" {', '.join(sorted(places))}."
        )
    projections = [
        part
        for layer in model.model.layers
        for part in (*layer.self_attn.children(), *layer.mlp.children())
        if getattr(part, "weight", None) is not None
    ]
    if any(type(part) is not nn.Linear for part in projections):
        other = next(type(part).__name__ for part in projections if type(part) is not nn.Linear)
        return f"The CUDA engine knows plain linear layers; this {name} has {other} layers."
    if config.hidden_act != "silu" or any(part.bias is not None for part in projections):
        return "The CUDA engine knows SiLU and no biases; this Llama has others."
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"The CUDA engine has no rotary positions that change with the length ({rope})."
    return None


def _layer_of(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=fused([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=attention.o_proj.weight.detach(),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=fused([mlp.gate_proj, mlp.up_proj]),
        down=mlp.down_proj.weight.detach(),
    )
