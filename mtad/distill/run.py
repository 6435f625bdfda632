"""Both phases, one after the other: from a recipe to a folder with a draft."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import torch

from mtad.distill.card import CARD, RECIPE, REPORT, make_report, write_report
from mtad.distill.corpus import Corpus, open_corpus, write_corpus
from mtad.distill.files import DistillError, Watch, locked
from mtad.distill.recipe import Recipe
from mtad.distill.targets import Target
from mtad.distill.training import CHECKPOINT_SECONDS, Learner, train
from mtad.draft_files import FILE_NAME, is_draft, load_draft, save_draft
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
        DistillError: a file of `work` is damaged, or belongs to something else; or as `check_out`.
        Cancelled: the same call goes on.
    """
    check_out(out, start)
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


def check_out(out: Path, start: Path | None = None) -> None:
    """Makes the folder of a finished draft; finds out early what would spoil the end.

    Raises:
        DistillError: it cannot be written to, holds files of something else, or is `start`.
    """
    other = "Choose another --out folder"
    try:
        if start is not None and start.resolve() == out.resolve():
            raise DistillError(
                f"{out} holds the draft to start from, which is not to be lost. {other}."
            )
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        ours = is_draft(out / FILE_NAME)
        files = [out / name for name in (FILE_NAME, CARD, RECIPE, REPORT)]
        foreign = [each.name for each in files if each.is_dir() or (each.exists() and not ours)]
    except OSError as error:
        raise DistillError(f"{out} cannot be used: {error.strerror or error}. {other}.") from error
    if foreign:
        raise DistillError(
            f"{out} holds {' and '.join(foreign)}, but not of a draft by mtad distill. {other}, or"
            " move that away."
        )


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
    check_out(out, start)
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
        # What a user will load has 8 or 4 bits: its figures are the ones that count.
        final = _load(target, out).to(target.device)
        with contextlib.closing(Learner(target, corpus, recipe.training, final)) as judge:
            saved = judge.evaluate(watch)
        write_report(out, make_report(target, corpus, recipe, draft, progress, saved, start))
    return final


def _load(target: Target, folder: Path) -> HiddenDraft:
    return load_draft(folder, target.model, torch.device("cpu"), torch.float32)
