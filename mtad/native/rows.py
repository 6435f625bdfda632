"""Searches on the kernels: through wide rows of logits, and through a text."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mtad.histories import Histories
from mtad.logits import TORCH_SEARCH, Stretches
from mtad.native import library

# Up to here one call is dearer than its work, and torch makes ten.
_NARROW = 512


class NativeSearch:
    """See `mtad.logits.Search`; of equal logits the one in the first column comes first.

    Attributes:
        stretches: see `Search`.
    """

    stretches: Stretches | None = None

    def best(self, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Search.best`."""
        values = _readable(values)
        rows = values.shape[0]
        largest = values.new_empty(rows, count)
        columns = torch.empty(rows, count, dtype=torch.int64)
        threads = library.context()
        threads.library.mtad_best(
            threads.pointer,
            ctypes.byref(
                library.Rows(
                    values.data_ptr(),
                    values.stride(0),
                    rows,
                    values.shape[1],
                    count,
                    largest.data_ptr(),
                    columns.data_ptr(),
                )
            ),
        )
        return largest, columns

    def log_sums(self, values: Tensor) -> Tensor:
        """See `Search.log_sums`."""
        values = _readable(values)
        rows = values.shape[0]
        sums = values.new_empty(rows)
        threads = library.context()
        threads.library.mtad_log_sums(
            threads.pointer,
            ctypes.byref(
                library.Rows(
                    values.data_ptr(),
                    values.stride(0),
                    rows,
                    values.shape[1],
                    sums=sums.data_ptr(),
                )
            ),
        )
        return sums

    def warp(self, values: Tensor, temperature: float, top_p: float) -> Tensor:
        """See `Search.warp`; masses are summed in float64."""
        if values.shape[-1] > _NARROW:
            return TORCH_SEARCH.warp(values, temperature, top_p)
        values = values.contiguous()
        logprobs = torch.empty_like(values)
        columns = values.shape[-1]
        library.load().mtad_warp(
            values.data_ptr(),
            values.numel() // columns,
            columns,
            temperature,
            top_p,
            logprobs.data_ptr(),
        )
        return logprobs

    def grow(
        self,
        histories: Histories,
        values: Tensor,
        token_ids: Tensor,
        width: int,
        temperature: float,
        top_p: float,
        chance: Tensor,
    ) -> Histories | None:
        """See `Search.grow`."""
        rows, columns = values.shape
        if columns > _NARROW:
            return None
        steps = histories.steps
        old = [getattr(histories, name).contiguous() for name in library.HISTORIES[:-1]]
        new = Histories(
            token_ids=old[0].new_empty(width, steps + 1),
            logprobs=old[1].new_empty(width, steps + 1),
            nodes=old[2].new_empty(width, steps + 1),
            real=old[3].new_empty(width, steps + 1),
            joint=old[4].new_empty(width),
            finished=old[5].new_empty(width),
            came_from=old[0].new_empty(width),
        )
        values, token_ids = values.contiguous(), token_ids.contiguous()
        choices, races = torch.empty_like(values), torch.empty_like(chance)
        library.load().mtad_grow(
            ctypes.byref(
                library.Growth(
                    *(values.data_ptr(), token_ids.data_ptr(), chance.data_ptr()),
                    *(rows, columns, steps, width, temperature, top_p),
                    *(held.data_ptr() for held in old),
                    *(held.data_ptr() for held in vars(new).values()),
                    *(choices.data_ptr(), races.data_ptr()),
                )
            )
        )
        return new


NATIVE_SEARCH = NativeSearch()


def longest_match(text: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
    """See `mtad.copy_drafter.longest_match`."""
    tails = tails.contiguous()
    rows, size = tails.shape
    lengths, tokens = torch.empty(2, rows, dtype=torch.int64)
    library.load().mtad_longest_match(
        text.data_ptr(),
        text.shape[0],
        tails.data_ptr(),
        rows,
        size,
        lengths.data_ptr(),
        tokens.data_ptr(),
    )
    return lengths, tokens


def _readable(values: Tensor) -> Tensor:
    """[rows, K] as the kernels read them: floats side by side."""
    values = values.float()
    return values if values.stride(1) == 1 else values.contiguous()
