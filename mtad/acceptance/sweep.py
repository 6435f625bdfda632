"""Runs a grid of settings over prompts and yields a Record of each run.

In which order, and with which seeds: see `mtad.acceptance.order`.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtad.acceptance.order import Job, task_seed
from mtad.acceptance.records import Record, Setting, Task
from mtad.config import DecodeConfig
from mtad.errors import Cancelled, MtadError
from mtad.pairs import ModelPair
from mtad.runner import run
from mtad.trace import ModelInfo, Trace

WARM_UP_TOKENS = 8
_SAMPLED_WEIGHTS = 1024


def fingerprint(pair: ModelPair, config: DecodeConfig) -> dict[str, Any]:
    """What all records of a file have in common: models, their weights, device, parameters."""
    shared = dataclasses.asdict(config)
    for name in ("num_draft_tokens", "accept_threshold"):  # each setting has its own
        del shared[name]
    draft = None
    if pair.draft_info is not None:
        draft = _identity(pair.draft_info, pair.draft)
    return {
        "target": _identity(pair.target_info, pair.target),
        "draft": draft,
        "device": str(pair.device),
        "dtype": pair.weights,
        "engine": pair.engine,
        "config": shared,
    }


def _identity(info: ModelInfo, model: object) -> dict[str, Any]:
    weights = weights_digest(model) if isinstance(model, nn.Module) else type(model).__name__
    return {"name": info.name, "revision": info.revision, "weights": weights}


def weights_digest(model: nn.Module) -> str:
    """Tells weights apart: names, shapes and about a thousand values of each tensor."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(_sample(tensor))
    return found.hexdigest()[:16]


def _sample(tensor: Tensor) -> bytes:
    values = tensor.detach().reshape(-1)
    values = values[:: max(1, values.shape[0] // _SAMPLED_WEIGHTS)].to(torch.float32).cpu()
    return array.array("f", values.tolist()).tobytes()


def sweep(
    pair: ModelPair,
    todo: Sequence[Job],
    config: DecodeConfig,
    cancel: threading.Event | None = None,
) -> Iterator[Record]:
    """Runs jobs one after another; the caller saves each record before it asks for the next.

    Args:
        pair: the models.
        todo: see `mtad.acceptance.order.jobs`.
        config: everything but γ and τ; `seed` is where the seeds of the prompts start.
        cancel: ends the run in progress, whose record is lost, and the sweep.

    Raises:
        MtadError: a run failed; the message says which.
    """
    short = dataclasses.replace(config, max_new_tokens=min(WARM_UP_TOKENS, config.max_new_tokens))
    first = {setting.method: (task, setting) for task, setting in reversed(todo)}
    for task, setting in first.values():
        if _run(pair, task, setting, short, cancel) is None:
            return
    for task, setting in todo:
        trace = _run(pair, task, setting, config, cancel)
        if trace is None:
            return
        yield Record.of(trace, setting, task)


def _run(
    pair: ModelPair,
    task: Task,
    setting: Setting,
    config: DecodeConfig,
    cancel: threading.Event | None,
) -> Trace | None:
    """None if it was stopped."""
    own = setting.config(config, task_seed(config.seed, task))
    try:
        trace = run(setting.method, pair, **task.request, config=own, cancel=cancel)
    except Cancelled:
        return None
    except MtadError as error:
        raise type(error)(f"{setting}, prompt {task.id!r}: {error}") from error
    return None if trace.stop_reason == "cancelled" else trace
