"""What is kept of each run of a bench, and the file in which it outlives the process.

A `Run` is a `Record` of `mtad acceptance` with its repeat, its energy and where it ran. Imports
no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

from mtad.acceptance.records import Positive, Record, RecordFile, RecordsError, Setting, Task, match
from mtad.trace import Count, EnergyReading, Trace

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """One finished run.

    Of transformers the first pass is the prefill too, and the timed window begins behind it.

    Attributes:
        record: its numbers, of all passes; `setting.method` is the id of the row. The seconds
            are those of the timed window.
        repeat: number of the repetition, from 0.
        engine: what ran the models.
        dtype: of the target.
        prompt_tokens: length of the prompt.
        timed_tokens: of these passes.
        timed_passes: of the target in the timed window.
        timed_draft_passes: of the draft.
        timed_draft_positions: rows of those; None where nobody counted them.
        energy: over the timed window.
    """

    record: Record
    repeat: Count
    engine: str
    dtype: str
    prompt_tokens: Positive
    timed_tokens: Count
    timed_passes: Count
    timed_draft_passes: Count
    timed_draft_positions: Count | None
    energy: EnergyReading

    @property
    def tokens_per_second(self) -> float | None:
        """None for an answer that ended in its first pass."""
        seconds = self.record.decode_seconds
        return self.timed_tokens / seconds if self.timed_tokens and seconds > 0 else None

    @staticmethod
    def of(trace: Trace, setting: Setting, task: Task, repeat: int = 0) -> Run:
        """What a trace of one of our methods says: all of its passes were timed."""
        record = Record.of(trace, setting, task)
        return Run(
            record=record,
            repeat=repeat,
            engine=trace.engine,
            dtype=trace.dtype,
            prompt_tokens=len(trace.prompt_ids),
            timed_tokens=record.tokens,
            timed_passes=record.target_passes,
            timed_draft_passes=record.draft_passes,
            timed_draft_positions=None,
            energy=trace.energy,
        )


# By prompt and repeat
Runs = Mapping[tuple[str, int], Run]


class RunFile(RecordFile):
    """Runs on disk, as `RecordFile` has records: whole once `add` has returned."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Opens a file, or begins one; see `RecordFile`.

        Raises:
            RecordsError: see `RecordFile`.
        """
        self._runs: dict[tuple[Setting, str, int], Run] = {}
        super().__init__(path, {"bench": FORMAT, **header})

    @property
    def runs(self) -> list[Run]:
        """What the file holds, the latest of each row, prompt and repeat."""
        return list(self._runs.values())

    def add(self, run: Run) -> None:
        """Adds a finished run.

        Raises:
            RecordsError: the disk refused.
        """
        try:
            self._write("a", _adapter().dump_json(run).decode() + "\n")
        except OSError as error:
            raise RecordsError(f"{self.path} cannot be written: {error.strerror}.") from None
        self._hold(run)

    def _hold(self, run: Run) -> None:
        self._runs[run.record.setting, run.record.task_id, run.repeat] = run

    def _read(self, data: bytes, header: dict[str, Any]) -> None:
        first, *lines = data.split(b"\n")[:-1] or [b""]
        super()._read(first + b"\n", header)
        for number, line in enumerate(lines, 2):
            try:
                self._hold(_adapter().validate_json(line, strict=True))
            except ValidationError:
                raise RecordsError(
                    f"{self.path}, line {number} is damaged. Delete that line to run it again."
                ) from None


@functools.cache
def _adapter() -> TypeAdapter[Run]:
    return TypeAdapter(Annotated[Run, AfterValidator(_possible)])


def _possible(run: Run) -> Run:
    """The run; raises ValueError if none can have given it."""
    record = run.record
    if record.accepted > record.offered or record.distinct_ngrams > record.ngrams:
        raise ValueError("a part is larger than its whole")
    if run.timed_tokens > record.tokens or run.timed_passes > record.target_passes:
        raise ValueError("more was timed than done")
    return run


def matching(
    runs: Sequence[Run], tasks: Sequence[Task], settings: Sequence[Setting], repeats: int
) -> list[Run]:
    """The runs of these prompts, rows and repeats; others may lie in the file and are left out.

    Raises:
        RecordsError: a prompt had another text when it was run.
    """
    wanted = {id(record) for record in match([run.record for run in runs], tasks, settings)}
    return [run for run in runs if id(run.record) in wanted and run.repeat < repeats]


def plain(runs: Sequence[Run]) -> list[Any]:
    """The runs as JSON has them."""
    return [_adapter().dump_python(run, mode="json") for run in runs]
