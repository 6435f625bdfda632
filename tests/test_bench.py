"""The bench: limits, figures, transformers' rows, turns and the file of runs."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mtad import ModelPair, runner
from mtad.acceptance.measures import Costs, Estimate
from mtad.acceptance.records import Record, RecordsError, Setting, Task
from mtad.acceptance.sweep import fingerprint
from mtad.bench import baselines, machine, systems
from mtad.bench.baselines import BenchError, Transformers, in_dtype, score
from mtad.bench.machine import last_level_cache, measure_machine
from mtad.bench.measures import (
    ASSISTED,
    GENERATE,
    Line,
    Row,
    draft_rows,
    rows,
    without,
)
from mtad.bench.predictions import passes_of, tree_passes
from mtad.bench.records import Run, RunFile, matching, plain
from mtad.bench.roofline import Machine, Shape, pass_bytes, pass_operations, reached
from mtad.bench.shapes import draft_shape, shape_of, target_shape
from mtad.config import DecodeConfig
from mtad.errors import Cancelled, MtadError, PromptError
from mtad.hidden_draft import HiddenDraft, HiddenDraftConfig
from mtad.inspection import cache_argument
from mtad.trace import EnergyReading, ModelInfo
from tests.models import tiny

CPU = torch.device("cpu")
PLAIN = Setting("autoregressive")
MTAD = Setting("mtad", 4, 0.3)
FLOAT32 = Setting(GENERATE["float32"])
UNMEASURED = EnergyReading(None, 1.0, "none", "nothing", None, "no sensor")
GREEDY = DecodeConfig(temperature=0.0, max_new_tokens=12)
TASK = Task("t", "k", {"prompt_ids": [1, 2, 3]})


# Limits


SHAPE = Shape(
    weight_bytes=1000,
    parameters=250,
    layers=2,
    query_size=8,
    key_value_size=4,
    cache_item_bytes=4,
)


def test_bytes_and_operations_of_a_pass() -> None:
    # Keys and values: 2 layers × 4 numbers × 4 bytes, twice, for 10 + 3 tokens.
    assert pass_bytes(SHAPE, 3, 10) == 1000 + 64 * 13
    # Each row: 250 multiplications and additions; scores and sums over 8 numbers, 2 layers.
    assert pass_operations(SHAPE, 3, 10) == 3 * (500 + 4 * 2 * 8 * 11)


@pytest.mark.parametrize(
    ("rate", "limit", "bound"),
    [
        (1e9, 1064 / 1e6, "bandwidth"),
        (1e5, 564 / 1e5, "arithmetic"),
        (None, 1064 / 1e6, "bandwidth"),
    ],
)
def test_the_longer_of_the_two_times_is_the_limit(
    rate: float | None, limit: float, bound: str
) -> None:
    found = reached(
        SHAPE,
        rows=1,
        context=0,
        seconds=0.01,
        read_bytes_per_second=1e6,
        operations_per_second=rate,
    )
    assert found.limit_seconds == pytest.approx(limit)
    assert found.bound == bound
    assert found.share == pytest.approx(limit / 0.01)
    assert (found.pass_bytes, found.operations) == (1064, 564)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gpt2", "gemma3"])
def test_the_shape_of_a_model_is_that_of_its_layers(family: str) -> None:
    model = tiny(family)
    found = shape_of(model)
    assert (found.layers, found.query_size, found.cache_item_bytes) == (2, 16, 4)
    ids = torch.arange(5).unsqueeze(0)
    with torch.inference_mode():
        output = model(ids, use_cache=True)
    cache = output[cache_argument(model) or "cache"]
    # What the cache of five tokens really holds:
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert pass_bytes(found, 5, 0) - found.weight_bytes == held
    assert found.parameters * 4 == found.weight_bytes
    assert shape_of(model, 77).weight_bytes == 77


def hidden_draft() -> HiddenDraft:
    shape = HiddenDraftConfig(
        hidden_size=16, target_layers=(1, 2), num_heads=4, num_key_value_heads=2, mlp_size=16
    )
    return HiddenDraft(shape, torch.arange(0, 32, 2))


def test_the_shape_of_a_draft() -> None:
    target = tiny()
    pair = ModelPair(target, hidden_draft())
    assert pair.draft_info is not None
    found = draft_shape(pair)
    assert found == Shape(
        pair.draft_info.weight_bytes, pair.draft_info.weight_bytes // 4, 1, 16, 8, 4
    )
    assert target_shape(pair) == shape_of(target)
    assert draft_shape(ModelPair(target, tiny(seed=1))) == shape_of(tiny(seed=1))
    assert draft_shape(ModelPair(target)) is None


class Guess:
    """A drafter of unknown make: it always proposes the same."""

    vocab_size = 32
    target_layers: tuple[int, ...] = ()

    def __init__(self, info: ModelInfo | None) -> None:
        self.info = info

    def prefill(self, token_ids: torch.Tensor, target_hidden: torch.Tensor | None) -> None: ...

    def next_logits(
        self, token_ids: torch.Tensor, parents: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.zeros(token_ids.shape[0], 32)

    def keep(self, path: torch.Tensor | int, target_hidden: torch.Tensor | None = None) -> None: ...


def test_of_a_drafter_only_the_weights_are_known() -> None:
    assert draft_shape(ModelPair(tiny(), Guess(None))) is None
    found = draft_shape(ModelPair(tiny(), Guess(ModelInfo("g", parameters=5, weight_bytes=20))))
    assert found is not None
    assert (pass_bytes(found, 4, 100), pass_operations(found, 4, 100)) == (20, 0)


# The machine


def test_the_machine_is_measured() -> None:
    stages: list[str] = []
    found = measure_machine(
        CPU,
        ["float32", "bfloat16", "int8", "q4", "float32"],
        progress=stages.append,
        buffer_bytes=2**20,
        largest_product=64,
    )
    assert set(found.operations_per_second) == {"float32", "bfloat16", "int8"}
    assert 1e4 < found.operations_per_second["int8"] < 1e16
    for rate in (found.read_bytes_per_second, found.copy_bytes_per_second):
        # No machine reads slower than a floppy disk or faster than its registers.
        assert 1e5 < rate < 1e14
    assert 1e4 < found.operations_per_second["float32"] < 1e16
    assert (found.buffer_bytes, "1 threads" in found.name) == (2**20, True)
    assert stages[0] == "reading" and stages.count("multiplying in float32") == 1


def test_rates_are_bytes_and_operations_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine._Best, "__call__", lambda self, call, rounds=0: 0.5)
    found = measure_machine(CPU, ["float32"], buffer_bytes=2**20, largest_product=512)
    assert found.read_bytes_per_second == found.copy_bytes_per_second == 2**21
    assert found.operations_per_second == {"float32": 2 * 512**3 / 0.5}


def test_products_grow_until_they_last_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine._Best, "__call__", lambda self, call, rounds=0: 1e-4)
    found = measure_machine(CPU, ["float32"], buffer_bytes=2**20, largest_product=600)
    assert found.operations_per_second["float32"] == pytest.approx(2 * 600**3 / 1e-4)


def test_a_product_that_was_held_up_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bandwidths, products = [0.5] * 3, [0.5, 3e-3, 24e-3]  # of 256, 512 and 1,024
    seconds = iter(bandwidths + products)
    monkeypatch.setattr(machine._Best, "__call__", lambda self, call, rounds=0: next(seconds))
    found = measure_machine(CPU, ["float32"], buffer_bytes=2**20)
    assert found.operations_per_second["float32"] == pytest.approx(2 * 512**3 / 3e-3)
    assert next(seconds, None) is None


def test_the_better_bandwidth_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.5, 0.5, 0.5, 0.25, 0.5, 1.0, 2.0, 2.0, 0.25])  # a sum, a product, a copy
    monkeypatch.setattr(machine._Best, "__call__", lambda self, call, rounds=0: next(seconds))
    found = measure_machine(CPU, [], buffer_bytes=2**20)
    found = machine.with_bandwidth(found, CPU)
    assert (found.read_bytes_per_second, found.copy_bytes_per_second) == (2**22, 2**21)
    found = machine.with_bandwidth(found, CPU)
    assert (found.read_bytes_per_second, found.copy_bytes_per_second) == (2**22, 2**22)
    assert found.reads == (2**21, 2**22, 2**19)


def test_the_measurement_of_the_machine_can_be_stopped() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        measure_machine(CPU, ["float32"], cancel=stop, buffer_bytes=2**20)


def test_the_last_level_cache_is_added_up_over_its_parts(tmp_path: Path) -> None:
    for cpu, (level, size, shared) in enumerate(
        [(3, "32768K", "0-1"), (3, "32768K", "0-1"), (3, "32M", "2-3"), (2, "1024K", "3")]
    ):
        folder = tmp_path / f"cpu{cpu}" / "cache" / "index0"
        folder.mkdir(parents=True)
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
        (folder / "shared_cpu_list").write_text(f"{shared}\n")
    assert last_level_cache(CPU, tmp_path) == 64 * 2**20
    assert last_level_cache(CPU, tmp_path / "none") == machine.UNKNOWN_CACHE_BYTES


def test_the_buffer_is_several_caches_and_never_most_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mtad.loading.free_bytes", lambda device: None)
    assert machine._buffer_bytes(CPU, 2**20) == 256 * 2**20
    assert machine._buffer_bytes(CPU, 200 * 2**20) == 800 * 2**20
    monkeypatch.setattr("mtad.loading.free_bytes", lambda device: 400 * 2**20)
    assert machine._buffer_bytes(CPU, 200 * 2**20) == 100 * 2**20


# Figures


def made(
    setting: Setting,
    task: str,
    seconds: float = 1.0,
    *,
    repeat: int = 0,
    tokens: int = 10,
    passes: int = 10,
    joules: float | None = None,
    timed: int | None = None,
    prompt_tokens: int = 20,
    **more: Any,
) -> Run:
    values = {
        "task_digest": "d",
        "target_positions": passes,
        "draft_passes": 0,
        "accepted": 0,
        "offered": 0,
        "nll": float(tokens),
        "ngrams": 10,
        "distinct_ngrams": 9,
        "draft_seconds": 0.0,
        "verify_seconds": seconds / 2,
        "stop_reason": "length",
        **more,
    }
    record = Record(
        setting, task, tokens=tokens, target_passes=passes, decode_seconds=seconds, **values
    )
    energy = UNMEASURED
    if joules is not None:
        energy = EnergyReading(joules, seconds, "rapl", "board", None, None)
    engine = "transformers" if setting.method.startswith("transformers") else "eager"
    return Run(
        record=record,
        repeat=repeat,
        engine=engine,
        dtype="float32",
        prompt_tokens=prompt_tokens,
        timed_tokens=tokens if timed is None else timed,
        timed_passes=passes,
        timed_draft_passes=record.draft_passes,
        timed_draft_positions=None,
        energy=energy,
    )


def lines(*settings: Setting) -> list[Line]:
    return [Line(setting, "eager", "float32") for setting in settings]


def table(runs: Sequence[Run], *settings: Setting, **more: Any) -> list[Row]:
    return rows(lines(*settings), runs, DecodeConfig(), times=200, **more)


def test_speed_is_the_median_over_the_prompts_and_ratios_are_taken_at_the_same_prompt() -> None:
    plain_seconds = [1.0, 2.0, 4.0, 8.0, 16.0]
    runs = [made(PLAIN, str(i), seconds) for i, seconds in enumerate(plain_seconds)]
    runs += [made(MTAD, str(i), seconds / 2) for i, seconds in enumerate(plain_seconds)]
    first, second = table(runs, PLAIN, MTAD)
    assert first.tokens_per_second is not None and second.tokens_per_second is not None
    assert first.tokens_per_second.value == 2.5 and second.tokens_per_second.value == 5.0
    assert second.tokens_per_second.low is not None
    assert 1.25 <= second.tokens_per_second.low < 5.0
    # Twice as fast at every prompt: that is certain, however different the prompts are.
    assert second.times_autoregressive == Estimate(2.0, 2.0, 2.0)
    assert first.times_autoregressive == Estimate(1.0, 1.0, 1.0)
    assert second.times_transformers is None and second.times_speculative is None
    rival = Setting("speculative", "auto")
    runs += [made(rival, str(i), seconds * 0.8) for i, seconds in enumerate(plain_seconds)]
    third = table(runs, PLAIN, MTAD, rival)[1]
    assert third.times_speculative is not None
    assert third.times_speculative.value == pytest.approx(1.6)


def test_fewer_than_five_prompts_have_no_interval() -> None:
    runs = [made(setting, str(i), i + 1.0) for setting in (PLAIN, MTAD) for i in range(4)]
    found = table(runs, PLAIN, MTAD)[1]
    for figure in (
        found.tokens_per_second,
        found.times_autoregressive,
        found.block_efficiency,
        found.perplexity,
    ):
        assert figure is not None and (figure.low, figure.high) == (None, None)
    runs += [made(setting, "4", 9.0) for setting in (PLAIN, MTAD)]
    found = table(runs, PLAIN, MTAD)[1]
    assert found.tokens_per_second is not None and found.tokens_per_second.low is not None


def test_repeats_are_one_prompt() -> None:
    seconds = [1.0, 10.0, 2.0]  # 10, 1 and 5 tokens/s
    runs = [made(MTAD, "a", s, repeat=i, nll=20.0) for i, s in enumerate(seconds)]
    runs += [made(PLAIN, "a", s, repeat=i) for i, s in enumerate([4.0, 10.0, 2.0])]
    found = table(runs, MTAD, PLAIN)[0]
    assert (found.prompts, found.tokens) == (1, 30)
    assert found.tokens_per_second == Estimate(5.0)
    # 4, 1 and 1 times as fast in the same repeat
    assert found.times_autoregressive == Estimate(1.0)
    assert found.perplexity is not None and found.perplexity.value == pytest.approx(math.exp(2.0))
    assert found.distinct_4 == 0.9 and found.repeated_4gram_share == pytest.approx(0.1)


def test_an_impossible_token_in_one_repeat_leaves_no_perplexity() -> None:
    runs = [made(MTAD, "a", repeat=0), made(MTAD, "a", repeat=1, nll=None)]
    assert table(runs, MTAD)[0].perplexity is None


def test_an_answer_of_one_pass_has_no_speed_and_leaves_the_others_theirs() -> None:
    runs = [made(FLOAT32, "a", timed=0), made(FLOAT32, "b", timed=9)]
    found = table(runs, FLOAT32)[0]
    assert found.tokens_per_second == Estimate(9.0)
    assert found.prompts == 2
    assert table(runs[:1], FLOAT32)[0].tokens_per_second is None


def test_shares_of_the_decode_time_add_up_to_one() -> None:
    run = made(MTAD, "a", 4.0, draft_seconds=1.0, verify_seconds=2.0, draft_passes=5)
    found = table([run], MTAD)[0]
    assert (found.draft_share, found.verify_share, found.other_share) == (0.25, 0.5, 0.25)
    # Device times beyond the wall clock; and who drafts nothing has no share of 0.
    found = table([made(PLAIN, "a", 4.0, verify_seconds=4.1)], PLAIN)[0]
    assert found.other_share == 0.0 and found.draft_share is None
    # Without a draft pass a draft may still have read what was emitted.
    found = table([made(MTAD, "a", 4.0, draft_seconds=1.0, verify_seconds=2.0)], MTAD)[0]
    assert (found.draft_share, found.verify_share, found.other_share) == (0.25, 0.5, 0.25)
    # Of an answer of one pass the clock saw no pass.
    once = dataclasses.replace(made(FLOAT32, "a", timed=0), timed_passes=0)
    found = table([once], FLOAT32)[0]
    assert (found.draft_share, found.verify_share, found.other_share) == (None, None, None)


def test_joules_count_only_if_every_run_was_measured() -> None:
    runs = [made(MTAD, "a", joules=30.0, timed=6), made(MTAD, "b", joules=20.0, timed=4)]
    found = table(runs, MTAD)[0]
    assert found.joules_per_token == 5.0
    assert found.energy is not None and found.energy.method == "rapl"
    found = table([*runs, made(MTAD, "c")], MTAD)[0]
    assert found.joules_per_token is None
    assert found.energy is not None and found.energy.reason == "no sensor"


def test_a_row_that_failed_is_there_with_its_message_and_is_no_baseline() -> None:
    runs = [made(PLAIN, "a"), made(MTAD, "a", 0.5)]
    marked = without(lines(PLAIN, MTAD), {PLAIN: "it broke"})
    plain_row, mtad_row = rows(marked, runs, DecodeConfig())
    assert plain_row == Row(dataclasses.replace(lines(PLAIN)[0], absent="it broke"))
    assert mtad_row.tokens_per_second == Estimate(20.0)
    assert mtad_row.times_autoregressive is None
    assert rows(lines(PLAIN), [], DecodeConfig()) == [Row(lines(PLAIN)[0])]


COSTS = Costs(
    context=200,
    rounds=1,
    target={1: 0.05, 5: 0.07},
    tree={29: 0.1},
    draft={1: 0.01, 4: 0.015, 8: 0.025},
    draft_first=0.01,
)


def test_predictions_are_made_of_what_passes_cost_in_the_runs() -> None:
    tree = Setting("specinfer")
    spans = {"draft_seconds": 0.2, "verify_seconds": 0.4, "draft_passes": 40}
    runs = [made(PLAIN, "a", 1.0, verify_seconds=0.9)]
    runs += [made(MTAD, "a", 0.8, tokens=20, **spans), made(FLOAT32, "a")]
    runs += [made(tree, "b", 0.8, tokens=20, **spans)]
    plain_row, mtad_row, tree_row, foreign = table(runs, PLAIN, MTAD, tree, FLOAT32)
    assert plain_row.predicted == pytest.approx(1.0)
    assert plain_row.measured_over_predicted == pytest.approx(1.0)
    # Two tokens a pass; 0.09 of a pass of one token against 0.04 and 0.02.
    assert mtad_row.predicted == pytest.approx(2 * 0.09 / 0.06)
    # Outside of its passes the one spent 0.1 of its time, the other 0.25.
    assert mtad_row.measured_over_predicted == pytest.approx(0.75 / 0.9)
    assert foreign.predicted is None and foreign.measured_over_predicted is None
    assert tree_row.predicted is None, "no prompt in common"
    assert table(runs, MTAD)[0].predicted is None, "nothing to be faster than"
    # Passes that others slowed down are slow in both.
    slow = dataclasses.replace(
        runs[1],
        record=dataclasses.replace(
            runs[1].record, decode_seconds=1.6, draft_seconds=0.4, verify_seconds=0.8
        ),
    )
    found = table([runs[0], slow], PLAIN, MTAD)[1]
    assert found.predicted == pytest.approx(0.09 / 0.06)
    assert found.measured_over_predicted == pytest.approx(0.75 / 0.9)
    assert found.speedup == pytest.approx(found.predicted * found.measured_over_predicted)


def test_predictions_of_repeats_are_of_the_runs_that_both_have() -> None:
    runs = [made(PLAIN, "a", 1.0, repeat=i, verify_seconds=s) for i, s in enumerate((0.8, 0.4))]
    runs += [made(MTAD, "a", 0.5, repeat=0, tokens=30)]
    found = table(runs, PLAIN, MTAD)[1]
    assert found.predicted == pytest.approx(3 * 0.08 / 0.025)
    assert found.measured_over_predicted == pytest.approx((30 / 0.5) / 10 / found.predicted)


def test_predictions_of_passes_alone() -> None:
    tree = Setting("specinfer")
    runs = [made(PLAIN, "a", 1.0), made(MTAD, "a", 0.8, tokens=20, target_positions=50)]
    runs += [made(tree, "a", 0.5, tokens=30, target_positions=290), made(FLOAT32, "a")]
    plain_row, mtad_row, tree_row, foreign = table(runs, PLAIN, MTAD, tree, FLOAT32, costs=COSTS)
    assert plain_row.predicted_alone == pytest.approx(1.0)
    # Two tokens a pass; a verification of 5 rows, a first draft step and three of four beams.
    assert mtad_row.predicted_alone == pytest.approx(2 * 0.05 / (0.07 + 0.01 + 3 * 0.015))
    # The tree of 4 + 8 + 16 nodes below the pending token.
    assert tree_row.predicted_alone == pytest.approx(3 * 0.05 / (0.1 + 0.01 + 0.015 + 0.025))
    assert foreign.predicted_alone is None
    # The end of an answer cuts blocks: eight of five rows, one of three and one of one.
    short = made(MTAD, "a", 0.8, tokens=20, target_positions=44)
    found = table([short], MTAD, costs=COSTS)[0]
    whole = 0.07 + 0.01 + 3 * 0.015
    assert found.predicted_alone == pytest.approx(2 * 0.05 / (0.05 + (whole - 0.05) * 3.4 / 4))
    assert table(runs, MTAD)[0].predicted_alone is None


def test_what_is_predicted_of_all_tokens_is_measured_of_all_tokens() -> None:
    """One answer of three that repeats itself is fast: it lifts tokens a pass, and no median."""
    runs = [made(PLAIN, task, 1.0) for task in "abc"]
    runs += [made(MTAD, "a", 1.0), made(MTAD, "b", 1.0), made(MTAD, "c", 0.25, tokens=40)]
    runs[-1] = dataclasses.replace(runs[-1], timed_tokens=40)
    found = table(runs, PLAIN, MTAD)[1]
    assert found.times_autoregressive is not None and found.times_autoregressive.value == 1.0
    assert found.predicted is not None and found.measured_over_predicted is not None
    slow, fast = runs[0].timed_tokens, 40
    speedup = (2 * slow + fast) / 2.25 / slow
    assert found.measured_over_predicted == pytest.approx(speedup / found.predicted)


def test_a_length_that_adapts_is_predicted_alone_by_its_mean_verification() -> None:
    adapts = Setting("mtad", "auto", 0.5)
    costs = dataclasses.replace(
        COSTS,
        target={1: 0.05, **{rows: 0.05 + 0.005 * (rows - 1) for rows in (2, 3, 5, 9, 17)}},
    )
    runs = [made(PLAIN, "a", 1.0), made(adapts, "a", 0.8, tokens=20, target_positions=70)]
    found = table(runs, PLAIN, adapts, costs=costs)[1]
    # Seven rows: between γ 4 and γ 8, at 6 draft tokens.
    assert found.predicted_alone == pytest.approx(2 * 0.05 / (0.08 + 0.01 + 5 * 0.015))
    # Ten passes of seven rows and ten of thirteen are not twenty of ten: costs bend at nine rows.
    bent = dataclasses.replace(costs, target=costs.target | {17: 0.2})
    mixed = [*runs, made(PLAIN, "b", 1.0), made(adapts, "b", 0.8, tokens=20, target_positions=130)]
    iterations = (0.08 + 0.01 + 5 * 0.015, (0.09 + 0.2) / 2 + 0.01 + 11 * 0.015)
    found = table(mixed, PLAIN, adapts, costs=bent)[1]
    assert found.predicted_alone == pytest.approx(2 * 0.05 / (sum(iterations) / 2))
    short = [made(adapts, "a", target_positions=14)]  # now and then no draft at all
    (found,) = table(short, adapts, costs=costs)
    assert found.predicted_alone == pytest.approx(0.05 / (0.05 + 0.4 * 0.015))
    assert passes_of([adapts], DecodeConfig()) == {
        ("draft", 4),
        *(("target", rows) for rows in (1, 2, 3, 5, 9, 17)),
    }
    assert table(runs, adapts)[0].predicted_alone is None


def test_the_passes_of_a_prediction() -> None:
    config = DecodeConfig(k_config=(4, 2, 2))
    assert tree_passes((4, 2, 2), 4) == (("tree", 29), [("draft", 4), ("draft", 8)])
    found = passes_of([PLAIN, Setting("specinfer")], config)
    assert found == {("target", 1), ("tree", 29), ("draft", 4), ("draft", 8)}
    assert tree_passes((1, 1, 1, 1), 4)[0] == ("target", 5)  # a line is a block
    odd = DecodeConfig(k_config=(3,), beam_width=4)
    assert passes_of([Setting("specinfer")], odd) == {("target", 1), ("target", 4)}
    every = passes_of([Setting("specinfer")], DecodeConfig(k_config="auto"))
    assert {("target", 2), ("tree", 5), ("tree", 29), ("draft", 1), ("draft", 8)} < every
    assert passes_of([MTAD], config) == {("target", 1), ("target", 5), ("draft", 4)}


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        (Setting("speculative", 4), 1.0),
        (Setting("speculative", "auto"), 1.0),
        (Setting("bild", 10), 1.0),
        (MTAD, (1 + 3 * 4) / 4),
        (Setting("mtad_tree", 2, 0.5), (1 + 4) / 2),
        (Setting("mtad", "auto", 0.5), None),
        (Setting("specinfer"), (1 + 4 + 8) / 3),
    ],
    ids=str,
)
def test_mean_rows_of_a_draft_step(setting: Setting, found: float | None) -> None:
    assert draft_rows(setting, DecodeConfig()) == found


def test_limits_are_those_of_the_mean_pass() -> None:
    able = Machine("m", 0, 0, 1e6, 1e6, {"float32": 1e9})
    run = made(
        MTAD,
        "a",
        target_positions=40,
        draft_passes=20,
        draft_seconds=0.2,
        verify_seconds=0.1,
        prompt_tokens=15,
    )
    shapes = {"targets": {MTAD: SHAPE}, "drafts": {MTAD: SHAPE}}
    found = table([run], MTAD, machine=able, **shapes)[0]
    # Ten passes of four rows; the prompt and half of ten tokens.
    assert found.target_pass == reached(
        SHAPE,
        rows=4.0,
        context=20.0,
        seconds=0.01,
        read_bytes_per_second=1e6,
        operations_per_second=1e9,
    )
    assert found.draft_step is not None
    assert (found.draft_step.rows, found.draft_step.measured_seconds) == (3.25, 0.01)
    counted = dataclasses.replace(run, timed_draft_positions=30)
    found = table([counted], MTAD, machine=able, **shapes)[0]
    assert found.draft_step is not None and found.draft_step.rows == 1.5
    assert table([run], MTAD, **shapes)[0].target_pass is None
    nothing = table([made(PLAIN, "a")], PLAIN, machine=able, targets={PLAIN: SHAPE})[0]
    assert nothing.target_pass is not None and nothing.draft_step is None


# The file of runs


def test_runs_outlive_the_process(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    first = made(MTAD, "a", joules=3.0)
    second = dataclasses.replace(made(FLOAT32, "a", timed=0, repeat=1), timed_passes=0)
    kept = RunFile(file, {"device": "cpu"})
    kept.add(first)
    kept.add(second)
    assert RunFile(file, {"device": "cpu"}).runs == [first, second]
    with file.open("a") as stream:
        stream.write('{"record": ')
    assert RunFile(file, {"device": "cpu"}).runs == [first, second]
    with pytest.raises(RecordsError, match="device is 'cpu' there and 'cuda' here"):
        RunFile(file, {"device": "cuda"})
    assert [entry["record"]["task_id"] for entry in plain([first, second])] == ["a", "a"]


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run["record"].update(accepted=9),
        lambda run: run.update(timed_tokens=99),
        lambda run: run.update(timed_passes=99),
        lambda run: run.update(repeat=-1),
        lambda run: run["record"].update(tokens=0),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, change: Callable[[Any], None]) -> None:
    file = tmp_path / "r.jsonl"
    RunFile(file, {}).add(made(MTAD, "a"))
    header, line = file.read_text().splitlines()
    entry = json.loads(line)
    change(entry)
    file.write_text(f"{header}\n{json.dumps(entry)}\n")
    with pytest.raises(RecordsError, match="line 2 is damaged"):
        RunFile(file, {})


def test_a_file_of_acceptance_is_refused(tmp_path: Path) -> None:
    from mtad.acceptance.records import RecordFile

    RecordFile(tmp_path / "r.jsonl", {"device": "cpu"})
    with pytest.raises(RecordsError, match="bench is None there and 1 here"):
        RunFile(tmp_path / "r.jsonl", {"device": "cpu"})


def test_runs_of_other_rows_prompts_and_repeats_are_left_out() -> None:
    digest = TASK.digest
    wanted = made(MTAD, "t", task_digest=digest)
    others = [
        made(PLAIN, "t", task_digest=digest),
        made(MTAD, "other", task_digest=digest),
        made(MTAD, "t", task_digest=digest, repeat=1),
    ]
    assert matching([*others, wanted], [TASK], [MTAD], 1) == [wanted]
    with pytest.raises(RecordsError, match="another text"):
        matching([made(MTAD, "t")], [TASK], [MTAD], 1)


# transformers


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of every answer of transformers, in order."""
    found: list[list[int]] = []

    def listen(model: Any, vocab: int, prompt: Sequence[int], answer: Sequence[int]) -> Any:
        found.append(list(answer))
        return score(model, vocab, prompt, answer)

    monkeypatch.setattr(baselines, "score", listen)
    return found


def generate(
    pair: ModelPair,
    config: DecodeConfig = GREEDY,
    *,
    prompt: Sequence[int] = (1, 2, 3),
    **more: Any,
) -> Run:
    """A run of `generate` in the pair's own dtype."""
    system = Transformers(FLOAT32, pair, pair.target, **more)
    found = system.run(TASK, list(prompt), config, 0, None)
    assert found is not None
    return found


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma3"])
def test_generate_writes_what_our_greedy_decoding_writes(
    family: str, answers: list[list[int]]
) -> None:
    pair = ModelPair(tiny(family))
    run = generate(pair)
    trace = runner.run("autoregressive", pair, prompt_ids=[1, 2, 3], config=GREEDY)
    assert answers == [list(trace.token_ids)]
    record, own = run.record, Record.of(trace, PLAIN, TASK)
    assert record.nll == pytest.approx(own.nll, rel=1e-4)
    for name in ("tokens", "target_passes", "target_positions", "ngrams", "distinct_ngrams"):
        assert getattr(record, name) == getattr(own, name), name
    assert (run.prompt_tokens, run.timed_tokens, run.timed_passes) == (3, 11, 11)
    assert (record.offered, record.accepted, record.draft_passes) == (0, 0, 0)
    assert 0 < record.verify_seconds < record.decode_seconds
    assert (run.engine, run.dtype, record.stop_reason) == ("transformers", "float32", "length")
    assert run.energy.seconds == pytest.approx(record.decode_seconds, rel=0.5)


def test_a_draft_that_is_the_target_has_all_its_tokens_accepted(answers: list[list[int]]) -> None:
    pair = ModelPair(tiny(), tiny())
    config = dataclasses.replace(GREEDY, max_new_tokens=15, num_draft_tokens=4)
    run = generate(pair, config, assistant=pair.draft)
    record = run.record
    assert (record.tokens, record.target_passes, record.target_positions) == (15, 3, 15)
    assert (record.offered, record.accepted) == (12, 12)
    # The prompt's pass gave five of the tokens; four steps for each of the two others.
    assert (run.timed_tokens, run.timed_passes, run.timed_draft_passes) == (10, 2, 8)
    # The first step of a block reads the last draft token again, and the bonus.
    assert run.timed_draft_positions == 10
    assert record.draft_passes == 12
    assert 0 < record.draft_seconds < record.decode_seconds
    generate(pair, config)
    assert answers[0] == answers[1]


def test_assisted_greedy_decoding_writes_what_the_target_alone_writes(
    answers: list[list[int]],
) -> None:
    pair = ModelPair(tiny(), tiny(seed=1))
    run = generate(pair, assistant=pair.draft)
    generate(pair)
    assert answers[0] == answers[1]
    assert 0 < run.record.accepted + run.record.target_passes == 12
    assert run.record.accepted < run.record.offered


def test_sampling_follows_the_seed_and_leaves_the_global_generator_alone(
    answers: list[list[int]],
) -> None:
    pair = ModelPair(tiny())
    state = torch.random.get_rng_state()
    for seed in (0, 0, 1):
        generate(pair, DecodeConfig(max_new_tokens=12, seed=seed))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert answers[0] == answers[1] != answers[2]


def test_the_filters_are_those_of_the_config(answers: list[list[int]]) -> None:
    pair = ModelPair(tiny())
    generate(pair)
    generate(pair, DecodeConfig(max_new_tokens=12, top_k=1))
    generate(pair, DecodeConfig(max_new_tokens=12, top_k=0, top_p=1e-6))
    generate(pair, DecodeConfig(max_new_tokens=12, top_k=0, top_p=1.0, temperature=0.001))
    assert answers[0] == answers[1] == answers[2] == answers[3]
    # 24 draws that are all among the two best of 32 would be chance with the filter switched off.
    generate(pair, DecodeConfig(max_new_tokens=24, top_k=2, top_p=1.0))
    ids = torch.tensor([[1, 2, 3, *answers[-1]]])
    with torch.inference_mode():
        best = pair.target(ids).logits[0, 2:-1].topk(2).indices
    assert all(token in best[i] for i, token in enumerate(answers[-1]))


def test_what_the_model_brings_along_is_put_aside(answers: list[list[int]]) -> None:
    pair = ModelPair(tiny(), tiny(seed=1))
    generate(pair)
    own = transformers.GenerationConfig(repetition_penalty=9.0, bad_words_ids=[[answers[0][0]]])
    assert isinstance(pair.draft, transformers.PreTrainedModel)
    pair.target.generation_config = own
    theirs = pair.draft.generation_config
    generate(pair)
    generate(pair, assistant=pair.draft)
    assert answers[0] == answers[1] == answers[2]
    assert pair.target.generation_config is own
    assert pair.draft.generation_config is theirs
    assert theirs.num_assistant_tokens is None


def test_the_answer_ends_where_ours_ends(answers: list[list[int]]) -> None:
    generate(ModelPair(tiny()))
    whole = answers[0]
    end = whole[4]
    count = whole.index(end) + 1
    pair = ModelPair(tiny(eos_token_id=end))
    assert pair.eos_token_ids == (end,)
    run = generate(pair)
    assert (answers[1], run.record.stop_reason) == (whole[:count], "eos")
    trace = runner.run("autoregressive", pair, prompt_ids=[1, 2, 3], config=GREEDY)
    assert list(trace.token_ids) == answers[1]
    run = generate(pair, dataclasses.replace(GREEDY, ignore_eos=True))
    assert (answers[2], run.record.stop_reason) == (whole, "length")


def test_an_answer_that_ends_at_once_is_kept_without_a_speed(
    answers: list[list[int]], tmp_path: Path
) -> None:
    generate(ModelPair(tiny()))
    pair = ModelPair(tiny(eos_token_id=answers[0][0]))
    run = generate(pair)
    assert (run.record.tokens, run.timed_tokens, run.timed_passes) == (1, 0, 0)
    assert run.tokens_per_second is None
    RunFile(tmp_path / "r.jsonl", {}).add(run)
    assert RunFile(tmp_path / "r.jsonl", {}).runs == [run]


def test_the_answer_ends_with_the_context(answers: list[list[int]]) -> None:
    pair = ModelPair(tiny(max_position_embeddings=16))
    run = generate(pair, prompt=[1] * 10)
    assert (len(answers[0]), run.record.stop_reason) == (6, "context")


def words() -> Any:
    """A tokenizer of w, w1, w2 …; the last word is one that transformers probes it with."""
    vocabulary = {"w": 0, **{f"w{i}": i for i in range(1, 31)}, "abcdef": 31}
    made = Tokenizer(WordLevel(vocabulary, unk_token="w"))
    made.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w")


def test_the_answer_ends_at_a_stop_string(answers: list[list[int]]) -> None:
    pair = ModelPair(tiny(), tokenizer=words())
    generate(pair)
    word = f"w{answers[0][5]}"
    run = generate(pair, dataclasses.replace(GREEDY, stop=(word,)))
    assert run.record.stop_reason == "stop"
    assert answers[1] == answers[0][: len(answers[1])] and len(answers[1]) <= 6


def test_a_run_that_was_stopped_leaves_nothing_behind() -> None:
    pair = ModelPair(tiny(), tiny(seed=1))
    assert isinstance(pair.draft, transformers.PreTrainedModel)
    own = pair.target.generation_config
    stop = threading.Event()
    stop.set()
    system = Transformers(Setting(ASSISTED, 4), pair, pair.target, pair.draft)
    assert system.run(TASK, [1, 2, 3], GREEDY, 0, stop) is None
    assert pair.target.generation_config is own
    for model in (pair.target, pair.draft):
        assert not model._forward_hooks and not model._forward_pre_hooks
    assert not runner.device_lock(CPU).locked()


def test_a_run_is_stopped_between_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, stop, calls = ModelPair(tiny()), threading.Event(), Counter[str]()
    forward = pair.target.forward

    def third(*args: Any, **kwargs: Any) -> Any:
        calls["passes"] += 1
        if calls["passes"] == 3:
            stop.set()
        return forward(*args, **kwargs)

    monkeypatch.setattr(pair.target, "forward", third)
    assert Transformers(FLOAT32, pair, pair.target).run(TASK, [1], GREEDY, 0, stop) is None
    assert calls["passes"] == 3


def test_an_error_of_transformers_names_it() -> None:
    # Both vocabularies are padded ones of 32 tokens, which we take and transformers does not.
    pair = ModelPair(tiny(), tiny(vocab_size=48, seed=1))
    with pytest.raises(BenchError, match="transformers: ValueError: The main and assistant"):
        generate(pair, assistant=pair.draft)
    assert not runner.device_lock(CPU).locked()


def test_the_score_of_an_impossible_token_is_none() -> None:
    model = tiny()
    with torch.no_grad():
        head = torch.nn.Linear(16, 32)
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[7] = -torch.inf
    model.lm_head = head
    assert score(model, 32, [1, 2], [3, 7]) is None
    assert score(model, 32, [1, 2], [3, 6]) is not None


def test_a_copy_in_another_dtype_keeps_its_buffers() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert in_dtype(model, torch.float32) is model
    copied = in_dtype(model, torch.bfloat16)
    assert copied.dtype == torch.bfloat16
    assert {weight.dtype for weight in copied.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in copied.buffers()} == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    run = Transformers(Setting(GENERATE["bfloat16"]), ModelPair(model), copied).run(
        TASK, [1, 2, 3], GREEDY, 0, None
    )
    assert run is not None and run.dtype == "bfloat16"


# Turns


CONFIG = DecodeConfig(max_new_tokens=6, beam_width=2)
TASKS = [Task(name, "k", {"prompt_ids": [i + 1, i + 2]}) for i, name in enumerate("abc")]


def test_all_rows_are_built_in_order() -> None:
    pair = ModelPair(tiny(), tiny(seed=1))
    found, shown = systems.build(
        pair, ["mtad", "autoregressive"], ["float32", "bfloat16", "assisted"], CONFIG
    )
    assert [system.setting for system in found] == [line.setting for line in shown]
    assert [(line.title, line.engine, line.dtype, line.absent) for line in shown] == [
        ("transformers generate", "transformers", "float32", None),
        ("transformers generate", "transformers", "bfloat16", None),
        ("transformers assisted generation", "transformers", "float32", None),
        ("mtad", "eager", "float32", None),
        ("autoregressive", "eager", "float32", None),
    ]
    assert [line.setting for line in shown][2:] == [Setting(ASSISTED, 4), MTAD, PLAIN]
    targets, drafts = systems.shapes(found)
    assert set(targets) == {line.setting for line in shown}
    assert targets[Setting(GENERATE["bfloat16"])].weight_bytes * 2 == targets[FLOAT32].weight_bytes
    assert drafts.keys() >= {Setting(ASSISTED, 4), MTAD} and FLOAT32 not in drafts


@pytest.mark.parametrize(
    ("draft", "said"),
    [(hidden_draft(), "this pair's draft is none"), (None, "this pair has no draft")],
)
def test_without_a_plain_draft_the_row_of_assisted_generation_says_why(
    draft: Any, said: str
) -> None:
    pair = ModelPair(tiny(), draft)
    found, shown = systems.build(pair, ["autoregressive"], ["assisted"], CONFIG)
    assert [system.setting for system in found] == [PLAIN]
    assert shown[0].absent is not None and said in shown[0].absent


def test_a_copy_that_does_not_fit_costs_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, dtype: torch.dtype) -> Any:
        if dtype == torch.bfloat16:
            raise torch.OutOfMemoryError("out of memory\nlong story")
        return model

    monkeypatch.setattr(systems, "in_dtype", refuse)
    pair = ModelPair(tiny())
    found, shown = systems.build(pair, [], ["float32", "bfloat16"], CONFIG)
    assert len(found) == 1
    assert [line.absent for line in shown] == [None, "no copy in bfloat16: out of memory"]


def test_draft_lengths_are_the_config_s_or_the_method_s_own() -> None:
    found = systems.settings_of(["bild", "speculative", "specinfer"], CONFIG)
    assert found == [Setting("bild", 10), Setting("speculative", 4), Setting("specinfer")]
    longer = dataclasses.replace(CONFIG, num_draft_tokens=7)
    assert systems.settings_of(["bild"], longer) == [Setting("bild", 7)]


def test_rows_take_turns_at_every_prompt_and_what_is_done_is_left_out() -> None:
    settings = [PLAIN, MTAD, FLOAT32]
    order = systems.missing(TASKS, settings, 4, [], 0)
    assert len(order) == 36
    groups = [order[i : i + 3] for i in range(0, 36, 3)]
    for group in groups:
        assert {job.setting for job in group} == set(settings)
        assert len({(job.repeat, job.task.id) for job in group}) == 1
        assert group[0].setting == FLOAT32, "ours lie next to each other"
    assert len({tuple(job.setting for job in group) for group in groups}) > 1
    done = [made(MTAD, "b", repeat=2)]
    rest = systems.missing(TASKS, settings, 4, done, 0)
    assert len(rest) == 35
    assert rest == [
        job for job in order if (job.repeat, job.task.id, job.setting) != (2, "b", MTAD)
    ]


def test_prompts_are_encoded_once_and_refused_before_anything_runs() -> None:
    pair = ModelPair(tiny(max_position_embeddings=8))
    assert systems.encode(pair, TASKS) == {"a": [1, 2], "b": [2, 3], "c": [3, 4]}
    with pytest.raises(PromptError, match="'long' has 8 tokens.*fewer than the 8"):
        systems.encode(pair, [Task("long", "k", {"prompt_ids": [1] * 8})])
    with pytest.raises(PromptError, match="'text'.*needs a tokenizer"):
        systems.encode(pair, [Task("text", "k", {"prompt": "x"})])


def measured(
    pair: ModelPair, methods: Sequence[str], foreign: Sequence[str], **more: Any
) -> tuple[list[Line], list[Any]]:
    found, shown = systems.build(pair, methods, foreign, CONFIG)
    settings = [line.setting for line in shown if line.absent is None]
    todo = systems.missing(TASKS, settings, 1, [], CONFIG.seed)
    prompts = systems.encode(pair, TASKS)
    return shown, list(systems.measure(found, todo, prompts, CONFIG, **more))


def test_every_row_of_a_tiny_pair_from_end_to_end() -> None:
    pair = ModelPair(tiny(), tiny(seed=1))
    methods = ["autoregressive", "speculative", "mtad", "mtad_tree", "specinfer"]
    shown, runs = measured(pair, methods, ["float32", "bfloat16", "assisted"])
    assert Counter(run.record.setting for run in runs) == {line.setting: 3 for line in shown}
    found = rows(shown, runs, CONFIG, times=50)
    assert [row.prompts for row in found] == [3] * 8
    for row in found:
        assert row.tokens == 18
        assert row.tokens_per_second is not None and row.tokens_per_second.value > 0
        assert row.times_autoregressive is not None and row.times_transformers is not None
        shares = (row.draft_share or 0.0, row.verify_share, row.other_share)
        assert sum(share or 0.0 for share in shares) == pytest.approx(1.0)
        assert row.block_efficiency is not None and 1.0 <= row.block_efficiency.value <= 5.0
    # At temperature 1, but of the same prompts and the same model:
    perplexities = [row.perplexity.value for row in found if row.perplexity]
    assert len(perplexities) == 8 and max(perplexities) < 4 * min(perplexities)


def test_on_another_engine_ours_run_there_and_transformers_where_it_always_does() -> None:
    wide = {"hidden_size": 64, "intermediate_size": 64}
    models = tiny(**wide), tiny(seed=1, **wide)
    try:
        pair = ModelPair(*models, engine="native")
    except MtadError as error:
        pytest.skip(str(error))
    shown, runs = measured(pair, ["autoregressive", "mtad"], ["float32", "assisted"])
    found = rows(shown, runs, CONFIG, times=50)
    assert [(row.line.engine, row.line.dtype) for row in found] == [
        ("transformers", "float32"),
        ("transformers", "float32"),
        ("native", "int8"),
        ("native", "int8"),
    ]
    assert [row.prompts for row in found] == [3] * 4
    ours, theirs = target_shape(pair), shape_of(pair.target)
    assert ours.weight_bytes < theirs.weight_bytes / 2 and ours.parameters == theirs.parameters


def test_all_rows_of_a_prompt_and_repeat_share_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ModelPair(tiny(), tiny(seed=1))
    seeds: list[tuple[str, int]] = []
    for kind in (Transformers, systems.Own):
        original = kind.run

        def listen(
            self: Any,
            task: Task,
            ids: Any,
            config: DecodeConfig,
            *rest: Any,
            original: Any = original,
        ) -> Any:
            seeds.append((task.id, config.seed))
            return original(self, task, ids, config, *rest)

        monkeypatch.setattr(kind, "run", listen)
    measured(pair, ["autoregressive", "mtad"], ["float32", "assisted"])
    assert len(set(seeds)) == 3 and {task for task, _ in seeds} == {"a", "b", "c"}


@dataclasses.dataclass
class Fragile:
    """A row that fails at a chosen run, the warm-up included in the count."""

    setting: Setting
    at: int
    calls: int = 0

    def shapes(self) -> tuple[None, None]:
        return None, None

    def run(self, task: Task, *_: Any) -> Run | None:
        self.calls += 1
        if self.calls == self.at:
            raise MtadError("it broke")
        return made(self.setting, task.id)


@pytest.mark.parametrize(("at", "finished"), [(1, 0), (3, 1)])
def test_a_row_that_fails_is_out_and_the_others_go_on(at: int, finished: int) -> None:
    fragile, sound = Fragile(MTAD, at), Fragile(PLAIN, 0)
    todo = systems.missing(TASKS, [MTAD, PLAIN], 1, [], 0)
    prompts = {task.id: [1] for task in TASKS}
    found = list(systems.measure([fragile, sound], todo, prompts, CONFIG))
    failures = [one for one in found if isinstance(one, systems.Failure)]
    runs = Counter(one.record.setting for one in found if isinstance(one, Run))
    assert [failure.setting for failure in failures] == [MTAD]
    assert "it broke" in failures[0].message and "prompt '" in failures[0].message
    assert (runs[PLAIN], runs[MTAD]) == (3, finished)
    assert fragile.calls == at


def test_a_stop_ends_it_without_a_failure() -> None:
    stop = threading.Event()

    class Stopping(Fragile):
        def run(self, task: Task, *_: Any) -> Run | None:
            self.calls += 1
            if self.calls == 3:
                stop.set()
                raise Cancelled("stopped")
            return made(self.setting, task.id)

    todo = systems.missing(TASKS, [PLAIN], 1, [], 0)
    prompts = {task.id: [1] for task in TASKS}
    found = list(systems.measure([Stopping(PLAIN, 0)], todo, prompts, CONFIG, stop))
    assert [one.record.task_id for one in found if isinstance(one, Run)] == ["a"]
    assert len(found) == 1


def test_a_run_of_ours_is_what_the_trace_says() -> None:
    pair = ModelPair(tiny(), tiny(seed=1))
    own = systems.Own(MTAD, pair).run(TASK, [1, 2, 3], CONFIG, 2, None)
    config = dataclasses.replace(CONFIG, num_draft_tokens=4)
    trace = runner.run("mtad", pair, prompt_ids=[1, 2, 3], config=config)
    assert own is not None
    assert own.record.nll == Record.of(trace, MTAD, TASK).nll
    assert (own.timed_tokens, own.timed_passes) == (6, trace.summary.target_passes)
    assert own.timed_draft_passes == own.record.draft_passes > 0
    assert (own.repeat, own.engine, own.dtype, own.prompt_tokens) == (2, "eager", "float32", 3)


def test_the_header_of_acceptance_fits(tmp_path: Path) -> None:
    pair = ModelPair(tiny(), tiny(seed=1))
    header = fingerprint(pair, CONFIG)
    RunFile(tmp_path / "r.jsonl", header)
    with pytest.raises(RecordsError, match="config.top_k is 10 there and 5 here"):
        RunFile(tmp_path / "r.jsonl", fingerprint(pair, dataclasses.replace(CONFIG, top_k=5)))
