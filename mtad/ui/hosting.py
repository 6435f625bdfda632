"""How the page is put together for where it runs: on one's own machine, hosted, on a shared GPU.

On Hugging Face's ZeroGPU a GPU belongs to the page only inside a call that `spaces.GPU` wraps.
The call runs in a forked process: what goes in and what comes out is pickled, so a run is asked
for by name, steps come back one by one, and Stop is a file that appears. The package `spaces` is
there where it is needed; nothing else of the project depends on it. Knows no gradio.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mtad.config import DecodeConfig
from mtad.errors import ConfigError
from mtad.trace import Step, Trace
from mtad.ui.comparison import PairSource, Stream
from mtad.ui.limits import Limits, limits_from_environment
from mtad.ui.loading import PairLoader
from mtad.ui.pair_menu import PairMenu

SHARED_GPU_VARIABLE = "SPACES_ZERO_GPU"
PORT_VARIABLE = "GRADIO_SERVER_PORT"
NO_JOULES = (
    "This page's GPU is lent to it call by call and shared with other pages: its sensor would"
    " count what they draw."
)
# A call is paid for by its announced length, and killed after it.
_START_SECONDS = 15.0
_SECONDS_A_PASS = 0.12
_POLL_SECONDS = 0.1
_M_ARENA_MAX = -8  # of malloc.h

Decorator = Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]


def keep_memory_together() -> None:
    """Has all threads of this process take memory from two places, before they are started.

    Every run is a thread, and glibc would give each one of up to eight places a processor, where
    what one run has freed waits for a run that comes by again: a page that serves many grows by
    hundreds of megabytes. Elsewhere than on glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def port_from_environment() -> int | None:
    """The port that GRADIO_SERVER_PORT asks for; None if it does not, and gradio finds one.

    Raises:
        ConfigError: it is no port, or somebody listens there: gradio would take another one.
    """
    value = os.environ.get(PORT_VARIABLE, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:6]) <= 65_535):
        raise ConfigError(f"{PORT_VARIABLE} is {value[:60]!r}, but must be from 1 to 65535.")
    port = int(value)
    try:
        socket.create_server((os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} is taken. Stop what listens there, or choose another one, such as:"
                f" make demo PORT={port + 1 if port < 65_535 else port - 1}"
            ) from None
        # Whatever else is wrong with the address, gradio says.
    return port


def port_and_limits() -> tuple[int | None, Limits]:
    """What the environment says of the page. Ends the program with a message if that is wrong."""
    try:
        return port_from_environment(), limits_from_environment()
    except ConfigError as error:
        raise SystemExit(f"mtad: {error}") from None


def on_shared_gpu() -> bool:
    """True in a Space with ZeroGPU."""
    return os.environ.get(SHARED_GPU_VARIABLE, "").lower() in ("1", "t", "true")


def page_source(limits: Limits) -> PairSource:
    """The pair of the page: exchangeable on one's own machine, fixed on a hosted page."""
    if on_shared_gpu():
        # The engine that records graphs needs a GPU when the pair is loaded; here is none yet.
        return PairLoader(load=_load_for_shared_gpu)
    return PairLoader() if limits.hosted else PairMenu()


def gpu_seconds(config: DecodeConfig, most: float) -> float:
    """Seconds of a GPU to ask for: enough for the slowest method, never more than a run may take.

    Args:
        config: of the run.
        most: deadline of a run.
    """
    return min(_START_SECONDS + _SECONDS_A_PASS * config.max_new_tokens, most)


def shared_gpu_stream(
    stream: Stream, source: PairSource, limits: Limits, decorate: Decorator | None = None
) -> Stream:
    """`stream` on a GPU that is lent call by call; joules are unavailable and caches are not kept.

    Args:
        stream: has the signature of `mtad.runner.stream`.
        source: of the pair; loaded before the first run, since the forked process inherits it.
        limits: of the page.
        decorate: `spaces.GPU` unless a test says otherwise.
    """
    if decorate is None:
        from spaces import GPU as decorate  # type: ignore[import-untyped, no-redef]

    def duration(method: str, request: dict[str, Any], stop_file: str) -> float:
        asked = request.get("deadline_seconds") or limits.deadline_seconds
        return gpu_seconds(request["config"], min(asked, limits.deadline_seconds))

    def on_gpu(method: str, request: dict[str, Any], stop_file: str) -> Iterator[Step | Trace]:
        from mtad.energy import none_meter

        cancel, over = threading.Event(), threading.Event()

        def watch() -> None:
            while not over.wait(_POLL_SECONDS):
                if os.path.exists(stop_file):
                    cancel.set()
                    return

        threading.Thread(target=watch, name="mtad-stop-file", daemon=True).start()
        try:
            yield from stream(
                method, source.pair, **request, cancel=cancel, meter=none_meter(NO_JOULES)
            )
        finally:
            over.set()

    lent = decorate(duration=duration)(on_gpu)  # type: ignore[misc]

    def shared(
        method: str,
        pair: Any,
        *,
        cancel: threading.Event | None = None,
        session: Any = None,
        config: DecodeConfig | None = None,
        **request: Any,
    ) -> Iterator[Step | Trace]:
        del pair, session  # the forked process has the pair; nothing of it comes back to be kept
        request["config"] = config or DecodeConfig()
        with tempfile.TemporaryDirectory(prefix="mtad-stop-") as folder:
            stop_file = Path(folder) / "stop"
            over = threading.Event()
            watcher = threading.Thread(
                target=_tell, args=(cancel, over, stop_file), name="mtad-tell-stop", daemon=True
            )
            watcher.start()
            try:
                with contextlib.closing(lent(method, request, str(stop_file))) as events:
                    yield from events
            finally:
                over.set()
                watcher.join()

    return shared


def _tell(cancel: threading.Event | None, over: threading.Event, stop_file: Path) -> None:
    """Makes the file that stops a run once its switch is set."""
    while cancel is not None and not over.wait(_POLL_SECONDS):
        if cancel.is_set():
            stop_file.touch()
            return


def _load_for_shared_gpu(progress: Any) -> Any:
    from mtad.pairs import load_pair

    return load_pair("smollm2", device="cuda", engine="eager", progress=progress)
