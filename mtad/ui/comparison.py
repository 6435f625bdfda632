"""One visitor's comparison: checked request, run of the methods in turn, messages for the page.

`play` is the generator behind the Run button. The decoding itself happens in the worker thread
of `mtad.runner.stream`; this side only drains it, folds the steps into the board and sends a
message at most every `INTERVAL_SECONDS`. Knows no gradio.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mtad.catalogue import MethodInfo, method_info, methods
from mtad.config import DecodeConfig
from mtad.errors import Cancelled, ConfigError, DeadlineExceeded, MtadError, PairError, PromptError
from mtad.trace import Step, Trace
from mtad.ui.board import Board, encode
from mtad.ui.latest import Latest
from mtad.ui.limits import Limits
from mtad.ui.loading import LoadStatus

# Eight a second would cost a decoder on two cores twice as much (tests/streaming_cost.py).
INTERVAL_SECONDS = 0.25
LOADING_INTERVAL_SECONDS = 0.5
# A visitor who walks away must not hold the device for hours.
DEADLINE_SECONDS = 900.0
MIN_METHODS, MAX_METHODS = 2, 4
MAX_KEPT = 32
_WHOLE_FIELDS = ("max_new_tokens", "num_draft_tokens", "beam_width", "top_k", "seed")
_log = logging.getLogger(__name__)

Stream = Callable[..., Iterator[Step | Trace]]
T = TypeVar("T")


class PairSource(Protocol):
    """What `play` needs of a `PairLoader`."""

    def start(self) -> None:
        """Begins to load where that has not been done, or has failed."""

    def status(self) -> LoadStatus:
        """How far it is."""

    def wait(self, seconds: float) -> bool:
        """Waits for the end of the loading, good or bad; True if it has come."""

    @property
    def pair(self) -> Any:
        """The pair; None until it is ready."""


def wait_for_models(
    source: PairSource,
    cancel: threading.Event,
    waiting: Callable[[str], T],
    seconds: float = LOADING_INTERVAL_SECONDS,
) -> Generator[T, None, bool]:
    """Waits for the end of the loading, good or bad, and has it begun if nobody has.

    Yields what `waiting` makes of the line that says how far it is, every so many `seconds`.
    Returns False if `cancel` was set first.
    """
    source.start()
    while not source.wait(seconds):
        if cancel.is_set():
            return False
        yield waiting(source.status().line)
    return True


@dataclass(frozen=True)
class Request:
    """What a visitor asked for, checked."""

    prompt: str
    methods: tuple[MethodInfo, ...]
    config: DecodeConfig


def config_of(parameters: Mapping[str, Any]) -> DecodeConfig:
    """The config that a browser asks for. It has one kind of number: 4.0 is a whole one there.

    The tree of `specinfer` adapts unless something else is said: not every form has a field for it.

    Raises:
        ConfigError: a parameter is out of range.
    """

    def whole(name: str, value: Any) -> bool:
        return name in _WHOLE_FIELDS and isinstance(value, float) and value.is_integer()

    given = {n: int(v) if whole(n, v) else v for n, v in parameters.items()}
    return DecodeConfig(**{"k_config": "auto"} | given)


def check_request(prompt: str, method_ids: Sequence[str], **parameters: Any) -> Request:
    """Checks a request as far as that is possible without a model.

    Args:
        prompt: of the visitor.
        method_ids: ids of the methods to compare, in any order.
        parameters: fields of `DecodeConfig`; None means the default.

    Raises:
        ConfigError: a parameter is out of range, a method unknown, or their number not 2 to 4.
        PromptError: the prompt is empty.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError("The prompt is empty. Type a question or choose one of the examples.")
    if not isinstance(method_ids, (list, tuple)):
        raise ConfigError(f"methods is {str(method_ids)[:60]!r}, but must be a list of method ids.")
    chosen = {method_info(method) for method in method_ids}
    if not MIN_METHODS <= len(chosen) <= MAX_METHODS:
        raise ConfigError(
            f"{len(chosen)} methods are chosen, but a comparison takes {MIN_METHODS} to"
            f" {MAX_METHODS}. Tick or untick some."
        )
    config = config_of(parameters)
    return Request(prompt, tuple(info for info in methods() if info in chosen), config)


class Comparison:
    """A request, its board, and the switch that stops it.

    Attributes:
        run_id: names it towards the browser; nobody can guess it.
        cancel: set it to stop the run.
        started: True once it has got the device.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.run_id = secrets.token_hex(16)
        self.board = Board(self.run_id, request.methods, request.config, request.prompt)
        self.cancel = threading.Event()
        self.started = False

    def stop(self) -> None:
        """The Stop button: ends the run, or takes a waiting one out of the line."""
        self.cancel.set()
        if not self.started:
            self.board.close("Stopped before it began.", "did not run")

    def traces(self) -> dict[str, Trace]:
        """The finished traces by method."""
        lanes = self.board.lanes.items()
        return {name: lane.trace for name, lane in lanes if lane.trace is not None}


class Comparisons:
    """The last comparisons of all visitors, found by their unguessable ids."""

    def __init__(self, limit: int = MAX_KEPT, limits: Limits | None = None) -> None:
        self._kept: Latest[Comparison] = Latest(limit)
        self._limits = limits or Limits()

    def open(self, request: Request) -> Comparison:
        """A new comparison; the oldest is forgotten when there are too many.

        Raises:
            ConfigError, PromptError: it is more than this page allows.
        """
        self._limits.check_request(request.prompt, len(request.methods), request.config)
        comparison = Comparison(request)
        self._kept.put(comparison.run_id, comparison)
        return comparison

    def get(self, run_id: object) -> Comparison | None:
        """The comparison of that id; None if it is unknown or forgotten."""
        return self._kept.get(run_id)


class _Sender:
    """Encodes messages that hold only what has not been sent yet, not too often."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._have: dict[str, tuple[int, int]] = {}
        self._sent_at = 0.0

    def due(self) -> bool:
        return time.monotonic() - self._sent_at >= INTERVAL_SECONDS

    def send(self) -> str:
        message = self._board.message(self._have)
        self._have = {lane["method"]: (lane["epoch"], lane["count"]) for lane in message["lanes"]}
        self._sent_at = time.monotonic()
        return encode(message)


def play(comparison: Comparison, source: PairSource, stream: Stream) -> Generator[str, None, None]:
    """Runs the methods in turn; yields messages for the token view.

    Closing the generator (a closed tab) or setting `comparison.cancel` (the Stop button) stops
    the decoding within one target pass; after a cancel the partial text stays on the board.
    """
    board, request = comparison.board, comparison.request
    sender = _Sender(board)
    comparison.started = True
    try:
        if comparison.cancel.is_set():
            yield sender.send()
            return
        pair = yield from _wait_for_pair(comparison, source, sender)
        if pair is None:
            return
        for info in request.methods:
            if comparison.cancel.is_set():
                break
            board.start(info.id, "reading the prompt")
            yield sender.send()
            go_on = yield from _play_one(comparison, info, pair, stream, sender)
            if not go_on:
                break
        stopped = comparison.cancel.is_set()
        board.close(
            "Stopped. What was decoded so far stays below." if stopped else "Finished.",
            "stopped before it began" if stopped else "did not run",
        )
        yield sender.send()
    finally:
        comparison.cancel.set()


def _wait_for_pair(
    comparison: Comparison, source: PairSource, sender: _Sender
) -> Generator[str, None, Any]:
    """Returns the pair; None where there is none and the comparison is over."""
    board = comparison.board

    def waiting(line: str) -> str:
        board.status(f"Waiting for the models: {line}")
        return sender.send()

    if not (yield from wait_for_models(source, comparison.cancel, waiting)):
        board.close("Stopped before the models were loaded.", "did not run")
        yield sender.send()
        return None
    pair = source.pair
    if pair is None:
        board.error(source.status().text)
        board.close("The models could not be loaded.", "did not run")
        yield sender.send()
        return None
    board.status("", notes=pair.notes)
    return pair


def _play_one(
    comparison: Comparison, info: MethodInfo, pair: Any, stream: Stream, sender: _Sender
) -> Generator[str, None, bool]:
    """Returns whether the next method can run."""
    board, request = comparison.board, comparison.request
    try:
        events = stream(
            info.id,
            pair,
            prompt=request.prompt,
            config=request.config,
            cancel=comparison.cancel,
            deadline_seconds=DEADLINE_SECONDS,
        )
        with contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                if isinstance(event, Trace):
                    board.finish(info.id, event)
                    break
                board.add(info.id, event)
                if sender.due():
                    yield sender.send()
    except Cancelled as error:
        # While another run held the device: there is no trace to show.
        late = isinstance(error, DeadlineExceeded)
        board.fail(info.id, str(error) if late else "stopped before it began")
    except (PromptError, PairError) as error:
        # These hold for every method of this comparison.
        board.fail(info.id, str(error))
        board.error(str(error))
        return False
    except MtadError as error:
        board.fail(info.id, str(error))
        board.error(f"{info.title}: {error}")
    except Exception as error:
        _log.exception("%s failed", info.id)
        board.fail(info.id, f"failed ({type(error).__name__}); the server's log says more")
    yield sender.send()
    return True
