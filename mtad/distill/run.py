"""Both phases, one after the other: from a recipe to a folder with a draft."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from mtad.distill.card import make_report, write_report
from mtad.distill.corpus import Corpus, open_corpus, write_corpus
from mtad.distill.files import Watch, locked
from mtad.distill.recipe import Recipe
from mtad.distill.targets import Target
from mtad.distill.training import CHECKPOINT_SECONDS, Learner, train
from mtad.draft_files import load_draft, save_draft
from mtad.hidden_draft import HiddenDraft

CHECKPOINT = "checkpoint.safetensors"


def distill(
    target: Target,
    recipe: Recipe,
    work: Path,
    out: Path,
    *,
    start: Path | None = None,
    watch: Watch | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> HiddenDraft:
    """Writes what is missing of the corpus, trains what is missing of the draft, and saves it.

    Args:
        target: that the draft is for.
        recipe: how it is made.
        work: folder of the corpus and of the checkpoint, a few kilobytes for each token.
        out: folder of the finished draft, its card and its report.
        start: folder of a draft whose weights to begin with.
        watch: sees the run and stops it.
        checkpoint_seconds: time between two checkpoints.

    Returns:
        The draft, as it was saved.

    Raises:
        ConfigError, PairError: recipe, target and start do not fit together.
        DistillError: a file of `work` is damaged, or belongs to something else.
        Cancelled: the same call goes on.
    """
    write(target, recipe, work, watch=watch)
    return learn(
        target,
        recipe,
        work,
        out,
        start=start,
        watch=watch,
        checkpoint_seconds=checkpoint_seconds,
    )


def write(target: Target, recipe: Recipe, work: Path, *, watch: Watch | None = None) -> None:
    """Phase 1 alone; see `distill`."""
    with locked(work, "write"):
        write_corpus(target, recipe, work, watch or Watch())


def learn(
    target: Target,
    recipe: Recipe,
    work: Path,
    out: Path,
    *,
    start: Path | None = None,
    watch: Watch | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> HiddenDraft:
    """Phase 2 alone; see `distill`."""
    watch = watch or Watch()
    with locked(work, "train"):
        target.check(recipe)
        begun = None if start is None else _load(target, start)
        corpus: Corpus = open_corpus(target, recipe, work)
        draft, progress = train(
            target,
            corpus,
            recipe,
            work / CHECKPOINT,
            start=begun,
            watch=watch,
            checkpoint_seconds=checkpoint_seconds,
        )
        save_draft(draft, out, target.name)
        # What a user will load has 8 bits: its figures are the ones that count.
        final = _load(target, out).to(target.device)
        with contextlib.closing(Learner(target, corpus, recipe.training, final)) as judge:
            saved = judge.evaluate(watch)
        name = "" if start is None else start.resolve().name
        write_report(out, make_report(target, corpus, recipe, draft, progress, saved, start=name))
    return final


def _load(target: Target, folder: Path) -> HiddenDraft:
    return load_draft(folder, target.model, torch.device("cpu"), torch.float32)
