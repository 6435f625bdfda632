"""Distillation: rules against hand-computed values, masks by brute force, and real kills.

The targets are tiny and random, so that a whole distillation takes seconds.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import mtad
from mtad.config import DecodeConfig
from mtad.distill import checkpoint, losses, training, unroll
from mtad.distill.corpus import (
    Corpus,
    open_corpus,
    open_shard,
    save_shard,
    shard_path,
    write_corpus,
)
from mtad.distill.files import DistillError, Watch, locked, read_tensors, save_tensors
from mtad.distill.recipe import Losses, Recipe, Shape, Training, Writing, read_recipe, recipe_from
from mtad.distill.run import CHECKPOINT, distill, learn, write
from mtad.distill.targets import Target, fast_dtype
from mtad.distill.training import (
    Learner,
    batches,
    learning_rate,
    new_draft,
    rows_of,
    total_steps,
    train,
)
from mtad.distill.writing import (
    Origin,
    Shard,
    Stream,
    Template,
    sample_top,
    write_shard,
)
from mtad.draft_files import FILE_NAME, load_draft, save_draft
from mtad.errors import Cancelled, ConfigError, PairError
from mtad.four_bits import FourBits
from mtad.hidden_draft import Ends, HiddenDraft, HiddenDraftConfig
from tests.models import FAMILIES, tiny

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "assets" / "recipes").glob("*.json"))
VOCABULARY = 32

RECIPE = Recipe(
    target="smollm2",
    draft=Shape(target_layers=(1, 2), num_layers=1, mlp_size=32, head_tokens=24),
    writing=Writing(shards=2, rows=64, row_tokens=24, top=32, answer_tokens=40),
    training=Training(
        epochs=4,
        batch_rows=8,
        parts=2,
        held_out_rows=8,
        warmup_steps=5,
        learning_rate=2e-2,
        evaluate_steps=25,
        evaluate_depths=3,
        dtype="float32",
    ),
    seed=7,
)


def changed(**parts: dict[str, Any]) -> Recipe:
    """RECIPE with other fields in some of its parts."""
    return dataclasses.replace(
        RECIPE,
        **{name: dataclasses.replace(getattr(RECIPE, name), **new) for name, new in parts.items()},
    )


BRIEF = changed(training={"epochs": 0.2})


def a_target(**overrides: Any) -> Target:
    return Target(tiny(vocab_size=VOCABULARY, **{"eos_token_id": 3, **overrides}))


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Seconds, where other programs write much; the tests ask nothing of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def target() -> Target:
    return a_target()


@pytest.fixture(scope="module")
def finished(target: Target, written: Path) -> Path:
    """A folder with corpus, checkpoint and, in `out`, the draft of RECIPE."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    learn(target, RECIPE, written, written / "out")
    torch.set_num_threads(threads)
    return written


@pytest.fixture(scope="module")
def written(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus of RECIPE; copy it before changing it."""
    folder = tmp_path_factory.mktemp("corpus")
    write(target, RECIPE, folder)
    return folder


@pytest.fixture
def corpus(target: Target, written: Path) -> Corpus:
    return open_corpus(target, RECIPE, written)


@pytest.fixture
def work(written: Path, tmp_path: Path) -> Path:
    """A folder of its own with the corpus of RECIPE."""
    folder = tmp_path / "work"
    folder.mkdir()
    for file in written.glob("shard*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def same_tensors(one: Path, other: Path) -> bool:
    """True if two files hold the same tensors, to the bit."""
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


class StopAt:
    """A watch that stops the run at the n-th report of a stage."""

    def __init__(self, stage: str, count: int) -> None:
        self.watch = Watch(progress=self._progress, cancel=threading.Event())
        self._stage, self._left = stage, count

    def _progress(self, stage: str, done: int, total: int, note: str) -> None:
        self._left -= stage == self._stage
        if self._left <= 0:
            self.watch.cancel.set()


# Recipes


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipes_are_valid_and_name_everything(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.target == "smollm2"
    written = json.loads(file.read_text(encoding="utf-8"))
    plain = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert plain == written, "a shipped recipe leaves no field to a default"


def test_there_is_a_recipe_for_each_kind_of_device() -> None:
    assert [file.stem for file in RECIPES] == ["smollm2-cpu", "smollm2-gpu"]


def test_a_recipe_survives_json() -> None:
    assert recipe_from(json.loads(json.dumps(dataclasses.asdict(RECIPE)))) == RECIPE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("writing.rows=0", "writing.rows is 0, but must be a whole number from 1 to 65536."),
        ("writing.rows=true", "writing.rows is True"),
        ("writing.rows=many", "writing.rows is 'many'"),
        ("writing.answer_samplings=[[1.0, 10]]", "writing.answer_samplings is [1.0, 10]"),
        ("writing.answer_samplings=[[0, 10, 0.9]]", "writing.answer_samplings is [0, 10, 0.9]"),
        ("writing.question_samplings=[]", "writing.question_samplings is [], but must be a list"),
        ("writing.openers=[1]", "writing.openers is"),
        ('writing.openers=["\\ud800"]', "a list of strings without lone surrogates"),
        ('target="\\ud800"', "target is '\\ud800'"),
        ("draft.target_layers=[2, 1]", "draft.target_layers is"),
        ("draft.target_layers=[-1]", "draft.target_layers is"),
        ("draft.weight_bits=6", "draft.weight_bits is 6, but must be 4 or 8"),
        ("training.betas=[0.9, 1.0]", "training.betas is"),
        ("training.epochs=0", "training.epochs is 0, but must be a number above 0 and at most"),
        ("training.learning_rate=NaN", "training.learning_rate is nan"),
        ("training.dtype=half", "training.dtype is 'half', but must be \"auto\""),
        ("training.losses={}", "training.losses are all 0"),
        ("training.losses.sideways=1", "training.losses.sideways is no field of a recipe"),
        ("training.losses=3", "training.losses is '3', but must be a JSON object"),
        ("training.warp_top_k=33", "training.warp_top_k is 33, but must be a whole number from 1"),
        ("training.held_out_rows=121", "training.held_out_rows (121) and training.batch_rows (8)"),
        ("training.parts=3", "training.parts is 3, but must be a divisor of batch_rows (8)."),
        ("training.depths=8", None),
        ("writing.row_tokens=8", None),
        ("writing.lines=3", "writing.lines is no field of a recipe. There are: writing.shards"),
        ("size=3", "size is no field of a recipe"),
        ("seed=-1", "seed is -1"),
        ("target=", "target is ''"),
        ("training", "is no change of a recipe"),
        ("seed.low=3", "seed.low is '7', but must be a JSON object"),
    ],
)
def test_a_recipe_is_checked(change: str, message: str | None, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(dataclasses.asdict(RECIPE)), encoding="utf-8")
    if message is None:
        read_recipe(file, [change])
        return
    with pytest.raises(ConfigError) as caught:
        read_recipe(file, [change])
    assert message in str(caught.value)


def test_depths_must_fit_into_a_row() -> None:
    with pytest.raises(ConfigError, match=r"at most 5, for rows of 8 tokens"):
        changed(writing={"row_tokens": 8}, training={"depths": 6})


def test_a_loss_that_is_not_named_has_no_weight() -> None:
    fields = json.loads(json.dumps(dataclasses.asdict(RECIPE)))
    fields["training"]["losses"] = {"warped": 2}
    assert recipe_from(fields).training.losses == Losses(forward_kl=0.0, warped=2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "no JSON object"), ("{", "no JSON"), ("{}", "draft is missing"), ("\xff", "no JSON")],
)
def test_a_file_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        read_recipe(file, ["target=smollm2"] if text == "{}" else [])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"draft": {"target_layers": (0, 1)}}, r"target_layers is \[0, 1\], but must end with 2"),
        ({"draft": {"head_tokens": 33}}, "head_tokens is 33, but must be at most 32"),
        ({"writing": {"top": 33}}, "writing.top is 33, but must be at most 32"),
        ({"writing": {"row_tokens": 513}}, "row_tokens is 513, but must be at most 512"),
    ],
)
def test_a_recipe_is_compared_with_the_target(
    parts: dict[str, Any], message: str, target: Target, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write(target, changed(**parts), tmp_path)


# Writing


class Marks:
    """A tokenizer of a bracketed chat template: one token a character."""

    chat_template = "yes"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{message['role'][0]}:{message['content']}>\n" for message in messages)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_a_template_is_cut_between_what_is_said() -> None:
    template = Template.of(Marks(), ["", "Why"])
    assert template == Template(ids("<u:"), ids(">\n<a:"), ids(">\n<u:"), ((), ids("Why")))


def test_a_template_that_hides_what_is_said_is_refused() -> None:
    class Mute(Marks):
        def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
            return f"<{messages[0]['content']}>"

    with pytest.raises(PairError, match="does not render a conversation of two turns"):
        Template.of(Mute())


def spoken(stream: Stream, said: str, count: int) -> tuple[str, str]:
    """`count` tokens and their origins, where the target says `said` whenever it is asked."""
    answers = iter(said)
    tokens, origins = "", ""
    for _ in range(count):
        token, origin = stream.next(0 if stream._forced else ord(next(answers)))
        tokens += chr(token)
        origins += "fqa"[origin]
    return tokens, origins


def test_a_stream_forces_the_template_and_samples_between() -> None:
    writing = Writing(turns=2, question_tokens=3, answer_tokens=4)
    template = Template(ids("<u:"), ids("]a:"), ids("]u:"), (ids("W"),))
    stream = Stream(writing, template, frozenset(ids("]")), torch.Generator().manual_seed(0))
    # An end of the target's own is sampled; one that a limit forces is not.
    tokens, origins = spoken(stream, "hy]yes]Hx!good", 28)
    assert tokens == "<u:Why]a:yes]u:Hx]a:good<u:W"
    assert origins == "ffffqqqffaaaaffqqfffaaaaffff"


def test_a_stream_without_template_restarts_after_an_end() -> None:
    template = Template((), (), (), (ids("B"),))
    stream = Stream(
        Writing(answer_tokens=4), template, frozenset(ids(".")), torch.Generator().manual_seed(0)
    )
    assert spoken(stream, "ab.cdefgh", 12) == ("Bab.BcdefBgh", "faaafaaaafaa")


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        ({"bos_token_id": 5, "eos_token_id": 3}, [5]),
        ({"eos_token_id": 3}, [3]),
        ({"eos_token_id": None}, list(range(VOCABULARY))),
    ],
)
def test_plain_text_begins_with_bos_or_eos_or_any(
    overrides: dict[str, Any], starts: list[int]
) -> None:
    template = Template.for_target(a_target(**overrides), RECIPE.writing)
    assert template == Template((), (), (), tuple((start,) for start in starts))


def test_rows_must_hold_more_than_the_template(target: Target) -> None:
    chatting = SimpleNamespace(tokenizer=Marks(), model=target.model, ends=frozenset())
    with pytest.raises(ConfigError, match="row_tokens is 8, but must be at least 13"):
        Template.for_target(chatting, Writing(row_tokens=8, openers=("", "Why")))  # type: ignore[arg-type]


def test_sample_top_draws_from_the_warped_support_in_its_proportions() -> None:
    """5 rows' warps of one distribution, 20,000 draws each; the supports are worked out by hand.

    A share is off by more than 0.02 with a probability below 1e-7 (5.6 standard deviations).
    """
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    warps = [(1.0, 4, 1.0), (1.0, 2, 1.0), (1.0, 4, 0.79), (1.0, 4, 0.81), (0.5, 3, 1.0)]
    squared = torch.tensor([0.25, 0.09, 0.0225]) / 0.3625
    expected = torch.tensor(
        [
            [0.5, 0.3, 0.15, 0.05],
            [0.625, 0.375, 0, 0],
            [0.625, 0.375, 0, 0],  # 0.5 + 0.3 reaches 0.79
            [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0],
            [*squared, 0],
        ]
    )
    draws = 20_000
    columns = torch.tensor(warps, dtype=torch.float64).repeat_interleave(draws, 0)
    logprobs = probs.double().log().expand(len(columns), 4)
    index = sample_top(logprobs, *columns.unbind(1), torch.Generator().manual_seed(0))
    shares = torch.nn.functional.one_hot(index.view(5, draws), 4).double().mean(1)
    assert (shares[expected == 0] == 0).all()
    assert (shares - expected).abs().max() < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shard_holds_what_the_target_thinks_of_it(family: str) -> None:
    """The same figures as one pass of the model over the finished text."""
    target = Target(tiny(family, vocab_size=VOCABULARY, eos_token_id=3))
    writing = Writing(rows=3, row_tokens=12, top=8, answer_samplings=((1.0, 8, 1.0),))
    template = Template.for_target(target, writing)
    shard = write_shard(target, template, writing, (1, 2), seed=0)
    with torch.no_grad():
        output = target.model(shard.token_ids.long(), output_hidden_states=True)
    logprobs = output.logits.log_softmax(-1)
    told = logprobs.gather(-1, shard.top_ids.long())
    torch.testing.assert_close(shard.top_logprobs.float(), told, atol=2e-2, rtol=2e-3)
    assert torch.equal(shard.top_logprobs, shard.top_logprobs.sort(-1, descending=True).values)
    hidden = torch.cat([output.hidden_states[1], output.hidden_states[2]], -1)
    torch.testing.assert_close(shard.hidden.float(), hidden, atol=2e-2, rtol=1e-2)
    # What the head reads is the last hidden state, so that a draft's state can stand in for it.
    head = target.model.get_output_embeddings()
    torch.testing.assert_close(head(output.hidden_states[-1]), output.logits)
    sampled = shard.origins[:, 1:] == Origin.ANSWER
    after = (shard.top_ids[:, :-1] == shard.token_ids[:, 1:, None]).any(-1)
    assert after[sampled].all() and sampled.any()


def test_shards_are_the_same_whenever_they_are_written(
    target: Target, written: Path, tmp_path: Path
) -> None:
    stop = StopAt("write", RECIPE.writing.row_tokens + 5)
    with pytest.raises(Cancelled, match="kept"):
        write(target, RECIPE, tmp_path, watch=stop.watch)
    assert [file.name for file in tmp_path.glob("shard*")] == ["shard-00000.safetensors"]
    write(target, RECIPE, tmp_path)
    for index in range(2):
        assert shard_path(tmp_path, index).read_bytes() == shard_path(written, index).read_bytes()
    assert shard_path(written, 0).read_bytes() != shard_path(written, 1).read_bytes()


def test_shards_that_are_written_at_the_same_time_are_the_same(
    target: Target, written: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    write(target, changed(writing={"parts": 2}), tmp_path)
    assert torch.get_num_threads() == threads
    for index in range(2):
        assert shard_path(tmp_path, index).read_bytes() == shard_path(written, index).read_bytes()


def test_a_shard_that_cannot_be_written_stops_the_others(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(shard: Shard, path: Path, *rest: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtad.distill.corpus.save_shard", full)
    with pytest.raises(OSError, match="No space left"):
        write(target, changed(writing={"parts": 2, "shards": 20}), tmp_path)
    assert not list(tmp_path.glob("shard*"))


def test_more_shards_can_be_added(target: Target, work: Path) -> None:
    more = changed(writing={"shards": 3})
    before = shard_path(work, 0).read_bytes()
    write(target, more, work)
    assert shard_path(work, 0).read_bytes() == before
    assert open_corpus(target, more, work).num_rows == 192


def test_a_missing_shard_is_named(target: Target, work: Path) -> None:
    shard_path(work, 1).unlink()
    with pytest.raises(DistillError, match="1 of 2 shards are there. Run the phase write first"):
        learn(target, RECIPE, work, work / "out")


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (changed(writing={"answer_tokens": 41}), {}, "another recipe"),
        (dataclasses.replace(RECIPE, seed=8), {}, "another recipe"),
        (changed(draft={"target_layers": (0, 2)}), {}, "another recipe"),
        (RECIPE, {"seed": 1}, "another target"),
    ],
)
def test_a_foreign_shard_is_refused(
    recipe: Recipe, overrides: dict[str, Any], message: str, work: Path
) -> None:
    target = a_target(**overrides)
    for phase in (write, lambda *given: learn(*given, work / "out")):
        with pytest.raises(DistillError, match=f"{message}.*Choose another --work folder, or"):
            phase(target, recipe, work)


def test_a_shard_under_another_number_is_refused(target: Target, work: Path) -> None:
    shard_path(work, 0).replace(shard_path(work, 1))
    with pytest.raises(DistillError, match="another number"):
        write(target, RECIPE, work)


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "noise", "token_ids", "origins", "top_ids", "top_logprobs"]
)
def test_a_damaged_shard_is_refused(damage: str, target: Target, work: Path) -> None:
    path = shard_path(work, 1)
    data = bytearray(path.read_bytes())
    broken = {"cut": data[:-7], "empty": b"", "noise": b"\x07" * 99}
    if damage not in broken:
        data[data.index(load_file(path)[damage].numpy().tobytes())] ^= 1
    path.write_bytes(broken.get(damage, data))
    with pytest.raises(DistillError, match="shard-00001.* damaged.*Delete .*written anew"):
        write(target, RECIPE, work)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("origins", 3),
        ("token_ids", VOCABULARY),
        ("top_ids", -1),
        ("top_logprobs", 0.5),
        ("top_logprobs", float("nan")),
    ],
)
def test_values_that_no_target_gives_are_refused(
    name: str, value: float, target: Target, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard_path(work, 0)
    shard = Shard(**{n: t.clone() for n, t in vars(open_shard(path, RECIPE, target, 0)[0]).items()})
    getattr(shard, name)[1, 2] = value
    before = path.read_bytes()
    with pytest.raises(DistillError, match=f"is not written: {name} are from .* must be from"):
        save_shard(shard, path, RECIPE, target, 0)
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr("mtad.distill.corpus._flaw", lambda *given: "")
        save_shard(shard, path, RECIPE, target, 0)
    with pytest.raises(DistillError, match=f"is damaged: {name} are from .* Delete"):
        open_shard(path, RECIPE, target, 0)


def test_no_log_probability_at_all_is_a_value(target: Target, work: Path) -> None:
    path = shard_path(work, 0)
    shard = Shard(**{n: t.clone() for n, t in vars(open_shard(path, RECIPE, target, 0)[0]).items()})
    shard.top_logprobs[0, 0, -1] = -torch.inf
    save_shard(shard, path, RECIPE, target, 0)
    assert torch.isneginf(open_shard(path, RECIPE, target, 0)[0].top_logprobs[0, 0, -1])


@pytest.mark.parametrize("where", ["held out", "scale", "trained"])
def test_hidden_states_that_are_no_numbers_are_blamed(
    where: str, target: Target, work: Path
) -> None:
    rows = {"held out": 3, "scale": 65, "trained": max(rows_of(BRIEF, 128, 2))}
    assert rows["trained"] > 72  # beyond the rows that the scale is taken of
    index, place = divmod(rows[where], 64)
    tensors, metadata = read_tensors(shard_path(work, index))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["hidden"][place, 7, 9] = torch.nan
    save_tensors(shard_path(work, index), tensors, metadata)
    found = f"shard-0000{index}.* is damaged: the hidden states of its row {place} are not finite"
    with pytest.raises(DistillError, match=found):
        learn(target, BRIEF, work, work / "out")


def test_a_header_of_endless_lists_is_no_file_of_ours(tmp_path: Path) -> None:
    save_file({}, tmp_path / "nested", {"mtad": "[" * 100_000})
    with pytest.raises(ValueError, match="no metadata of ours"):
        read_tensors(tmp_path / "nested")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mtad.distill.files.save_file", full)
    with pytest.raises(
        DistillError, match=r"file cannot be written: I/O error: No space left.*room"
    ):
        save_tensors(tmp_path / "file", {}, {})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_found_out_first(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DistillError, match=r"has 0.0 GB free, but 2 shards of"):
        write(target, RECIPE, tmp_path)


def test_two_processes_do_not_do_the_same(target: Target, tmp_path: Path) -> None:
    with locked(tmp_path, "write"), pytest.raises(DistillError, match="Another process"):
        write(target, RECIPE, tmp_path)


def test_frequent_tokens(corpus: Corpus, target: Target) -> None:
    counts = [0] * VOCABULARY
    for shard, skip in zip(corpus.shards, (8, 0), strict=True):
        for row in range(skip, 64):
            for token, origin in zip(shard.token_ids[row], shard.origins[row], strict=True):
                counts[token] += int(origin == Origin.ANSWER)
    counts[3] = 10**9  # the end of a text can always be proposed
    best = sorted(range(VOCABULARY), key=lambda token: (-counts[token], token))
    for count in (1, 5, 24, 32):
        found = corpus.frequent_tokens(count, target.ends, held_out=8)
        assert found.tolist() == sorted(best[:count])


def test_a_batch_is_made_of_rows_of_all_shards(corpus: Corpus) -> None:
    batch = corpus.batch([65, 0, 127])
    for name, values in vars(batch).items():
        first, second = (getattr(shard, name) for shard in corpus.shards)
        assert torch.equal(values, torch.stack([second[1], first[0], second[63]]))


# Losses


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_losses_by_hand() -> None:
    """Two known tokens and a rest of 0.2; the draft gives them 0.6 and 0.1."""
    p, q = logs([0.5, 0.3]), logs([0.6, 0.1])
    log = torch.tensor([0.5, 0.3, 0.2, 0.6, 0.1], dtype=torch.float64).log().tolist()
    cross = -(0.5 * log[3] + 0.3 * log[4]) / 0.8
    assert losses.forward_kl(p, q).item() == pytest.approx(cross)
    reverse = 0.6 * (log[3] - log[0]) + 0.1 * (log[4] - log[1])
    reverse += 0.3 * (torch.tensor(0.3).log().item() - log[2])
    assert losses.reverse_kl(p, q).item() == pytest.approx(reverse, rel=1e-6)
    assert losses.overlap(p, q).item() == pytest.approx(0.6)
    assert losses.total_variation(p, q).item() == pytest.approx(0.4)
    both = losses.weighted(Losses(1.0, 0.5, 2.0, 0.0), p, q, 10, 0.9).item()
    assert both == pytest.approx(cross + 0.5 * reverse + 0.8, rel=1e-6)


def test_losses_leave_out_what_the_draft_cannot_propose() -> None:
    p, q = logs([0.5, 0.3, 0.2]), logs([0.6, 0.0, 0.4])
    cross = -(0.5 * q[0, 0] + 0.2 * q[0, 2]) / 0.7
    assert losses.forward_kl(p, q).item() == pytest.approx(cross.item())
    assert losses.overlap(p, q).item() == pytest.approx(0.7)
    reverse = 0.6 * (q - p)[0, 0] + 0.4 * (q - p)[0, 2]
    assert losses.reverse_kl(p, q).item() == pytest.approx(reverse.item(), abs=1e-4)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Losses)])
def test_losses_are_smallest_at_the_target_and_their_gradients_are_finite(name: str) -> None:
    weights = dataclasses.replace(Losses(0.0, 0.0, 0.0, 1.0), **{"warped": 0.0, name: 1.0})
    p = torch.tensor([[0.6, 0.25, 0.1, 0.05]]).log()
    goal = losses.warped_target(p, 3, 0.9) if name == "warped" else p
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    blocked = torch.tensor([[False, False, False, True]])

    def value(logits: Tensor) -> Tensor:
        return losses.weighted(weights, p, logits.log_softmax(-1), 3, 0.9).sum()

    assert value(goal.clamp(min=-50)).item() <= value(logits).item()
    assert value(logits.masked_fill(blocked, -torch.inf)).isfinite()
    value(logits.masked_fill(blocked, -torch.inf)).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad.abs().max() > 1e-3


def test_the_warped_target_by_hand() -> None:
    p = logs([0.6, 0.25, 0.1, 0.05])
    by_k = losses.warped_target(p, 2, 1.0).exp()
    assert by_k[0].tolist() == pytest.approx([0.6 / 0.85, 0.25 / 0.85, 0, 0])
    # Top-k first: of 0.95 the first two are 0.895 and the third crosses 0.9.
    assert losses.warped_target(p, 3, 0.9).exp()[0].tolist() == pytest.approx(
        [0.6 / 0.95, 0.25 / 0.95, 0.1 / 0.95, 0]
    )
    assert losses.warped_target(p, 3, 0.89).exp()[0, 2].item() == 0


# Unrolling


def test_masks_by_hand() -> None:
    def seen(depth: int) -> list[str]:
        rows = unroll.mask(3, depth, torch.device("cpu")) == 0
        return ["".join("x" if cell else "." for cell in row) for row in rows.tolist()]

    assert seen(0) == ["x..", "xx.", "xxx"]
    assert seen(1) == ["...x..", "x...x.", "xx...x"]
    assert seen(2) == ["......x..", "...x...x.", "x...x...x"]


def a_batch(rows: int, length: int, layers: int) -> Shard:
    generator = torch.Generator().manual_seed(1)
    shape = (rows, length)
    top = torch.stack(
        [torch.randperm(VOCABULARY, generator=generator)[:6] for _ in range(rows * length)]
    ).view(*shape, 6)
    logits = torch.randn(*shape, VOCABULARY, generator=generator).log_softmax(-1)
    return Shard(
        token_ids=torch.randint(VOCABULARY, shape, generator=generator, dtype=torch.int32),
        origins=torch.randint(3, shape, generator=generator, dtype=torch.uint8),
        top_ids=top.int(),
        top_logprobs=logits.gather(-1, top).sort(-1, descending=True).values.half(),
        hidden=torch.randn(*shape, 16 * layers, generator=generator).bfloat16(),
    )


def a_draft() -> HiddenDraft:
    config = HiddenDraftConfig(16, (1, 2), 2, num_heads=4, num_key_value_heads=2, mlp_size=32)
    torch.manual_seed(0)
    return HiddenDraft(config, torch.arange(0, VOCABULARY, 2))


def test_the_unrolled_states_are_those_of_drafting_step_by_step() -> None:
    """Every line of guesses, from every position, one token at a time with a real cache."""
    target, draft, depths, length = a_target(), a_draft(), 4, 9
    batch = a_batch(2, length + 2, 2)
    ends = Ends.of(target.model, draft.token_ids)
    with torch.no_grad():
        unrolled = list(unroll.unroll(draft, ends, batch, depths))
        embedded = ends.embed(batch.token_ids.long())
        for start in range(length):
            state = draft.read_target(batch.hidden[:, : start + 1].float())
            causal = unroll.mask(start + 1, 0, state.device)
            states, past = draft(
                embedded[:, 1 : start + 2], state, torch.arange(1, start + 2), causal, None
            )
            torch.testing.assert_close(unrolled[0][:, : start + 1], states, atol=1e-5, rtol=1e-5)
            state = states[:, -1:]
            for depth in range(1, min(depths, length - start)):
                index = start + depth
                state, past = draft(
                    embedded[:, index + 1 : index + 2],
                    state,
                    torch.tensor([index + 1]),
                    None,
                    past,
                )
                torch.testing.assert_close(
                    unrolled[depth][:, index : index + 1], state, atol=1e-5, rtol=1e-5
                )


def test_the_loss_and_the_overlaps_are_those_of_plain_loops() -> None:
    target, draft = a_target(), a_draft()
    training = dataclasses.replace(
        RECIPE.training,
        losses=Losses(1.0, 0.0, 0.5, 0.0),
        warp_top_k=3,
        depths=2,
        evaluate_depths=2,
    )
    batch = a_batch(2, 9, 2)
    ends = Ends.of(target.model, draft.token_ids)
    columns = torch.full((VOCABULARY,), -1)
    columns[draft.token_ids] = torch.arange(len(draft.token_ids))
    head = target.model.get_output_embeddings().weight
    scale = batch.hidden[..., -16:].float().std()
    config = DecodeConfig(top_k=3, top_p=0.9)
    total, means = 0.0, []
    with torch.no_grad():
        for depth, states in enumerate(unroll.unroll(draft, ends, batch, 2)):
            summed = weight_sum = count = 0.0
            alphas = [0.0, 0.0]
            for row in range(2):
                for t in range(depth, 7):
                    origin = Origin(int(batch.origins[row, t + 2]))
                    weight = {Origin.FORCED: 0, Origin.QUESTION: 0.3, Origin.ANSWER: 1}[origin]
                    seen = draft.head_input(states[row, t])
                    q = torch.full((VOCABULARY,), -torch.inf)
                    # The even tokens, and those that were read before the guesses began.
                    text = batch.token_ids[row, : t - depth + 1].long()
                    proposed = torch.cat([draft.token_ids, text]).unique()
                    said = head[proposed] @ seen
                    q[proposed] = said.log_softmax(-1)
                    tokens = batch.top_ids[row, t + 1].long()
                    p = batch.top_logprobs[row, t + 1].float()
                    value = losses.forward_kl(p[None], q[tokens][None]).item()
                    value += 0.5 * losses.total_variation(p[None], q[tokens][None]).item()
                    gap = seen / scale - batch.hidden[row, t + 1, -16:].float() / scale
                    smooth = torch.where(gap.abs() < 1, gap.square() / 2, gap.abs() - 0.5)
                    value += 0.25 * training.feature_weight * smooth.mean().item()
                    summed += weight * value
                    weight_sum += weight
                    if origin is Origin.ANSWER:
                        warped = unroll.warp(said, config).dense()
                        narrow = torch.full((VOCABULARY,), -torch.inf)
                        narrow[proposed] = warped
                        alphas[0] += sum(min(p.exp()[i], q[x].exp()) for i, x in enumerate(tokens))
                        sharp = losses.warped_target(p, 3, 0.9).exp()
                        alphas[1] += sum(
                            min(sharp[i], narrow[x].exp()) for i, x in enumerate(tokens)
                        )
                        count += 1
            total += 0.7**depth / 1.7 * summed / weight_sum
            means.append([*alphas, count])
        loss = unroll.loss(draft, ends, batch, columns, training, 0.25)
        assert loss.item() == pytest.approx(total, rel=1e-5)
        found = unroll.overlaps(draft, ends, batch, columns, training)
    torch.testing.assert_close(found, torch.tensor(means))


@pytest.mark.parametrize("piece", [1, 3, 5])
def test_pieces_change_neither_the_loss_nor_its_gradient(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = a_target(), a_draft()
    training = dataclasses.replace(RECIPE.training, losses=Losses(0.5, 0.0, 2.0, 0.0))
    ends = Ends.of(target.model, draft.token_ids)
    columns = torch.full((VOCABULARY,), -1)
    columns[draft.token_ids] = torch.arange(len(draft.token_ids))
    found = []
    for rows in (1000, piece):
        monkeypatch.setattr(unroll, "_PIECE_ROWS", rows)
        loss = unroll.loss(draft, ends, a_batch(2, 9, 2), columns, training, 0.25)
        found.append((loss.detach(), *torch.autograd.grad(loss, list(draft.parameters()))))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)
    assert found[0][1].abs().sum() > 0


# Training


def test_the_order_of_rows_is_a_permutation_of_each_epoch() -> None:
    assert total_steps(RECIPE.training, 128) == 4 * 15
    epochs = [
        [row for step in range(15) for row in rows_of(RECIPE, 128, 15 * epoch + step)]
        for epoch in range(4)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(8, 128))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_half_an_epoch_and_a_rest() -> None:
    training = dataclasses.replace(RECIPE.training, epochs=0.5, batch_rows=50)
    assert total_steps(training, 128) == 1
    assert total_steps(dataclasses.replace(training, epochs=2.5), 128) == 5
    assert total_steps(dataclasses.replace(training, epochs=1e-6), 128) == 1


def test_the_learning_rate_rises_and_falls() -> None:
    training = dataclasses.replace(
        RECIPE.training, learning_rate=0.1, warmup_steps=4, final_rate=0.2
    )
    rates = [learning_rate(training, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.025)
    assert rates[3] == pytest.approx(0.1 * (1 - 0.8 * 0.03))
    assert rates[50] == pytest.approx(0.06)
    assert rates[100] == pytest.approx(0.02)


def test_batches_are_read_ahead_in_order(corpus: Corpus) -> None:
    got = list(batches(corpus, RECIPE, 3, 8, torch.device("cpu")))
    assert len(got) == 5
    for step, batch in enumerate(got, 3):
        wanted = corpus.batch(rows_of(RECIPE, 128, step))
        assert torch.equal(batch.token_ids, wanted.token_ids)


def test_the_last_norm_begins_at_the_scale_of_the_targets_state(
    corpus: Corpus, target: Target
) -> None:
    draft = new_draft(target, corpus, RECIPE)
    state = corpus.batch(range(8, 72)).hidden[..., -16:].float()
    torch.testing.assert_close(draft.norm.detach(), state.square().mean((0, 1)).sqrt())


def test_distilling_raises_the_overlap(finished: Path, target: Target) -> None:
    report = json.loads((finished / "out" / "report.json").read_text(encoding="utf-8"))
    curve = report["curve"]
    assert [point["step"] for point in curve] == [0, 25, 50, 60]
    assert [point["tokens"] for point in curve] == [192 * point["step"] for point in curve]
    for depth in range(3):
        for name in ("alpha", "alpha_warped"):
            assert curve[-1][name][depth] > curve[0][name][depth] + 0.1
            assert report["saved"][name][depth] == pytest.approx(curve[-1][name][depth], abs=0.02)
    assert curve[-1]["loss"] < curve[1]["loss"]
    assert report["recipe"] == json.loads(json.dumps(dataclasses.asdict(RECIPE)))
    card = (finished / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| trained | {curve[-1]['alpha'][0]:.3f}, {curve[-1]['alpha_warped'][0]:.3f} |" in card
    assert "python -m mtad distill" in card and str(finished) not in card
    assert max(map(len, card.splitlines())) <= 100
    assert read_recipe(finished / "out" / "recipe.json") == RECIPE


def test_distilling_raises_the_block_efficiency(
    finished: Path, target: Target, corpus: Corpus
) -> None:
    """Tokens a pass of `speculative`, over 300 tokens of five runs."""

    def efficiency(draft: HiddenDraft) -> float:
        pair = mtad.ModelPair(target.model, draft.requires_grad_(False))
        settings = mtad.DecodeConfig(max_new_tokens=60, ignore_eos=True)
        traces = [
            mtad.run(
                "speculative",
                pair,
                prompt_ids=[3, 5 + seed],
                config=dataclasses.replace(settings, seed=seed),
            )
            for seed in range(5)
        ]
        tokens = sum(len(trace.token_ids) for trace in traces)
        return tokens / sum(len(trace.steps) for trace in traces)

    trained = load_draft(finished / "out", target.model, torch.device("cpu"), torch.float32)
    before, after = efficiency(new_draft(target, corpus, RECIPE)), efficiency(trained)
    assert after > before + 0.15


def test_stopping_and_going_on_changes_nothing(
    target: Target, finished: Path, work: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    out = tmp_path / "out"
    for count in (13, 12, 20):  # the second stop comes with an evaluation
        stop = StopAt("train", count)
        with pytest.raises(Cancelled, match="goes on"):
            learn(target, RECIPE, work, out, watch=stop.watch)
    learn(target, RECIPE, work, out, watch=Watch(say=lines.append))
    assert len(lines) == 2 and "step 60 of 60" in lines[-1]
    assert same_tensors(work / CHECKPOINT, finished / CHECKPOINT)
    assert same_tensors(out / FILE_NAME, finished / "out" / FILE_NAME)
    curves = [
        json.loads((folder / "report.json").read_text(encoding="utf-8"))["curve"]
        for folder in (out, finished / "out")
    ]
    assert curves[0] == curves[1]

    # A finished run is finished: the same command only saves it again, elsewhere as well, and
    # so does one with other copy weights, which nothing is trained with.
    kept = (work / CHECKPOINT).stat()
    for folder, recipe in (
        (out, RECIPE),
        (tmp_path / "new", changed(draft={"copy_weights": [0.5]})),
    ):
        draft = learn(target, recipe, work, folder, watch=StopAt("train", 1).watch)
        assert same_tensors(folder / FILE_NAME, finished / "out" / FILE_NAME)
        assert draft.config.copy_weights == recipe.draft.copy_weights
    now = (work / CHECKPOINT).stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns), "written again"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md"], "holds README.md, but not of a draft by mtad distill"),
        (["report.json", "README.md"], "holds README.md and report.json"),
        ([FILE_NAME], "holds draft.safetensors"),
        (["README.md/"], "holds README.md"),
        ([f"{FILE_NAME}/"], "holds draft.safetensors"),
    ],
)
def test_a_folder_of_something_else_is_not_written_to(
    names: list[str], message: str, target: Target, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in names:
        if name.endswith("/"):
            (out / name).mkdir(parents=True)
        else:
            out.mkdir(exist_ok=True)
            (out / name).write_text("mine", encoding="utf-8")
    with pytest.raises(DistillError, match=message):
        distill(target, BRIEF, tmp_path / "work", out)
    assert not (tmp_path / "work").exists()
    assert all((out / name).is_dir() or (out / name).read_text() == "mine" for name in names)


def test_a_folder_that_cannot_be_written_to_is_found_out_first(
    target: Target, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DistillError, match="file/out cannot be used"):
        distill(target, BRIEF, tmp_path / "work", tmp_path / "file" / "out")
    (tmp_path / "link").symlink_to(finished / "out")
    before = (finished / "out" / FILE_NAME).read_bytes()
    with pytest.raises(DistillError, match="link holds the draft to start from"):
        distill(target, BRIEF, tmp_path / "work", tmp_path / "link", start=finished / "out")
    assert (finished / "out" / FILE_NAME).read_bytes() == before
    assert not (tmp_path / "work").exists()


def test_a_start_is_where_another_training_ended(
    target: Target, finished: Path, work: Path, tmp_path: Path
) -> None:
    start = finished / "out"
    ended = json.loads((start / "report.json").read_text(encoding="utf-8"))
    copying = changed(training={"epochs": 0.2}, draft={"copy_weights": (0.5,)})
    draft = learn(target, copying, work, tmp_path, start=start)
    assert draft.config.copy_weights == (0.5,)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["start"] == "out"
    assert report["start_tokens"] == ended["curve"][-1]["tokens"] == 60 * 192
    card = (tmp_path / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert "the weights of out, which had seen 0.01 million tokens." in card
    assert "--start out." in card and "Without out, leave --start out: training" in card
    # Of a draft that began with another, that one's tokens count as well.
    (work / CHECKPOINT).unlink()
    learn(target, BRIEF, work, tmp_path / "third", start=tmp_path)
    third = json.loads((tmp_path / "third" / "report.json").read_text(encoding="utf-8"))
    assert third["start_tokens"] == 63 * 192
    (work / CHECKPOINT).unlink()
    (tmp_path / "report.json").unlink()
    learn(target, BRIEF, work, tmp_path / "third", start=tmp_path)
    card = (tmp_path / "third" / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"the weights of {tmp_path.name}. " in card.replace("##", " ")
    assert report["curve"][0]["alpha"] == pytest.approx(ended["saved"]["alpha"], abs=1e-6)
    # Its tokens stay, whatever is frequent in this corpus.
    (work / CHECKPOINT).unlink()
    begun = load_draft(start, target.model)
    absent = [token for token in range(VOCABULARY) if token not in begun.token_ids.tolist()]
    begun.token_ids[-1] = max(absent)
    begun.token_ids.copy_(begun.token_ids.sort().values)
    other = tmp_path / "other"
    save_draft(begun, other, target.name)
    taken = learn(target, BRIEF, work, tmp_path / "fourth", start=other)
    assert torch.equal(taken.token_ids, begun.token_ids)
    with pytest.raises(DistillError, match="another --start draft"):
        learn(target, BRIEF, work, tmp_path)
    with pytest.raises(ConfigError, match="has the shape"):
        learn(target, changed(draft={"mlp_size": 8}), work, tmp_path, start=start)


@pytest.mark.parametrize(
    "damage", ["cut", "noise", "weights", "other recipe", "other target", "other corpus"]
)
def test_a_damaged_or_foreign_checkpoint_is_refused(
    damage: str, target: Target, finished: Path, work: Path
) -> None:
    recipe, message = RECIPE, "damaged.*Delete .* to begin training anew"
    data = bytearray((finished / CHECKPOINT).read_bytes())
    if damage == "weights":
        data[-5] ^= 1
    if damage.startswith("other"):
        message = f"another {damage.split()[1]}.*Delete .* to begin training anew"
    if damage == "other recipe":
        recipe = changed(training={"weight_decay": 0.02})
    if damage == "other corpus":
        recipe = changed(writing={"shards": 3})
    if damage == "other target":
        target = a_target(seed=1)
        for shard in work.glob("shard*"):
            shard.unlink()
    write(target, recipe, work)
    broken = {"cut": bytes(data[:-9]), "noise": b"\x07" * 99}
    (work / CHECKPOINT).write_bytes(broken.get(damage, bytes(data)))
    with pytest.raises(DistillError, match=message):
        learn(target, recipe, work, work / "out")


@pytest.mark.parametrize(
    "progress",
    [
        {"step": -3},
        {"step": 61},
        {"step": True},
        {"step": 3.0},
        {"curve": None},
        {"curve": [1]},
        {"curve": [{"step": 0}]},
        {"seconds": "x"},
        {"loss_sum": float("nan")},
        {"speed": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("digested", [True, False])
def test_a_damaged_account_of_the_progress_is_refused(
    progress: dict[str, Any], digested: bool, target: Target, finished: Path, work: Path
) -> None:
    tensors, metadata = read_tensors(finished / CHECKPOINT)
    metadata["progress"] = json.dumps(json.loads(metadata["progress"]) | progress)
    if digested:
        metadata["digest"] = checkpoint.digest_of(tensors, metadata["progress"])
    save_tensors(work / CHECKPOINT, tensors, metadata)
    message = next(iter(progress)).replace("curve", "curve is no list") if digested else "content"
    with pytest.raises(DistillError, match=f"is damaged .*{message}.*Delete"):
        learn(target, RECIPE, work, work / "out")


def test_a_draft_of_4_bits_learns_with_the_weights_that_it_will_have(
    tmp_path: Path,
) -> None:
    """Its last evaluation is that of the saved file."""
    target = a_target(hidden_size=32)
    recipe = changed(draft={"weight_bits": 4}, training={"epochs": 2})
    draft = distill(target, recipe, tmp_path / "work", tmp_path / "four")
    report = json.loads((tmp_path / "four" / "report.json").read_text(encoding="utf-8"))
    assert report["saved"]["alpha"] == pytest.approx(report["curve"][-1]["alpha"], abs=1e-6)
    assert report["curve"][-1]["alpha"][0] > report["curve"][0]["alpha"][0] + 0.1
    assert all(
        torch.equal(FourBits.nearest(weight).values(), weight)
        for weight in draft.parameters()
        if weight.dim() == 2
    )
    assert "in 4 bits" in (tmp_path / "four" / "README.md").read_text(encoding="utf-8")
    # One of 8 bits may be where it begins.
    eight = distill(target, changed(training={"epochs": 2}), tmp_path / "work8", tmp_path / "eight")
    assert eight.config.weight_bits == 8
    (tmp_path / "work" / CHECKPOINT).unlink()
    begun = distill(target, recipe, tmp_path / "work", tmp_path / "begun", start=tmp_path / "eight")
    assert begun.config.weight_bits == 4


def test_bfloat16_trains(corpus: Corpus, target: Target, tmp_path: Path) -> None:
    recipe = changed(training={"dtype": "bfloat16", "epochs": 3})
    draft, progress = train(target, corpus, recipe, tmp_path / CHECKPOINT)
    assert draft.norm.dtype == torch.float32
    assert progress.curve[-1]["alpha"][0] > progress.curve[0]["alpha"][0] + 0.1


def test_parts_of_a_batch_make_the_same_step_together(corpus: Corpus, target: Target) -> None:
    """The mean of the parts' gradients, each part on a thread: again and again the same."""
    batch = corpus.batch(range(8, 16))
    batch.origins.fill_(Origin.ANSWER)  # so that all parts weigh the same
    after = []
    for parts in (1, 4, 4):
        training = dataclasses.replace(RECIPE.training, parts=parts, weight_decay=0.0)
        draft = new_draft(target, corpus, RECIPE)
        with contextlib.closing(Learner(target, corpus, training, draft)) as learner:
            losses = [learner.step(batch, step, 10) for step in range(3)]
        after.append((losses, torch.cat([p.detach().flatten() for p in draft.parameters()])))
    assert after[0][0] == pytest.approx(after[1][0], rel=0.02)
    torch.testing.assert_close(after[0][1], after[1][1], atol=2e-2, rtol=2e-2)
    assert after[1][0] == after[2][0]
    assert torch.equal(after[1][1], after[2][1])


def test_gradients_are_taken_at_four_bits_and_move_the_exact_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = a_target(hidden_size=32)
    recipe = changed(draft={"weight_bits": 4}, training={"weight_decay": 0.0})
    write(target, recipe, tmp_path)
    corpus = open_corpus(target, recipe, tmp_path)
    draft = new_draft(target, corpus, recipe)
    before = {name: weight.detach().clone() for name, weight in draft.named_parameters()}
    rounded = {
        name: FourBits.nearest(weight).values() if weight.dim() == 2 else weight
        for name, weight in before.items()
    }
    seen, real_loss = [], unroll.loss

    def loss(part: HiddenDraft, *arguments: Any) -> Tensor:
        seen.append({name: weight.detach().clone() for name, weight in part.named_parameters()})
        return real_loss(part, *arguments)

    def now_is(expected: dict[str, Tensor], found: dict[str, Tensor]) -> bool:
        return all(torch.equal(found[name], expected[name]) for name in expected)

    monkeypatch.setattr(unroll, "loss", loss)
    with contextlib.closing(Learner(target, corpus, recipe.training, draft)) as learner:
        with monkeypatch.context() as still:
            still.setattr(training, "learning_rate", lambda *_: 0.0)
            learner.step(corpus.batch(range(8, 16)), 0, 10)
        assert len(seen) == 2 and all(now_is(rounded, part) for part in seen)  # a part each
        assert now_is(before, dict(draft.named_parameters()))
        with monkeypatch.context() as broken:
            broken.setattr(unroll, "loss", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                learner.step(corpus.batch(range(8, 16)), 0, 10)
        assert now_is(before, dict(draft.named_parameters()))
        learner.step(corpus.batch(range(8, 16)), 0, 10)
    moved = dict(draft.named_parameters())["join.weight"].detach()
    assert not torch.equal(moved, before["join.weight"])
    assert not torch.equal(moved, FourBits.nearest(moved).values())


def test_four_bits_of_a_width_that_is_no_group_are_refused_before_writing(tmp_path: Path) -> None:
    recipe = changed(draft={"weight_bits": 4, "mlp_size": 40})
    with pytest.raises(ConfigError, match="weight_bits is 4, but must be 8 where"):
        distill(a_target(hidden_size=32), recipe, tmp_path / "work", tmp_path / "out")
    assert not list((tmp_path / "work").glob("*.safetensors"))


def test_a_loss_that_is_no_number_ends_the_run(
    corpus: Corpus, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learner, "step", lambda self, batch, step, steps: float("nan"))
    with pytest.raises(DistillError, match="became nan at step 0. Lower training.learning_rate"):
        train(target, corpus, BRIEF, tmp_path / CHECKPOINT)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("family", ["opt", "gpt2", "gemma3"])
def test_other_families_learn(family: str, tmp_path: Path) -> None:
    target = Target(tiny(family, vocab_size=VOCABULARY))
    recipe = changed(training={"epochs": 3})
    write_corpus(target, recipe, tmp_path, Watch())
    corpus = open_corpus(target, recipe, tmp_path)
    _, progress = train(target, corpus, recipe, tmp_path / CHECKPOINT)
    assert progress.curve[-1]["alpha"][0] > progress.curve[0]["alpha"][0] + 0.05


def test_a_cpu_computes_in_bfloat16_only_if_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "mtad.processor.cpu_info"
    monkeypatch.setattr(flags, lambda: ["model name : x", "flags : sse avx2 amx_bf16"])
    assert fast_dtype(torch.device("cpu")) == (torch.bfloat16, "this CPU has amx_bf16")
    monkeypatch.setattr(flags, list)
    assert fast_dtype(torch.device("cpu"))[0] is torch.float32


KILLED = """
import json, sys
from pathlib import Path
from mtad.distill.files import Watch
from mtad.distill.recipe import recipe_from
from mtad.distill.run import distill
from tests.test_distill import a_target
def progress(stage, done, total, note):
    print(stage, done, flush=True)
recipe = recipe_from(json.loads(sys.argv[1]))
work = Path(sys.argv[2])
import torch; torch.set_num_threads(1)
distill(a_target(), recipe, work, work / "out", watch=Watch(progress), checkpoint_seconds=0.0)
"""


def kill_at(stage: str, tokens: int, work: Path) -> None:
    """Starts a distillation in a process of its own and ends it with SIGKILL at a point."""
    recipe = json.dumps(dataclasses.asdict(RECIPE))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, recipe, str(work)],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            said, done = line.split()
            if said == stage and int(done) >= tokens:
                break
        process.kill()
    assert process.returncode == -9, "it ended before it could be killed"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_kill_in_either_phase_changes_nothing(
    target: Target, finished: Path, tmp_path: Path
) -> None:
    kill_at("write", 64 * 24 + 300, tmp_path)
    assert shard_path(tmp_path, 0).exists() and not shard_path(tmp_path, 1).exists()
    kill_at("train", 3 * 192, tmp_path)
    assert (tmp_path / CHECKPOINT).exists() and not any((tmp_path / "out").iterdir())
    distill(target, RECIPE, tmp_path, tmp_path / "out")
    for index in range(2):
        assert shard_path(tmp_path, index).read_bytes() == shard_path(finished, index).read_bytes()
    assert same_tensors(tmp_path / CHECKPOINT, finished / CHECKPOINT)
    assert same_tensors(tmp_path / "out" / FILE_NAME, finished / "out" / FILE_NAME)
    assert not list(tmp_path.glob("*.partial")), "what the kill left is cleared away"
