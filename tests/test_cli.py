"""The command line: what it prints, what it refuses, its exit codes, and Ctrl-C."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mtad import cli_compare, cli_generate, cli_io
from mtad.catalogue import methods
from mtad.cli import app
from mtad.cli_options import config_from
from mtad.cli_table import Run, cells, markdown, notes, rows
from mtad.config import DecodeConfig
from mtad.errors import BudgetError, Cancelled, MtadError, PromptError
from mtad.terminal import STYLES, clean, console, step_text, summary_lines
from mtad.trace import Step, StopReason, Trace
from tests.samples import HOSTILE, NO_SENSOR, trace

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "assets" / "prompts" / "compare.jsonl"
# Whatever is said around it, a terminal gets none of these from a model or a file.
FORBIDDEN = ("\x1b", "\x9b", "\r", "\u202e")


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Any:
    """Runs the command line in this process: .exit_code, .stdout, .stderr."""
    return CliRunner().invoke(app, list(arguments), input=stdin)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Runs the command line as a user does, in its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "mtad", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    file = tmp_path / "trace.json"
    file.write_text(trace().to_json(), encoding="utf-8")
    return file


# Text of a model is data


def test_clean_neutralises_what_a_terminal_obeys_and_keeps_the_rest() -> None:
    assert clean("a\nb\tc") == "a\nb\tc"
    assert clean("\x1b[2J\r\x08\x7f") == "␛[2J␍␈␡"
    assert clean("\x9b2J\u202e\u2028\ud800") == "\\x9b2J\\u202e\\u2028\\ud800"
    kept = "naïve 日本 👩\u200d🚀 e\u0301 \xa0 ‘x’ [bold]"
    assert clean(kept) == kept


def test_no_character_below_space_survives() -> None:
    everything = "".join(map(chr, range(0x110000)))
    seen = clean(everything)
    bad = [char for char in seen if ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0]
    assert sorted(set(bad)) == ["\t", "\n"]
    assert not any(0xD800 <= ord(char) < 0xE000 for char in seen)


@pytest.mark.parametrize("colours", ["0", "1"])
def test_replay_of_a_hostile_trace(colours: str) -> None:
    hostile = dataclasses.replace(
        trace(text=HOSTILE),
        device=HOSTILE,
        engine=HOSTILE,
        method=HOSTILE,
        started_at=HOSTILE,
        notes=(HOSTILE,),
        target=dataclasses.replace(trace().target, name=HOSTILE),
    )
    terminal = {"FORCE_COLOR": "1"} if colours == "1" else {}
    result = subprocess.run(
        [sys.executable, "-m", "mtad", "replay", "-", "--no-wait"],
        input=hostile.to_json(),
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, **terminal},
        check=True,
    )
    assert result.stdout.count("[bold]") == 7
    shown = result.stdout
    if terminal:
        assert "\x1b[4;" in shown, "nothing was styled"
        assert "\x1b[2J" not in shown
        shown = shown.replace("\x1b[", "")
    assert not any(char in shown for char in FORBIDDEN)


def test_styles_differ_without_colour() -> None:
    shapes = {kind: style.split(" #")[0] for kind, style in STYLES.items()}
    assert len(set(shapes.values())) == len(shapes)


def test_a_step_shows_what_was_rejected_and_why_nothing_is_lost() -> None:
    first, second = trace().steps
    assert step_text(first, styled=False).plain == "one two[- wrong-]{+ and+}"
    assert step_text(second, styled=False).plain == "[- no-]{= three=}"
    styled = step_text(first, styled=True)
    assert styled.plain == "one two wrong and"
    assert [span.style for span in styled.spans] == [
        STYLES["accepted"],
        STYLES["accepted"],
        STYLES["rejected"],
        STYLES["bonus"],
    ]


def test_a_tree_shows_how_many_nodes_were_rejected() -> None:
    first = trace().steps[0]
    branching = dataclasses.replace(first.decision.tree, parents=(-1, 0, 0))
    step = dataclasses.replace(first, decision=dataclasses.replace(first.decision, tree=branching))
    assert "⟨1 other nodes⟩" in step_text(step, styled=False).plain


@pytest.mark.parametrize("reason", typing.get_args(StopReason))
def test_every_end_of_a_run_is_said(reason: StopReason) -> None:
    lines = summary_lines(dataclasses.replace(trace(), stop_reason=reason))
    assert sum(line.startswith("ended: ") for line in lines) == 1


# methods, pairs, replay


def test_methods_lists_all() -> None:
    found = json.loads(invoke("methods", "--json").stdout)
    assert [entry["id"] for entry in found] == [info.id for info in methods()]
    assert set(found[0]) >= {"id", "title", "lossless", "parameters"}
    table = invoke("methods").stdout
    assert all(info.id in table and info.title in table for info in methods())
    assert "accept_threshold" in table


def test_pairs_says_what_fits() -> None:
    result = invoke("pairs", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    found = {entry["id"]: entry for entry in json.loads(result.stdout)}
    assert found["smollm2"]["embedded"] is True
    assert all(
        entry["unavailable"] is None or "GB" in entry["unavailable"] for entry in found.values()
    )
    assert "smollm2" in invoke("pairs", "--device", "cpu").stdout
    refused = invoke("pairs", "--device", "toaster")
    assert (refused.exit_code, "toaster" in refused.stderr) == (1, True)


def test_replay_prints_header_steps_and_summary(trace_file: Path) -> None:
    result = invoke("replay", str(trace_file), "--no-wait")
    assert result.exit_code == 0
    for part in (
        "mtad: big, draft small",
        "one two[- wrong-]{+ and+}[- no-]{= three=}",
        "4 tokens in 0.40 s: 10.0 tokens/s",
        "2 target passes: 2.00 tokens a pass, acceptance rate 0.50",
        f"perplexity {math.exp(0.5):.2f}",
        f"energy —: {NO_SENSOR}",
        "note: a stand-in",
    ):
        assert part in result.stdout


def test_replay_keeps_time(tmp_path: Path) -> None:
    file = tmp_path / "slow.json"
    file.write_text(trace(tokens_per_second=4.0).to_json(), encoding="utf-8")

    def seconds(*arguments: str) -> float:
        before = time.perf_counter()
        assert invoke("replay", str(file), *arguments).exit_code == 0
        return time.perf_counter() - before

    assert seconds("--speed", "2") >= 0.5
    assert seconds("--no-wait") < 0.4


@pytest.mark.parametrize("speed", ["0", "-1", "nan", "inf"])
def test_replay_refuses_a_speed(trace_file: Path, speed: str) -> None:
    result = invoke("replay", str(trace_file), f"--speed={speed}")
    assert result.exit_code == 2
    assert "--speed" in result.stderr and "above 0" in result.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a trace"),
        (b"\xff\xfe", "not a trace"),
        (b"[]", "not a trace"),
        (b'{"schema_version": 99}', ""),
        (b"[" * 100_000, "not a trace"),
    ],
    ids=["empty", "binary", "list", "other", "deep"],
)
def test_replay_refuses_what_is_no_trace(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    result = invoke("replay", str(file))
    assert result.exit_code == 1
    assert result.stderr.startswith("mtad: ") and said in result.stderr
    assert "Traceback" not in result.stderr


def test_replay_of_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        result = invoke("replay", str(path))
        assert (result.exit_code, str(path) in result.stderr) == (1, True)


# Usage and errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "--beam-width", "0"], "beam_width is 0, but must be"),
        (["generate", "x", "--beam-width", "wide"], "beam_width is 'wide'"),
        (["generate", "x", "--beam-width", "auto"], 'num_draft_tokens="auto" as well'),
        (["generate", "x", "--num-draft-tokens", "many"], "num_draft_tokens is 'many'"),
        (["generate", "x", "--k-config", "4,x"], "k_config"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
        (["generate", "x", "--search", "depth"], "search"),
        (["generate", "x", "--method", "magic"], "no method 'magic'"),
        (["generate", "x", "--raw", "--system", "y"], "--system"),
        (["generate", "x", "--deadline", "0"], "--deadline"),
        (["generate", "x", "--prompt-file", "y"], "not both"),
        (["generate", "x", "--json", "/none/such/t.json"], "there is no folder"),
        (["generate", "--no-such-option"], "--no-such-option"),
        (["compare"], "either one PROMPT or --prompts"),
        (["compare", "x", "--prompts", str(PROMPTS)], "either one PROMPT or --prompts"),
        (["compare", "x", "--methods", "mtad,"], "no method ''"),
        (["compare", "x", "--repeats", "0"], "--repeats is 0"),
        (["compare", "x", "--json", "t.json"], "file.jsonl"),
        (["nonsense"], "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_end_with_2_before_anything_is_loaded(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("models were loaded")

    monkeypatch.setattr(cli_generate, "load", refuse)
    monkeypatch.setattr(cli_compare, "load", refuse)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["generate", ""], ["generate", "-"], ["compare", " "]])
def test_an_empty_prompt_is_refused_before_anything_is_loaded(arguments: list[str]) -> None:
    result = invoke(*arguments, "--pair", "smolm2", stdin=" \n")  # there is no such pair
    assert result.exit_code == 1
    assert result.stderr == "mtad: The prompt is empty. Write at least one word.\n"


def test_what_is_no_draft_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "draft.safetensors").write_bytes(b"no draft")
    for folder, said in (
        (tmp_path / "none", "There is no draft.safetensors in"),
        (tmp_path, "cannot be read as a draft"),
    ):
        result = invoke("generate", "x", "--pair", "smolm2", "--draft", str(folder))
        assert result.exit_code == 1
        assert said in result.stderr and "smollm2" not in result.stderr


def test_an_unknown_pair_ends_with_1_and_names_the_known() -> None:
    result = invoke("generate", "x", "--pair", "smolm2")
    assert result.exit_code == 1
    assert "smolm2" in result.stderr and "smollm2" in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = invoke("--debug", "replay", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "TraceError" in result.stderr


def test_an_error_message_cannot_drive_the_terminal() -> None:
    result = invoke("generate", "x", "--method", HOSTILE)
    assert result.exit_code == 2
    assert not any(char in result.stderr for char in FORBIDDEN)


def test_a_closed_pipe_is_no_traceback(trace_file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "mtad", "replay", str(trace_file), "--no-wait"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_the_version_is_the_library_s() -> None:
    import mtad

    assert invoke("--version").stdout == f"mtad {mtad.__version__}\n"


# Options


def test_every_field_of_the_config_has_an_option_with_help() -> None:
    for command in ("generate", "compare"):
        shown = invoke(command, "--help").stdout
        for field in dataclasses.fields(DecodeConfig):
            assert f"--{field.name.replace('_', '-')}" in shown


def test_options_reach_the_config() -> None:
    assert config_from({}) == DecodeConfig()
    given = {
        "num_draft_tokens": "7",
        "k_config": "3,2",
        "iteration_costs": "1,1.5",
        "stop": ["a", "b"],
        "replacement": False,
        "temperature": 0.0,
        "seed": None,
    }
    assert config_from(given) == DecodeConfig(
        num_draft_tokens=7,
        k_config=(3, 2),
        iteration_costs=(1.0, 1.5),
        stop=("a", "b"),
        replacement=False,
        temperature=0.0,
    )
    assert config_from({"num_draft_tokens": "auto"}).num_draft_tokens == "auto"
    assert config_from({"k_config": "auto"}).k_config == "auto"
    adapting = {"num_draft_tokens": "auto", "beam_width": "auto", "iteration_costs": "1,2;1,3"}
    assert config_from(adapting) == DecodeConfig(
        num_draft_tokens="auto", beam_width="auto", iteration_costs=((1, 2), (1, 3))
    )


# Prompts and files


def test_the_shipped_prompts_are_of_several_kinds() -> None:
    prompts = cli_io.read_prompts(PROMPTS)
    assert len(prompts) == 16
    assert len({prompt.kind for prompt in prompts}) >= 8
    assert all(prompt.text.strip() == prompt.text for prompt in prompts)


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbffirst\r\n\r\n third \r\n")
    assert cli_io.read_prompts(file) == [
        cli_io.Prompt("line-1", "first"),
        cli_io.Prompt("line-3", "third"),
    ]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a\u2028b", "id": 3, "kind": "k"}\n\n', encoding="utf-8")
    assert cli_io.read_prompts(lines) == [cli_io.Prompt("3", "a\u2028b", "k")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompt"),
        (b"{", "line 1"),
        (b'{"prompt": "a"}\n{"prompt": 1}', "line 2"),
        (b'["a"]', "line 1"),
        (b"\xff", "no UTF-8"),
        (b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "'x' more than once"),
        (b'{"prompt": "a"}\n{"prompt": "b", "id": "a\\ud800"}', 'line 2: "id" holds half'),
        (b'{"prompt": "a", "kind": "\\udfff"}', 'line 1: "kind" holds half'),
        (b'{"prompt": "a\\ud800"}', 'line 1: "prompt" holds half'),
        (
            b'{"messages": [{"role": "system", "content": "\\ud800"},'
            b' {"role": "user", "content": "x"}]}',
            'line 1: "messages" holds half',
        ),
    ],
)
def test_bad_prompt_files(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(PromptError, match=said):
        cli_io.read_prompts(file)


@pytest.mark.parametrize(
    ("module", "command", "option"),
    [(cli_compare, "compare", "--prompts"), (cli_generate, "generate", "--prompt-file")],
)
def test_no_command_writes_over_its_prompts(
    module: Any, command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("models were loaded"))
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n')
    result = invoke(command, option, str(file), "--json", str(file))
    assert result.exit_code == 2 and f"{option} and --json both name" in result.stderr
    assert file.read_text() == '{"prompt": "x"}\n'


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        cli_io.write_atomically(file, "new \ud800")
    assert file.read_text() == "old"
    cli_io.write_atomically(file, "new")
    assert file.read_text() == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(MtadError, match="cannot be written"):
        cli_io.write_atomically(tmp_path / "none" / "t.json", "x")


def test_the_first_interrupt_asks_and_the_second_insists() -> None:
    before = signal.getsignal(signal.SIGINT)
    with cli_io.stop_on_interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is before


# The table of compare


def sample_runs() -> list[Run]:
    return [
        Run("a", 0, trace("speculative", tokens_per_second=5.0)),
        Run("b", 0, trace("speculative", tokens_per_second=20.0)),
        Run("a", 1, trace("speculative", tokens_per_second=10.0)),
        Run("b", 1, trace("speculative", tokens_per_second=10.0)),
        Run("a", 0, trace("mtad", tokens_per_second=18.0, joules=2.0, energy_method="rapl")),
    ]


def test_figures_are_pooled_and_speed_is_the_median_of_the_repeats() -> None:
    mtad_row, speculative = rows(["mtad", "beam", "speculative"], sample_runs())
    assert (mtad_row.method, speculative.method) == ("mtad", "speculative")
    assert (speculative.runs, speculative.tokens, speculative.target_passes) == (4, 16, 8)
    assert speculative.block_efficiency == 2.0
    assert speculative.acceptance_rate == 0.5
    assert speculative.perplexity == pytest.approx(math.exp(0.5))
    # Repeat 0: 8 tokens in 0.8 + 0.2 s; repeat 1: 8 tokens in 0.8 s. The median of 8 and 10.
    assert speculative.tokens_per_second == pytest.approx(9.0)
    assert speculative.joules_per_token is None
    assert mtad_row.joules_per_token == pytest.approx(0.5)


def test_distinct_4_is_counted_within_each_answer() -> None:
    # Each answer has one 4-gram; that it is the same in both is no repetition.
    (row,) = rows(["mtad"], [Run("a", 0, trace()), Run("b", 0, trace())])
    assert row.distinct_4 == 1.0


def test_a_missing_figure_is_a_dash_with_its_reason() -> None:
    found = rows(["mtad", "speculative"], sample_runs())
    (mtad_cells, speculative_cells) = cells(found)
    assert mtad_cells[6] == "2.00", "18 against a median of 9"
    assert mtad_cells[7] == "—" and mtad_cells[10] == "0.5"
    assert speculative_cells[10] == "—"
    said = notes(found)
    assert "× autoregressive —: autoregressive was not run." in said
    assert f"J/token —: {NO_SENSOR} (speculative)" in said
    assert "J/token: rapl, test board (mtad)" in said


def test_joules_count_only_if_every_run_was_measured() -> None:
    runs = [Run("a", 0, trace(joules=2.0, energy_method="rapl")), Run("b", 0, trace())]
    (row,) = rows(["mtad"], runs)
    assert row.joules_per_token is None
    assert row.energy.reason == NO_SENSOR


def test_an_estimate_says_so() -> None:
    estimated = trace(joules=2.0, energy_method="estimate")
    (row,) = rows(["mtad"], [Run("a", 0, estimated)])
    assert cells([row])[0][10] == "≈ 0.5"
    assert any("energy ≈ 2 J, ≈ 0.5 J/token" in line for line in summary_lines(estimated))


def test_markdown_has_one_cell_a_heading() -> None:
    lines = markdown(rows(["mtad", "speculative"], sample_runs())).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| mtad | 4 | 2 | 2.00 |")


def test_methods_take_turns_in_shuffled_order() -> None:
    prompts = [cli_io.Prompt(str(number), "x") for number in range(10)]
    order = list(cli_compare.turns(["a", "b", "c"], prompts, 2, seed=0))
    assert len(order) == 60
    groups = [tuple(method for *_, method in order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(group) == ["a", "b", "c"] for group in groups)
    assert len(set(groups)) > 1
    assert order == list(cli_compare.turns(["a", "b", "c"], prompts, 2, seed=0))
    first = collections.Counter(group[0] for group in groups)
    assert max(first.values()) < 20, "one method always goes first"


# compare and generate without a model


class Runner:
    """Stands in for the runner where a failure or a Ctrl-C at a chosen run must be provoked."""

    def __init__(self, act: Callable[[str, int], None] = lambda method, count: None) -> None:
        self.calls: list[tuple[str, DecodeConfig]] = []
        self._act = act

    def run(self, method: str, pair: object, *, config: DecodeConfig, **more: Any) -> Trace:
        self.calls.append((method, config))
        self._act(method, len(self.calls))
        if more["cancel"].is_set():
            return dataclasses.replace(trace(method), stop_reason="cancelled")
        return trace(method, seed=config.seed)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Runner], Runner]:
    def install(runner: Runner) -> Runner:
        monkeypatch.setattr("mtad.runner.run", runner.run)
        monkeypatch.setattr(cli_compare, "load", lambda *_: None)
        return runner

    return install


def test_compare_warms_up_and_shares_seeds(stand_in: Any, tmp_path: Path) -> None:
    runner = stand_in(Runner())
    folder = tmp_path / "new" / "traces"
    options = ["--methods", "mtad,beam", "--repeats", "2", "--seed", "5", "--markdown"]
    result = invoke("compare", "x", *options, "--json", str(folder))
    assert result.exit_code == 0, result.stderr
    warm_up, measured = runner.calls[:2], runner.calls[2:]
    assert {method for method, _ in warm_up} == {"mtad", "beam"}
    assert all(config.max_new_tokens == cli_compare.WARM_UP_TOKENS for _, config in warm_up)
    assert sorted((method, config.seed) for method, config in measured) == [
        ("beam", 5),
        ("beam", 6),
        ("mtad", 5),
        ("mtad", 6),
    ]
    names = sorted(file.name for file in folder.iterdir())
    assert names == [f"{method}-prompt-{n}.json" for method in ("beam", "mtad") for n in (1, 2)]
    assert Trace.from_json((folder / "mtad-prompt-2.json").read_bytes()).config.seed == 6
    assert "| mtad | 8 |" in result.stdout and "4 of 4 runs" in result.stdout
    assert "a stand-in" in result.stdout


def test_a_method_that_fails_leaves_the_others_in(stand_in: Any) -> None:
    def fail(method: str, count: int) -> None:
        if method == "mtjd":
            raise BudgetError("too many nodes, lower k " + HOSTILE)

    stand_in(Runner(fail))
    result = invoke("compare", "x", "--methods", "mtad,mtjd")
    assert result.exit_code == 1
    assert "mtjd failed at prompt: too many nodes" in result.stderr
    assert "mtad" in result.stdout and "1 of 2 runs" in result.stdout
    assert not any(char in result.output for char in FORBIDDEN)


def test_ctrl_c_keeps_the_finished_runs(stand_in: Any, tmp_path: Path) -> None:
    def interrupt(method: str, count: int) -> None:
        if count == 2 + 2:  # the warm-up of both, one run, and in the next
            os.kill(os.getpid(), signal.SIGINT)

    runner = stand_in(Runner(interrupt))
    file = tmp_path / "t.jsonl"
    options = ["--methods", "mtad,beam", "--repeats", "3"]
    result = invoke("compare", "x", *options, "--json", str(file))
    assert result.exit_code == 130
    assert len(runner.calls) == 4, "it went on after Ctrl-C"
    assert "1 of 6 runs" in result.stdout
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert Trace.from_json(line).stop_reason == "length"


def test_ctrl_c_while_waiting_for_the_device(stand_in: Any, tmp_path: Path) -> None:
    def interrupt(method: str, count: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise Cancelled("stopped while waiting")

    stand_in(Runner(interrupt))
    file = tmp_path / "t.jsonl"
    file.write_text("of an earlier comparison\n")
    result = invoke("compare", "x", "--json", str(file))
    assert result.exit_code == 130
    assert "0 of 3 runs" in result.stderr
    assert file.read_text() == "of an earlier comparison\n"


def test_prompt_ids_become_harmless_and_distinct_file_names() -> None:
    ids = ("../../etc", ".. .. etc", "a b", "a-b", "é" * 300)
    names = {cli_compare._file_name(Run(name, 0, trace())) for name in ids}
    assert len(names) == len(ids)
    assert all("/" not in name and len(name) < 120 for name in names)


def printed(*, show: bool = False, terminal: bool, text: str = HOSTILE) -> str:
    """What `generate` writes to stdout for the sample with `text` in it."""
    sample = trace(text=text)
    out = io.StringIO()
    made = Console(file=out, force_terminal=terminal, markup=False, color_system="truecolor")
    events: list[Step | Trace] = [*sample.steps, sample]
    assert cli_generate._print_events(events, made, show=show) is sample
    return out.getvalue()


def test_a_pipe_gets_the_text_as_it_is_and_a_terminal_does_not() -> None:
    assert printed(terminal=False) == f"one two and{HOSTILE}\n"
    marked = printed(terminal=False, show=True)
    assert "[- wrong-]{+ and+}" in marked and "\x1b" not in marked
    assert printed(terminal=True) == "one two and[bold]␛[2J␍\\x9b2J\\u202e\n"
    assert "\x1b[2J" not in printed(terminal=True, show=True)
    assert "wrong" in printed(terminal=True, show=True)
    assert printed(terminal=False, text="end\n") == "one two andend\n"


def test_hypotheses_are_not_part_of_the_answer() -> None:
    sample = trace()
    decision = dataclasses.replace(sample.steps[1].decision, provisional=True)
    guess = dataclasses.replace(sample.steps[1], decision=decision)
    out = io.StringIO()
    cli_generate._print_events([guess, guess, *sample.steps, sample], console(out), show=False)
    assert out.getvalue() == "one two and three\n"


# The real pair


def test_generate_streams_the_text_and_saves_the_trace(smollm2: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    options = ["--max-new-tokens", "8", "--top-k", "1", "--json", str(file)]
    result = invoke("generate", *options, stdin="Why is the sky blue?\n")
    assert result.exit_code == 0, result.stderr
    saved = Trace.from_json(file.read_bytes())
    assert result.stdout == saved.text + "\n"
    assert len(saved.token_ids) == 8 and saved.method == "mtad" and saved.config.top_k == 1
    assert "Why is the sky blue?<|im_end|>" in saved.prompt
    assert "8 tokens in" in result.stderr
    replayed = invoke("replay", str(file), "--no-wait")
    assert replayed.exit_code == 0 and "8 tokens in" in replayed.stdout


def test_compare_on_the_real_pair(smollm2: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("Name a colour.\nName a fruit.\n")
    options = ["--methods", "autoregressive,speculative", "--max-new-tokens", "4", "--ignore-eos"]
    file = tmp_path / "t.jsonl"
    result = invoke("compare", "--prompts", str(prompts), *options, "--json", str(file))
    assert result.exit_code == 0, result.stderr
    traces = [Trace.from_json(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert collections.Counter(one.method for one in traces) == {
        "autoregressive": 2,
        "speculative": 2,
    }
    assert "4 of 4 runs" in result.stdout


def test_sigint_ends_a_real_run_and_keeps_what_was_written(smollm2: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    options = ["--max-new-tokens", "4000", "--ignore-eos", "--method", "autoregressive"]
    process = start("generate", "Tell a long story.", *options, "--json", str(file))
    killer = threading.Timer(240, process.kill)
    killer.start()
    assert process.stdout is not None
    # Past the buffer of the text stream, which communicate() would not look into.
    first = os.read(process.stdout.fileno(), 1).decode("ascii")
    process.send_signal(signal.SIGINT)
    before = time.perf_counter()
    rest, errors = process.communicate()
    seconds = time.perf_counter() - before
    killer.cancel()
    assert process.returncode == 130, errors
    saved = Trace.from_json(file.read_bytes())
    assert saved.stop_reason == "cancelled" and saved.token_ids
    assert first + rest == saved.text + "\n"
    assert "stopped by the user" in errors and "Traceback" not in errors
    # A pass takes a tenth of a second, ending Python a second; 4,000 tokens would take minutes.
    assert seconds < 30
