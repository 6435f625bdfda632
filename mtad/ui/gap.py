"""The true gap to exact joint decoding, measured on request: checked, stoppable, in its own thread.

`GapJobs` hands out jobs by unguessable ids; `measure_gap` is the generator behind the button. It
imports the models' code when it is first run. Knows no gradio.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from typing import Any

from mtad.errors import Cancelled, ConfigError, MtadError, PairError
from mtad.trace import Bound, ModelInfo, Trace
from mtad.ui.collection import Collection
from mtad.ui.comparison import PairSource
from mtad.whatif import JOINT_METHODS

BEAT_SECONDS = 0.25
MAX_KEPT = 64
# However large a budget a file names: the device is shared.
MAX_NODE_BUDGET = 4096
_log = logging.getLogger(__name__)

Measure = Callable[..., Bound]


@dataclasses.dataclass
class GapJob:
    """One request.

    Attributes:
        job_id: names it towards the browser; nobody can guess it.
        key: of the trace.
        index: of the pass.
        cancel: set it to stop the search.
        started: True once it has got the device.
    """

    job_id: str
    key: str
    index: int
    cancel: threading.Event = dataclasses.field(default_factory=threading.Event)
    started: bool = False

    def message(self, state: str, text: str) -> dict[str, Any]:
        """What the page is told: waiting, running, done, stopped or failed, and in words."""
        return {
            "gap": {
                "job": self.job_id,
                "key": self.key,
                "i": self.index,
                "state": state,
                "text": text,
            }
        }


class GapJobs:
    """The last jobs of all visitors."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, GapJob] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, collection: Collection, pair: Any, key: object, index: object) -> GapJob:
        """A new job.

        Args:
            collection: of the traces.
            pair: that is loaded; None if none is yet.
            key: of the trace.
            index: of the pass.

        Raises:
            ConfigError: the trace is not kept, has no such pass, or the gap cannot be measured.
        """
        found = collection.get(key)
        if found is None or not isinstance(key, str):
            raise ConfigError("The server no longer keeps this trace. Open it again.")
        trace = found[1]
        if type(index) is not int or not 0 <= index < len(trace.steps):
            raise ConfigError(
                f"step is {str(index)[:40]}, but must be from 0 to {len(trace.steps) - 1}."
            )
        why = why_no_gap(trace, pair)
        if why:
            raise ConfigError(f"The true gap cannot be measured: {why}.")
        job = GapJob(secrets.token_hex(16), key, index)
        with self._lock:
            self._kept[job.job_id] = job
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)[1].cancel.set()
        return job

    def get(self, job_id: object) -> GapJob | None:
        """The job of that id; None if it is unknown or forgotten."""
        with self._lock:
            return self._kept.get(job_id) if isinstance(job_id, str) else None


def why_no_gap(trace: Trace, pair: Any) -> str:
    """Why the true gap of a trace cannot be measured with a pair; "" if it can, or may.

    The search asks the loaded models for log p and log q and compares them with recorded ones,
    so everything that changes these figures has to be the same.

    Args:
        trace: whose passes are asked about.
        pair: that is loaded; None if none is yet.
    """
    if trace.method not in JOINT_METHODS:
        return "the bound holds for MTAD and multi-candidate MTAD only"
    if pair is None:
        return ""
    if _same(trace.target) != _same(pair.target_info):
        names = _named(trace.target), _named(pair.target_info)
        return "the trace's target is {}, the loaded one {}".format(*names)
    if _same(trace.draft) != _same(pair.draft_info):
        names = _named(trace.draft), _named(pair.draft_info)
        return "the trace's draft is {}, the loaded one {}".format(*names)
    here = (str(pair.device), pair.weights, pair.engine)
    if (trace.device, trace.dtype, trace.engine) != here:
        return (
            f"it was recorded on {trace.device[:40]} in {trace.dtype[:40]} by the"
            f" {trace.engine[:40]} engine, and on {here[0]} in {here[1]} by the {here[2]} engine"
            " the same weights give other figures"
        )
    bad = [token for token in trace.prompt_ids if token >= pair.vocab_size]
    if bad or not trace.prompt_ids:
        return "the trace's prompt is none of this pair"
    length = len(trace.prompt_ids) + trace.summary.tokens
    tokens = sum(len(step.decision.emitted) for step in trace.steps)
    if max(length, len(trace.prompt_ids) + tokens) > pair.context_length:
        return f"the trace is longer than the context of the pair ({pair.context_length:,} tokens)"
    return ""


def _same(info: ModelInfo | None) -> tuple[str, str, int] | None:
    """What makes a model the same; its bytes differ with the engine, which is compared apart."""
    return None if info is None else (info.name, info.revision, info.parameters)


def _named(info: ModelInfo | None) -> str:
    if info is None:
        return "none"
    return " ".join(f"{info.name[:80]} {info.revision[:80]}".split())


def library_measure(pair: Any, trace: Trace, index: int, check: Callable[[], None]) -> Bound:
    """`mtad.bound.measure` under the lock of the device."""
    from mtad.bound import measure
    from mtad.runner import device_lock

    lock = device_lock(pair.device)
    while not lock.acquire(timeout=0.1):
        check()
    try:
        return measure(pair, trace, index, check=check)
    finally:
        lock.release()


def measure_gap(
    job: GapJob,
    collection: Collection,
    source: PairSource,
    measure: Measure = library_measure,
) -> Generator[dict[str, Any], None, None]:
    """Measures, and keeps the bound in the trace; yields what the page is told.

    Closing the generator (a closed tab) or setting `job.cancel` (the Stop button) ends the search
    before its next pass.
    """
    job.started = True
    try:
        if job.cancel.is_set():
            yield job.message("stopped", "Stopped before it began.")
            return
        source.start()
        while not source.wait(BEAT_SECONDS):
            if job.cancel.is_set():
                yield job.message("stopped", "Stopped before the models were loaded.")
                return
            yield job.message("waiting", f"Waiting for the models: {source.status().line}")
        found = collection.get(job.key)
        try:
            if source.pair is None:
                raise PairError(source.status().text)
            if found is None:
                raise ConfigError("The server no longer keeps this trace. Open it again.")
            why = why_no_gap(found[1], source.pair)
            if why:
                raise ConfigError(f"The true gap cannot be measured: {why}.")
        except MtadError as error:
            yield job.message("failed", str(error))
            return
        yield from _search(job, collection, source.pair, found[1], measure)
    finally:
        job.cancel.set()


def _search(
    job: GapJob, collection: Collection, pair: Any, trace: Trace, measure: Measure
) -> Generator[dict[str, Any], None, None]:
    passes = 0
    outcome: list[Bound | BaseException] = []

    def check() -> None:
        nonlocal passes
        if job.cancel.is_set():
            raise Cancelled("The search was stopped.")
        passes += 1

    def work() -> None:
        try:
            budget = min(trace.config.node_budget, MAX_NODE_BUDGET)
            config = dataclasses.replace(trace.config, node_budget=budget)
            asked = dataclasses.replace(trace, config=config)
            outcome.append(measure(pair, asked, job.index, check))
        except BaseException as error:  # handed to the page, below
            outcome.append(error)

    thread = threading.Thread(target=work, name="mtad-gap", daemon=True)
    started_at = time.monotonic()
    thread.start()
    while True:
        thread.join(BEAT_SECONDS)
        if not thread.is_alive():
            break
        seconds = time.monotonic() - started_at
        text = f"Searching the best block: {passes:,} target passes, {seconds:.0f} s."
        yield job.message("running", text)
    result = outcome[0]
    if isinstance(result, Bound):
        # Looked up again: another pass may have been measured while this one waited.
        latest = collection.get(job.key)
        trace = trace if latest is None else latest[1]
        steps = list(trace.steps)
        steps[job.index] = dataclasses.replace(steps[job.index], bound=result)
        collection.replace(job.key, dataclasses.replace(trace, steps=tuple(steps)))
        yield job.message("done", f"Measured in {time.monotonic() - started_at:.1f} s.")
    elif isinstance(result, Cancelled):
        yield job.message("stopped", "Stopped.")
    elif isinstance(result, MtadError):
        yield job.message("failed", str(result))
    else:
        _log.error("measuring the gap failed", exc_info=result)
        name = type(result).__name__
        yield job.message("failed", f"The search failed ({name}); the server's log says more.")
