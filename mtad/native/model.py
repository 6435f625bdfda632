"""A stack of Llama's layers on the kernels: weights packed once, passes in one call each.

`NativeModel` holds what never changes and may be shared; a `NativeCache` belongs to one run. Tokens
come in and leave as hidden states and logits. A draft's layers stand here too: what goes into them
is `mtad.native.drafter`'s business, and they have no embedding.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtad.native import abi
from mtad.native.linear import matrix
from mtad.native.memory import Arena, floats
from mtad.native.packing import BLOCK, CODES4, FLOAT32, pack
from mtad.native.threads import context

_FIRST_SLOTS = 512
_UNKNOWN_TOKEN = 2  # what `mtad_forward` says of one
# Weights of more bytes do not stay in a processor's cache from one pass to the next.
_STAYING_BYTES = 16 * 2**20


@dataclass(frozen=True)
class LayerWeights:
    """One pre-norm layer of grouped-query attention and a gated MLP, all float32.

    Attributes:
        attention_norm: [H].
        qkv: [(heads + 2·kv_heads)·size, H], queries first, then keys, then values.
        out: [H, heads·size].
        mlp_norm: [H].
        gate, up: [M, H].
        down: [H, M].
    """

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Rows(NamedTuple):
    """What a pass gives for n rows.

    Attributes:
        logits: [n − skipped, head rows]; None if none were asked for.
        tapped: [n, F·H] the hidden states asked for, one after the other; None if none were.
    """

    logits: Tensor | None
    tapped: Tensor | None


class NativeModel:
    """Packed layers, final norm and head.

    Attributes:
        width: H.
        num_layers: L.
        weight_bytes: that a pass reads.
        weights: "float32", "int4" where the layers have four bits a weight, else "int8".
        cache_dtype: of keys and values.
    """

    def __init__(
        self,
        layers: Iterable[LayerWeights],
        norm: Tensor,  # [H]
        head: Tensor,  # [K, H]
        *,
        heads: int,
        kv_heads: int,
        eps: float,
        cosines: Tensor,  # [P, size / 2]
        sines: Tensor,  # [P, size / 2]
        embedding: Tensor | None = None,  # [V, H]
        exact: bool = False,
    ) -> None:
        """Packs everything: `exact` in float32, else in as few bits as lose nothing, or eight."""
        kind = FLOAT32 if exact else None
        self._arena = Arena()
        self._kept: list[Tensor] = []  # the kernels hold pointers into these
        self.weight_bytes = 0
        made = [self._layer(layer, kind) for layer in layers]
        self.width = int(norm.shape[0])
        self.num_layers = len(made)
        self._layers = (abi.Layer * len(made))(*made)
        kinds = {each.kind for one in made for each in (one.qkv, one.out, one.gate_up, one.down)}
        self.cache_dtype = torch.float32 if exact else torch.float16
        self.weights = "float32" if exact else "int4" if kinds == {CODES4} else "int8"
        packed_head = self.matrix(head, kind)
        size = 2 * int(cosines.shape[1])
        self.head_rows = int(head.shape[0])
        self._kv = (kv_heads, size)
        self.struct = abi.Model(
            layers=len(made),
            width=self.width,
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            mlp=made[0].gate_up.rows // 2,
            eps=eps,
            cosines=self._vector(cosines),
            sines=self._vector(sines),
            embedding=None if embedding is None else self._rows(embedding),
            vocabulary=0 if embedding is None else embedding.shape[0],
            layer=self._layers,
            norm=self._vector(norm),
            head=packed_head,
        )
        if self.weight_bytes > _STAYING_BYTES:
            for one in self._layers:
                for each in (one.qkv, one.out, one.gate_up, one.down):
                    each.streamed = 1
            self.struct.head.streamed = 1

    def cache(self, texts: int = 1, slots: int = _FIRST_SLOTS) -> NativeCache:
        """An empty cache for one text, or for several that grow in lockstep."""
        return NativeCache(self, texts, slots)

    def cache_shape(self, texts: int, slots: int) -> tuple[int, int, int, int]:
        """[layers · texts, kv_heads, slots, size]: of keys and of values."""
        kv_heads, size = self._kv
        return self.num_layers * texts, kv_heads, slots, size

    def matrix(self, weight: Tensor, kind: int | None) -> abi.Matrix:
        """Packs [rows, columns], see `packing.pack`; it lives as long as the model."""
        packed = pack(weight, kind)
        packed = dataclasses.replace(packed, data=self._arena.place(packed.data))
        self._kept.append(packed.data)
        self.weight_bytes += packed.data.numel()
        return matrix(packed)

    def _layer(self, weights: LayerWeights, kind: int | None) -> abi.Layer:
        # The kernel multiplies 16 gates with the 16 values that it computes next.
        pairs = [part.view(-1, 1, BLOCK, part.shape[1]) for part in (weights.gate, weights.up)]
        gate_up = torch.cat(pairs, 1).view(-1, weights.gate.shape[1])
        return abi.Layer(
            attention_norm=self._vector(weights.attention_norm),
            mlp_norm=self._vector(weights.mlp_norm),
            qkv=self.matrix(weights.qkv, kind),
            out=self.matrix(weights.out, kind),
            gate_up=self.matrix(gate_up, kind),
            down=self.matrix(weights.down, kind),
        )

    def _rows(self, values: Tensor) -> int:
        """Float32 rows that are already such stay where they are."""
        own = values.detach().float().contiguous()
        self._kept.append(own)
        return own.data_ptr()

    def _vector(self, values: Tensor) -> int:
        own = values.detach().to("cpu", torch.float32).contiguous().clone()
        self._kept.append(own)
        return own.data_ptr()


@functools.cache
def _taps(layers: tuple[int, ...]) -> Tensor:
    return torch.tensor(layers, dtype=torch.int32)


class NativeCache:
    """Keys and values of one run, and the passes that fill them."""

    def __init__(self, model: NativeModel, texts: int, slots: int) -> None:
        self.model = model
        self.texts = texts
        self._slots = 0
        self._keys = self._values = floats(0)
        self.reserve(slots, 0)

    def forward(
        self,
        token_ids: Tensor,  # [n]
        prefix: int,
        nodes: int,
        visible: Tensor | None = None,  # [n, nodes]
        positions: Tensor | None = None,  # [n]
        *,
        layers: tuple[int, ...] = (),
        logits: bool = True,
        skipped: int = 0,
    ) -> Rows:
        """One pass.

        Args:
            token_ids: of the new rows.
            prefix: slots that every row sees.
            nodes: slots behind them; the last n become those of the new rows. With several texts
                1: every text gets one.
            visible: who sees which of the nodes; None for a chain.
            positions: of the tokens in the text; None where they are those of the slots.
            layers: hidden states to return: 0 is the embedding, i what layer i gives, the
                last one after the final norm.
            logits: whether to multiply with the head.
            skipped: so many of the first rows get no logits.

        Raises:
            IndexError: a token is none of the vocabulary; nothing was read.
        """
        model, rows = self.model, token_ids.shape[0]
        self.reserve(prefix + nodes, prefix + nodes - (1 if self.texts > 1 else rows))
        token_ids = token_ids.long().contiguous()
        positions = None if positions is None else positions.long().contiguous()
        mask = None if visible is None else visible.to(torch.uint8).contiguous()
        out = floats(rows - skipped, model.head_rows) if logits else None
        tapped = floats(rows, len(layers) * model.width) if layers else None
        threads = context()
        failed = threads.library.mtad_forward(
            threads.pointer,
            ctypes.byref(model.struct),
            ctypes.byref(self.struct),
            ctypes.byref(
                abi.Pass(
                    rows,
                    prefix,
                    nodes,
                    token_ids.data_ptr(),
                    None if positions is None else positions.data_ptr(),
                    None if mask is None else mask.data_ptr(),
                    None if out is None else out.data_ptr(),
                    skipped,
                    len(layers),
                    _taps(layers).data_ptr(),
                    None if tapped is None else tapped.data_ptr(),
                )
            ),
        )
        if failed == _UNKNOWN_TOKEN:
            raise IndexError(
                f"token ids reach from {int(token_ids.min())} to {int(token_ids.max())}, but must"
                f" be from 0 to {model.struct.vocabulary - 1}"
            )
        if failed:
            raise MemoryError(f"no memory for a pass of {rows:,} rows")
        return Rows(out, tapped)

    def move(self, slots: Tensor, start: int) -> None:
        """Moves ascending slots [k] down to start, start + 1, …; what stood there is lost."""
        index = slots.to(torch.int32).contiguous()
        context().library.mtad_move(
            ctypes.byref(self.model.struct),
            ctypes.byref(self.struct),
            index.data_ptr(),
            index.shape[0],
            start,
        )

    def save(self, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of the first `length` slots, of one text."""
        blocks = -(-length // BLOCK)
        return self._keys[:, :, :blocks].clone(), self._values[:, :, :length].clone()

    def load(self, tensors: Sequence[Tensor], length: int) -> None:
        """Fills the first `length` slots of an empty cache from what `save` gave, or its begin."""
        keys, values = tensors
        blocks = -(-length // BLOCK)
        self.reserve(length, 0)
        self._keys[:, :, :blocks] = keys[:, :, :blocks]
        self._values[:, :, :length] = values[:, :, :length]

    def reserve(self, slots: int, used: int) -> None:
        """Makes room for `slots`, keeping the first `used`; `struct` changes with that."""
        if slots <= self._slots:
            return
        # Twice as many each time: a text grows token by token.
        size = -(-max(slots, 2 * self._slots) // BLOCK) * BLOCK
        shape = self.model.cache_shape(self.texts, size)
        first, heads, _, head_size = shape
        # Keys lie in blocks of 16 slots, so that a run of slots is a run of blocks.
        kind = self.model.cache_dtype
        keys = torch.empty(first, heads, size // BLOCK, head_size * BLOCK, dtype=kind)
        values = torch.empty(shape, dtype=kind)
        if used:
            blocks = -(-used // BLOCK)
            keys[:, :, :blocks] = self._keys[:, :, :blocks]
            values[:, :, :used] = self._values[:, :, :used]
        self._keys, self._values, self._slots = keys, values, size
        halves = kind == torch.float16
        self.struct = abi.Cache(keys.data_ptr(), values.data_ptr(), size, self.texts, halves)
