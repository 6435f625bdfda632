"""Matrices of four bits a weight: 16 evenly spaced values for each 32 weights of a row.

llama.cpp calls it Q4_1: a group's lowest value and the step to the next are float16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32
STEPS = 15


class FourBits(NamedTuple):
    """A matrix of [rows, columns]; columns are a multiple of 32.

    Attributes:
        codes: [rows, columns / 32, 32] uint8, from 0 to 15.
        low: [rows, columns / 32] float16, what code 0 stands for.
        step: [rows, columns / 32] float16, from one code to the next.
    """

    codes: Tensor
    low: Tensor
    step: Tensor

    @staticmethod
    def nearest(weight: Tensor) -> FourBits:
        """Of [rows, columns]: each group from its lowest to its highest weight."""
        groups = weight.detach().float().view(*weight.shape[:-1], -1, GROUP)
        lowest, highest = groups.amin(-1), groups.amax(-1)
        low = lowest.half()
        step = ((highest - low.float()) / STEPS).half()
        wide = step.float().unsqueeze(-1)
        shifted = groups - low.float().unsqueeze(-1)
        codes = torch.where(wide > 0, shifted / wide, 0.0).round().clamp(0, STEPS)
        return FourBits(codes.to(torch.uint8), low, step)

    def values(self) -> Tensor:
        """[rows, columns] float32."""
        shifted = self.codes.float() * self.step.float().unsqueeze(-1)
        return (self.low.float().unsqueeze(-1) + shifted).flatten(-2)
