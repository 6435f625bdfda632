"""`mtad distill`: one command from a recipe to a draft, that can be stopped and goes on."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from mtad import cli_distill
from mtad.cli import app
from mtad.distill.run import CHECKPOINT
from mtad.draft_files import FILE_NAME, load_draft
from tests.models import tiny
from tests.test_distill import BRIEF


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    yield


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(dataclasses.asdict(BRIEF)), encoding="utf-8")
    return str(file)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "tiny-target"
    tiny(vocab_size=32, eos_token_id=3).save_pretrained(folder)
    return str(folder)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["distill", *arguments])


def test_from_a_recipe_to_a_draft(recipe: str, model: str, tmp_path: Path) -> None:
    work, out = str(tmp_path / "work"), str(tmp_path / "out")
    common = (recipe, "--work", work, "--target", model, "--device", "cpu")
    result = invoke(*common, "--phase", "write", "--set", "training.epochs=1")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{work}\n"
    assert not (tmp_path / "work" / CHECKPOINT).exists()
    result = invoke(*common, "--out", out, "--phase", "train")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert "tiny-target on cpu in" in result.stderr
    assert "step 3 of 3" in result.stderr and "overlap by depth" in result.stderr
    load_draft(tmp_path / "out", tiny(vocab_size=32), torch.device("cpu"), torch.float32)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: other\nbase_model: tiny-target\n")
    assert str(tmp_path) not in card
    again = str(tmp_path / "again")
    result = invoke(
        *common, "--work", work + "2", "--out", again, "--start", out, "--set", "training.depths=1"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "again" / "report.json").read_bytes())["start"] == "out"


def test_ctrl_c_keeps_everything(
    recipe: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(say: Any) -> Any:
        def report(stage: str, done: int, total: int, note: str) -> None:
            if stage == "train":
                os.kill(os.getpid(), signal.SIGINT)

        return report

    out = tmp_path / "out"
    command = (recipe, "--work", str(tmp_path / "work"), "--out", str(out), "--target", model)
    with monkeypatch.context() as patch:
        patch.setattr(cli_distill, "_lines", interrupting)
        result = invoke(*command)
    assert result.exit_code == 130
    assert "What is finished is kept: the same command goes on" in result.stderr
    assert (tmp_path / "work" / CHECKPOINT).exists() and not any(out.iterdir())
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    assert "step 0 of 3" not in result.stderr, "it began anew"
    assert (out / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent.json", "--work", "w", "--out", "o"], 2, "absent.json cannot be read"),
        (["RECIPE", "--work", "w"], 2, "--out"),
        (["RECIPE", "--work", "w", "--out", "o", "--set", "training.epochs=0"], 2, "epochs is 0"),
        (["RECIPE", "--work", "w", "--out", "o", "--start", "absent"], 2, "--start is absent"),
        (["RECIPE", "--work", "RECIPE", "--out", "o"], 2, "--work"),
        (["RECIPE", "--work", "w", "--out", "RECIPE"], 2, "--out"),
        (["RECIPE", "--work", "w", "--out", "RECIPE/o"], 2, "recipe.json/o cannot be used"),
        (
            ["RECIPE", "--work", "w", "--out", "o", "--start", "o/../o"],
            2,
            "the draft to start from",
        ),
        (
            ["RECIPE", "--work", "w", "--out", "."],
            2,
            "README.md and recipe.json, but not of a draft",
        ),
        (["RECIPE", "--work", "w", "--out", "o", "--device", "tpu"], 1, "device is 'tpu'"),
        (["RECIPE", "--work", "w", "--out", "o", "--target", "./absent"], 1, "./absent"),
        (["RECIPE", "--work", "w", "--out", "o", "--set", "target=gpt"], 1, "gpt"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    arguments: list[str],
    code: int,
    message: str,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    (tmp_path / "o").mkdir()
    result = invoke(*[argument.replace("RECIPE", recipe) for argument in arguments])
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "w").exists()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_lines_of_progress_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines: list[str] = []
    report = cli_distill._lines(lines.append)
    for done in range(0, 1100, 10):
        report("write", 50_000 + done, 60_000, "shard 6 of 6")
        now += 0.125
    assert lines == [
        "Writing: 83.4%, 80/s, 0:02:04 left, shard 6 of 6",
        "Writing: 84.7%, 80/s, 0:01:54 left, shard 6 of 6",
    ]


def test_a_stage_that_begins_again_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines: list[str] = []
    report = cli_distill._lines(lines.append)
    report("evaluate", 8, 64, "")
    report("evaluate", 64, 64, "")
    now += 3600
    report("evaluate", 8, 64, "")
    now += 10
    report("evaluate", 16, 64, "")
    assert lines[-1] == "Evaluating: 25.0%, 1/s, 0:01:00 left"


def test_a_terminal_gets_bars_and_no_markup() -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    with cli_distill._watching(terminal) as (report, say):
        report("write", 10, 100, "shard [bold]1[/bold]")
        report("write", 100, 100, "")
        report("train", 5, 10, "loss \x1b[2J")
        report("evaluate", 5, 10, "")
        report("evaluate", 10, 10, "")
        report("evaluate", 5, 10, "")
        say("step [red]1[/red]")
    assert "step [red]1[/red]" in screen.getvalue()
    assert "\x1b[2J" not in screen.getvalue()
