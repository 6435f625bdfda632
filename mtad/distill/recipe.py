"""A recipe: everything that decides which draft comes out, in one small JSON file.

Frozen dataclasses, checked when they are made. What changes no result stands elsewhere: the
device, the folders, how often a checkpoint is written. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtad.config import MAX_SEED
from mtad.errors import ConfigError
from mtad.fields import FieldCheck, is_number, is_text, is_whole

MAX_RECIPE_BYTES = 1024 * 1024

Sampling = tuple[float, int, float]


@dataclass(frozen=True)
class Writing:
    """Phase 1: how much the target writes, and how.

    Attributes:
        shards: files of the corpus; more can be added later.
        rows: B, rows of a shard, written side by side.
        row_tokens: L, tokens of a row.
        parts: shards that are written at the same time; on a CPU each has its share of the threads,
            which is faster than all threads on one.
        top: log-probabilities that are kept of each successor's distribution.
        keep_hidden: keep the hidden states that the draft reads, more than ten times the bytes of
            all the rest. Without them the target runs again in training: cheap on a GPU.
        turns: questions and answers of one conversation.
        question_tokens: most tokens of a question.
        answer_tokens: most tokens of an answer, or of a text of a target without chat template.
        question_samplings: (temperature, top-k, top-p), one of which a question draws; a top-k
            beyond `top` means `top`.
        answer_samplings: the same for an answer. Name one twice to have it drawn twice as often.
        openers: first words of a question, one of which it draws; they spread the kinds of
            question. A target without chat template needs none.
    """

    shards: int = 1
    rows: int = 512
    row_tokens: int = 256
    parts: int = 1
    top: int = 64
    keep_hidden: bool = True
    turns: int = 1
    question_tokens: int = 80
    answer_tokens: int = 200
    question_samplings: tuple[Sampling, ...] = ((1.0, 64, 1.0), (0.8, 64, 0.95))
    answer_samplings: tuple[Sampling, ...] = (
        (1.0, 10, 0.9),
        (1.0, 10, 0.9),
        (1.0, 10, 0.9),
        (0.7, 10, 0.9),
        (1.0, 64, 1.0),
    )
    openers: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        check = FieldCheck(self, "writing")
        check.whole("shards", 1, 100_000)
        check.whole("rows", 1, 65_536)
        check.whole("row_tokens", 8, 131_072)
        check.whole("parts", 1, 64)
        check.whole("top", 1, 1024)
        if not isinstance(self.keep_hidden, bool):
            check.refuse("keep_hidden", self.keep_hidden, "true or false")
        check.whole("turns", 1, 64)
        check.whole("question_tokens", 1, 131_072)
        check.whole("answer_tokens", 1, 131_072)
        for name in ("question_samplings", "answer_samplings"):
            triples = check.items(name, 1, 64, "lists of [temperature, top_k, top_p]")
            check.put(name, tuple(self._sampling(check, name, triple) for triple in triples))
        openers = check.items("openers", 1, 4096, "strings")
        if not all(is_text(opener) for opener in openers):
            check.refuse("openers", self.openers, "a list of strings without lone surrogates")
        check.put("openers", openers)

    @staticmethod
    def _sampling(check: FieldCheck, name: str, triple: Any) -> Sampling:
        allowed = (
            "lists of [temperature from 0.01 to 100, top_k from 1 to 1024, top_p above 0 and at"
            " most 1]"
        )
        if not isinstance(triple, (list, tuple)) or len(triple) != 3:
            check.refuse(name, triple, allowed)
        temperature, top_k, top_p = triple
        if not (
            is_number(temperature)
            and 0.01 <= temperature <= 100
            and is_whole(top_k)
            and 1 <= top_k <= 1024
            and is_number(top_p)
            and 0 < top_p <= 1
        ):
            check.refuse(name, triple, allowed)
        return float(temperature), int(top_k), float(top_p)

    @property
    def shard_tokens(self) -> int:
        """Tokens of one shard."""
        return self.rows * self.row_tokens


@dataclass(frozen=True)
class Shape:
    """Of the draft.

    Attributes:
        target_layers: the target's hidden states that are read, ascending; 0 is the embedding.
            The last one must be the target's last.
        num_layers: of the draft.
        mlp_size: width of its gated MLPs.
        head_tokens: K; it proposes only the K tokens that occur most often in the answers.
        copy_weights: the share of q for a token copied from the text, by the length of the match;
            empty for no copying. Nothing is trained with it; see `mtad.copy_drafter`.
        weight_bits: of its matrices where they are stored: 8, or 4, which training then rounds to
            at every step, so that it learns with the weights that will be used.
    """

    target_layers: tuple[int, ...]
    num_layers: int = 1
    mlp_size: int = 1536
    head_tokens: int = 8192
    copy_weights: tuple[float, ...] = ()
    weight_bits: int = 8

    def __post_init__(self) -> None:
        check = FieldCheck(self, "draft")
        allowed = "ascending whole numbers from 0, such as [8, 16, 24, 30]"
        layers = check.items("target_layers", 1, 16, allowed)
        rises = all(is_whole(layer) and layer >= 0 for layer in layers)
        if not rises or list(layers) != sorted(set(layers)):
            check.refuse("target_layers", layers, allowed)
        check.put("target_layers", layers)
        check.whole("num_layers", 1, 16)
        check.whole("mlp_size", 1, 65_536)
        check.whole("head_tokens", 1, 1_048_576)
        allowed = "a list of up to 16 numbers from 0 to 0.99"
        weights = check.items("copy_weights", 0, 16, allowed)
        if not all(isinstance(weight, (int, float)) and 0 <= weight <= 0.99 for weight in weights):
            check.refuse("copy_weights", weights, allowed)
        check.put("copy_weights", tuple(float(weight) for weight in weights))
        if not is_whole(self.weight_bits) or self.weight_bits not in (4, 8):
            check.refuse("weight_bits", self.weight_bits, "4 or 8")


@dataclass(frozen=True)
class Losses:
    """Weights of the terms that compare the draft with the target; see `mtad.distill.losses`."""

    forward_kl: float = 1.0
    reverse_kl: float = 0.0
    total_variation: float = 0.0
    warped: float = 0.0

    def __post_init__(self) -> None:
        check = FieldCheck(self, "training.losses")
        for term in dataclasses.fields(self):
            check.number(term.name, 0.0, 1000.0)
        if not any(dataclasses.astuple(self)):
            raise ConfigError("training.losses are all 0: give one of them a weight.")


@dataclass(frozen=True)
class Training:
    """Phase 2: how the draft learns.

    Attributes:
        epochs: how often each training row is seen; may be a fraction.
        batch_rows: rows of a step.
        parts: a batch is cut into so many, whose gradients are averaged. On a CPU each has a
            thread of its own: as many as there are cores is fastest. On a GPU they follow each
            other, in less memory.
        depths: D, unrolled steps of drafting: the first reads the target's states, each further
            one the draft's own.
        depth_decay: depth k weighs depth_decay^k.
        losses: weights of the terms.
        feature_weight: of the distance between the draft's state and the target's next one; it
            falls linearly to 0 at the last step.
        question_weight: of a token of a question; one of an answer weighs 1.
        learning_rate: of AdamW, at the end of the warm-up.
        final_rate: share of the learning rate that is left at the last step.
        warmup_steps: steps in which the rate rises.
        betas: of AdamW.
        weight_decay: of AdamW.
        clip_norm: largest norm of the gradient.
        warp_top_k: of the warp by which acceptance is judged; also the loss `warped`.
        warp_top_p: the same.
        held_out_rows: first rows of the corpus, which are never trained on.
        evaluate_steps: steps between two evaluations on them.
        evaluate_depths: depths that are evaluated.
        dtype: "float32", "bfloat16" (weights stay float32), or "auto": bfloat16 where the device
            has it in hardware.
    """

    epochs: float = 1.0
    batch_rows: int = 4
    parts: int = 1
    depths: int = 2
    depth_decay: float = 0.7
    losses: Losses = field(default_factory=Losses)
    feature_weight: float = 1.0
    question_weight: float = 0.3
    learning_rate: float = 2e-3
    final_rate: float = 0.03
    warmup_steps: int = 30
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    warp_top_k: int = 10
    warp_top_p: float = 0.9
    held_out_rows: int = 64
    evaluate_steps: int = 500
    evaluate_depths: int = 4
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check = FieldCheck(self, "training")
        check.number("epochs", 0.0, 100_000.0, above=True)
        check.whole("batch_rows", 1, 65_536)
        check.whole("parts", 1, self.batch_rows)
        if self.batch_rows % self.parts:
            check.refuse("parts", self.parts, f"a divisor of batch_rows ({self.batch_rows})")
        check.whole("depths", 1, 8)
        check.number("depth_decay", 0.0, 1.0, above=True)
        check.number("feature_weight", 0.0, 1000.0)
        check.number("question_weight", 0.0, 1.0)
        check.number("learning_rate", 0.0, 1.0, above=True)
        check.number("final_rate", 0.0, 1.0)
        check.whole("warmup_steps", 0, 1_000_000)
        betas = check.items("betas", 2, 2, "two numbers")
        if not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
            check.refuse("betas", self.betas, "two numbers from 0 to below 1")
        check.put("betas", tuple(float(beta) for beta in betas))
        check.number("weight_decay", 0.0, 1.0)
        check.number("clip_norm", 0.0, 1000.0, above=True)
        check.whole("warp_top_k", 1, 1024)
        check.number("warp_top_p", 0.0, 1.0, above=True)
        check.whole("held_out_rows", 1, 65_536)
        check.whole("evaluate_steps", 1, 1_000_000)
        check.whole("evaluate_depths", 1, 8)
        if self.dtype not in ("auto", "float32", "bfloat16"):
            check.refuse("dtype", self.dtype, '"auto", "float32" or "bfloat16"')


@dataclass(frozen=True)
class Recipe:
    """How to make one draft.

    Attributes:
        target: id of a preset.
        draft: its shape.
        writing: phase 1.
        training: phase 2.
        seed: of everything; shard i is written with seed + i.

    Raises:
        ConfigError: names the field, the value and the allowed range.
    """

    target: str
    draft: Shape
    writing: Writing = field(default_factory=Writing)
    training: Training = field(default_factory=Training)
    seed: int = 0

    def __post_init__(self) -> None:
        check = FieldCheck(self)
        if not is_text(self.target) or not self.target:
            check.refuse("target", self.target, "the id of a pair; see `mtad pairs`")
        check.whole("seed", 0, MAX_SEED - self.writing.shards)
        training, writing = self.training, self.writing
        FieldCheck(training, "training").whole("warp_top_k", 1, writing.top)
        total = writing.shards * writing.rows
        if training.held_out_rows + training.batch_rows > total:
            raise ConfigError(
                f"training.held_out_rows ({training.held_out_rows}) and training.batch_rows"
                f" ({training.batch_rows}) are more than the {total} rows of the corpus. Lower one"
                " of them, or raise writing.shards or writing.rows."
            )
        if max(training.depths, training.evaluate_depths) > writing.row_tokens - 3:
            raise ConfigError(
                f"training.depths and training.evaluate_depths must be at most"
                f" {writing.row_tokens - 3}, for rows of {writing.row_tokens} tokens."
            )


def read_recipe(file: Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a JSON file.

    Args:
        file: of UTF-8 text.
        changes: such as "training.epochs=2", applied one after the other; a value is JSON, or
            else a string.

    Raises:
        ConfigError: the file cannot be read, is no JSON object, has a field that does not exist
            or a value outside its range.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"The recipe {file} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise ConfigError(f"The recipe {file} is larger than {MAX_RECIPE_BYTES:,} bytes.")
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The recipe {file} is no JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"The recipe {file} is no JSON object.")
    for change in changes:
        _apply(fields, change)
    return recipe_from(fields)


def recipe_from(fields: dict[str, Any]) -> Recipe:
    """A recipe from the object that its JSON file holds; the reverse of `dataclasses.asdict`."""
    parts: dict[str, Any] = dict(fields)
    for name, kind in (("draft", Shape), ("writing", Writing), ("training", Training)):
        if name in parts:
            part = _object(parts[name], name)
            if kind is Training and "losses" in part:
                losses = _object(part["losses"], "training.losses")
                # A term that is not named has no weight: naming one chooses it.
                blank = {term.name: 0.0 for term in dataclasses.fields(Losses)}
                part = {**part, "losses": _make(Losses, {**blank, **losses}, "training.losses.")}
            parts[name] = _make(kind, part, f"{name}.")
    recipe: Recipe = _make(Recipe, parts, "")
    return recipe


def fingerprint(*parts: Any) -> str:
    """16 hex digits that tell recipes, or parts of them, apart."""
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]  # type: ignore[arg-type]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _apply(fields: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    if not equals or not name:
        raise ConfigError(f"{change[:60]!r} is no change of a recipe; write training.epochs=2.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *path, last = name.split(".")
    for step in path:
        fields = _object(fields.setdefault(step, {}), name)
    fields[last] = value


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {str(value)[:60]!r}, but must be a JSON object of fields.")
    return value


def _make(kind: Any, values: dict[str, Any], prefix: str) -> Any:
    known = {each.name: each for each in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{prefix}{name} is no field of a recipe. There are:"
                f" {', '.join(prefix + each for each in known)}."
            )
    for name, each in known.items():
        needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise ConfigError(f"{prefix}{name} is missing from the recipe. Add it.")
    return kind(**values)
