"""The measurement of a pair on held-out prompts: figures, intervals, records, the command."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
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

from mtad import ModelPair, cli_acceptance
from mtad.acceptance import records as records_module
from mtad.acceptance.costs import measure_costs, together
from mtad.acceptance.measures import (
    Costs,
    Estimate,
    estimate,
    frontier,
    needed_passes,
    quantile,
    resamples,
    rows,
)
from mtad.acceptance.order import jobs, task_seed
from mtad.acceptance.records import (
    Record,
    RecordFile,
    RecordsError,
    Setting,
    Task,
    grid,
    locked,
    match,
    spread,
)
from mtad.acceptance.sweep import fingerprint, sweep
from mtad.cli import app
from mtad.cli_acceptance_table import (
    FRONTIER_HEADINGS,
    HEADINGS,
    cells,
    frontier_cells,
    rich_tables,
)
from mtad.cli_io import UsageError, read_prompts
from mtad.config import DecodeConfig
from mtad.draft_files import save_draft
from mtad.errors import Cancelled, ConfigError, PairError, PromptError
from mtad.hidden_draft import HiddenDraft, HiddenDraftConfig
from mtad.lm import CachedLM
from tests.models import tiny
from tests.samples import trace

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"question", "rewriting", "list", "code", "story", "arithmetic", "chat"}
PLAIN = Setting("autoregressive")
SPECULATIVE = Setting("speculative", 4)
MTAD = Setting("mtad", 4, 0.5)


def record(
    setting: Setting, task: str, tokens: int, passes: int, nll: float | None = 1.0, **more: Any
) -> Record:
    values = {
        "task_digest": "d",
        "target_positions": passes,
        "draft_passes": 0,
        "accepted": 0,
        "offered": 0,
        "ngrams": 10,
        "distinct_ngrams": 9,
        "decode_seconds": 1.0,
        "draft_seconds": 0.0,
        "verify_seconds": 1.0,
        "stop_reason": "length",
        **more,
    }
    return Record(setting, task, tokens=tokens, target_passes=passes, nll=nll, **values)


# Figures


def test_a_record_holds_what_the_trace_says() -> None:
    found = Record.of(trace(), MTAD, Task("t", "k", {"prompt": "x"}))
    assert (found.tokens, found.target_passes, found.accepted, found.offered) == (4, 2, 2, 4)
    assert found.nll == 2.0
    assert (found.ngrams, found.distinct_ngrams) == (1, 1)
    assert (found.distinct_4, found.repeated_4gram_share) == (1.0, 0.0)
    assert found.stop_reason == "length"


def test_figures_are_pooled_over_tokens_and_passes() -> None:
    records = [
        record(MTAD, "a", 10, 2, 5.0, accepted=8, offered=8, decode_seconds=1.0),
        record(MTAD, "b", 30, 18, 45.0, accepted=12, offered=72, decode_seconds=4.0),
    ]
    (row,) = rows(records, [MTAD])
    assert row.block_efficiency is not None and row.perplexity is not None
    assert row.block_efficiency.value == 40 / 20
    assert row.perplexity.value == pytest.approx(math.exp(50 / 40))
    assert row.acceptance_rate == 20 / 80
    assert row.distinct_4 == 18 / 20 and row.repeated_4gram_share == pytest.approx(0.1)
    assert row.tokens_per_second == 8.0
    # Of two prompts a quarter of the resamples holds one of them twice: the interval ends there.
    assert (row.block_efficiency.low, row.block_efficiency.high) == (30 / 18, 5.0)
    assert row.perplexity.low == pytest.approx(math.exp(0.5))
    assert row.perplexity.high == pytest.approx(math.exp(1.5))
    assert row.times_speculative is None and row.perplexity_change is None and row.score is None


def test_an_interval_is_that_of_the_resamples_computed_one_by_one() -> None:
    tokens, passes = [9, 20, 31, 5, 60], [3, 10, 11, 4, 15]
    records = [record(MTAD, str(i), tokens[i], passes[i]) for i in range(5)]
    (row,) = rows(records, [MTAD], times=400, seed=3)
    drawn = []
    for indices in resamples(5, 400, 3):
        assert len(indices) == 5 and set(indices) <= set(range(5))
        drawn.append(sum(tokens[i] for i in indices) / sum(passes[i] for i in indices))
    drawn.sort()
    # 0.025 · 399 = 9.975 and 0.975 · 399 = 389.025
    low = drawn[9] + 0.975 * (drawn[10] - drawn[9])
    high = drawn[389] + 0.025 * (drawn[390] - drawn[389])
    assert row.block_efficiency is not None
    assert row.block_efficiency.low == pytest.approx(low)
    assert row.block_efficiency.high == pytest.approx(high)
    assert quantile([1.0, 2.0], 1.0) == 2.0


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = [float(i % 10) for i in range(100)]
    found = estimate(lambda drawn: sum(values[i] for i in drawn) / len(drawn), len(values))
    assert found is not None and found.low is not None and found.high is not None
    # Standard error sqrt(8.25 / 100) = 0.287. The seed is fixed; with any other the width's own
    # error of about 3 % would fail this about once in 500 tries.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.287, rel=0.1)
    assert found.value == 4.5


def test_ratios_are_resampled_in_pairs() -> None:
    passes = [4, 10, 40, 6, 90, 12]
    records = [record(SPECULATIVE, str(i), 100, n, float(n)) for i, n in enumerate(passes)]
    records += [record(MTAD, str(i), 200, n, 2.0 * n) for i, n in enumerate(passes)]
    records += [record(PLAIN, str(i), 100, 100, float(n)) for i, n in enumerate(passes)]
    plain, speculative, mtad = rows(records, [PLAIN, SPECULATIVE, MTAD])
    assert mtad.block_efficiency is not None and mtad.block_efficiency.low is not None
    assert mtad.block_efficiency.low < 0.8 * mtad.block_efficiency.value
    # Prompt by prompt twice as many tokens a pass, and the same perplexity: nothing is uncertain.
    assert mtad.times_speculative == Estimate(2.0, 2.0, 2.0)
    assert mtad.perplexity_change == Estimate(0.0, 0.0, 0.0)
    assert speculative.times_speculative == Estimate(1.0, 1.0, 1.0)
    assert plain.block_efficiency == Estimate(1.0, 1.0, 1.0)


def test_ratios_are_taken_over_the_prompts_that_both_have_finished() -> None:
    records = [record(SPECULATIVE, "a", 10, 5), record(MTAD, "a", 10, 2), record(MTAD, "b", 9, 9)]
    mtad = rows(records, [SPECULATIVE, MTAD])[1]
    assert mtad.times_speculative == Estimate(2.5)
    assert mtad.prompts == 2


def test_the_baseline_is_speculative_at_its_own_best_length() -> None:
    short, long = Setting("speculative", 2), Setting("speculative", 8)
    records = [record(short, "a", 10, 5), record(long, "a", 10, 4), record(MTAD, "a", 10, 2)]
    found = rows(records, [short, long, MTAD])
    assert [row.times_speculative for row in found] == [
        Estimate(0.8),
        Estimate(1.0),
        Estimate(2.0),
    ]
    assert [row.best_block for row in found] == [False, True, False]


def test_an_impossible_token_leaves_no_perplexity() -> None:
    records = [record(MTAD, "a", 10, 5, None), record(MTAD, "b", 10, 5)]
    (row,) = rows([*records, record(PLAIN, "a", 5, 5)], [MTAD])
    assert row.perplexity is None and row.perplexity_change is None


def test_the_score_is_tokens_a_pass_over_its_cost() -> None:
    costs = Costs(
        context=200,
        rounds=1,
        target={1: 0.050, 3: 0.060, 5: 0.070},
        tree={5: 0.080, 9: 0.100},
        draft={1: 0.002, 2: 0.003},
        draft_first=0.004,
    )
    tree = Setting("mtad_tree", 2, 0.5)
    settings = [PLAIN, Setting("speculative", 2), Setting("mtad", 4, 0.5), tree]
    assert [costs.pass_seconds(setting, 2) for setting in settings] == pytest.approx(
        [0.050, 0.060 + 0.004 + 0.002, 0.070 + 0.004 + 3 * 0.003, 0.080 + 0.004 + 0.003]
    )
    unknown = [Setting("mtad", 7, 0.5), Setting("mtad", "auto", 0.5), Setting("specinfer")]
    assert [costs.pass_seconds(setting, 2) for setting in unknown] == [None] * 3
    records = [record(PLAIN, "a", 9, 9), record(tree, "a", 9, 3)]
    plain, best = rows(records, [PLAIN, tree], costs=costs, beam_width=2)
    assert plain.score == 1.0
    assert best.score == pytest.approx(3 * 0.050 / 0.087)


def test_the_frontier_leaves_out_what_is_worse_in_both() -> None:
    taus = {0.1: (20, 30.0), 0.3: (10, 40.0), 0.5: (10, 20.0)}
    settings = [Setting("mtad", 4, tau) for tau in taus]
    records = [record(Setting("mtad", 4, tau), "a", n, 5, nll) for tau, (n, nll) in taus.items()]
    found = frontier(rows(records, settings))
    assert {row.setting.accept_threshold: best for row, best in found} == {
        0.1: True,
        0.3: False,
        0.5: False,
    }
    assert frontier(rows(records[:1], settings)) == []


def test_figures_that_no_float_holds_are_left_out() -> None:
    records = [record(SPECULATIVE, "a", 9, 0, decode_seconds=1e-320), record(MTAD, "a", 9, 3)]
    speculative, mtad = rows(records, [SPECULATIVE, MTAD])
    assert speculative.block_efficiency is None and mtad.times_speculative is None
    assert speculative.tokens_per_second is None


# The grid


def test_the_grid_multiplies_only_what_a_method_reads() -> None:
    found = grid(["autoregressive", "speculative", "mtad"], [2, 4], [0.3, 0.5])
    assert [str(setting) for setting in found] == [
        "autoregressive",
        "speculative γ 2",
        "speculative γ 4",
        "mtad γ 2 τ 0.3",
        "mtad γ 4 τ 0.3",
        "mtad γ 2 τ 0.5",
        "mtad γ 4 τ 0.5",
    ]
    with pytest.raises(ConfigError, match="num_draft_tokens is 0"):
        grid(["mtad"], [0], [0.5])
    with pytest.raises(ConfigError, match="no method"):
        grid(["magic"], [2], [0.5])


def test_prompts_are_spread_over_the_kinds() -> None:
    tasks = [Task(f"{kind}{i}", kind, {}) for kind in "abc" for i in range(3 if kind == "a" else 1)]
    assert [task.id for task in spread(tasks)] == ["a0", "b0", "c0", "a1", "a2"]
    assert [task.id for task in spread(tasks, 2)] == ["a0", "b0"]


def test_all_runs_of_a_prompt_share_a_seed_and_only_missing_ones_are_run() -> None:
    tasks = [Task(name, "k", {}) for name in "abc"]
    settings = [PLAIN, SPECULATIVE, MTAD]
    todo = jobs(tasks, settings, [record(MTAD, "b", 1, 1)], seed=7)
    assert Counter(task.id for task, _ in todo) == {"a": 3, "b": 2, "c": 3}
    assert (tasks[1], MTAD) not in todo
    assert todo == jobs(tasks, settings, [record(MTAD, "b", 1, 1)], seed=7)
    orders = {
        tuple(setting for task, setting in jobs(tasks, settings, [], seed) if task is tasks[0])
        for seed in range(40)
    }
    assert len(orders) == 6
    assert task_seed(7, tasks[0]) != task_seed(7, tasks[1])
    assert task_seed(8, tasks[0]) == task_seed(7, tasks[0]) + 1
    assert MTAD.config(DecodeConfig(), 3) == DecodeConfig(
        num_draft_tokens=4, accept_threshold=0.5, seed=3
    )


# Records on disk

HEADER: dict[str, Any] = {"target": {"name": "t", "weights": "1"}, "config": {"stop": ()}}


def test_records_come_back_and_the_latest_counts(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first, again = record(MTAD, "a", 9, 3, None), record(MTAD, "a", 9, 2)
    other = record(PLAIN, "b\u2028", 9, 3)
    file = RecordFile(path, HEADER)
    for one in (first, other, again):
        file.append(one)
    assert file.records == RecordFile(path, HEADER).records == [again, other]
    assert len(path.read_text(encoding="utf-8").split("\n")) == 5


@pytest.mark.parametrize("missing", [1, 10, 60])
def test_the_half_line_of_a_killed_run_is_dropped(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "r.jsonl"
    file = RecordFile(path, HEADER)
    for task in "ab":
        file.append(record(MTAD, task, 9, 3))
    path.write_bytes(path.read_bytes()[:-missing])
    file = RecordFile(path, HEADER)
    assert [one.task_id for one in file.records] == ["a"]
    file.append(record(MTAD, "c", 9, 3))
    assert [one.task_id for one in RecordFile(path, HEADER).records] == ["a", "c"]


def test_a_run_killed_in_the_header_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, HEADER)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert RecordFile(path, HEADER).records == []
        assert path.read_bytes() == whole


def test_a_killed_process_loses_nothing_that_it_had_appended(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    code = (
        "import sys, itertools, dataclasses\nfrom pathlib import Path\n"
        "from mtad.acceptance.records import *\n"
        "file = RecordFile(Path(sys.argv[1]), {'target': 't'})\n"
        "for i in itertools.count():\n"
        "    file.append(Record(Setting('mtad', 4, .5), str(i), 'd', 1, 1, 1, 1, 1, 1, .5, 1, 1,"
        " 1., 1., 1., 'length'))\n"
        "    print(i, flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout is not None
    for _ in range(20):
        said = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    said = max([said, *(int(line) for line in child.stdout.read().split())])
    child.wait()
    child.stdout.close()
    found = RecordFile(path, {"target": "t"}).records
    assert [one.task_id for one in found[: said + 1]] == [str(i) for i in range(said + 1)]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({**HEADER, "target": {"name": "t", "weights": "2"}}, "target.weights is '1' there"),
        ({**HEADER, "config": {"stop": ["x"]}}, "config.stop is"),
        ({**HEADER, "draft": "d"}, "draft is None there and 'd' here"),
    ],
)
def test_records_of_other_runs_are_refused(
    tmp_path: Path, header: dict[str, Any], said: str
) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, HEADER).append(record(MTAD, "a", 9, 3))
    before = path.read_bytes()
    with pytest.raises(RecordsError, match=said):
        RecordFile(path, header)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"my notes", "no file of acceptance records"),
        (b"my notes\nand half a line", "no file of acceptance records"),
        (b'{"prompt": "x"}\n', "no file of acceptance records"),
        (b'{"mtad_acceptance": 0}\n', "mtad_acceptance is 0 there and 1 here"),
        (b'{"mtad_acceptance": 1}\n{"tokens": 1}\n', "line 2 is damaged"),
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordsError, match=said):
        RecordFile(path, {})
    assert path.read_bytes() == content
    with pytest.raises(RecordsError, match="cannot be used"):
        RecordFile(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", "-4"),
        ("tokens", '"9"'),
        ("tokens", "9" * 400),
        ("target_passes", "0"),
        ("target_passes", "-1"),
        ("draft_passes", "-1"),
        ("accepted", "1"),
        ("distinct_ngrams", "11"),
        ("nll", "NaN"),
        ("nll", "1" + "0" * 400),
        ("decode_seconds", "Infinity"),
        ("decode_seconds", "-0.5"),
        ("stop_reason", '"bored"'),
        ("method", '"magic"'),
        ("num_draft_tokens", "-5"),
        ("accept_threshold", "NaN"),
    ],
)
def test_a_record_that_no_run_gives_is_damaged(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "r.jsonl"
    file = RecordFile(path, HEADER)
    for task in "ab":
        file.append(record(MTAD, task, 9, 3))
    text, count = re.subn(f'"{name}":[^,}}]+', f'"{name}":{value}', path.read_text())
    assert count == 2
    path.write_text(text)
    with pytest.raises(RecordsError, match=r"r\.jsonl, line 2 is damaged"):
        RecordFile(path, HEADER)
    assert path.read_text() == text


def test_too_large_a_file_of_records_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, HEADER)
    monkeypatch.setattr(records_module, "MAX_RECORDS_BYTES", 10)
    with pytest.raises(RecordsError, match="larger than 10 bytes"):
        RecordFile(path, HEADER)


def test_records_are_locked_whatever_link_names_them(tmp_path: Path) -> None:
    path, link = tmp_path / "r.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    refused = pytest.raises(RecordsError, match="Another process writes to .*link")
    with locked(path), refused, locked(link):
        pass
    with locked(link):
        pass
    with pytest.raises(RecordsError, match="cannot be used"), locked(tmp_path / ("r" * 255)):
        pass


def test_records_of_a_changed_prompt_are_refused_and_others_left_out() -> None:
    task = Task("a", "k", {"prompt": "x"})
    records = [
        record(MTAD, "a", 9, 3, task_digest=task.digest),
        record(PLAIN, "a", 9, 3, task_digest=task.digest),
        record(MTAD, "elsewhere", 9, 3),
    ]
    assert match(records, [task], [MTAD]) == records[:1]
    with pytest.raises(RecordsError, match="prompt 'a' with another text"):
        match(records, [Task("a", "k", {"prompt": "y"})], [MTAD])


# Running


@pytest.fixture
def pair() -> ModelPair:
    return ModelPair(tiny(), tiny(seed=1))


def tasks_of_ids(count: int) -> list[Task]:
    return [Task(f"t{i}", "k", {"prompt_ids": [i + 1, 2, 3]}) for i in range(count)]


def test_a_sweep_gives_the_same_decisions_again(pair: ModelPair) -> None:
    settings = grid(["autoregressive", "speculative", "mtad"], [2], [0.5])
    config = DecodeConfig(max_new_tokens=6)
    todo = jobs(tasks_of_ids(2), settings, [], config.seed)

    def untimed() -> list[Record]:
        found = sweep(pair, todo, config)
        none = {"decode_seconds": 0.0, "draft_seconds": 0.0, "verify_seconds": 0.0}
        return [dataclasses.replace(one, **none) for one in found]

    found = untimed()
    assert [(one.task_id, one.setting) for one in found] == [(task.id, s) for task, s in todo]
    assert all(one.tokens == 6 for one in found)
    assert {one.block_efficiency for one in rows(found, [PLAIN])} == {Estimate(1.0, 1.0, 1.0)}
    assert found == untimed()


def test_a_run_that_fails_is_named(pair: ModelPair) -> None:
    todo = jobs([Task("bad", "k", {"prompt_ids": [99]})], [PLAIN], [], 0)
    with pytest.raises(PromptError, match="autoregressive, prompt 'bad': .*token id 99"):
        list(sweep(pair, todo, DecodeConfig()))


def test_a_stopped_sweep_ends(pair: ModelPair) -> None:
    stop = threading.Event()
    found = []
    for one in sweep(pair, jobs(tasks_of_ids(3), [PLAIN], [], 0), DecodeConfig(), stop):
        found.append(one)
        stop.set()
    assert len(found) == 1


def test_the_fingerprint_tells_weights_apart(pair: ModelPair) -> None:
    config = DecodeConfig()
    first = fingerprint(pair, config)
    assert json.loads(json.dumps(first))["config"]["top_k"] == 10
    assert first == fingerprint(ModelPair(tiny(), tiny(seed=1)), config)
    same = dataclasses.replace(config, num_draft_tokens=8, accept_threshold=0.1)
    assert first == fingerprint(pair, same)
    assert first != fingerprint(ModelPair(tiny(), tiny(seed=2)), config)
    assert first != fingerprint(pair, dataclasses.replace(config, top_k=9))
    assert fingerprint(ModelPair(tiny()), config)["draft"] is None
    with torch.no_grad():
        pair.target.get_input_embeddings().weight[0, 0] += 1
    assert first["target"] != fingerprint(pair, config)["target"]


def test_costs_are_measured_for_every_kind_of_pass(pair: ModelPair) -> None:
    seen: list[tuple[int, int]] = []
    passes = needed_passes(grid(["speculative", "mtad", "mtad_tree"], [2, 4], [0.5]), 3)
    found = measure_costs(pair, passes, 3, rounds=2, progress=lambda *at: seen.append(at))
    assert (list(found.target), list(found.tree)) == ([1, 3, 5], [7, 13])
    assert list(found.draft) == [1, 3] and found.draft_first is not None
    every = [*found.target.values(), *found.tree.values(), *found.draft.values(), found.draft_first]
    assert all(0 < seconds < 5 for seconds in every)
    assert (found.context, found.rounds, seen) == (200, 2, [(0, 2), (1, 2), (2, 2)])


@pytest.mark.parametrize(
    ("methods", "alone", "target", "tree", "draft"),
    [
        (["autoregressive", "specinfer"], False, [1], [], []),
        (["speculative", "typical"], False, [1, 3], [], [1]),
        (["mtad"], False, [1, 3], [], [1, 3]),
        (["mtad_tree"], False, [1], [7], [1, 3]),
        (["autoregressive", "mtad_tree"], True, [1], [], []),
    ],
)
def test_only_passes_of_the_settings_are_measured(
    pair: ModelPair,
    methods: list[str],
    alone: bool,
    target: list[int],
    tree: list[int],
    draft: list[int],
) -> None:
    given = ModelPair(pair.target) if alone else pair
    settings = grid(methods, [2], [0.5])
    found = measure_costs(given, needed_passes(settings, 3), 3, rounds=1)
    assert (list(found.target), list(found.tree), list(found.draft)) == (target, tree, draft)
    assert (found.draft_first is None) == (not draft)
    known = [setting for setting in settings if setting.method != "specinfer" and not alone]
    assert all(found.pass_seconds(setting, 3) for setting in known)


def test_of_costs_measured_several_times_the_middle_counts() -> None:
    parts = [
        Costs(200, 5, {1: one, 5: 3.0}, {9: 2 * one}, {1: 0.1}, first)
        for one, first in ((4.0, 0.2), (1.0, 0.3), (2.0, 0.7))
    ]
    found = together(parts)
    # 5 rows took 0.75, 3 and 1.5 one-token passes, the first step 0.05, 0.3 and 0.35.
    assert found == Costs(200, 15, {1: 2.0, 5: 3.0}, {9: 4.0}, {1: 0.1}, 0.6)
    assert together([Costs(9, 1, {1: 1.0}, {}, {}, None)]) == Costs(9, 1, {1: 1.0}, {}, {}, None)


def test_a_pass_is_compared_with_the_one_before_it(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that runs four times as fast half of the time changes no ratio."""
    now, calls = [0.0], [0]
    plain = CachedLM.forward

    def forward(self: CachedLM, token_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """A row takes 1 and each further one 0.1; a quarter of that in a fast minute."""
        calls[0] += token_ids.shape[0] == 1
        fast = calls[0] // 4 % 2
        now[0] += (0.9 + 0.1 * token_ids.shape[0]) / (4 if fast else 1)
        return plain(self, token_ids, *rest, **named)

    monkeypatch.setattr(CachedLM, "forward", forward)
    monkeypatch.setattr("mtad.acceptance.costs.time.perf_counter", lambda: now[0])
    found = measure_costs(pair, {("target", 3), ("target", 9)}, 4, rounds=5)
    ratios = [found.target[rows] / found.target[1] for rows in (3, 9)]
    assert ratios == pytest.approx([1.2, 1.8])


def test_costs_can_be_stopped_and_need_room(pair: ModelPair) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        measure_costs(pair, {("target", 3)}, 4, cancel=stop)
    with pytest.raises(PairError, match="holds 512 tokens"):
        measure_costs(pair, {("tree", 513)}, 8)


# Prompts


def test_the_held_out_prompts() -> None:
    prompts = read_prompts(cli_acceptance.HELD_OUT)
    assert len(prompts) >= 64
    kinds = Counter(prompt.kind for prompt in prompts)
    assert kinds.keys() == KINDS and min(kinds.values()) >= 10
    shown = [prompt.messages or prompt.text for prompt in prompts]
    assert len(set(shown)) == len(shown)
    for prompt in prompts:
        assert prompt.text == prompt.text.strip() and 10 < len(prompt.text) < 600
        roles = [role for role, _ in prompt.messages]
        assert roles == (["user", "assistant", "user"] if prompt.kind == "chat" else [])
    compared = read_prompts(ROOT / "assets" / "prompts" / "compare.jsonl")
    assert not {prompt.text for prompt in prompts} & {prompt.text for prompt in compared}


def test_conversations_in_a_prompt_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    file.write_text(json.dumps({"id": "x", "kind": "chat", "messages": messages}) + "\n")
    (prompt,) = read_prompts(file)
    assert (prompt.text, prompt.messages) == ("c", tuple(turns))
    assert prompt.request() == {"messages": messages}
    with pytest.raises(UsageError, match="'x' is a conversation"):
        prompt.request(raw=True)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"messages": []}, "list of turns"),
        ({"messages": "x"}, "list of turns"),
        ({"messages": [{"role": "user"}]}, "list of turns"),
        ({"messages": [{"role": "god", "content": "x"}]}, "list of turns"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "last one the user's"),
        ({"messages": [{"role": "user", "content": "x"}], "prompt": "y"}, "either"),
        ({"prompt": None}, "no text"),
    ],
)
def test_bad_conversations(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(entry) + "\n")
    with pytest.raises(PromptError, match=f"line 1.*{said}"):
        read_prompts(file)


# The command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["acceptance", *arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "magic"], "no method 'magic'"),
        (["--methods", "mtad,"], "no method ''"),
        (["--gammas", "2,x"], "--gammas holds 'x'"),
        (["--gammas", "2,0"], "num_draft_tokens is 0"),
        (["--thresholds", "half"], "--thresholds holds 'half'"),
        (["--thresholds", "0"], "accept_threshold is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--records", "/none/such/r.jsonl"], "there is no folder"),
        (["--json", str(ROOT)], "is a folder"),
        (["--top-p", "2"], "top_p is 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_end_with_2_before_anything_is_loaded(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("models were loaded")

    monkeypatch.setattr(cli_acceptance, "load", refuse)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr


@pytest.mark.parametrize("options", [("prompts", "json"), ("records", "json")], ids="-".join)
@pytest.mark.parametrize("how", ["same", "dots", "symlink", "hard link"])
def test_one_file_under_two_options_is_refused_and_left_alone(
    options: tuple[str, str], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("models were loaded")

    monkeypatch.setattr(cli_acceptance, "load", refuse)
    first, second = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    first.write_text('{"prompt": "x"}\n')
    if how == "same":
        second = first
    elif how == "dots":
        second = tmp_path / ".." / tmp_path.name / first.name
    elif how == "symlink":
        second.symlink_to(first)
    else:
        second.hardlink_to(first)
    result = invoke(f"--{options[0]}", str(first), f"--{options[1]}", str(second))
    assert result.exit_code == 2, result.output
    assert f"--{options[0]} and --{options[1]} both name" in result.stderr
    assert first.read_text() == '{"prompt": "x"}\n'


def test_the_held_out_prompts_are_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_acceptance, "check_writable", lambda file: pytest.fail(str(file)))
    result = invoke("--json", str(cli_acceptance.HELD_OUT))
    assert result.exit_code == 2 and "--prompts and --json both name" in result.stderr


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A tiny pair that knows a few words; the arguments that run it on three prompts."""
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
        {"id": "one", "kind": "a", "prompt": "w3 w4 w5"},
        {"id": "two", "kind": "a", "prompt": "w6 w7"},
        {"id": "talk", "kind": "b", "messages": turns},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--prompts", str(file), "--max-new-tokens", "6", "--gammas", "2,3"]
    return [*options, "--methods", "autoregressive,speculative,mtad", "--beam-width", "2"]


def figures(file: Path) -> list[dict[str, Any]]:
    """The rows of a --json file without what depends on the time."""
    found = json.loads(file.read_text())["rows"]
    timed = ("tokens_per_second", "score", "best_score")
    return [{name: row[name] for name in row if name not in timed} for row in found]


def test_one_command_prints_the_table_and_a_killed_one_is_resumed(
    talking: list[str], tmp_path: Path
) -> None:
    records, first, second = tmp_path / "r.jsonl", tmp_path / "1.json", tmp_path / "2.json"
    result = invoke(*talking, "--records", str(records), "--json", str(first))
    assert result.exit_code == 0, result.stderr
    for said in ("mtad", "2*", "[", "vs autoregressive", "15 of 15 runs (prompts: 3)"):
        assert said in result.stdout, said
    for said in ("draft, later step", "a tiny pair", "one-token target pass", "seed 0"):
        assert said in result.stdout, said
    assert "15/15 " in result.stderr and "min left" in result.stderr
    saved = json.loads(first.read_text())
    assert saved["runs_finished"] == saved["runs_planned"] == 15
    assert saved["prompts"] == ["one", "talk", "two"]
    # Killed in the seventh line after the header, nine of fifteen runs missing:
    whole = records.read_bytes()
    lines = whole.splitlines(keepends=True)
    records.write_bytes(b"".join(lines[:7]) + lines[7][:40])
    result = invoke(*talking, "--records", str(records), "--json", str(second), "--markdown")
    assert result.exit_code == 0, result.stderr
    assert "7/15 " in result.stderr and "6/15 " not in result.stderr
    assert figures(first) == figures(second)
    assert records.read_bytes().splitlines()[:7] == whole.splitlines()[:7]
    assert len(records.read_bytes().splitlines()) == 16
    assert "| mtad | 2" in result.stdout and r"\*" in result.stdout
    result = invoke(*talking, "--records", str(records), "--top-k", "5")
    assert result.exit_code == 1
    assert "config.top_k is 10 there and 5 here" in result.stderr


def test_records_in_use_are_refused_before_the_models_load(
    talking: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_acceptance, "load", lambda *_: pytest.fail("models were loaded"))
    records = tmp_path / "r.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\nfrom mtad.acceptance.records import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(records)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "locked\n"
        result = invoke(*talking, "--records", str(records))
        child.communicate("\n")
    assert result.exit_code == 1 and "Another process writes to" in result.stderr
    assert child.returncode == 0 and not records.exists()


def test_without_room_for_the_costs_there_is_no_score(talking: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--methods", "mtad_tree", "--gammas", "64", "--beam-width", "8", "--limit", "1"]
    result = invoke(*talking, *options, "--json", str(out))
    assert result.exit_code == 0, result.stderr
    assert "Without a score: The context of this pair holds 512" in result.stderr
    assert "There is no score. The context of this pair holds 512" in result.stdout
    saved = json.loads(out.read_text())
    assert saved["costs_seconds"] is None and saved["rows"][0]["score"] is None
    assert saved["runs_finished"] == 1 and "passes of 513 rows" in saved["notes"][-1]


def test_several_thresholds_print_the_frontier(talking: list[str]) -> None:
    result = invoke(*talking, "--thresholds", "0.001,0.9", "--limit", "1", "--gammas", "2")
    assert result.exit_code == 0, result.stderr
    assert "on the frontier" in result.stdout and "0.001" in result.stdout


def test_a_draft_of_distill_takes_the_place_of_the_pair_s_own(
    talking: list[str], tmp_path: Path
) -> None:
    shape = HiddenDraftConfig(
        hidden_size=16, target_layers=(1, 2), num_heads=4, num_key_value_heads=2, mlp_size=16
    )
    save_draft(HiddenDraft(shape, torch.arange(0, 32, 2)), tmp_path / "mine", "tiny")
    records, out = tmp_path / "r.jsonl", tmp_path / "out.json"
    options = [*talking, "--draft", str(tmp_path / "mine"), "--limit", "1"]
    result = invoke(*options, "--records", str(records), "--json", str(out))
    assert result.exit_code == 0, result.stderr
    assert "draft mine" in result.stdout
    costs = json.loads(out.read_text())["costs_seconds"]
    assert costs["draft_first"] > 0 and list(costs["draft"]) == ["1", "2"]
    result = invoke(*talking, "--records", str(records))
    assert result.exit_code == 1 and "draft.name is 'mine' there" in result.stderr


def test_a_table_that_is_too_wide_is_split_and_then_turned() -> None:
    found = cells(rows([record(MTAD, task, 9, 3) for task in "ab"], [MTAD]))
    whole = rich_tables(HEADINGS, found, 200)
    assert [len(table.columns) for table in whole] == [len(HEADINGS)]
    split = rich_tables(HEADINGS, found, 110)
    names = [[str(column.header) for column in table.columns] for table in split]
    assert [part[:3] for part in names] == [list(HEADINGS[:3])] * 2
    assert names[0] + names[1][3:] == list(HEADINGS)
    (turned,) = rich_tables(HEADINGS, found, 40)
    assert (len(turned.columns), turned.row_count) == (2, len(HEADINGS))


@pytest.mark.parametrize("width", [160, 100, 80, 60, 20])
def test_no_terminal_cuts_a_cell_off(width: int) -> None:
    settings = grid(["autoregressive", "mtad_tree"], [2, 8], [0.05, 0.5])
    records = [record(one, task, 98_765, 4321, 5e4) for one in settings for task in "ab"]
    found = rows(records, settings)
    for headings, lines in ((HEADINGS, cells(found)), (FRONTIER_HEADINGS, frontier_cells(found))):
        out = Console(file=io.StringIO(), width=width)
        for table in rich_tables(headings, lines, width):
            out.print(table)
        assert isinstance(out.file, io.StringIO)
        shown = out.file.getvalue()
        assert "…" not in shown and max(map(len, shown.splitlines())) <= width
        squeezed = "".join(shown.split())
        # A line a figure needs no word "method"; a very narrow one may fold a cell.
        for text in {*headings[1:], *(cell for line in lines for cell in line)}:
            assert width < 60 or "".join(text.split()) in squeezed


def test_ctrl_c_prints_what_is_finished(
    talking: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RecordFile.append

    def interrupt(self: RecordFile, record: Record) -> None:
        append(self, record)
        if len(self.records) == 4:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)  # the handler runs between two instructions

    monkeypatch.setattr(RecordFile, "append", interrupt)
    records = tmp_path / "r.jsonl"
    result = invoke(*talking, "--records", str(records))
    assert result.exit_code == 130, result.stderr
    assert "Stopped: 4 of 15 runs" in result.stderr
    assert "tokens/pass" in result.stdout and "4 of 15 runs" in result.stdout
    assert len(records.read_text().splitlines()) == 5


def test_a_failure_ends_with_1_after_the_table(talking: list[str], tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    entries = [{"id": "good", "prompt": "w1"}, {"id": "long", "prompt": "w1 " * 600}]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    result = invoke(*talking, "--prompts", str(file), "--methods", "autoregressive")
    assert result.exit_code == 1
    assert "prompt 'long'" in result.stderr and "1 of 2 runs" in result.stdout
