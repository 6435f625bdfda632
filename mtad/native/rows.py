"""Searches through wide rows of logits on the kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mtad.histories import Histories
from mtad.logits import TORCH_SEARCH, Logits, Stretches
from mtad.native import abi, library
from mtad.native.memory import floats
from mtad.native.rules import NARROW, NativeRules
from mtad.native.threads import context


class NativeSearch(NativeRules):
    """See `mtad.logits.Search`; of equal logits the one in the first column comes first.

    Attributes:
        stretches: see `Search`.
    """

    stretches: Stretches | None = None

    def best(self, values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Search.best`."""
        return _read(values, count)

    def log_sums(self, values: Tensor) -> Tensor:
        """See `Search.log_sums`."""
        return _read(values, 0)[2]

    def choose(
        self, logits: Logits, count: int, temperature: float, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """See `Search.choose`."""
        if count > NARROW:
            return None
        sums = floats(logits.values.shape[0])
        choices, (_, values, token_ids, logprobs) = _choices(
            logits, count, temperature, top_p, sums
        )
        threads = context()
        threads.library.mtad_choose(threads.pointer, ctypes.byref(choices))
        return values, token_ids, sums, logprobs

    def warp(self, values: Tensor, temperature: float, top_p: float) -> Tensor:
        """See `Search.warp`; masses are summed in float64."""
        if values.shape[-1] > NARROW:
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

    def draw(self, logprobs: Tensor, token_ids: Tensor, uniform: Tensor) -> Tensor:
        """See `Search.draw`."""
        columns = logprobs.shape[-1]
        if columns > NARROW or uniform.shape != logprobs.shape[:-1]:
            return TORCH_SEARCH.draw(logprobs, token_ids, uniform)
        mass, token_ids = logprobs.double().contiguous(), token_ids.contiguous()
        level = uniform.double().contiguous()
        drawn = torch.empty(uniform.shape, dtype=torch.int64)
        library.load().mtad_draw(
            *(mass.data_ptr(), token_ids.data_ptr(), level.data_ptr()),
            *(level.numel(), columns, drawn.data_ptr()),
        )
        return drawn

    def draw_row(self, logprobs: Tensor, token_ids: Tensor, row: Tensor, uniform: Tensor) -> Tensor:
        """See `Search.draw_row`."""
        columns = logprobs.shape[-1]
        wanted = torch.float32, torch.int64, torch.float64
        known = (logprobs.dtype, row.dtype, uniform.dtype) == wanted
        if columns > NARROW or not known:
            return TORCH_SEARCH.draw_row(logprobs, token_ids, row, uniform)
        logprobs, token_ids = logprobs.contiguous(), token_ids.contiguous()
        drawn = torch.empty((), dtype=torch.int64)
        library.load().mtad_draw_row(
            *(logprobs.data_ptr(), token_ids.data_ptr(), row.data_ptr(), uniform.data_ptr()),
            *(columns, drawn.data_ptr()),
        )
        return drawn

    def draw_corrected(
        self,
        target: tuple[Tensor, Tensor],
        draft: tuple[Tensor, Tensor],
        accepted: Tensor,
        uniform: Tensor,
    ) -> Tensor | None:
        """See `Search.draw_corrected`."""
        logprobs, token_ids, draft_logprobs, draft_ids = (
            each.contiguous() for each in (*target, *draft)
        )
        rows, draft_columns = draft_logprobs.shape
        kinds = logprobs.dtype, draft_logprobs.dtype, uniform.dtype
        if kinds != (torch.float32, torch.float32, torch.float64) or logprobs.shape[1] > NARROW:
            return None
        drawn = torch.empty((), dtype=torch.int64)
        library.load().mtad_draw_corrected(
            ctypes.byref(
                abi.Correction(
                    *(logprobs.data_ptr(), token_ids.data_ptr()),
                    *(draft_logprobs.data_ptr(), draft_ids.data_ptr()),
                    *(logprobs.shape[1], draft_columns, rows),
                    *(accepted.data_ptr(), uniform.data_ptr()),
                )
            ),
            drawn.data_ptr(),
        )
        return drawn

    def pick(self, logprobs: Tensor, token_ids: Tensor, tokens: Tensor) -> Tensor:
        """See `Search.pick`."""
        columns = logprobs.shape[-1]
        known = logprobs.dtype == torch.float32 and tokens.shape == logprobs.shape[:-1]
        if columns > NARROW or not known:
            return TORCH_SEARCH.pick(logprobs, token_ids, tokens)
        logprobs, token_ids = logprobs.contiguous(), token_ids.contiguous()
        tokens = tokens.contiguous()
        picked = logprobs.new_empty(tokens.shape)
        library.load().mtad_pick(
            *(logprobs.data_ptr(), token_ids.data_ptr(), tokens.data_ptr()),
            *(tokens.numel(), columns, picked.data_ptr()),
        )
        return picked

    def grow(
        self,
        histories: Histories,
        logits: Logits,
        top_k: int,
        width: int,
        temperature: float,
        top_p: float,
        chance: Tensor,
    ) -> Histories | None:
        """See `Search.grow`."""
        if top_k > NARROW:
            return None
        choices, _held = _choices(logits, top_k, temperature, top_p)
        steps = histories.steps
        old = [getattr(histories, name) for name in abi.HISTORIES[:-1]]
        new = Histories(
            token_ids=old[0].new_empty(width, steps + 1),
            logprobs=old[1].new_empty(width, steps + 1),
            nodes=old[2].new_empty(width, steps + 1),
            real=old[3].new_empty(width, steps + 1),
            joint=old[4].new_empty(width),
            finished=old[5].new_empty(width),
            came_from=old[0].new_empty(width),
        )
        races = torch.empty_like(chance)
        threads = context()
        threads.library.mtad_grow(
            threads.pointer,
            ctypes.byref(
                abi.Growth(
                    *(choices, chance.data_ptr(), steps, width),
                    *(held.data_ptr() for held in old),
                    *(held.data_ptr() for held in vars(new).values()),
                    races.data_ptr(),
                )
            ),
        )
        return new

    def record(
        self,
        logits: Logits,
        count: int,
        tokens: Tensor,
        accepted: Tensor,
        final: Tensor,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `Search.record`."""
        whole, depth = logits.values, tokens.shape[0]
        if logits.columns is not None or whole.dtype != torch.float32 or whole.stride(1) != 1:
            return None
        values, token_ids = (each.contiguous() for each in logits.leading(count))
        sums, tokens = logits.log_sums().contiguous(), tokens.contiguous()
        rows = None if rows is None else rows.contiguous()
        emitted, logprobs = floats(depth + 1), floats(depth + 1, count)
        ids = torch.empty(depth + 1, count, dtype=torch.int64)
        library.load().mtad_record(
            ctypes.byref(
                abi.Record(
                    *(whole.data_ptr(), whole.stride(0), whole.shape[1]),
                    *(values.data_ptr(), token_ids.data_ptr()),
                    *(values.shape[1], sums.data_ptr(), None if rows is None else rows.data_ptr()),
                    *(tokens.data_ptr(), accepted.data_ptr(), final.data_ptr(), depth, count),
                    *(emitted.data_ptr(), ids.data_ptr(), logprobs.data_ptr()),
                )
            )
        )
        return emitted, ids, logprobs

    def sample(
        self, logits: Logits, top_k: int, temperature: float, top_p: float, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """See `Search.sample`."""
        if top_k > NARROW:
            return None
        choices, (*_held, token_ids, logprobs) = _choices(logits, top_k, temperature, top_p)
        drawn = torch.empty_like(uniform, dtype=torch.int64)
        picked = logprobs.new_empty(uniform.shape)
        threads = context()
        threads.library.mtad_sample(
            threads.pointer,
            ctypes.byref(
                abi.Sample(choices, uniform.data_ptr(), drawn.data_ptr(), picked.data_ptr())
            ),
        )
        return drawn, picked, token_ids, logprobs


NATIVE_SEARCH = NativeSearch()


def _read(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest, their columns, and the log-sums."""
    values = _readable(values)
    rows = values.shape[0]
    largest, sums = floats(rows, count), floats(rows)
    columns = torch.empty(rows, count, dtype=torch.int64)
    threads = context()
    threads.library.mtad_rows(
        threads.pointer,
        ctypes.byref(
            abi.Rows(
                *(values.data_ptr(), values.stride(0), rows, values.shape[1], count),
                *(largest.data_ptr(), columns.data_ptr(), sums.data_ptr()),
            )
        ),
    )
    return largest, columns, sums


def _choices(
    logits: Logits, count: int, temperature: float, top_p: float, sums: Tensor | None = None
) -> tuple[abi.Choices, tuple[Tensor, ...]]:
    """The tensors into which it points must live as long; the last are tokens and log q."""
    rows, names = _readable(logits.values), logits.columns
    height, every = rows.shape
    values, logprobs = floats(height, count), floats(height, count)
    token_ids = torch.empty(height, count, dtype=torch.int64)
    choices = abi.Choices(
        *(rows.data_ptr(), rows.stride(0)),
        None if names is None else names.token_ids.data_ptr(),
        *(height, every, count, temperature, top_p),
        *(values.data_ptr(), token_ids.data_ptr(), logprobs.data_ptr()),
        None if sums is None else sums.data_ptr(),
    )
    return choices, (rows, values, token_ids, logprobs)


def _readable(values: Tensor) -> Tensor:
    """[rows, K] as the kernels read them: floats side by side."""
    values = values.float()
    return values if values.stride(1) == 1 else values.contiguous()
