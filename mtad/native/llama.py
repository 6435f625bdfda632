"""A Hugging Face Llama on the kernels, and how a run walks through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from mtad.eager import Output
from mtad.errors import PairError
from mtad.native import library
from mtad.native.model import LayerWeights, NativeModel
from mtad.native.packing import BLOCK, fits
from mtad.native.rows import NATIVE_SEARCH


class NativeLlama:
    """A model made ready for the native engine; see `mtad.lm.Runnable`.

    The weights are copied into the kernels' layout; the embedding stays the model's own.

    Attributes:
        model: its layers and its head.
    """

    def __init__(self, model: PreTrainedModel, *, exact: bool = False) -> None:
        """Packs a LlamaForCausalLM on the CPU.

        Args:
            model: the model.
            exact: keep the weights in float32 instead of 4 or 8 bits.

        Raises:
            PairError: the model is not one that the kernels know.
        """
        reason = unsupported_reason(model)
        if reason:
            raise PairError(reason)
        config = model.config
        rotary = model.model.rotary_emb
        cosines, sines = rotary_tables(rotary.inv_freq, config.max_position_embeddings)
        self.model = NativeModel(
            _layers_of(model),
            model.model.norm.weight,
            model.lm_head.weight,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            eps=config.rms_norm_eps,
            cosines=cosines * rotary.attention_scaling,
            sines=sines * rotary.attention_scaling,
            embedding=model.get_input_embeddings().weight,
            exact=exact,
        )

    def passes(self) -> NativePasses:
        """It with an empty cache."""
        return NativePasses(self)


class NativePasses:
    """See `mtad.eager.Passes`. A slot that is dropped is simply written again."""

    def __init__(self, llama: NativeLlama) -> None:
        self.device = torch.device("cpu")
        self.vocab_size = llama.model.head_rows
        self._cache = llama.model.cache()

    def read(self, token_ids: Tensor, length: int, layers: Sequence[int]) -> Tensor | None:
        """See `Passes.read`."""
        count, taps = token_ids.shape[0], tuple(layers)
        return self._cache.forward(token_ids, length, count, layers=taps, logits=False).tapped

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
        count = token_ids.shape[0]
        visible = None if ancestors is None else ancestors[-count:]
        rows = self._cache.forward(
            token_ids, length, nodes + count, visible, positions, layers=tuple(layers)
        )
        assert rows.logits is not None
        return Output(rows.logits, rows.tapped, NATIVE_SEARCH)

    def grow_tree(
        self, ancestors: Tensor | None, parents: Tensor, levels: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """See `Passes.grow_tree`."""
        old, count = 0 if ancestors is None else ancestors.shape[0], parents.shape[0]
        ancestors = None if ancestors is None else ancestors.contiguous()
        parents = parents.long().contiguous()
        grown = torch.empty(old + count, old + count, dtype=torch.bool)
        positions = torch.empty(count, dtype=torch.int64)
        failed = library.load().mtad_grow_tree(
            *(None if ancestors is None else ancestors.data_ptr(), old),
            *(parents.data_ptr(), count, length, grown.data_ptr(), positions.data_ptr()),
        )
        if failed:
            raise IndexError(
                f"parents are {parents.tolist()}, but each must be −1 or a node before its own,"
                f" which are counted from {old} on"
            )
        return grown, positions

    def crop(self, length: int) -> None:
        """See `Passes.crop`."""

    def select(self, length: int, nodes: Tensor) -> None:
        """See `Passes.select`."""
        self._cache.move(length + nodes, length)

    def save(self, length: int) -> tuple[Tensor, ...]:
        """See `Passes.save`."""
        return self._cache.save(length)

    def load(self, tensors: Sequence[Tensor], length: int) -> None:
        """See `Passes.load`."""
        self._cache.load(tensors, length)


def rotary_tables(frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """[size / 2] frequencies → cosines and sines [positions, size / 2], float32."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies.float().cpu())
    return angles.cos(), angles.sin()


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why the kernels cannot run a model; None if they can."""
    name = type(model).__name__
    if type(model) is not LlamaForCausalLM:
        return f"The native engine runs Llama models; this one is a {name}."
    config = model.config
    device = model.get_input_embeddings().weight.device
    if device.type != "cpu":
        return f"The native engine runs on the CPU; this {name} is on {device}."
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    sizes = (
        (config.num_attention_heads + 2 * config.num_key_value_heads) * size,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
    )
    if not (
        size % BLOCK == 0
        and all(fits(rows, 32) for rows in sizes)
        and all(
            fits(BLOCK, columns)
            for columns in (sizes[1], sizes[2], config.num_attention_heads * size)
        )
    ):
        return (
            f"The native engine takes heads and a vocabulary in multiples of {BLOCK} and widths in"
            f" multiples of 32; this model has heads of {size}, widths of {config.hidden_size} and"
            f" {config.intermediate_size}, a vocabulary of {config.vocab_size:,}."
        )
    if config.hidden_act != "silu" or config.attention_bias or config.mlp_bias:
        return "The native engine knows SiLU and no biases; this Llama has others."
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"The native engine has no rotary positions that change with the length ({rope})."
    return None


def _layers_of(model: PreTrainedModel) -> Iterator[LayerWeights]:
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        joined = [part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        yield LayerWeights(
            attention_norm=layer.input_layernorm.weight,
            qkv=torch.cat(joined).detach(),
            out=attention.o_proj.weight.detach(),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate=mlp.gate_proj.weight.detach(),
            up=mlp.up_proj.weight.detach(),
            down=mlp.down_proj.weight.detach(),
        )
