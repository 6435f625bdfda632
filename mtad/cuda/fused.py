"""Two stretches of a layer as one kernel each, written in Triton where that is installed.

In a pass of few rows every operation takes as long as its launch. Between its products a layer
of plain operations launches nine of them for what these two do in one read and one write.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform, or torch came without it
    triton = None


class Plain:
    """In operations of torch; on any device."""

    def turn(
        self,
        joined: Tensor,  # [R, heads + 2·kv_heads, size]
        angles: tuple[Tensor, Tensor],  # [R, size / 2] each
        slots: Tensor,  # [R]
        kept: Tensor,  # [2·kv_heads, slots, size]
    ) -> Tensor:
        """Turns queries and keys by rotary angles and puts keys and values into a cache.

        Args:
            joined: queries, keys and values of R rows.
            angles: float32 cosines and sines.
            slots: where in the cache each row goes.
            kept: the cache, keys first.

        Returns:
            [kv_heads, R · group, size] queries: those of one key-value head as rows beside each
            other.
        """
        rows, _, size = joined.shape
        kv_heads = kept.shape[0] // 2
        heads = joined.shape[1] - 2 * kv_heads
        cosines, sines = (part.unsqueeze(1) for part in angles)
        left, right = joined[:, : heads + kv_heads].float().chunk(2, -1)
        turned = torch.cat([left * cosines - right * sines, right * cosines + left * sines], -1)
        turned = turned.to(joined.dtype)
        new = torch.cat([turned[:, heads:], joined[:, heads + kv_heads :]], 1)
        kept.index_copy_(1, slots, new.transpose(0, 1))
        query = turned[:, :heads].view(rows, kv_heads, -1, size).transpose(0, 1)
        return query.reshape(kv_heads, -1, size)

    def gated(self, both: Tensor) -> Tensor:
        """[R, 2·M] gates and values → [R, M] SiLU of the first times the second."""
        gate, value = both.chunk(2, -1)
        return F.silu(gate) * value


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _turn(  # type: ignore[no-untyped-def]
        joined,
        cosines,
        sines,
        slots,
        kept,
        query,
        rows,
        heads,
        kv_heads,
        head_stride,
        HALF: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        row, head = tl.program_id(0), tl.program_id(1)
        place = tl.arange(0, BLOCK)
        inside = place < HALF
        source = joined + (row * (heads + 2 * kv_heads) + head) * 2 * HALF + place
        left = tl.load(source, mask=inside, other=0.0)
        right = tl.load(source + HALF, mask=inside, other=0.0)
        turns = head < heads + kv_heads
        cosine = tl.load(cosines + row * HALF + place, mask=inside & turns, other=1.0)
        sine = tl.load(sines + row * HALF + place, mask=inside & turns, other=0.0)
        wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
        new_left = wide_left * cosine - wide_right * sine
        new_right = wide_right * cosine + wide_left * sine
        group = heads // kv_heads
        asks = head < heads
        line = (head // group * rows + row) * group + head % group
        there = query + line * 2 * HALF + place
        tl.store(there, new_left.to(query.dtype.element_ty), mask=inside & asks)
        tl.store(there + HALF, new_right.to(query.dtype.element_ty), mask=inside & asks)
        slot = tl.load(slots + row)
        there = kept + (head - heads) * head_stride + slot * 2 * HALF + place
        tl.store(there, new_left.to(kept.dtype.element_ty), mask=inside & (head >= heads))
        tl.store(there + HALF, new_right.to(kept.dtype.element_ty), mask=inside & (head >= heads))

    @triton.jit  # type: ignore[untyped-decorator]
    def _gate(both, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        row, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = place < width
        gate = tl.load(both + row * 2 * width + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(both + (2 * row + 1) * width + place, mask=inside, other=0.0)
        product = gate * tl.sigmoid(gate) * value.to(tl.float32)
        tl.store(out + row * width + place, product.to(out.dtype.element_ty), mask=inside)


class Fused:
    """As one kernel each; see `Plain`, whose sums they round once less."""

    def turn(
        self, joined: Tensor, angles: tuple[Tensor, Tensor], slots: Tensor, kept: Tensor
    ) -> Tensor:
        """See `Plain.turn`; the cache has its slots side by side."""
        rows, columns, size = joined.shape
        kv_heads = kept.shape[0] // 2
        heads = columns - 2 * kv_heads
        query = joined.new_empty(kv_heads, rows * (heads // kv_heads), size)
        _turn[rows, columns](
            joined,
            *angles,
            slots,
            kept,
            query,
            rows,
            heads,
            kv_heads,
            kept.stride(0),
            HALF=size // 2,
            BLOCK=triton.next_power_of_2(size // 2),
            num_warps=1,
        )
        return query

    def gated(self, both: Tensor) -> Tensor:
        """See `Plain.gated`."""
        rows, width = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, width)
        block = 1024
        _gate[rows, triton.cdiv(width, block)](both, out, width, BLOCK=block)
        return out


_found: dict[torch.device, Plain | Fused] = {}


def kernels(device: torch.device) -> Plain | Fused:
    """What there is for a device. Triton compiles with the machine's C compiler, or not at all."""
    if device not in _found:
        _found[device] = Fused() if device.type == "cuda" and _compiles(device) else Plain()
    return _found[device]


def _compiles(device: torch.device) -> bool:
    if triton is None:
        return False
    try:
        Fused().gated(torch.ones(1, 2, device=device))
        torch.cuda.synchronize(device)
    except Exception:  # whatever a compiler says: the engine works without
        return False
    return True
