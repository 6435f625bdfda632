"""Loads models: which device, which dtype, whether there is room, and what went wrong if not.

Weights are read as safetensors where a repository has them; code from a repository is never run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mtad.errors import ConfigError, PairError
from mtad.presets import DTYPE_BYTES, Preset


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to use: the one asked for, or CUDA, else MPS (untested), else the CPU.

    Raises:
        ConfigError: no such device, or not on this machine.
    """
    mps = getattr(torch.backends, "mps", None)
    has_mps = mps is not None and mps.is_available()
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if has_mps else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    allowed = '"cpu", "cuda", "cuda:0" and so on, "mps", or left out'
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device is {str(device)[:60]!r}, but must be {allowed}.")
    if chosen.type == "mps" and not has_mps:
        raise ConfigError('device is "mps", but this machine has none. Use device="cpu".')
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = torch.cuda.current_device() if count and chosen.index is None else chosen.index
        if index is None or index >= count:
            raise ConfigError(
                f'device is "{chosen}", but torch sees {count} CUDA devices here.'
                f" Use {'a lower number' if count else 'device=' + chr(34) + 'cpu' + chr(34)}."
            )
        return torch.device("cuda", index)
    return torch.device(chosen.type)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to use: the one asked for, or what suits the device.

    That is float32 on CPU and MPS; on CUDA bfloat16, or float16 where the board has no bfloat16.

    Raises:
        ConfigError: not one of float32, bfloat16, float16.
    """
    if dtype is None or dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(
            f"dtype is {name[:60]!r}, but must be one of {', '.join(DTYPE_BYTES)}, or left out."
        )
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name as it is written in a trace, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, all boards together for CUDA; None where it cannot be known."""
    if device.type == "cuda":
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    free: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    # A container may hold less than its host.
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        free.append(limit - used)
    return min(free, default=None)


def too_big(preset: Preset, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a preset does not fit on a device; None if it does or nobody can tell."""
    needed, free = preset.memory_bytes(dtype_name(dtype)), free_bytes(device)
    if free is None or needed <= free:
        return None
    return (
        f'"{preset.id}" needs about {needed / 1e9:.1f} GB in {dtype_name(dtype)}, but {device.type}'
        f" has {free / 1e9:.1f} GB free"
    )


@dataclass(frozen=True)
class Loaded:
    """A model and the tokenizer that lies beside it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_repository(
    repository: str | os.PathLike[str], device: torch.device, dtype: torch.dtype, *, spread: bool
) -> Loaded:
    """A causal model and its tokenizer from the Hugging Face Hub or from a folder.

    Args:
        repository: name on the hub, or a folder.
        device: where the model goes.
        dtype: of its weights.
        spread: lay it over all CUDA boards if one is too small.

    Raises:
        PairError: a licence that was not accepted, no network, no memory, no such repository.
    """
    with explained(str(repository), device, dtype):
        # The config first: it fails with the clearest errors and before the large files.
        AutoConfig.from_pretrained(repository, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=False)
        placement: Any = "auto" if spread else {"": device}
        model = AutoModelForCausalLM.from_pretrained(
            repository, dtype=dtype, device_map=placement, trust_remote_code=False
        )
    return Loaded(model.eval(), tokenizer)


def must_spread(needed_bytes: int, device: torch.device) -> bool:
    """True if a model has to be laid over several CUDA boards to fit."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return False
    return needed_bytes > torch.cuda.mem_get_info(device)[0]


@contextlib.contextmanager
def explained(what: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Turns whatever loading raises into a PairError with a next step."""
    from huggingface_hub import errors

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        free = free_bytes(device)
        there = "" if free is None else f" ({free / 1e9:.1f} GB are free)"
        raise PairError(
            f"{what} does not fit into the memory of {device} in {dtype_name(dtype)}{there}."
            " Choose a smaller pair, another device, or a dtype of fewer bytes."
        ) from error
    except ImportError as error:
        raise PairError(f"{what} needs a library that is not installed: {error}") from error
    except Exception as error:
        chain = list(_causes(error))
        if _has(chain, errors.GatedRepoError) or _status(chain) == 403:
            message = (
                f"{what} is gated: its licence must be accepted once on its page on the Hugging"
                ' Face Hub. Then log in here with "hf auth login" and try again.'
            )
        elif _has(chain, errors.RepositoryNotFoundError):
            message = (
                f"The Hugging Face Hub has no {what}, or does not show it without an account."
                ' Log in with "hf auth login" and try again.'
            )
        elif _has(chain, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
            message = (
                f"{what} is not in the local cache and the Hugging Face Hub cannot be reached."
                " Check the network, unset HF_HUB_OFFLINE if it is set, or fetch the files on a"
                f' connected machine with "hf download {what}" and copy its cache. The pair'
                ' "smollm2" needs no hub.'
            )
        else:
            message = f"{what} could not be loaded: {type(error).__name__}: {str(error)[:300]}"
        raise PairError(message) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _has(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(error, kinds) for error in chain)


def _status(chain: list[BaseException]) -> int | None:
    """HTTP status of the first error that has one."""
    for error in chain:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
    return None
