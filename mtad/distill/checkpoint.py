"""A checkpoint: the draft's weights, AdamW's state and the learning curve, in one safetensors file.

There is no state of a generator in it: order and schedule follow from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtad.distill.files import DistillError, read_tensors, save_tensors

FORMAT = "mtad checkpoint 2"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_POINT = {"step", "tokens", "loss", "alpha", "alpha_warped"}
_MEANING = {
    "format": "format",
    "recipe": "recipe (draft, training or seed)",
    "corpus": "corpus",
    "target": "target",
    "start": "--start draft",
}


@dataclass
class Progress:
    """Where training stands, beside the weights.

    Attributes:
        step: steps done.
        seconds: time spent on them.
        loss_sum: of the steps since the last evaluation.
        curve: one entry an evaluation; see `mtad.distill.training`.
    """

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def save(
    path: Path,
    draft: nn.Module,
    optimizer: torch.optim.AdamW,
    progress: Progress,
    identity: dict[str, str],
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        path: the file.
        draft: the model.
        optimizer: of all its parameters.
        progress: where training stands.
        identity: what a run must share to go on from here.
    """
    tensors = {f"draft/{name}": tensor for name, tensor in draft.state_dict().items()}
    for name, parameter in draft.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS if moment in state}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = json.dumps(vars(progress))
    metadata = {
        **identity,
        "format": FORMAT,
        "progress": said,
        "digest": digest_of(tensors, said),
    }
    save_tensors(path, tensors, metadata)


def load(
    path: Path,
    draft: nn.Module,
    optimizer: torch.optim.AdamW,
    identity: dict[str, str],
    steps: int,
) -> Progress:
    """Puts a checkpoint of a training of so many steps into a draft and its optimizer.

    Returns:
        Where training stands.

    Raises:
        DistillError: it is damaged, or of another run; the message says which.
    """
    forget = f"Delete {path} to begin training anew"
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise DistillError(f"{path} is damaged or no checkpoint ({error}). {forget}.") from None
    for key, value in {"format": FORMAT, **identity}.items():
        if metadata.get(key) != value:
            raise DistillError(
                f"{path} is of a training with another {_MEANING[key]} (it says"
                f" {metadata.get(key, 'nothing')!r}, not {value!r}). {forget}, or choose another"
                " --work folder; --start can begin from a finished draft's weights."
            )
    try:
        if metadata["digest"] != digest_of(tensors, metadata["progress"]):
            raise ValueError("its content is not what was saved")
        progress = _read_progress(metadata["progress"], steps)
        draft.load_state_dict({name: tensors[f"draft/{name}"] for name in draft.state_dict()})
        if progress.step:
            for name, parameter in draft.named_parameters():
                moments = {m: tensors[f"{m}/{name}"].to(parameter.device) for m in _MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(progress.step)), **moments}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DistillError(f"{path} is damaged ({error}). {forget}.") from None
    return progress


def _read_progress(text: str, steps: int) -> Progress:
    progress = Progress(**json.loads(text))
    if type(progress.step) is not int or not 0 <= progress.step <= steps:
        raise ValueError(f"step is {progress.step!r}, but must be a number from 0 to {steps}")
    for name in ("seconds", "loss_sum"):
        value = getattr(progress, name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, but must be a number")
    curve = progress.curve
    if not isinstance(curve, list) or any(
        not isinstance(point, dict) or point.keys() != _POINT for point in curve
    ):
        raise ValueError("its learning curve is no list of evaluations")
    return progress


def digest_of(tensors: dict[str, Tensor], text: str = "") -> str:
    """16 hex digits of named tensors on the CPU, and of a text beside them."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()[:16]
