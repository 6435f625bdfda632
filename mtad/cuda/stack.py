"""A stack of Llama's layers as plain functions of tensors.

No shape and no control flow depends on a value, so that a pass can be recorded. About ten kernels
a layer: queries, keys and values come from one product and turn together, what is added to the
stream is added by the product itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtad.cuda.fused import Fused, Plain, kernels

# What attention adds to the scores of slots that a row must not see: their weights become exactly
# zero, and no kernel overflows when it scales the sum, in float16 either.
_UNSEEN = -30_000.0

# The order of preference. cuDNN would plan anew for each shape; both of these take any mask, and
# with the queries of a group as rows of their key-value head neither copies the cache.
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class LayerWeights:
    """One pre-norm layer of grouped-query attention and a gated MLP.

    Attributes:
        attention_norm: [H].
        qkv: [(heads + 2·kv_heads)·size, H], queries first, then keys, then values.
        out: [H, heads·size].
        mlp_norm: [H].
        gate_up: [2·M, H], the gate first.
        down: [H, M].
    """

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Stack:
    """Layers, and the norm behind them.

    Attributes:
        layers: from the first to the last.
        norm: [H].
        heads: query heads.
        kv_heads: key and value heads.
        eps: of every norm.
        frequencies: [size / 2] of the rotary positions, float32.
        scaling: of their cosines and sines.
    """

    layers: Sequence[LayerWeights]
    norm: Tensor
    heads: int
    kv_heads: int
    eps: float
    frequencies: Tensor
    scaling: float = 1.0

    @property
    def kernels(self) -> Plain | Fused:
        """What it runs between its products."""
        return kernels(self.norm.device)

    @property
    def width(self) -> int:
        """H."""
        return int(self.norm.shape[0])

    def cache(self, slots: int) -> Tensor:
        """[layers, 2·kv_heads, slots, size] zeros: keys, then values."""
        size = 2 * self.frequencies.shape[0]
        return self.norm.new_zeros(len(self.layers), 2 * self.kv_heads, slots, size)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """[R, H] scaled to a mean square of one, times [H]."""
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def forward(
        self,
        x: Tensor,  # [R, H]
        positions: Tensor,  # [R]
        slots: Tensor,  # [R]
        visible: Tensor,  # [R, S]
        cache: Tensor,  # [layers, 2·kv_heads, S or more, size]
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """One pass.

        Args:
            x: the rows; overwritten.
            positions: of the rows in the text.
            slots: where their keys and values go.
            visible: which of the first S slots each row sees, its own included.
            cache: written to.
            taps: hidden states to return: 0 is the embedding, i what layer i gives, the last
                one after the final norm.

        Returns:
            x after the last layer, before the final norm, and the states [R, F·H]; None if none
            were asked for.
        """
        seen: dict[int, Tensor] = {}
        mask = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
        mask = self._by_group(mask.masked_fill_(~visible, _UNSEEN))
        angles = positions.float().unsqueeze(1) * self.frequencies
        turns = angles.cos() * self.scaling, angles.sin() * self.scaling
        with sdpa_kernel(_BACKENDS):
            for index, (layer, kept) in enumerate(zip(self.layers, cache, strict=True)):
                if index in taps:
                    seen[index] = x.clone()
                self._attend(layer, x, turns, slots, mask, kept)
                both = F.linear(self.normed(x, layer.mlp_norm), layer.gate_up)
                x.addmm_(self.kernels.gated(both), layer.down.t())
        if len(self.layers) in taps:
            seen[len(self.layers)] = self.normed(x, self.norm)
        return x, torch.cat([seen[tap] for tap in taps], -1) if taps else None

    def _attend(
        self,
        layer: LayerWeights,
        x: Tensor,
        turns: tuple[Tensor, Tensor],
        slots: Tensor,
        mask: Tensor,  # [R · group, S]
        kept: Tensor,  # [2·kv_heads, slots, size]
    ) -> None:
        rows, size = x.shape[0], kept.shape[-1]
        joined = F.linear(self.normed(x, layer.attention_norm), layer.qkv).view(rows, -1, size)
        query = self.kernels.turn(joined, turns, slots, kept)
        seen = kept[:, : mask.shape[1]]
        mixed = F.scaled_dot_product_attention(
            query.unsqueeze(0),
            seen[: self.kv_heads].unsqueeze(0),
            seen[self.kv_heads :].unsqueeze(0),
            mask,
        )
        mixed = mixed.view(self.kv_heads, rows, -1, size).transpose(0, 1)
        x.addmm_(mixed.reshape(rows, -1), layer.out.t())

    def _by_group(self, mask: Tensor) -> Tensor:
        """[R, S] → [R · group, S]: the queries of one key-value head are rows beside each other."""
        group = self.heads // self.kv_heads
        return mask.unsqueeze(1).expand(-1, group, -1).reshape(-1, mask.shape[1])


def fused(linears: Sequence[nn.Linear]) -> Tensor:
    """The weights of linear layers of one input as one matrix, whose rows they become views of.

    So that there is no second copy of them. Layers that were fused before stay as they are.
    """
    weights = [linear.weight.detach() for linear in linears]
    first = weights[0]
    total = sum(weight.shape[0] for weight in weights)
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    ends = [weight.data_ptr() + weight.numel() * weight.element_size() for weight in weights]
    if len(storages) == 1 and [weight.data_ptr() for weight in weights[1:]] == ends[:-1]:
        return first.as_strided((total, first.shape[1]), (first.shape[1], 1))
    joined = torch.cat(weights)
    start = 0
    for linear in linears:
        stop = start + linear.weight.shape[0]
        linear.weight.data = joined[start:stop]
        start = stop
    return joined
