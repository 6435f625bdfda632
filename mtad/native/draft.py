"""A `HiddenDraft` packed for the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mtad.errors import PairError
from mtad.four_bits import GROUP
from mtad.hidden_draft import NORM_EPS, Ends, HiddenDraft, Layer
from mtad.native import abi
from mtad.native.llama import rotary_tables
from mtad.native.model import LayerWeights, NativeModel
from mtad.native.packing import BLOCK, CODES8, FLOAT32, pack
from mtad.native.threads import context

_TABLE_ROWS = 4096


class NativeDraft:
    """A draft whose every step is one call of the kernels.

    Attributes:
        draft: what it was made from.
        model: its layers, and the rows of the target's head.
        embedding: [V, H] float32, the target's.
        weight_bytes: that a pass reads, the rows of the target's head among them.
        empty_rows: a block of rows of zeros, as further rows of the target's head are packed.
    """

    def __init__(
        self, draft: HiddenDraft, ends: Ends, positions: int, *, exact: bool = False
    ) -> None:
        """Packs a draft for a `NativeLlama`.

        Args:
            draft: the draft, float32.
            ends: the target's; its head has no bias, as no Llama's has.
            positions: how long a text can become.
            exact: keep the weights in float32 instead of 4 or 8 bits.

        Raises:
            PairError: its shape is not one that the kernels know.
        """
        reason = unsupported_draft(draft)
        if reason:
            raise PairError(reason)
        config = draft.config
        size = config.hidden_size // config.num_heads
        powers = torch.arange(0, size, 2, dtype=torch.float32) / size
        cosines, sines = rotary_tables(1.0 / config.rope_theta**powers, positions)
        kind = FLOAT32 if exact else None
        self.draft = draft
        self._ends = ends
        zeros = torch.zeros(BLOCK, config.hidden_size)
        self.empty_rows = pack(zeros, FLOAT32 if exact else CODES8)
        self.model = NativeModel(
            _layers_of(draft),
            draft.norm,
            _padded(ends.head),
            heads=config.num_heads,
            kv_heads=config.num_key_value_heads,
            eps=NORM_EPS,
            cosines=cosines,
            sines=sines,
            exact=exact,
        )
        read, join = (self.model.matrix(each.weight, kind) for each in (draft.read, draft.join))
        norms = [norm.detach() for norm in (draft.read_norm, draft.token_norm, draft.state_norm)]
        self.weight_bytes = self.model.weight_bytes
        self.embedding = _table(ends)
        self._kept = norms  # the kernels hold pointers into these
        self.struct = abi.Draft(
            self.model.struct,
            *(read, join),
            *(norm.data_ptr() for norm in norms),
            len(config.target_layers),
        )

    def head_rows(self, token_ids: Tensor) -> Tensor:
        """[n, H] float32, the rows of the target's head for [n] tokens."""
        return self._ends.rows(token_ids)[0].float().contiguous()

    def read_target(self, hidden: Tensor, states: Tensor) -> None:
        """The target's hidden states [n, F·H] → the states [n, H] that the draft reads."""
        hidden = hidden.float().contiguous()
        threads = context()
        failed = threads.library.mtad_read(
            threads.pointer,
            ctypes.byref(self.struct),
            hidden.data_ptr(),
            states.data_ptr(),
            hidden.shape[0],
        )
        if failed:
            raise MemoryError(f"no memory for {hidden.shape[0]:,} rows")


def unsupported_draft(draft: HiddenDraft) -> str | None:
    """Why the kernels cannot run a draft; None if they can."""
    config = draft.config
    size = config.hidden_size // config.num_heads
    if draft.norm.device.type != "cpu":
        return f"The native engine runs on the CPU; this draft is on {draft.norm.device}."
    if size % BLOCK or config.hidden_size % GROUP or config.mlp_size % GROUP:
        return (
            f"The native engine takes heads in multiples of {BLOCK} and widths in multiples of"
            f" {GROUP}; this draft has heads of {size}, widths of {config.hidden_size} and"
            f" {config.mlp_size}."
        )
    return None


def _table(ends: Ends) -> Tensor:
    """[V, H] what `ends.embed` says of every token: the target's own matrix where it is that."""
    embed, size = ends.embed, ends.whole.shape[0]
    if type(embed) is torch.nn.Embedding and embed.weight.dtype is torch.float32:
        return embed.weight.detach().contiguous()
    with torch.inference_mode():
        parts = [embed(tokens).float() for tokens in torch.split(torch.arange(size), _TABLE_ROWS)]
    return torch.cat(parts)


def _padded(head: Tensor) -> Tensor:
    """A head with as many rows as the kernels take; the added ones are cut off again."""
    return F.pad(head.float(), (0, 0, 0, -head.shape[0] % BLOCK))


def _layers_of(draft: HiddenDraft) -> Iterator[LayerWeights]:
    for layer in draft.layers:
        assert isinstance(layer, Layer)
        gate, up = layer.gate_up.weight.detach().chunk(2)
        yield LayerWeights(
            attention_norm=layer.norm,
            qkv=layer.qkv.weight.detach(),
            out=layer.out.weight.detach(),
            mlp_norm=layer.mlp_norm,
            gate=gate,
            up=up,
            down=layer.down.weight.detach(),
        )
