"""What is kept of each run of a sweep, and the file in which it outlives the process.

The file is JSON lines. The first line is the header: what all runs have in common (models,
weights, device, parameters). Every further line is one finished run. Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from mtad.catalogue import method_info
from mtad.config import DecodeConfig
from mtad.errors import MtadError
from mtad.metrics import NGRAM
from mtad.trace import Count, StopReason, Trace

FORMAT = 1
MAX_RECORDS_BYTES = 256 * 1024 * 1024
_MARK = "mtad_acceptance"

Positive = Annotated[int, Field(ge=1, le=2**53 - 1)]
Seconds = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]
# Below 0 only by the rounding of log-probabilities; small enough that a sum of them is finite.
Nats = Annotated[float, Field(ge=-1.0, le=1e12, allow_inf_nan=False)]


class RecordsError(MtadError):
    """A file of records belongs to other runs, is none, or is in use."""


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Attributes:
        method: id of a decoding method.
        num_draft_tokens: γ; None for methods that read none.
        accept_threshold: τ; None for methods that read none.
        beam_width: W; None for methods that read none, and where all runs have the same.
    """

    method: str
    num_draft_tokens: int | Literal["auto"] | None = None
    accept_threshold: float | None = None
    beam_width: int | None = None

    def __str__(self) -> str:
        gamma = "" if self.num_draft_tokens is None else f" γ {self.num_draft_tokens}"
        tau = "" if self.accept_threshold is None else f" τ {self.accept_threshold:g}"
        width = "" if self.beam_width is None else f" W {self.beam_width}"
        return f"{self.method}{gamma}{tau}{width}"

    def config(self, shared: DecodeConfig, seed: int) -> DecodeConfig:
        """The parameters of a run of this setting; the rest is as in `shared`."""
        own: dict[str, Any] = {"num_draft_tokens": self.num_draft_tokens, "seed": seed}
        if self.accept_threshold is not None:
            own["accept_threshold"] = self.accept_threshold
        if self.beam_width is not None:
            own["beam_width"] = self.beam_width
        elif self.num_draft_tokens is None:  # nor W: it is chosen together with γ
            own["beam_width"] = shared.width
        return dataclasses.replace(shared, **own)


def grid(
    methods: Sequence[str],
    draft_lengths: Sequence[int | Literal["auto"]],
    thresholds: Sequence[float],
    beam_widths: Sequence[int | None] = (None,),
) -> list[Setting]:
    """Every method with every γ, τ and W; what a method does not read does not multiply it.

    Raises:
        ConfigError: there is no such method, or a value is outside its range.
    """
    found = []
    for method in methods:
        reads = method_info(method).parameters
        gammas = draft_lengths if "num_draft_tokens" in reads else (None,)
        taus = thresholds if "accept_threshold" in reads else (None,)
        widths = beam_widths if "beam_width" in reads else (None,)
        found += [
            Setting(method, gamma, tau, width)
            for width in widths
            for tau in taus
            for gamma in gammas
        ]
    for setting in found:
        setting.config(DecodeConfig(), seed=0)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Task:
    """One prompt.

    Attributes:
        id: names it; its runs share a seed that is made of it.
        kind: what sort of task it is.
        request: how `mtad.run` takes it: {"prompt": …}, {"messages": …} or {"prompt_ids": …}.
    """

    id: str
    kind: str
    request: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Of the request: another text under the same id is another prompt."""
        text = json.dumps(self.request, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def spread(tasks: Sequence[Task], limit: int | None = None) -> list[Task]:
    """The first `limit` tasks, one of each kind in turn: whatever the number, kinds are even."""
    kinds: dict[str, list[Task]] = {}
    for task in tasks:
        kinds.setdefault(task.kind, []).append(task)
    longest = max(map(len, kinds.values()), default=0)
    order = [own[i] for i in range(longest) for own in kinds.values() if i < len(own)]
    return order[:limit]


@dataclass(frozen=True)
class Record:
    """One finished run, in numbers that can be added up.

    Attributes:
        setting: how it was decoded.
        task_id: which prompt.
        task_digest: of its text.
        tokens: emitted.
        target_passes: prefill excluded.
        target_positions: rows of those passes.
        draft_passes: forward passes of the draft.
        accepted: draft tokens accepted.
        offered: draft tokens offered: γ, or the depth of the tree, summed over the passes.
        nll: −log p of the emitted tokens under the unwarped target, summed, in nats; None if a
            token has probability 0.
        ngrams: 4-grams in the answer.
        distinct_ngrams: different ones among them.
        decode_seconds: wall seconds of decoding, prefill excluded.
        draft_seconds: of these, in the draft.
        verify_seconds: of these, in the target.
        stop_reason: why the run ended.
    """

    setting: Setting
    task_id: str
    task_digest: str
    tokens: Positive
    target_passes: Positive
    target_positions: Positive
    draft_passes: Count
    accepted: Count
    offered: Count
    nll: Nats | None
    ngrams: Count
    distinct_ngrams: Count
    decode_seconds: Seconds
    draft_seconds: Seconds
    verify_seconds: Seconds
    stop_reason: StopReason

    @property
    def distinct_4(self) -> float | None:
        """Distinct 4-grams / 4-grams; None for an answer of fewer than four tokens."""
        return self.distinct_ngrams / self.ngrams if self.ngrams else None

    @property
    def repeated_4gram_share(self) -> float | None:
        """Share of 4-grams that had occurred before in the answer."""
        return 1 - self.distinct_ngrams / self.ngrams if self.ngrams else None

    @staticmethod
    def of(trace: Trace, setting: Setting, task: Task) -> Record:
        """What a trace says."""
        ids, decisions, summary = trace.token_ids, trace.decisions(), trace.summary
        logprobs = [value for decision in decisions for value in decision.emitted_logprobs]
        ngrams = [ids[i : i + NGRAM] for i in range(len(ids) - NGRAM + 1)]
        return Record(
            setting=setting,
            task_id=task.id,
            task_digest=task.digest,
            tokens=summary.tokens,
            target_passes=summary.target_passes,
            target_positions=sum(decision.target_positions for decision in decisions),
            draft_passes=sum(decision.draft_passes for decision in decisions),
            accepted=sum(decision.accepted_length for decision in decisions),
            offered=sum(decision.tree.depth for decision in decisions),
            nll=None if -math.inf in logprobs else -math.fsum(logprobs),
            ngrams=len(ngrams),
            distinct_ngrams=len(set(ngrams)),
            decode_seconds=summary.decode_seconds,
            draft_seconds=summary.draft_seconds,
            verify_seconds=summary.verify_seconds,
            stop_reason=trace.stop_reason,
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps a second process from the same file of records.

    Raises:
        RecordsError: another process has it, or the lock beside it cannot be made.
    """
    import filelock  # brings asyncio, for which no other command should wait

    file = Path(os.path.realpath(path))
    lock = filelock.FileLock(file.with_name(f".{file.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RecordsError(
            f"Another process writes to {path}. Wait for it, or name another file of records."
        ) from None
    except OSError as error:
        raise RecordsError(f"{path} cannot be used: {error.strerror or error}.") from None
    try:
        yield
    finally:
        lock.release()


class RecordFile:
    """Records on disk: each is there, whole, once `append` has returned.

    One process at a time may have the file open, see `locked`.

    Attributes:
        path: the file.
        records: what it holds, the latest of each setting and prompt.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Opens a file, or begins one. The half line of a killed run is cut off.

        Args:
            path: the file.
            header: see `mtad.acceptance.sweep.fingerprint`.

        Raises:
            RecordsError: it was begun with another header (the message says where they differ),
                is damaged, too large, no file of records, or cannot be read or written.
        """
        self.path = path
        self._records: dict[tuple[Setting, str], Record] = {}
        first = json.dumps({_MARK: FORMAT, **header}, allow_nan=False) + "\n"
        try:
            data = self._load()
            whole = data[: data.rfind(b"\n") + 1]
            if not whole and first.encode().startswith(data):
                whole = first.encode()
                self._write("w", first)
            else:
                self._read(whole, json.loads(first))
                if len(whole) < len(data):
                    os.truncate(path, len(whole))
        except OSError as error:
            raise RecordsError(f"{path} cannot be used: {error.strerror}.") from None

    @property
    def records(self) -> list[Record]:
        """See the class."""
        return list(self._records.values())

    def append(self, record: Record) -> None:
        """Adds a finished run.

        Raises:
            RecordsError: the disk refused.
        """
        try:
            self._write("a", _adapter().dump_json(record).decode() + "\n")
        except OSError as error:
            raise RecordsError(f"{self.path} cannot be written: {error.strerror}.") from None
        self._keep(record)

    def _load(self) -> bytes:
        if not self.path.exists():
            return b""
        with self.path.open("rb") as stream:
            data = stream.read(MAX_RECORDS_BYTES + 1)
        if len(data) > MAX_RECORDS_BYTES:
            raise RecordsError(
                f"{self.path} is larger than {MAX_RECORDS_BYTES:,} bytes. Name a new file."
            )
        return data

    def _keep(self, record: Record) -> None:
        self._records[record.setting, record.task_id] = record

    def _write(self, mode: Literal["w", "a"], text: str) -> None:
        with self.path.open(mode, encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self, data: bytes, header: dict[str, Any]) -> None:
        first, *lines = data.split(b"\n")[:-1] or [b""]
        try:
            found = json.loads(first)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or _MARK not in found:
            raise RecordsError(
                f"{self.path} is no file of acceptance records. Name one, or a new file."
            )
        for name, there, here in _differences(found, header):
            raise RecordsError(
                f"{self.path} holds records of other runs: {name} is {there} there and {here}"
                " here. Name another file, or repeat what it was begun with."
            )
        for number, line in enumerate(lines, 2):
            try:
                self._keep(_adapter().validate_json(line, strict=True))
            except ValidationError:
                raise RecordsError(
                    f"{self.path}, line {number} is damaged. Delete that line to run it again."
                ) from None


@functools.cache
def _adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Annotated[Record, AfterValidator(_possible)])


def _possible(record: Record) -> Record:
    """The record; raises ValueError if no run can have given it."""
    method_info(record.setting.method)
    record.setting.config(DecodeConfig(), seed=0)
    if record.accepted > record.offered or record.distinct_ngrams > record.ngrams:
        raise ValueError("a part is larger than its whole")
    return record


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, value there, value here) of each entry in which two headers differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**here, **there}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(there.get(key), here.get(key), inner)
    elif there != here:
        yield name, repr(there)[:80], repr(here)[:80]


def match(
    records: Sequence[Record], tasks: Sequence[Task], settings: Sequence[Setting]
) -> list[Record]:
    """The records of these prompts and settings; others may lie in the file and are left out.

    Raises:
        RecordsError: a prompt had another text when it was run.
    """
    digests = {task.id: task.digest for task in tasks}
    wanted = set(settings)
    found = []
    for record in records:
        if record.task_id not in digests:
            continue
        if record.task_digest != digests[record.task_id]:
            raise RecordsError(
                f"The records hold runs of a prompt {record.task_id!r} with another text. Name"
                " another file of records, or give the prompt another id."
            )
        if record.setting in wanted:
            found.append(record)
    return found
