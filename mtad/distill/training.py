"""Phase 2: the draft learns what the target thought of its own text.

Which rows a step sees, its learning rate and its weights follow from the recipe, the seed and
the number of the step alone, never from the time: a run that was stopped goes on from its last
checkpoint and ends with the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtad.distill import checkpoint, unroll
from mtad.distill.corpus import Corpus
from mtad.distill.files import DistillError, Watch
from mtad.distill.recipe import Recipe, Shape, Training, fingerprint
from mtad.distill.targets import Target, fast_dtype
from mtad.distill.writing import Shard
from mtad.errors import Cancelled, ConfigError
from mtad.four_bits import FourBits
from mtad.hidden_draft import Ends, HiddenDraft, HiddenDraftConfig

CHECKPOINT_SECONDS = 60.0
# Rows of which the scale of the target's last state is taken.
_SCALE_ROWS = 64

_Shape = TypeVar("_Shape", Shape, HiddenDraftConfig)


def train(
    target: Target,
    corpus: Corpus,
    recipe: Recipe,
    path: Path,
    *,
    start: HiddenDraft | None = None,
    watch: Watch | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> tuple[HiddenDraft, checkpoint.Progress]:
    """Trains a draft, or goes on training it.

    Args:
        target: its embedding and head stand at the draft's ends.
        corpus: what it wrote.
        recipe: of the draft.
        path: the checkpoint; training goes on from it if it is there.
        start: a draft whose weights to begin with.
        watch: sees the run and stops it.
        checkpoint_seconds: time between two checkpoints.

    Returns:
        The draft, in float32 on the target's device, and its learning curve: at each evaluation
        `step`, `tokens` trained on so far, `loss` (mean since the evaluation before; None at the
        first, before training) and, by depth on the held-out rows, `alpha` and `alpha_warped`.

    Raises:
        ConfigError: recipe, target and start do not fit together.
        DistillError: the checkpoint is damaged or of another run, or the loss is no number; the
            message says whether a shard is to blame.
        Cancelled: a checkpoint was written.
    """
    watch = watch or Watch()
    training = recipe.training
    target.check(recipe)
    draft = new_draft(target, corpus, recipe, start)
    learner = Learner(target, corpus, training, draft)
    identity = {
        # The first that differs is named, and another target writes another corpus.
        "target": target.digest,
        "recipe": fingerprint(_without_copying(recipe.draft), training, recipe.seed),
        "corpus": corpus.digest,
        "start": "" if start is None else checkpoint.digest_of(start.state_dict()),
    }
    at = checkpoint.Progress()
    steps = total_steps(training, corpus.num_rows)
    if path.exists():
        at = checkpoint.load(path, draft, learner.optimizer, identity, steps)
    evaluated = len(at.curve)
    step_tokens = training.batch_rows * corpus.row_tokens
    began = time.monotonic() - at.seconds

    def keep() -> float:
        at.seconds = time.monotonic() - began
        checkpoint.save(path, draft, learner.optimizer, at, identity)
        return time.monotonic()

    kept = time.monotonic()
    source = batches(corpus, recipe, at.step, steps, target.device)
    with contextlib.closing(learner), contextlib.closing(source):
        try:
            while True:
                before = at.curve[-1]["step"] if at.curve else -1
                due = at.step % training.evaluate_steps == 0 or at.step == steps
                if due and before < at.step:
                    loss = at.loss_sum / (at.step - before) if at.step else None
                    measured = learner.evaluate(watch)
                    point = {"step": at.step, "tokens": at.step * step_tokens, "loss": loss}
                    at.curve.append(point | measured)
                    at.loss_sum = 0.0
                    watch.say(describe(at.curve[-1], steps))
                if at.step == steps:
                    break
                watch.check()
                loss = learner.step(next(source), at.step, steps)
                if not math.isfinite(loss):
                    rows = rows_of(recipe, corpus.num_rows, at.step)
                    what = f"The loss became {loss} at step {at.step}"
                    raise _not_finite(what, corpus, rows, training)
                at.loss_sum += loss
                at.step += 1
                done = (at.step * step_tokens, steps * step_tokens)
                watch.progress("train", *done, f"loss {loss:.3f}")
                if time.monotonic() - kept >= checkpoint_seconds:
                    kept = keep()
        except Cancelled:
            keep()
            raise
    if len(at.curve) > evaluated:  # else nothing was left to do
        keep()
    return draft, at


class Learner:
    """A draft with its optimizer, the target's ends, and the rows that it never learns from."""

    def __init__(
        self, target: Target, corpus: Corpus, training: Training, draft: HiddenDraft
    ) -> None:
        self._training = training
        self._target = target
        self._corpus = corpus
        self._draft = draft
        self._device = target.device
        self._ends = Ends.of(target.model, draft.token_ids)
        # [V] int64: the head's column of each token, −1 for those that are never proposed.
        self._columns = draft.token_ids.new_full((target.vocab_size,), -1)
        self._columns[draft.token_ids] = torch.arange(len(draft.token_ids), device=self._device)
        chosen = training.dtype
        fast = fast_dtype(self._device)[0] is torch.bfloat16 if chosen == "auto" else None
        self._bfloat16 = chosen == "bfloat16" or bool(fast)
        threads = max(1, torch.get_num_threads() // training.parts)
        self._pool = ThreadPoolExecutor(
            training.parts, "mtad-part", torch.set_num_threads, (threads,)
        )
        self.optimizer = torch.optim.AdamW(
            draft.parameters(),
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
        )

    def step(self, batch: Shard, step: int, steps: int) -> float:
        """One step of AdamW on a batch; returns the loss."""
        batch = with_hidden(batch, self._target, self._draft.config.target_layers)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._training, step, steps)
        parameters, parts = list(self._draft.parameters()), self._training.parts

        def gradients(part: int) -> tuple[Tensor, tuple[Tensor, ...]]:
            rows = Shard(**{name: tensor[part::parts] for name, tensor in vars(batch).items()})
            with self._autocast():
                loss = unroll.loss(
                    self._draft, self._ends, rows, self._columns, self._training, 1 - step / steps
                )
            return loss.detach(), torch.autograd.grad(loss, parameters)

        each = self._pool.map if self._device.type == "cpu" else map
        with self._rounded():  # where gradients are taken; what they move are the exact weights
            losses, grads = zip(*each(gradients, range(parts)), strict=True)
        for parameter, *shares in zip(parameters, *grads, strict=True):
            parameter.grad = torch.stack(shares).mean(0)
        torch.nn.utils.clip_grad_norm_(parameters, self._training.clip_norm)
        self.optimizer.step()
        return torch.stack(losses).mean().item()

    @contextlib.contextmanager
    def _rounded(self) -> Iterator[None]:
        """The draft has the weights that it will be used with, where 4 bits leave few of them."""
        matrices = [weight for weight in self._draft.parameters() if weight.dim() == 2]
        if self._draft.config.weight_bits == 8:
            matrices = []  # so near that training sees no difference
        exact = [weight.detach().clone() for weight in matrices]
        for weight in matrices:
            weight.data.copy_(FourBits.nearest(weight).values())
        try:
            yield
        finally:
            for weight, kept in zip(matrices, exact, strict=True):
                weight.data.copy_(kept)

    def close(self) -> None:
        """Ends the threads, and gives back what one of them has set for all."""
        self._pool.shutdown()
        torch.set_num_threads(torch.get_num_threads())

    def evaluate(self, watch: Watch) -> dict[str, list[float]]:
        """`alpha` and `alpha_warped` by depth, means over the answers in the held-out rows.

        Raises:
            DistillError: one of them is no number.
        """
        total = self._training.held_out_rows
        sums: Any = 0
        for first in range(0, total, self._training.batch_rows):
            rows = range(first, min(first + self._training.batch_rows, total))
            batch = moved(self._corpus.batch(rows), self._device)
            batch = with_hidden(batch, self._target, self._draft.config.target_layers)
            with self._autocast(), self._rounded():
                sums = sums + unroll.overlaps(
                    self._draft, self._ends, batch, self._columns, self._training
                )
            watch.progress("evaluate", rows.stop, total, "")
        means = (sums[:, :2] / sums[:, 2:].clamp(min=1)).T.tolist()
        if not all(math.isfinite(mean) for mean in sum(means, [])):
            what = "The overlap with the target is no number"
            raise _not_finite(what, self._corpus, range(total), self._training)
        return {"alpha": means[0], "alpha_warped": means[1]}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16)


def new_draft(
    target: Target, corpus: Corpus, recipe: Recipe, start: HiddenDraft | None = None
) -> HiddenDraft:
    """The draft before training: random layers, or those of `start`.

    It proposes the tokens that are frequent in this corpus; those of `start`, if it has as many,
    which may have seen a larger one. The last norm begins at the scale of each channel of the
    target's last state, so that the head is given what it is used to.

    Raises:
        ConfigError: `start` has another shape than the recipe says.
        DistillError: a shard is damaged.
    """
    held_out = recipe.training.held_out_rows
    token_ids = corpus.frequent_tokens(recipe.draft.head_tokens, target.ends, held_out)
    config = target.draft_config(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        draft = HiddenDraft(config, token_ids)
    if start is not None:
        held = dataclasses.replace(start.config, weight_bits=config.weight_bits)
        if _without_copying(held) != _without_copying(config):
            raise ConfigError(
                f"The draft to start from has the shape {start.config}, but the recipe asks for"
                f" {config}. Change the recipe's part draft, or start anew."
            )
        kept = start.token_ids if start.token_ids.shape == token_ids.shape else token_ids
        draft.load_state_dict(start.state_dict() | {"token_ids": kept})
        return draft.to(target.device)
    rows = range(held_out, min(held_out + _SCALE_ROWS, corpus.num_rows))
    damage = corpus.damage(rows)
    if damage:
        raise DistillError(damage)
    batch = with_hidden(corpus.batch(rows), target, config.target_layers)
    state = batch.hidden[..., -target.hidden_size :].float().cpu()
    with torch.no_grad():
        draft.norm.copy_(state.square().mean((0, 1)).sqrt())
    return draft.to(target.device)


def _without_copying(shape: _Shape) -> _Shape:
    """What training depends on: the copy weights only matter when the draft is used."""
    return dataclasses.replace(shape, copy_weights=())


def _not_finite(what: str, corpus: Corpus, rows: Iterable[int], training: Training) -> DistillError:
    """Blames a damaged shard if one of the rows is of one, else the learning rate."""
    return DistillError(
        corpus.damage(rows)
        or f"{what}. Lower training.learning_rate ({training.learning_rate:g}), or raise"
        " training.warmup_steps."
    )


def total_steps(training: Training, num_rows: int) -> int:
    """Steps of the whole training on a corpus of so many rows, the held-out ones included."""
    return max(1, round(training.epochs * _epoch_steps(training, num_rows)))


def _epoch_steps(training: Training, num_rows: int) -> int:
    return (num_rows - training.held_out_rows) // training.batch_rows


def learning_rate(training: Training, step: int, steps: int) -> float:
    """A linear warm-up, and a linear fall from the first step to the last."""
    warm = min(1.0, (step + 1) / max(1, training.warmup_steps))
    return training.learning_rate * warm * (1 - (1 - training.final_rate) * step / steps)


@functools.lru_cache(maxsize=2)
def _order(num_rows: int, held_out: int, seed: int) -> list[int]:
    """The rows of one epoch, shuffled, without those that are held out."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_rows - held_out, generator=generator) + held_out
    rows: list[int] = order.tolist()
    return rows


def rows_of(recipe: Recipe, num_rows: int, step: int) -> list[int]:
    """The rows that a step sees."""
    training = recipe.training
    epoch, place = divmod(step, _epoch_steps(training, num_rows))
    order = _order(num_rows, training.held_out_rows, recipe.seed + epoch)
    return order[place * training.batch_rows : (place + 1) * training.batch_rows]


def batches(
    corpus: Corpus, recipe: Recipe, first: int, steps: int, device: torch.device
) -> Generator[Shard, None, None]:
    """The batches of steps `first` to `steps`; one is read ahead while another is learnt."""

    def read(step: int) -> Shard:
        batch = corpus.batch(rows_of(recipe, corpus.num_rows, step))
        if device.type == "cuda":
            batch = Shard(**{name: tensor.pin_memory() for name, tensor in vars(batch).items()})
        return batch

    with ThreadPoolExecutor(1, "mtad-batches") as reader:
        ahead = reader.submit(read, first)
        for step in range(first, steps):
            batch, ahead = ahead.result(), reader.submit(read, step + 1)
            yield moved(batch, device)


def moved(batch: Shard, device: torch.device) -> Shard:
    """The batch on a device."""
    return Shard(**{name: t.to(device, non_blocking=True) for name, t in vars(batch).items()})


def with_hidden(batch: Shard, target: Target, layers: Sequence[int]) -> Shard:
    """The batch with the target's hidden states, computed if the corpus has not kept them."""
    if batch.hidden.shape[-1]:
        return batch
    tokens = batch.token_ids.to(target.device)
    return dataclasses.replace(batch, hidden=target.hidden_states(tokens, layers))


def describe(point: dict[str, Any], steps: int) -> str:
    """One line about a point of the learning curve."""
    loss = "before training" if point["loss"] is None else f"loss {point['loss']:.3f}"
    alpha, warped = (
        " ".join(f"{value:.3f}" for value in point[name]) for name in ("alpha", "alpha_warped")
    )
    tokens = f"{point['tokens'] / 1e6:.2f} M tokens"
    return (
        f"step {point['step']} of {steps}, {tokens}: {loss}, overlap by depth {alpha},"
        f" warped {warped}"
    )
