"""At most one host synchronisation per target pass in `mtad` and `speculative`.

Without a GPU: a Python-level mode sees `.tolist()`, `.item()`, `bool()` and the like, a dispatch
mode sees what C++ reads behind them (scalars, `nonzero`, copies between devices). On a GPU,
CUDA's own debug mode says the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mtad.config import DecodeConfig
from mtad.decoders import load_decoder, readback
from mtad.draft import LMDrafter
from mtad.lm import CachedLM
from tests.models import tiny

READS = {
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
}
READING_OPS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
}


class SyncCounter:
    """Counts reads of device values by the host; what one Python call does counts once."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.inside = 0

    @contextmanager
    def watching(self) -> Iterator[SyncCounter]:
        with _Calls(self), _Ops(self):
            yield self


class _Calls(TorchFunctionMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = func in READS
        if counts:
            self.counter.reads.append(getattr(func, "__name__", str(func)))
        self.counter.inside += counts
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.inside -= counts


class _Ops(TorchDispatchMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        masks = name in ("aten::index.Tensor", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (name in READING_OPS or masks) and not self.counter.inside:
            self.counter.reads.append(name)
        return func(*args, **(kwargs or {}))


def steady_state(method: str, device: str, **parameters: Any) -> tuple[Any, CachedLM]:
    target = tiny("llama", vocab_size=64, seed=1).to(device)
    draft = tiny("llama", vocab_size=64, seed=2).to(device)
    lm = CachedLM(target)
    config = DecodeConfig(max_new_tokens=60, **parameters)
    generator = torch.Generator(device).manual_seed(0)
    decisions = load_decoder(method)(
        lm, LMDrafter(CachedLM(draft)), [1, 2, 3], config, generator, eos_token_ids=[63]
    )
    next(decisions)
    return decisions, lm


@pytest.mark.parametrize("filters", [{}, {"top_k": 0, "top_p": 1.0}, {"temperature": 0.0}])
@pytest.mark.parametrize(
    "method", ["mtad", "speculative", "mtad_tree", "autoregressive", "typical"]
)
def test_one_read_per_target_pass(
    method: str, filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readback, "_on_host", lambda tensor: False)  # as on a device
    decisions, lm = steady_state(method, "cpu", **filters)
    for _ in range(6):
        before = lm.passes
        with SyncCounter().watching() as counter:
            next(decisions)
        assert lm.passes == before + 1
        assert counter.reads == ["tolist"]


def test_the_counter_sees_what_it_must() -> None:
    values = torch.arange(4)
    for program in (
        lambda: values.tolist(),
        lambda: values.sum().item(),
        lambda: bool(values.any()),
        lambda: int(values[0]),
        lambda: values.nonzero(),
        lambda: values[values > 1],
        lambda: values[torch.tensor(2)],
        lambda: torch.equal(values, values),
        lambda: values.cpu(),
    ):
        with SyncCounter().watching() as counter:
            program()
        assert len(counter.reads) == 1, counter.reads
    with SyncCounter().watching() as counter:
        values.index_select(0, values[:2]).cumsum(0)
    assert counter.reads == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("method", ["mtad", "speculative"])
def test_cuda_agrees(method: str) -> None:
    decisions, lm = steady_state(method, "cuda")
    passes = lm.passes
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as caught:
            for _ in range(6):
                next(decisions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) <= lm.passes - passes
