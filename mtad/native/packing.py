"""Weights in the layout that the kernels read; see the comment on `Matrix` in kernels.c.

Four bits are used only where they lose nothing: for weights that were stored in groups of 32
with 16 evenly spaced values each (llama.cpp's Q4_1 and Q4_0), as a matrix that was dequantised
from such a file is. Everything else gets eight bits a weight (as Q8_0 has them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtad.four_bits import GROUP, FourBits

BLOCK = 16
# How far a weight may stand from its 4-bit value, in steps between two such values.
EXACT_STEPS = 0.01

FLOAT32, CODES8, CODES4 = 0, 1, 2


@dataclass(frozen=True)
class Packed:
    """A linear layer as the kernels read it.

    Attributes:
        kind: FLOAT32, CODES8 or CODES4.
        rows: outputs; a multiple of 16.
        columns: inputs; a multiple of 32.
        data: uint8, one dimension.
    """

    kind: int
    rows: int
    columns: int
    data: Tensor


def fits(rows: int, columns: int) -> bool:
    """True if a linear layer of this size can be packed."""
    return rows % BLOCK == 0 and columns % GROUP == 0


def pack(weight: Tensor, kind: int | None = None) -> Packed:
    """Packs [rows, columns]; `kind` None takes four bits if they lose nothing, else eight."""
    weight = weight.detach().to("cpu", torch.float32)
    rows, columns = weight.shape
    if kind == FLOAT32:
        data = weight.view(-1, BLOCK, columns).transpose(1, 2).contiguous()
        return Packed(FLOAT32, rows, columns, data.view(-1).view(torch.uint8))
    if kind != CODES8:
        small = _four_bits(weight)
        if small is not None:
            return Packed(CODES4, rows, columns, small)
    return Packed(CODES8, rows, columns, _eight_bits(weight.view(rows, columns // GROUP, GROUP)))


def unpack(packed: Packed) -> Tensor:
    """[rows, columns] float32: what the kernels multiply with."""
    blocks, count = packed.rows // BLOCK, packed.columns // GROUP
    if packed.kind == FLOAT32:
        weight = packed.data.view(torch.float32).view(blocks, packed.columns, BLOCK)
        return weight.transpose(1, 2).reshape(packed.rows, packed.columns)
    data = packed.data.view(blocks, count, -1)
    if packed.kind == CODES8:
        codes = data[..., : 8 * 64].reshape(blocks, count, 8, BLOCK, 4).view(torch.int8).float()
        scales = _halves(data[..., 8 * 64 :])
        minima = torch.zeros_like(scales)
    else:
        both = data[..., : 4 * 64].reshape(blocks, count, 4, BLOCK, 4)
        codes = torch.cat([both & 15, both >> 4], 2).float()
        scales, minima = _halves(data[..., 4 * 64 :]).chunk(2, -1)
    # [blocks, count, part, lane, 4] → [blocks, lane, count, part, 4]
    values = codes * scales[:, :, None, :, None] + minima[:, :, None, :, None]
    return values.permute(0, 3, 1, 2, 4).reshape(packed.rows, packed.columns)


def _four_bits(weight: Tensor) -> Tensor | None:
    """Of [rows, columns]; None if the weights are not sixteen evenly spaced values a group."""
    found = FourBits.nearest(weight)
    missed = (weight - found.values()).abs_().view(found.codes.shape)
    if bool((missed > EXACT_STEPS * found.step.float().unsqueeze(-1)).any()):
        return None
    parts = _in_parts(found.codes)
    both = parts[:, :, :4] | parts[:, :, 4:] << 4
    return _join(both, found.step, found.low)


def _eight_bits(groups: Tensor) -> Tensor:
    scales = (groups.abs().amax(-1) / 127).half()
    steps = scales.float().unsqueeze(-1)
    codes = torch.where(steps > 0, groups / steps, 0.0).round_().clamp_(-127, 127)
    return _join(_in_parts(codes.to(torch.int8)).view(torch.uint8), scales)


def _in_parts(codes: Tensor) -> Tensor:
    """[rows, count, 32] → [blocks, count, 8, lane, 4]."""
    rows, count, _ = codes.shape
    blocks = codes.view(rows // BLOCK, BLOCK, count, 8, 4)
    return blocks.permute(0, 2, 3, 1, 4).contiguous()


def _join(parts: Tensor, *numbers: Tensor) -> Tensor:
    """The codes [blocks, count, …] and behind each group its rows' float16 [rows, count]."""
    blocks, count = parts.shape[:2]
    columns = [parts.reshape(blocks, count, -1)]
    for number in numbers:
        lanes = number.view(blocks, BLOCK, count).transpose(1, 2).contiguous()
        columns.append(lanes.view(torch.uint8))
    return torch.cat(columns, -1).reshape(-1)


def _halves(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).float()
