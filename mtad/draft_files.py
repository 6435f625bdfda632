"""The file of a `HiddenDraft`: its layers in 8 bits, one scale a row, and what it belongs to.

Neither embedding nor head is stored, since they are the target's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mtad.errors import PairError
from mtad.hidden_draft import HiddenDraft, HiddenDraftConfig

FILE_NAME = "draft.safetensors"
_FORMAT = "mtad hidden draft 1"
_SCALE = ".scale"
_MAX_HEADER_CHARACTERS = 10_000


def save_draft(draft: HiddenDraft, folder: Path, target: str, note: str = "") -> Path:
    """Writes `folder`/draft.safetensors, whole or not at all, and returns its path.

    Args:
        draft: what to write.
        folder: made if it is not there.
        target: name of the model that the draft was made for.
        note: what a reader of its results must know.
    """
    tensors: dict[str, Tensor] = {"token_ids": draft.token_ids.to("cpu", torch.int32)}
    for name, weight in draft.named_parameters():
        tensors |= _pack(name, weight.detach().float().cpu())
    about = {"config": dataclasses.asdict(draft.config), "target": target, "note": note}
    # One value: safetensors writes several in an order that changes from run to run.
    metadata = {_FORMAT: json.dumps(about)}
    folder.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(prefix=".draft-", dir=folder)
    try:
        save_file(tensors, staged, metadata)
        os.fsync(handle)
        os.chmod(staged, 0o644)
        os.replace(staged, folder / FILE_NAME)
    except BaseException:
        os.unlink(staged)
        raise
    finally:
        os.close(handle)
    return folder / FILE_NAME


def load_draft(
    folder: Path, target: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> HiddenDraft:
    """Reads what `save_draft` wrote.

    Args:
        folder: that holds draft.safetensors.
        target: the model that the draft is to work for.
        device: where the draft goes.
        dtype: of its weights, once unpacked.

    Raises:
        PairError: no such file, not a draft, or a draft for a target of other sizes.
    """
    file = folder / FILE_NAME
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            if _FORMAT not in metadata:
                raise PairError(
                    f"{file} is no draft: its header has no {_FORMAT!r}. Make one with:"
                    " python -m mtad distill"
                )
            names = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
        draft = _build(metadata[_FORMAT], tensors)
    except FileNotFoundError:
        raise PairError(
            f"There is no {FILE_NAME} in {folder}. Make one with: python -m mtad distill"
        ) from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PairError(
            f"{file} cannot be read as a draft: {type(error).__name__}: {str(error)[:200]}."
            " Copy or make it again."
        ) from error
    check_draft(draft, target)
    return draft.to(device, dtype).requires_grad_(False).eval()


def check_draft(draft: HiddenDraft, target: PreTrainedModel) -> None:
    """Refuses a draft that was made for a target of other sizes.

    Raises:
        PairError: names what differs.
    """
    config = target.config.get_text_config()
    ends = (target.get_input_embeddings(), target.get_output_embeddings())
    widths = {int(end.weight.shape[1]) for end in ends} | {int(config.hidden_size)}
    shape = draft.config
    if widths != {shape.hidden_size}:
        found = ", ".join(str(width) for width in sorted(widths))
        raise PairError(
            f"The draft has hidden states of {shape.hidden_size}, the target of {found}. Make a"
            " draft for this target with: python -m mtad distill"
        )
    deepest, highest = max(shape.target_layers), int(draft.token_ids.max())
    if deepest > config.num_hidden_layers or min(shape.target_layers) < 0:
        raise PairError(
            f"The draft reads layer {deepest} of the target, which has"
            f" {config.num_hidden_layers}. Make a draft for this target."
        )
    if highest >= config.vocab_size or int(draft.token_ids.min()) < 0:
        raise PairError(
            f"The draft proposes token {highest}, but the target's vocabulary has"
            f" {config.vocab_size}. Make a draft for this target."
        )


def _build(header: str, tensors: dict[str, Tensor]) -> HiddenDraft:
    fields: dict[str, Any] = json.loads(header[:_MAX_HEADER_CHARACTERS])["config"]
    fields["target_layers"] = tuple(int(layer) for layer in fields["target_layers"])
    fields["copy_weights"] = tuple(float(weight) for weight in fields["copy_weights"])
    if not all(0 <= weight < 1 for weight in fields["copy_weights"]):
        raise ValueError(f"copy_weights are {fields['copy_weights']}, but must be from 0 to 1")
    with torch.device("meta"):
        draft = HiddenDraft(HiddenDraftConfig(**fields), torch.empty(0))
    state = {
        name: _unpack(tensor, tensors.get(name + _SCALE))
        for name, tensor in tensors.items()
        if not name.endswith(_SCALE)
    }
    state["token_ids"] = state["token_ids"].long()
    draft.token_ids = state["token_ids"]
    draft.load_state_dict(state, assign=True)
    return draft


def _pack(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A matrix [rows, columns] as int8 with a scale [rows]; a vector as it is."""
    if weight.dim() < 2:
        return {name: weight}
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    return {name: (weight / scale.unsqueeze(1)).round().to(torch.int8), name + _SCALE: scale}


def _unpack(tensor: Tensor, scale: Tensor | None) -> Tensor:
    return tensor if scale is None else tensor.float() * scale.unsqueeze(1)
