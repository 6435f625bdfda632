"""The file of a `HiddenDraft`: its layers in 8 or 4 bits, and what it belongs to.

Neither embedding nor head is stored, since they are the target's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mtad.errors import PairError
from mtad.four_bits import GROUP, FourBits
from mtad.hidden_draft import HiddenDraft, HiddenDraftConfig

FILE_NAME = "draft.safetensors"
_FORMAT = "mtad hidden draft 1"
_SCALE = ".scale"
_LOW, _STEP = ".low", ".step"
_MAX_HEADER_CHARACTERS = 10_000


def save_draft(draft: HiddenDraft, folder: Path, target: str, note: str = "") -> Path:
    """Writes `folder`/draft.safetensors, whole or not at all, and returns its path.

    Args:
        draft: what to write.
        folder: made if it is not there.
        target: name of the model that the draft was made for.
        note: what a reader of its results must know.

    Raises:
        PairError: name and note are too long, or the file cannot be written.
    """
    about = {"config": dataclasses.asdict(draft.config), "target": target, "note": note}
    header = json.dumps(about)
    if len(header) > _MAX_HEADER_CHARACTERS:
        raise PairError(
            f"The draft's header with target and note would have {len(header):,} characters, but"
            f" must have at most {_MAX_HEADER_CHARACTERS:,}. Shorten the note."
        )
    tensors: dict[str, Tensor] = {"token_ids": draft.token_ids.to("cpu", torch.int32)}
    for name, weight in draft.named_parameters():
        tensors |= _pack(name, weight.detach().float().cpu(), draft.config.weight_bits)
    file = folder / FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(file) as staged:
            # One value: safetensors writes several in an order that changes from run to run.
            save_file(tensors, staged, {_FORMAT: header})
    except (SafetensorError, OSError) as error:  # the first also for a disk that is full
        raise PairError(
            f"{file} cannot be written: {getattr(error, 'strerror', None) or error}. Make room"
            " there, or choose another folder."
        ) from error
    return file


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[str]:
    """Gives a path to write to, beside `file`, that takes its place if nothing is raised."""
    handle, staged = tempfile.mkstemp(prefix=".draft-", dir=file.parent)
    try:
        yield staged
        os.fsync(handle)
        os.chmod(staged, 0o644)
        os.replace(staged, file)
    except BaseException:
        os.unlink(staged)
        raise
    finally:
        os.close(handle)


def is_draft(file: Path) -> bool:
    """True if a file says of itself that `save_draft` wrote it."""
    try:
        with safe_open(file, "pt") as opened:
            return _FORMAT in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_draft(folder: str | Path) -> HiddenDraft:
    """Reads what `save_draft` wrote, in float32 on the CPU, whatever target it is for.

    Raises:
        PairError: no such file, or not a draft.
    """
    file = Path(folder) / FILE_NAME
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
        return _build(metadata[_FORMAT], tensors)
    except FileNotFoundError:
        raise PairError(
            f"There is no {FILE_NAME} in {folder}. To make one see: python -m mtad distill --help"
        ) from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PairError(
            f"{file} cannot be read as a draft: {type(error).__name__}:"
            f" {str(error)[:200].rstrip('.')}. Copy or make it again."
        ) from error


def load_draft(
    folder: str | Path,
    target: PreTrainedModel,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HiddenDraft:
    """Reads what `save_draft` wrote, ready to draft for a target.

    Args:
        folder: that holds draft.safetensors.
        target: the model that the draft is to work for.
        device: where the draft goes; None for the target's.
        dtype: of its weights, once unpacked; None for the target's.

    Raises:
        PairError: no such file, not a draft, or a draft for a target of other sizes.
    """
    draft = read_draft(folder)
    check_draft(draft, target)
    draft.to(device or target.device, dtype or target.dtype)
    for name, weight in draft.named_parameters():
        if not bool(weight.isfinite().all()):  # finite numbers may unpack to one that is too large
            raise PairError(
                f"{Path(folder) / FILE_NAME} cannot be read as a draft: {name} has values that are"
                f" not finite in {str(weight.dtype).removeprefix('torch.')}. Copy or make it again."
            )
    return draft.requires_grad_(False).eval()


def check_draft(draft: HiddenDraft, target: PreTrainedModel) -> None:
    """Refuses a draft that was made for a target of other sizes, or has no tokens in order.

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
    deepest = shape.target_layers[-1]
    if deepest > config.num_hidden_layers:
        raise PairError(
            f"The draft reads layer {deepest} of the target, which has"
            f" {config.num_hidden_layers}. Make a draft for this target."
        )
    ids = draft.token_ids
    listed = ids.dim() == 1 and ids.dtype is torch.int64 and ids.numel() > 0
    if not listed or not bool((ids[1:] > ids[:-1]).all()):
        raise PairError(
            f"The draft's token_ids are {str(ids.dtype).removeprefix('torch.')} of"
            f" {list(ids.shape)}, but must be one row of at least one int64, ascending. Make or"
            " copy the draft again."
        )
    lowest, highest = int(ids[0]), int(ids[-1])
    if lowest < 0 or highest >= config.vocab_size:
        raise PairError(
            f"The draft proposes token {lowest if lowest < 0 else highest}, but the target's"
            f" vocabulary has {config.vocab_size}, from 0. Make a draft for this target."
        )


def _build(header: str, tensors: dict[str, Tensor]) -> HiddenDraft:
    if len(header) > _MAX_HEADER_CHARACTERS:
        raise ValueError(
            f"its header is too long: {len(header):,} characters, but at most"
            f" {_MAX_HEADER_CHARACTERS:,} are allowed"
        )
    config = HiddenDraftConfig(**json.loads(header)["config"])
    with torch.device("meta"):
        draft = HiddenDraft(config, torch.empty(0))
    names = dict(draft.named_parameters())
    _check_tensors(tensors, names, config.weight_bits)
    state = {name: _unpack(name, tensors) for name in names}
    draft.token_ids = tensors["token_ids"].long()
    draft.load_state_dict(state | {"token_ids": draft.token_ids}, assign=True)
    return draft


def _check_tensors(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], bits: int) -> None:
    """Compares what a file holds with what `save_draft` would make of these weights.

    Raises:
        ValueError: names a tensor that is missing, too many, of another size or kind, or no number.
    """
    ids = tensors.get("token_ids", torch.empty(0))
    wanted = {"token_ids": torch.empty(ids.shape, dtype=torch.int32, device="meta")}
    for name, weight in weights.items():
        wanted |= _pack(name, weight.detach(), bits)
    for name in sorted(wanted.keys() | tensors.keys()):
        found, right = _kind(tensors.get(name)), _kind(wanted.get(name))
        if found != right:
            raise ValueError(f"{name} is {found}, but must be {right}")
        if tensors[name].is_floating_point() and not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} of {list(tensor.shape)}"


def _pack(name: str, weight: Tensor, bits: int) -> dict[str, Tensor]:
    """A matrix [rows, columns] as int8 with a scale [rows], or as `FourBits` two codes a byte.

    A vector stays as it is.
    """
    if weight.dim() < 2:
        return {name: weight}
    if bits == 4:
        found = FourBits.nearest(weight)
        codes = found.codes.flatten(1)
        both = codes[:, ::2] | codes[:, 1::2] << 4
        return {name: both, name + _LOW: found.low, name + _STEP: found.step}
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    return {name: (weight / scale.unsqueeze(1)).round().to(torch.int8), name + _SCALE: scale}


def _unpack(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """What `_pack` has made of a parameter, in float32."""
    stored = tensors[name]
    if name + _SCALE in tensors:
        return stored.float() * tensors[name + _SCALE].unsqueeze(1)
    if name + _LOW not in tensors:
        return stored
    codes = torch.stack([stored & 15, stored >> 4], -1)
    shape = (stored.shape[0], -1, GROUP)
    return FourBits(codes.view(shape), tensors[name + _LOW], tensors[name + _STEP]).values()
