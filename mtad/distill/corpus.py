"""The corpus: shards on disk, each whole or absent, recognised before it is used.

A shard is a safetensors file. Its tensors are mapped into memory and read where a batch needs
them, so that a corpus may be larger than the memory.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from mtad import loading
from mtad.distill.files import DistillError, Watch, read_tensors, save_tensors
from mtad.distill.recipe import Recipe, Writing, fingerprint
from mtad.distill.targets import Target
from mtad.distill.writing import Origin, Shard, Template, write_shard
from mtad.errors import Cancelled

FORMAT = "mtad shard 2"
# All but `hidden`, which has more than ten times their bytes: training looks at it instead.
_DIGESTED = ("token_ids", "origins", "top_ids", "top_logprobs")
# Left on the disk beside the corpus, for checkpoints and whatever else needs the disk.
_SPARE_BYTES = 1_000_000_000


class Corpus:
    """All rows that were written, in one numbering.

    Attributes:
        shards: in order.
        digest: 16 hex digits of all tokens, origins and log-probabilities.
    """

    def __init__(self, shards: Sequence[Shard], digests: Sequence[str]) -> None:
        self.shards = shards
        self.digest = fingerprint(list(digests))
        self.num_rows = sum(shard.token_ids.shape[0] for shard in shards)
        self.row_tokens = shards[0].token_ids.shape[1]
        self._shard_rows = shards[0].token_ids.shape[0]

    def batch(self, rows: Iterable[int]) -> Shard:
        """The rows of these numbers, copied out of their shards."""
        places = [divmod(row, self._shard_rows) for row in rows]

        def gather(name: str) -> Tensor:
            return torch.stack([getattr(self.shards[shard], name)[row] for shard, row in places])

        return Shard(*(gather(name) for name in Shard.__dataclass_fields__))

    def damage(self, rows: Iterable[int]) -> str:
        """Names the first of these rows whose hidden states are no numbers; "" if there is none."""
        for row in rows:
            shard, place = divmod(row, self._shard_rows)
            if not self.shards[shard].hidden[place].isfinite().all():
                name = shard_path(Path(), shard).name
                return (
                    f"{name} is damaged: the hidden states of its row {place} are not finite."
                    " Delete it in the --work folder and run the same command again, without"
                    " --phase train: it is then written anew."
                )
        return ""

    def frequent_tokens(self, count: int, ends: Iterable[int], held_out: int) -> Tensor:
        """[count] int64, ascending: the ends, and what answers are made of most often.

        Of equals, and of those never seen, the lowest. The first `held_out` rows do not count.
        """
        seen = torch.zeros(0, dtype=torch.int64)
        for number, shard in enumerate(self.shards):
            skip = min(max(held_out - number * self._shard_rows, 0), self._shard_rows)
            tokens = shard.token_ids[skip:][shard.origins[skip:] == Origin.ANSWER]
            size = max(len(seen), count, int(tokens.max()) + 1 if tokens.numel() else 0)
            seen = torch.nn.functional.pad(seen, (0, size - len(seen)))
            seen += torch.bincount(tokens, minlength=size)
        highest = max(ends, default=-1)
        seen = torch.nn.functional.pad(seen, (0, max(0, highest + 1 - len(seen))))
        seen[sorted(ends)] = torch.iinfo(torch.int64).max
        return seen.sort(descending=True, stable=True).indices[:count].sort().values

    def shares(self) -> dict[str, float]:
        """Share of the tokens by origin."""
        counts = torch.zeros(len(Origin))
        for shard in self.shards:
            counts += torch.bincount(shard.origins.flatten(), minlength=len(Origin))
        return {each.name.lower(): float(counts[each] / counts.sum()) for each in Origin}


def write_corpus(target: Target, recipe: Recipe, folder: Path, watch: Watch) -> None:
    """Phase 1: writes the shards that are not there yet. Each depends on the seed and its number.

    Raises:
        DistillError: a shard that is there belongs to another recipe or target or is damaged,
            or there is no room for those to come.
        Cancelled: shards that were being written are lost, all others are kept.
    """
    target.check(recipe)
    writing = recipe.writing
    template = Template.for_target(target, writing)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [shard_path(folder, index) for index in range(writing.shards)]
    for index, path in enumerate(paths):
        if path.exists():
            open_shard(path, recipe, target, index)
    _check_space(folder, sum(not path.exists() for path in paths), recipe, target)
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    total = writing.shards * writing.shard_tokens
    before = total - len(missing) * writing.shard_tokens
    steps = dict.fromkeys(missing, 0)
    failed = threading.Event()

    def write(index: int) -> None:
        def progress(step: int) -> None:
            watch.check()
            if failed.is_set():
                raise Cancelled("Stopped, because another shard could not be written.")
            steps[index] = step
            done = before + sum(steps.values()) * writing.rows
            watch.progress("write", done, total, f"shard {index + 1} of {writing.shards}")

        try:
            shard = write_shard(
                target,
                template,
                writing,
                recipe.draft.target_layers,
                recipe.seed + index,
                progress,
            )
            save_shard(shard, paths[index], recipe, target, index)
            steps[index] = writing.row_tokens
        except BaseException:
            failed.set()
            raise

    _ = target.native  # packed here, once, and not by every writer
    threads = torch.get_num_threads()
    share = max(1, threads // writing.parts)
    try:
        with ThreadPoolExecutor(
            writing.parts, "mtad-write", torch.set_num_threads, (share,)
        ) as pool:
            futures = [pool.submit(write, index) for index in missing]
            errors = [error for future in futures if (error := future.exception())]
    finally:
        torch.set_num_threads(threads)
    # What failed first, not what was stopped because of it.
    if errors:
        raise min(errors, key=lambda error: isinstance(error, Cancelled))
    watch.progress("write", total, total, f"{writing.shards} shards")


def open_corpus(target: Target, recipe: Recipe, folder: Path) -> Corpus:
    """Maps all shards of a recipe into memory.

    Raises:
        DistillError: one is missing, belongs to another recipe or target, or is damaged.
    """
    shards, digests = [], []
    for index in range(recipe.writing.shards):
        path = shard_path(folder, index)
        if not path.exists():
            raise DistillError(
                f"{path} is missing: {index} of {recipe.writing.shards} shards are there. Run the"
                " phase write first, or lower writing.shards."
            )
        shard, digest = open_shard(path, recipe, target, index)
        shards.append(shard)
        digests.append(digest)
    return Corpus(shards, digests)


def shard_path(folder: Path, index: int) -> Path:
    """The file of one shard."""
    return folder / f"shard-{index:05d}.safetensors"


def save_shard(shard: Shard, path: Path, recipe: Recipe, target: Target, index: int) -> None:
    """Writes one shard, whole or not at all.

    Raises:
        DistillError: the target gave what is no number, or the disk refused.
    """
    flaw = _flaw(shard, target.vocab_size)
    if flaw:
        raise DistillError(
            f"{path} is not written: {flaw}. The target cannot be computed in"
            f" {loading.dtype_name(target.model.dtype)} here. Choose another --device or target."
        )
    metadata = {
        **_metadata(recipe, target, index),
        "digest": _digest(shard),
        "target_name": target.name,
        "dtype": loading.dtype_name(target.model.dtype),
    }
    save_tensors(path, dict(vars(shard)), metadata)


def open_shard(path: Path, recipe: Recipe, target: Target, index: int) -> tuple[Shard, str]:
    """One shard, mapped into memory, and the digest of all but its hidden states.

    Raises:
        DistillError: says why it is refused, and what to do.
    """
    again = f"Delete {path} and run the same command again: it is then written anew."
    layout = Shard.layout(recipe.writing, target.hidden_size * len(recipe.draft.target_layers))
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise DistillError(f"{path} is damaged or no shard ({error}). {again}") from None
    for key, value in _metadata(recipe, target, index).items():
        if metadata.get(key) != value:
            raise DistillError(
                f"{path} is a shard of another {_MEANING[key]} (it says"
                f" {metadata.get(key, 'nothing')!r}, not {value!r}). Choose another --work folder,"
                f" or delete {path} to have it written anew."
            )
    for name, (size, kind) in layout.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != size or tensor.dtype != kind:
            raise DistillError(f"{path} is damaged: {name} is not {kind} of {list(size)}. {again}")
    shard = Shard(**{name: tensors[name] for name in layout})
    digest = _digest(shard)
    flaw = "its content is not what was saved" if metadata.get("digest") != digest else ""
    flaw = flaw or _flaw(shard, target.vocab_size)
    if flaw:
        raise DistillError(f"{path} is damaged: {flaw}. {again}")
    return shard, digest


_MEANING = {"format": "format", "writing": "recipe", "shard": "number", "target": "target"}


def _metadata(recipe: Recipe, target: Target, index: int) -> dict[str, str]:
    """What must agree: not how many shards there are, nor how many are written at a time."""
    one = {**vars(recipe.writing), "shards": Writing.shards, "parts": Writing.parts}
    return {
        "format": FORMAT,
        "writing": fingerprint(one, recipe.seed, recipe.draft.target_layers),
        "shard": str(index),
        "target": target.digest,
    }


def _digest(shard: Shard) -> str:
    digest = hashlib.sha256()
    for name in _DIGESTED:
        digest.update(getattr(shard, name).contiguous().numpy())
    return digest.hexdigest()[:16]


def _flaw(shard: Shard, vocab_size: int) -> str:
    """What no target says: a value out of its range; "" if there is none."""
    for name, low, high in (
        ("token_ids", 0, vocab_size - 1),
        ("origins", 0, max(Origin)),
        ("top_ids", 0, vocab_size - 1),
        ("top_logprobs", -float("inf"), 0),
    ):
        lowest, highest = (float(end) for end in getattr(shard, name).aminmax())
        if not (low <= lowest and highest <= high):  # nor if one of them is NaN
            return f"{name} are from {lowest:g} to {highest:g}, but must be from {low:g} to {high}"
    return ""


def _check_space(folder: Path, missing: int, recipe: Recipe, target: Target) -> None:
    layout = Shard.layout(recipe.writing, target.hidden_size * len(recipe.draft.target_layers))
    size = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in layout.values())
    needed, free = missing * size + _SPARE_BYTES * (missing > 0), shutil.disk_usage(folder).free
    if needed > free:
        raise DistillError(
            f"{folder} has {free / 1e9:.1f} GB free, but {missing} shards of {size / 1e9:.2f} GB"
            f" are to be written ({needed / 1e9:.1f} GB with a reserve). Choose a --work folder on"
            " another disk, or lower writing.shards."
        )
