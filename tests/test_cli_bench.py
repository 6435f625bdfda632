"""`mtad bench`: what it prints, saves, refuses, and keeps when it is stopped."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

from mtad import ModelPair, cli_bench
from mtad.acceptance.measures import Costs, Estimate
from mtad.acceptance.records import Setting
from mtad.bench import machine, systems
from mtad.bench.measures import ASSISTED, GENERATE, Line, Row
from mtad.bench.records import Run, RunFile
from mtad.bench.roofline import Machine, Reached
from mtad.cli import app
from mtad.cli_acceptance_table import rich_tables
from mtad.cli_bench_table import (
    LIMIT_HEADINGS,
    PREDICTION_HEADINGS,
    SPEED_HEADINGS,
    TEXT_HEADINGS,
    footer,
    interval,
    tables,
)
from mtad.errors import MtadError
from mtad.hidden_draft import HiddenDraft, HiddenDraftConfig
from mtad.trace import EnergyReading
from tests.models import tiny
from tests.samples import HOSTILE, NO_SENSOR

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = ("\x1b", "\x9b", "\r", "\u202e")
ROWS = (
    "| transformers generate | transformers | float32 |",
    "| transformers generate | transformers | bfloat16 |",
    "| transformers assisted generation | transformers | float32 |",
    "| autoregressive | eager | float32 |",
    "| speculative | eager | float32 |",
    "| mtad | eager | float32 |",
    "| mtad_tree | eager | float32 |",
    "| specinfer | eager | float32 |",
)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


# Refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "magic"], "no method 'magic'"),
        (["--methods", "mtad,"], "no method ''"),
        (["--transformers", "float16"], "--transformers holds 'float16', but must hold float32"),
        (["--transformers", ""], "--transformers holds ''"),
        (["--limit", "0"], "--limit is 0"),
        (["--repeats", "0"], "--repeats is 0, but must be from 1 to 1000"),
        (["--records", "/none/such/r.jsonl"], "there is no folder"),
        (["--json", str(ROOT)], "is a folder"),
        (["--json", str(cli_bench.HELD_OUT)], "--prompts and --json both name"),
        (["--top-p", "2"], "top_p is 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_end_with_2_before_anything_is_loaded(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench, "load", lambda *_: pytest.fail("models were loaded"))
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr


def test_one_file_under_two_options_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench, "load", lambda *_: pytest.fail("models were loaded"))
    file = str(tmp_path / "r.jsonl")
    result = invoke("--records", file, "--json", file)
    assert result.exit_code == 2 and "--records and --json both name" in result.stderr


# Runs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured for real, but with little."""
    measure = machine.measure_machine
    small = {"buffer_bytes": 2**20, "largest_product": 64}
    monkeypatch.setattr(machine, "measure_machine", lambda *a, **k: measure(*a, **k, **small))


@pytest.fixture
def talking(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A tiny pair that knows a few words; the arguments that run it on six prompts."""
    vocabulary = {"w": 0, **{f"w{i}": i for i in range(1, 32)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    made = ModelPair(tiny(), tiny(seed=1), tokenizer, notes=("a tiny pair",))
    monkeypatch.setattr("mtad.pairs.load_pair", lambda *_, **__: made)
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "w1 w2"}]
    lines: Sequence[dict[str, Any]] = [
        *({"id": f"p{i}", "kind": "a", "prompt": f"w{i} w{i + 1}"} for i in range(1, 6)),
        {"id": "talk", "kind": "b", "messages": turns},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--prompts", str(file), "--max-new-tokens", "6"]


def test_one_command_times_every_row(talking: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = invoke(*talking, "--markdown", "--json", str(out))
    assert result.exit_code == 0, result.output
    for row in ROWS:
        # speed, text, limits, of ours predictions: each of them says engine and dtype
        assert result.stdout.count(row) == (3 if "transformers" in row else 4), row
    for said in ("48 of 48 runs (prompts: 6", "γ 4, W 4, τ 0.3, k-config 4,2,2", "a tiny pair"):
        assert said in result.stdout, said
    for said in ("GB/s", "Gop/s: float32", "bfloat16", "medians of 48", "torch", "first pass"):
        assert said in result.stdout, said
    assert "48/48 " in result.stderr and "min left" in result.stderr
    assert "Measuring what the machine can do." in result.stderr
    assert "| target, tree | 29 |" in result.stdout and "| draft, later step | 8 |" in result.stdout
    assert f"{ROWS[3]} " in result.stdout and "1.00 [1.00, 1.00]" in result.stdout


def test_the_json_file_holds_everything(talking: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--methods", "autoregressive,mtad", "--repeats", "2", "--seed", "7"]
    result = invoke(*talking, *options, "--json", str(out), "--limit", "5")
    assert result.exit_code == 0, result.output
    saved = json.loads(out.read_text(encoding="utf-8"))
    assert (saved["runs_planned"], saved["runs_finished"], len(saved["runs"])) == (50, 50, 50)
    assert saved["config"]["seed"] == 7 and saved["repeats"] == 2
    assert saved["versions"]["torch"] == torch.__version__ and saved["machine"]
    assert saved["rates"]["read_bytes_per_second"] > 0
    assert set(saved["rates"]["operations_per_second"]) == {"float32", "bfloat16"}
    assert saved["costs_seconds"]["target"]["1"] > 0
    assert saved["costs_seconds"]["rounds"] == 48, "before the runs and 15 times between"
    assert saved["failures"] == {}
    found = {row["line"]["setting"]["method"]: row for row in saved["rows"]}
    assert set(found) == {*GENERATE.values(), ASSISTED, "autoregressive", "mtad"}
    mtad = found["mtad"]
    assert (mtad["line"]["engine"], mtad["line"]["dtype"]) == ("eager", "float32")
    assert mtad["tokens"] == 60 and mtad["tokens_per_second"]["low"] > 0
    assert mtad["predicted"] > 0 and 0 < mtad["measured_over_predicted"] < 2
    assert mtad["predicted_alone"] > 0
    assert mtad["measured_over_alone"] == pytest.approx(mtad["speedup"] / mtad["predicted_alone"])
    assert mtad["times_speculative"] is None
    assert mtad["target_pass"]["share"] > 0 and mtad["draft_step"]["share"] > 0
    assert found["autoregressive"]["draft_step"] is None
    # The figures can be made again from the runs.
    speeds: dict[str, list[float]] = {}
    for run in saved["runs"]:
        if run["record"]["setting"]["method"] == "mtad":
            speed = run["timed_tokens"] / run["record"]["decode_seconds"]
            speeds.setdefault(run["record"]["task_id"], []).append(speed)
    medians = sorted(sum(pair) / 2 for pair in speeds.values())
    assert mtad["tokens_per_second"]["value"] == pytest.approx(medians[2])


def test_few_prompts_get_a_dash_for_the_interval_and_the_reason(talking: list[str]) -> None:
    options = ["--methods", "autoregressive", "--transformers", "none", "--limit", "2"]
    result = invoke(*talking, *options, "--markdown")
    assert result.exit_code == 0, result.output
    assert "1.00 [—]" in result.stdout
    assert "[—]: fewer than 5 prompts" in result.stdout
    assert "× transformers float32 —: that row has no finished run." in result.stdout
    assert "transformers generate" not in result.stdout


def test_a_draft_that_is_no_plain_model_leaves_a_row_of_dashes(
    talking: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = HiddenDraftConfig(
        hidden_size=16, target_layers=(1, 2), num_heads=4, num_key_value_heads=2, mlp_size=16
    )
    draft = HiddenDraft(shape, torch.arange(0, 32, 2))
    from mtad.pairs import load_pair  # the fixture's

    made = dataclasses.replace(load_pair("any"), draft=draft)
    monkeypatch.setattr("mtad.pairs.load_pair", lambda *_, **__: made)
    result = invoke(*talking, "--methods", "mtad", "--limit", "1", "--markdown")
    assert result.exit_code == 0, result.output
    dashes = " | ".join("—" for _ in SPEED_HEADINGS[3:])
    assert f"{ROWS[2]} {dashes} |" in result.stdout
    assert "this pair's draft is none." in result.stdout
    assert "3 of 3 runs" in result.stdout


def test_a_row_that_fails_is_out_with_its_message(
    talking: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = systems.Own.run

    def fail(self: systems.Own, *arguments: Any) -> Run | None:
        if self.setting.method == "mtad":
            raise MtadError("it broke " + HOSTILE)
        return original(self, *arguments)

    monkeypatch.setattr(systems.Own, "run", fail)
    options = ["--methods", "autoregressive,mtad", "--transformers", "none", "--limit", "2"]
    result = invoke(*talking, *options, "--markdown")
    assert result.exit_code == 1
    dashes = " | ".join("—" for _ in SPEED_HEADINGS[3:])
    assert f"{ROWS[5]} {dashes} |" in result.stdout
    assert "mtad (float32) —: prompt 'p1': it broke" in result.stdout
    assert "mtad γ 4 τ 0.3 failed at prompt 'p1': it broke" in result.stderr
    assert "2 of 4 runs" in result.stdout and "1.00 [—]" in result.stdout
    assert not any(char in result.output for char in FORBIDDEN)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(
    talking: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"id": "long", "prompt": "w1 " * 600}) + "\n")
    result = invoke(*talking, "--prompts", str(file))
    assert result.exit_code == 1 and "'long' has 600 tokens" in result.stderr
    assert "Measuring" not in result.stderr


def test_without_room_for_the_costs_there_is_no_prediction_by_them(talking: list[str]) -> None:
    options = ["--methods", "mtad_tree", "--num-draft-tokens", "64", "--beam-width", "8"]
    result = invoke(*talking, *options, "--limit", "1", "--transformers", "none")
    assert result.exit_code == 0, result.output
    why = "The context of this pair holds 512"
    assert f"Without a prediction by passes alone: {why}" in result.stderr
    assert "There is no prediction by passes alone." in result.stdout
    assert "predicted × by passes alone —: the costs were not measured." in result.stdout


def test_ctrl_c_prints_what_is_finished_and_the_same_command_goes_on(
    talking: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = RunFile.add

    def interrupt(self: RunFile, run: Run) -> None:
        add(self, run)
        if len(self.runs) == 7:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)  # the handler runs between two instructions

    records, out = tmp_path / "r.jsonl", tmp_path / "out.json"
    options = [*talking, "--methods", "autoregressive,mtad", "--records", str(records)]
    with monkeypatch.context() as patched:
        patched.setattr(RunFile, "add", interrupt)
        result = invoke(*options, "--markdown", "--json", str(out))
    assert result.exit_code == 130, result.output
    assert "Stopped: 7 of 30 runs" in result.stderr and "7 of 30 runs" in result.stdout
    assert ROWS[5] in result.stdout
    assert json.loads(out.read_text())["runs_finished"] == 7
    kept = records.read_bytes()
    assert len(kept.splitlines()) == 8
    result = invoke(*options, "--json", str(out))
    assert result.exit_code == 0, result.output
    assert "8/30 " in result.stderr and "\n7/30 " not in result.stderr
    assert "7 of the runs are of an earlier process" in result.stdout
    assert records.read_bytes().startswith(kept)
    saved = json.loads(out.read_text())
    assert (saved["runs_finished"], saved["runs_of_an_earlier_process"]) == (30, 7)
    assert all(row["prompts"] == 6 for row in saved["rows"])
    result = invoke(*options, "--top-k", "5")
    assert result.exit_code == 1 and "config.top_k is 10 there and 5 here" in result.stderr


def test_ctrl_c_before_the_first_run(talking: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = machine.measure_machine

    def interrupt(*arguments: Any, **options: Any) -> Machine:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
        return original(*arguments, **options)

    monkeypatch.setattr(machine, "measure_machine", interrupt)
    result = invoke(*talking)
    assert result.exit_code == 130, result.output
    assert "Stopped: 0 of 48 runs" in result.stderr and result.stdout == ""


def test_another_engine_is_asked_for_by_name(talking: list[str]) -> None:
    result = invoke(*talking, "--engine", "steam")
    assert result.exit_code == 1 and "engine is 'steam', but must be one of" in result.stderr
    options = ["--methods", "autoregressive", "--transformers", "none", "--limit", "1"]
    assert invoke(*talking, *options, "--engine", "eager").exit_code == 0


def test_a_target_with_ballast_has_the_price_of_its_shape(
    talking: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtad.ballast import BallastShape

    shape = BallastShape("8b", layers=3, width=64, heads=8, kv_heads=4, head_dim=8, mlp=64)
    monkeypatch.setattr("mtad.ballast.SHAPES", {"8b": shape})
    out = tmp_path / "out.json"
    options = [*talking, "--methods", "mtad", "--limit", "1", "--json", str(out)]
    read = []
    for more in ([], ["--ballast", "8b"]):
        result = invoke(*options, *more)
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text())["rows"]
        # transformers in float32, assisted generation and ours read the same weights.
        moved = [found[i]["target_pass"]["pass_bytes"] for i in (0, 2, 3)]
        assert max(moved) < 1.1 * min(moved)
        read.append(found[-1]["target_pass"]["pass_bytes"])
    assert read[1] > 4 * read[0]
    assert "ballast" in result.stdout
    result = invoke(*options, "--ballast", "9b")
    assert result.exit_code == 2 and "--ballast is '9b', but must be one of 8b." in result.stderr


def test_bench_loads_no_torch_for_its_help() -> None:
    import subprocess

    code = (
        "import sys\nsys.argv = ['mtad', 'bench', '--help']\nfrom mtad.cli import main\n"
        "try:\n main()\nexcept SystemExit as end:\n assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


# The tables


MADE = EnergyReading(None, 0.4, "none", "nothing", None, NO_SENSOR)


def row(method: str, **more: Any) -> Row:
    line = Line(Setting(method, 4), "eager", "float32")
    figures = {"prompts": 6, "tokens": 60, "energy": MADE, **more}
    return Row(line, **figures)


def test_figures_and_intervals() -> None:
    assert interval(None) == "—"
    assert interval(Estimate(1.234)) == "1.23 [—]"
    assert interval(Estimate(1.234, 1.0, 2.0), 1) == "1.2 [1.0, 2.0]"


def test_a_missing_figure_is_a_dash_and_never_a_zero() -> None:
    absent = Row(Line(Setting(ASSISTED, 4), "transformers", "float32", "no draft."))
    for _, lines in tables([absent], None):
        assert set(lines[0][3:]) == {"—"}
    said = footer([absent], None, None)
    assert "transformers assisted generation (float32) —: no draft." in said
    assert "× autoregressive —: autoregressive has no finished run." in said
    assert "predicted × by passes alone —: the costs were not measured." in said
    assert "limit —: the machine was not measured." in said


def test_energy_says_how_it_was_measured_or_why_not() -> None:
    joules = EnergyReading(30.0, 2.0, "rapl", "package 0", None, "the whole package")
    estimated = EnergyReading(30.0, 2.0, "estimate", "assumed", None, "no sensor")
    rows = [
        row("mtad", energy=joules, joules_per_token=0.5),
        row("beam", energy=estimated, joules_per_token=0.5),
        row("bild"),
    ]
    (_, speeds), *_ = tables(rows, None)
    column = SPEED_HEADINGS.index("J/token")
    assert [line[column] for line in speeds] == ["0.5", "≈ 0.5", "—"]
    said = footer(rows, None, None)
    assert "J/token: rapl, package 0, the whole package (mtad, float32)" in said
    assert f"J/token —: {NO_SENSOR} (bild, float32)" in said


def test_the_limits_are_in_milliseconds_and_per_cent() -> None:
    one = Reached(5.0, 250.0, 540e6, 1e9, 0.06, "bandwidth", 0.08, 0.75)
    able = Machine("AMD EPYC, 2 threads", 32_000_000, 256_000_000, 9e9, 4e9, {"float32": 1e11})
    *_, (headings, lines) = tables([row("mtad", target_pass=one)], None)
    assert headings == LIMIT_HEADINGS
    assert lines[0][3:9] == ("5.0", "540.0", "60.00", "bandwidth", "80.00", "75.0 %")
    said = " ".join(footer([row("mtad", target_pass=one)], None, able))
    assert "AMD EPYC, 2 threads: reads 9.0 GB/s" in said and "copies 4.0 GB/s" in said
    assert "float32 100.0" in said and "may find them there" not in said
    small = dataclasses.replace(one, pass_bytes=1e6)
    said = " ".join(footer([row("mtad", target_pass=one, draft_step=small)], None, able))
    assert "may find them there" in said
    whole = row("mtad", target_pass=one)
    whole = dataclasses.replace(whole, line=dataclasses.replace(whole.line, dtype="int4"))
    assert "matrix rate of int4 was not measured" in " ".join(footer([whole], None, able))
    assert "A share above" not in said
    above = row("mtad", target_pass=dataclasses.replace(one, share=1.1))
    assert "A share above 100 %" in " ".join(footer([above], None, able))


def test_assisted_generation_says_how_it_drafts() -> None:
    said = " ".join(footer([row(ASSISTED)], None, None))
    assert "num_assistant_tokens 4, constant, assistant_confidence_threshold 0." in said
    auto = Row(Line(Setting(ASSISTED, "auto"), "transformers", "float32"), prompts=1)
    assert "num_assistant_tokens auto, starting at 4" in " ".join(footer([auto], None, None))


@pytest.mark.parametrize("width", [160, 100, 80, 60])
def test_no_terminal_cuts_a_cell_off(width: int) -> None:
    one = Reached(12.5, 1250.0, 26e9, 1e12, 2.6, "arithmetic", 2.9, 0.897)
    figure = Estimate(98_765.4, 87_654.3, 99_999.9)
    full = row(
        "mtad_tree",
        tokens_per_second=figure,
        times_autoregressive=figure,
        perplexity=figure,
        target_pass=one,
        draft_step=one,
    )
    costs = Costs(200, 15, {1: 0.05}, {}, {}, None)
    for headings, lines in tables([full], costs):
        out = Console(file=io.StringIO(), width=width)
        for table in rich_tables(headings, lines, width):
            out.print(table)
        assert isinstance(out.file, io.StringIO)
        shown = out.file.getvalue()
        assert "…" not in shown and max(map(len, shown.splitlines())) <= width
        squeezed = "".join(shown.split())
        for text in lines[0]:
            assert "".join(text.split()) in squeezed


def test_every_heading_has_a_cell() -> None:
    headings = [SPEED_HEADINGS, PREDICTION_HEADINGS, TEXT_HEADINGS, LIMIT_HEADINGS]
    for (found, lines), wanted in zip(tables([row("mtad")], None), headings, strict=True):
        assert found == wanted and len(lines[0]) == len(wanted)
        assert found[:3] == ("row", "engine", "dtype") and lines[0][1:3] == ("eager", "float32")
