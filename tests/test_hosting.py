"""Where the page is hosted: its container, cut off from all networks, and GPUs lent by the call."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtad.config import DecodeConfig
from mtad.fetch import cache_root
from mtad.pairs import ModelPair
from mtad.trace import Step, Trace
from mtad.ui.hosting import (
    NO_JOULES,
    gpu_seconds,
    on_shared_gpu,
    page_source,
    port_and_limits,
    shared_gpu_stream,
)
from mtad.ui.limits import HOSTED, Limits
from mtad.ui.loading import PairLoader
from mtad.ui.pair_menu import PairMenu
from mtad.ui.site import library_stream
from tests.browser import ROOT, free_port
from tests.models import tiny

DOCKERFILE = ROOT / "Dockerfile"
USER_ID = 1000


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    parts = [line.strip().partition(" ") for line in lines if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in parts]


def environment() -> dict[str, str]:
    """What the Dockerfile sets."""
    pairs = " ".join(rest for word, rest in instructions() if word == "ENV").split()
    return dict(pair.split("=", 1) for pair in pairs)


def copied() -> list[str]:
    """Paths of the tree that the Dockerfile copies."""
    found = []
    for word, rest in instructions():
        if word == "COPY":
            sources = [part for part in rest.split()[:-1] if not part.startswith("--")]
            found += sources
    return found


# ------------------------------------------------------------------ the container


class TestDockerfile:
    def test_a_linter_has_nothing_to_say(self) -> None:
        linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.defpath}")
        if linter is None:
            pytest.skip("there is no hadolint for this machine")
        found = subprocess.run(
            [linter, str(DOCKERFILE)], capture_output=True, text=True, timeout=60
        )
        assert (found.stdout, found.stderr, found.returncode) == ("", "", 0)

    def test_it_is_what_a_space_and_a_gpu_need(self) -> None:
        words = instructions()
        assert ("EXPOSE", "7860") in words
        assert any(word == "RUN" and f"--uid {USER_ID} user" in rest for word, rest in words)
        assert [rest for word, rest in words if word == "USER"] == [str(USER_ID)]
        values = environment()
        assert values["GRADIO_SERVER_NAME"] == "0.0.0.0"
        assert values["GRADIO_SERVER_PORT"] == "7860"
        assert values["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
        fetched = words.index(("RUN", "python -m mtad fetch"))
        assert fetched < words.index(("CMD", '["python", "app.py"]'))

    def test_what_it_copies_is_there_and_let_through(self) -> None:
        lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        let_through = {line[1:] for line in lines if line.startswith("!")}
        sources = {source.removeprefix("./") for source in copied()}
        assert sources == let_through
        assert all((ROOT / source).exists() for source in sources)


def no_way_in() -> str:
    """Why this process cannot start another user's without a network; "" if it can."""
    if os.geteuid() != 0:
        return "only root can change the user and cut the network"
    for tool in ("unshare", "setpriv", "ip"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return tried.stderr.strip()


@pytest.mark.skipif(bool(no_way_in()), reason=no_way_in() or "can")
@pytest.mark.timeout(600)
def test_its_start_needs_no_root_no_write_and_no_network(smollm2: Any, tmp_path: Path) -> None:
    tree = tmp_path / "app"
    tree.mkdir()
    for source in copied():
        path = ROOT / source
        if path.is_dir():
            shutil.copytree(path, tree / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tree / source)
    # The weights alone: what the build leaves there.
    models = tmp_path / "models"
    models.mkdir()
    (models / "weights").symlink_to(cache_root() / "weights")
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o700)
    os.chown(scratch, USER_ID, USER_ID)
    started = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "tests.cut_off", str(tree)],
        cwd=ROOT,
        env={
            **{name: value for name, value in environment().items() if name != "PATH"},
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "MTAD_HOME": str(models),
            "TMPDIR": str(scratch),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert started.returncode == 0, started.stdout[-3000:] + started.stderr[-3000:]
    told = json.loads(started.stdout.splitlines()[-1])
    assert told["user"] == USER_ID
    assert "unreachable" in told["network"]
    assert told["refused"] == sorted([str(tree), str(models)])
    trace = Trace.from_json(json.dumps(told["trace"]))
    assert trace.stop_reason == "length"
    assert len(trace.token_ids) == 8
    assert trace.engine == smollm2.engine, "the fastest engine, compiled for this start"
    assert not list((models).glob("kernels")), "and nothing was written beside the weights"
    changed = [path for path in tree.rglob("*") if path.lstat().st_mtime > told["started"]]
    assert changed == []


# ------------------------------------------------------------------ the Space


def front_matter() -> dict[str, str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert block is not None
    pairs = [line.partition(":") for line in block[1].splitlines() if not line.startswith(" ")]
    return {name: value.strip() for name, _, value in pairs}


def test_the_readme_opens_with_what_spaces_reads() -> None:
    import gradio

    given = front_matter()
    assert (given["sdk"], given["app_file"], given["license"]) == ("gradio", "app.py", "apache-2.0")
    assert (ROOT / given["app_file"]).exists()
    assert given["python_version"].strip('"') in ("3.10.13", "3.12.12"), "those of ZeroGPU"
    assert given["sdk_version"] == gradio.__version__, "what the tests ran with"
    assert len(given["short_description"]) <= 60
    assert given["colorFrom"] in ("blue", "indigo")


def test_no_file_needs_large_file_support() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    large = [
        name
        for name in listed.stdout.decode().split("\0")
        if name and (ROOT / name).stat().st_size > 10_000_000
    ]
    assert large == []


# ------------------------------------------------------------------ a GPU lent by the call


class Source:
    """A pair source that is ready."""

    def __init__(self, pair: Any) -> None:
        self.pair = pair


def forking(duration: Callable[..., float]) -> Callable[[Any], Any]:
    """A stand-in for `spaces.GPU` on ZeroGPU, which is there only: a call forks, and all that
    goes in and comes out is pickled."""

    def decorate(function: Any) -> Any:
        def lent(*arguments: Any) -> Iterator[Any]:
            asked.append(duration(*arguments))
            sent = pickle.dumps(arguments)
            fork = multiprocessing.get_context("fork")
            inbox, outbox = fork.Pipe(duplex=False)

            def work() -> None:
                try:
                    for value in function(*pickle.loads(sent)):
                        outbox.send(("value", value))
                except BaseException as error:
                    outbox.send(("error", error))
                outbox.send(("end", os.getpid()))

            process = fork.Process(target=work)
            process.start()
            try:
                while True:
                    assert inbox.poll(60)
                    kind, value = inbox.recv()
                    if kind == "error":
                        raise value
                    if kind == "end":
                        workers.append(value)
                        return
                    yield value
            finally:
                process.join(20)
                process.kill()

        return lent

    return decorate


asked: list[float] = []
workers: list[int] = []


def lent_run(stream: Any, config: DecodeConfig, **more: Any) -> list[Step | Trace]:
    return list(stream("mtad", None, prompt_ids=[3, 1, 4], config=config, **more))


@pytest.fixture
def pair() -> ModelPair:
    return ModelPair(tiny(), tiny(seed=1))


class TestSharedGpu:
    def test_only_a_space_with_zerogpu_has_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
        assert not on_shared_gpu()
        assert isinstance(page_source(Limits()), PairMenu)
        assert type(page_source(HOSTED)) is PairLoader
        monkeypatch.setenv("SPACES_ZERO_GPU", "true")
        assert on_shared_gpu()
        assert type(page_source(Limits())) is PairLoader

    def test_the_duration_grows_with_the_request_up_to_the_deadline(self) -> None:
        seconds = [gpu_seconds(DecodeConfig(max_new_tokens=n), 120.0) for n in (1, 64, 256, 9999)]
        assert seconds == sorted(seconds)
        assert seconds[0] > 10
        assert seconds[2] < seconds[3] == 120.0

    def test_outside_a_space_the_package_runs_it_in_place(self, pair: ModelPair) -> None:
        pytest.importorskip("spaces", reason="the package of Hugging Face is not installed")
        config = DecodeConfig(max_new_tokens=12, num_draft_tokens=3)
        stream = shared_gpu_stream(library_stream, Source(pair), HOSTED)  # type: ignore[arg-type]
        *steps, trace = lent_run(stream, config)
        assert isinstance(trace, Trace)
        direct = list(library_stream("mtad", pair, prompt_ids=[3, 1, 4], config=config))[-1]
        assert isinstance(direct, Trace)
        assert trace.token_ids == direct.token_ids
        assert len(steps) == len(trace.steps)
        assert trace.energy.joules is None
        assert trace.energy.reason == NO_JOULES

    def test_across_a_fork_all_comes_back(self, pair: ModelPair) -> None:
        asked.clear()
        workers.clear()
        config = DecodeConfig(max_new_tokens=12, num_draft_tokens=3)
        stream = shared_gpu_stream(
            library_stream,
            Source(pair),
            HOSTED,
            decorate=forking,  # type: ignore[arg-type]
        )
        *_, trace = lent_run(stream, config, deadline_seconds=60.0)
        assert isinstance(trace, Trace)
        assert len(trace.token_ids) == 12
        assert workers[0] != os.getpid()
        assert asked == [gpu_seconds(config, 60.0)]

    def test_stop_reaches_across_the_fork_and_keeps_what_was_made(self) -> None:
        # Room for so many tokens that a run cannot end before it is stopped.
        long = dict(max_position_embeddings=8192)
        pair = ModelPair(tiny(**long), tiny(seed=1, **long))

        def slow(*arguments: Any, **keywords: Any) -> Iterator[Step | Trace]:
            for event in library_stream(*arguments, **keywords):
                time.sleep(0.05)
                yield event

        stream = shared_gpu_stream(
            slow,
            Source(pair),
            HOSTED,
            decorate=forking,  # type: ignore[arg-type]
        )
        cancel, seen = threading.Event(), []
        config = DecodeConfig(max_new_tokens=8000, num_draft_tokens=1, temperature=1.5)
        for event in stream("mtad", None, prompt_ids=[3, 1, 4], config=config, cancel=cancel):
            seen.append(event)
            if len(seen) == 3:
                cancel.set()
        trace = seen[-1]
        assert isinstance(trace, Trace)
        assert trace.stop_reason == "cancelled"
        assert 3 <= len(trace.token_ids) < 4000


# Where the page is served


def started(port: str) -> subprocess.CompletedProcess[str]:
    """`app.py`, which is not expected to start."""
    environment = {**os.environ, "GRADIO_SERVER_PORT": port, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "app.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("port", ["abc", "0", "65536", "99999999999999999999", "-1", "７８６０"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    found = started(port)
    assert found.returncode == 1
    assert found.stderr == f"mtad: GRADIO_SERVER_PORT is {port!r}, but must be from 1 to 65535.\n"


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = started(str(port))
    assert found.returncode == 1
    assert found.stderr.startswith(f"mtad: Port {port} is taken. Stop what listens there, or")
    assert f"make demo PORT={port + 1}\n" in found.stderr


def test_without_a_port_gradio_finds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADIO_SERVER_PORT", raising=False)
    assert port_and_limits() == (None, Limits())
    free = free_port()
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(free))
    assert port_and_limits()[0] == free
