"""In which order the runs of a grid are made, and with which seeds. Imports no torch.

Prompt by prompt all settings take turns in an order that is shuffled each time, so that a
machine that becomes warm or busy favours none, and an interrupted sweep compares what it has on
the same prompts. All runs of a prompt share a seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from mtad.acceptance.records import Record, Setting, Task
from mtad.config import MAX_SEED

Job = tuple[Task, Setting]


def task_seed(seed: int, task: Task) -> int:
    """The seed of all runs of a prompt; it does not depend on which other prompts are run."""
    return (seed + zlib.crc32(task.id.encode(errors="replace"))) % (MAX_SEED + 1)


def jobs(
    tasks: Sequence[Task], settings: Sequence[Setting], done: Sequence[Record], seed: int
) -> list[Job]:
    """What is still to be run, in order."""
    finished = {(record.task_id, record.setting) for record in done}
    order = []
    for task in tasks:
        chance = random.Random(task_seed(seed, task))
        turns = chance.sample(list(settings), len(settings))
        order += [(task, turn) for turn in turns if (task.id, turn) not in finished]
    return order
