"""A `HiddenDraft` on the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mtad.errors import PairError
from mtad.hidden_draft import NORM_EPS, Ends, HiddenDraft, Layer, rms_norm
from mtad.native.linear import NativeLinear
from mtad.native.llama import rotary_tables
from mtad.native.model import LayerWeights, NativeModel
from mtad.native.packing import FLOAT32, GROUP, LANES


class NativeDraft:
    """See `mtad.hidden_drafter.RunnableDraft`.

    Attributes:
        draft: what it was made from; its norms are read.
        ends: of the target.
        model: its layers, and the rows of the target's head.
        read, join: its other two matrices.
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
        self.ends = ends
        self.read = NativeLinear(draft.read.weight, kind)
        self.join = NativeLinear(draft.join.weight, kind)
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
        joins = (self.read, self.join)
        self.weight_bytes = self.model.weight_bytes + sum(
            each.packed.data.numel() for each in joins
        )

    def passes(self) -> NativeDraftPasses:
        """It with an empty cache."""
        return NativeDraftPasses(self)


class NativeDraftPasses:
    """See `mtad.hidden_drafter.DraftPasses`."""

    def __init__(self, native: NativeDraft) -> None:
        self.zeros = torch.zeros(0, native.model.width)
        self._native = native
        self._cache = native.model.cache()
        self._count = int(native.draft.token_ids.shape[0])

    def read_target(self, hidden: Tensor) -> Tensor:
        """See `DraftPasses.read_target`."""
        return self._native.read(self._native.draft.normalised(hidden.float()))

    def forward(
        self,
        token_ids: Tensor,
        states: Tensor,
        positions: Tensor,
        length: int,
        visible: Tensor,
        skipped: int,
    ) -> tuple[Tensor, Tensor]:
        """See `DraftPasses.forward`."""
        draft = self._native.draft
        embedded = rms_norm(self._native.ends.embed(token_ids).float(), draft.token_norm)
        joined = torch.cat([embedded, rms_norm(states, draft.state_norm)], -1)
        rows = self._cache.forward(
            self._native.join(joined),
            positions,
            length,
            visible.shape[1],
            visible,
            skipped=skipped,
        )
        assert rows.logits is not None
        return rows.states, rows.logits[:, : self._count]

    def crop(self, length: int) -> None:
        """See `DraftPasses.crop`: a slot that is dropped is simply written again."""


def unsupported_draft(draft: HiddenDraft) -> str | None:
    """Why the kernels cannot run a draft; None if they can."""
    config = draft.config
    size = config.hidden_size // config.num_heads
    if draft.norm.device.type != "cpu":
        return f"The native engine runs on the CPU; this draft is on {draft.norm.device}."
    if size % LANES or config.hidden_size % GROUP or config.mlp_size % GROUP:
        return (
            f"The native engine takes heads in multiples of {LANES} and widths in multiples of"
            f" {GROUP}; this draft has heads of {size}, widths of {config.hidden_size} and"
            f" {config.mlp_size}."
        )
    return None


def _padded(head: Tensor) -> Tensor:
    """A head with as many rows as the kernels take; the added ones are cut off again."""
    return F.pad(head.float(), (0, 0, 0, -head.shape[0] % LANES))


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
