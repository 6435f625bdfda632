"""Who takes part in a bench, and the runs: one process, all loaded, prompt by prompt in turns."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from mtad.acceptance.order import jobs, task_seed
from mtad.acceptance.records import Setting, Task, grid
from mtad.acceptance.sweep import WARM_UP_TOKENS
from mtad.bench.baselines import ENGINE, Transformers, in_dtype
from mtad.bench.measures import ASSISTED, GENERATE, Line, is_foreign
from mtad.bench.records import Run
from mtad.bench.roofline import Shape
from mtad.bench.shapes import draft_shape, target_shape
from mtad.catalogue import method_info
from mtad.config import DecodeConfig
from mtad.errors import MtadError, PromptError
from mtad.loading import dtype_name
from mtad.pairs import ModelPair
from mtad.runner import run
from mtad.text import encode_prompt


class System(Protocol):
    """Something that answers a prompt and says what that cost."""

    @property
    def setting(self) -> Setting:
        """The row that it belongs to."""

    def shapes(self) -> tuple[Shape | None, Shape | None]:
        """What passes of the target and of the draft read and compute; None if unknown."""

    def run(
        self,
        task: Task,
        prompt_ids: Sequence[int],
        config: DecodeConfig,
        repeat: int,
        cancel: threading.Event | None,
    ) -> Run | None:
        """One answer; None if it was stopped.

        Raises:
            MtadError: it failed.
        """


@dataclass(frozen=True)
class Own:
    """One of our methods on our engine."""

    setting: Setting
    pair: ModelPair

    def shapes(self) -> tuple[Shape | None, Shape | None]:
        """See `System.shapes`."""
        return target_shape(self.pair), draft_shape(self.pair)

    def run(
        self,
        task: Task,
        prompt_ids: Sequence[int],
        config: DecodeConfig,
        repeat: int,
        cancel: threading.Event | None,
    ) -> Run | None:
        """See `System.run`."""
        own = self.setting.config(config, config.seed)
        trace = run(
            self.setting.method, self.pair, prompt_ids=prompt_ids, config=own, cancel=cancel
        )
        if trace.stop_reason == "cancelled":
            return None
        return Run.of(trace, self.setting, task, repeat)


class Failure(NamedTuple):
    """A row that is out, and why."""

    setting: Setting
    message: str


class Job(NamedTuple):
    """A run that is still to be made."""

    repeat: int
    task: Task
    setting: Setting


def settings_of(methods: Sequence[str], config: DecodeConfig) -> list[Setting]:
    """Our rows: γ is the config's, or the method's own."""
    found = []
    for method in methods:
        own = config.with_draft_length(method_info(method).draft_length).num_draft_tokens
        assert own is not None
        found += grid([method], [own], [config.accept_threshold])
    return list(dict.fromkeys(found))


def build(
    pair: ModelPair,
    methods: Sequence[str],
    baselines: Sequence[str],
    config: DecodeConfig,
) -> tuple[list[System], list[Line]]:
    """Those who take part, and all rows of the table: transformers first, then our methods.

    Args:
        pair: the models; our methods run on its engine.
        methods: ids of ours.
        baselines: "float32", "bfloat16", "assisted".
        config: of all runs.
    """
    systems: list[System] = []
    lines: list[Line] = []
    for name in baselines:
        line, system = _baseline(name, pair, config)
        lines.append(line)
        if system is not None:
            systems.append(system)
    for setting in settings_of(methods, config):
        systems.append(Own(setting, pair))
        lines.append(Line(setting, pair.engine, pair.weights))
    return systems, lines


def _baseline(name: str, pair: ModelPair, config: DecodeConfig) -> tuple[Line, Transformers | None]:
    if name != "assisted":
        line = Line(Setting(GENERATE[name]), ENGINE, name)
        try:
            target = in_dtype(pair.target, getattr(torch, name))
        except (RuntimeError, MemoryError) as error:
            said = (str(error).strip().splitlines() or ["no memory"])[0][:200]
            return dataclasses.replace(line, absent=f"no copy in {name}: {said}"), None
        return line, Transformers(line.setting, pair, target)
    resolved = config.with_draft_length(4)
    setting = Setting(ASSISTED, resolved.num_draft_tokens)
    line = Line(setting, ENGINE, dtype_name(pair.dtype))
    if not isinstance(pair.draft, PreTrainedModel):
        what = "this pair has no draft" if pair.draft is None else "this pair's draft is none"
        absent = f"it takes a causal language model as draft, and {what}"
        return dataclasses.replace(line, absent=absent), None
    return line, Transformers(setting, pair, pair.target, pair.draft)


def shapes(systems: Sequence[System]) -> tuple[dict[Setting, Shape], dict[Setting, Shape]]:
    """By row, the shapes of targets and of drafts; unknown ones are left out."""
    found = {system.setting: system.shapes() for system in systems}
    targets = {setting: target for setting, (target, _) in found.items() if target is not None}
    drafts = {setting: draft for setting, (_, draft) in found.items() if draft is not None}
    return targets, drafts


def encode(pair: ModelPair, tasks: Sequence[Task]) -> dict[str, list[int]]:
    """By id of the task, the tokens of its prompt: all rows get the same.

    Raises:
        PromptError: one is empty, or leaves no room for an answer.
    """
    found = {}
    for task in tasks:
        try:
            ids = encode_prompt(pair.tokenizer, **task.request)
        except PromptError as error:
            raise PromptError(f"Prompt {task.id!r}: {error}") from None
        if len(ids) >= pair.context_length:
            raise PromptError(
                f"Prompt {task.id!r} has {len(ids):,} tokens, but must have fewer than the"
                f" {pair.context_length:,} that the context of this pair holds. Shorten it."
            )
        found[task.id] = ids
    return found


def missing(
    tasks: Sequence[Task],
    settings: Sequence[Setting],
    repeats: int,
    done: Sequence[Run],
    seed: int,
) -> list[Job]:
    """What is still to be run, in order: in every repeat all rows of a prompt, shuffled.

    Those of transformers come first, so that rows of the same engine, which are what is compared
    most closely, lie within seconds of each other.
    """
    order = []
    for repeat in range(repeats):
        finished = [run.record for run in done if run.repeat == repeat]
        todo = jobs(tasks, settings, finished, seed + repeat)
        for task, group in itertools.groupby(todo, key=operator.itemgetter(0)):
            turns = sorted((one for _, one in group), key=lambda one: not is_foreign(one))
            order += [Job(repeat, task, turn) for turn in turns]
    return order


def measure(
    systems: Sequence[System],
    todo: Sequence[Job],
    prompts: Mapping[str, Sequence[int]],
    config: DecodeConfig,
    cancel: threading.Event | None = None,
) -> Iterator[Run | Failure]:
    """Warms every row up, then runs; a row that fails is left out from there on.

    The caller saves each run before it asks for the next.

    Args:
        systems: those who take part.
        todo: see `missing`.
        prompts: see `encode`.
        config: of all runs; `seed` is where the seeds of the prompts start.
        cancel: ends the run in progress, which is lost, and all of it.
    """
    by_setting = {system.setting: system for system in systems}
    short = dataclasses.replace(config, max_new_tokens=min(WARM_UP_TOKENS, config.max_new_tokens))
    first = {job.setting: job for job in reversed(todo)}
    order = [(job, short) for job in first.values()] + [(job, config) for job in todo]
    failed: set[Setting] = set()
    for place, (job, shared) in enumerate(order):
        if job.setting in failed:
            continue
        own = dataclasses.replace(shared, seed=task_seed(config.seed + job.repeat, job.task))
        try:
            found = by_setting[job.setting].run(
                job.task, prompts[job.task.id], own, job.repeat, cancel
            )
        except MtadError as error:
            if cancel is not None and cancel.is_set():
                return
            failed.add(job.setting)
            yield Failure(job.setting, f"prompt {job.task.id!r}: {error}")
            continue
        if found is None:
            return
        if place >= len(first):
            yield found
