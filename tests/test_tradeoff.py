"""Sweeps of the page without a browser: requests, turns, what is kept, figures. No torch."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mtad.acceptance.records import Setting, Task
from mtad.bench.records import Run
from mtad.errors import BudgetError, ConfigError, FetchError
from mtad.trace import EnergyReading, Trace
from mtad.ui.board import encode
from mtad.ui.loading import PairLoader
from mtad.ui.sweeping import (
    MAX_NEW_TOKENS,
    MAX_RUNS,
    MAX_SETTINGS,
    Sweep,
    SweepRequest,
    Sweeps,
    check_sweep,
    play_turn,
    prompt_set,
)
from mtad.ui.tradeoff import label, parameters, pareto, run_list, to_csv, to_json, view
from tests.test_ui import WORDS, ReadyPair, handmade_stream, handmade_trace


def request(
    methods: Any = ("autoregressive", "mtad"),
    gammas: str = "4",
    taus: str = "0.3, 0.9",
    widths: str = "4",
    prompts: Any = (2, 0),
    **parameters: Any,
) -> SweepRequest:
    return check_sweep(methods, gammas, taus, widths, prompts, **parameters)


class Shelf:
    def __init__(self) -> None:
        self.labels: list[str] = []

    def __call__(self, setting: Setting, task: Task, trace: Trace) -> str:
        self.labels.append(f"{setting}: {task.id}")
        return f"key-{len(self.labels)}"


def finish(sweep: Sweep, stream: Any = None, turns: int = 1000, source: Any = None) -> int | None:
    """Plays turns as the page does; returns the number of the next one."""
    turn: int | None = 0 if not sweep._turn else sweep._turn
    stream = stream or handmade_stream(WORDS, 3)
    while turn is not None and turns:
        turns -= 1
        following = list(play_turn(sweep, turn, source or ReadyPair(), stream, Shelf()))
        turn = following[-1] if following else None
    return turn


# ------------------------------------------------------------------ requests


def test_a_request_is_the_grid_of_what_methods_read() -> None:
    made = request(["mtad", "autoregressive", "speculative"], "2, 4", "0.3;0.9", "2 8", (3, 1))
    assert [str(one) for one in made.settings] == [
        "autoregressive",
        "speculative γ 2",
        "speculative γ 4",
        *(f"mtad γ {g} τ {t} W {w}" for w in (2, 8) for t in (0.3, 0.9) for g in (2, 4)),
    ]
    assert len(made.tasks) == 4 and made.size == 44
    assert len({task.kind for task in made.tasks[:3]}) == 3, "kinds take turns"
    assert request(["speculative"], "auto, 3", "", "").settings[0].num_draft_tokens == "auto"


def test_the_prompt_sets_are_read() -> None:
    assert len(prompt_set("compare")) == 16 and len(prompt_set("held_out")) == 70
    assert any("messages" in task.request for task in prompt_set("held_out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": []}, "No method is chosen. Tick at least one."),
        ({"methods": ["magic"]}, "There is no method 'magic'"),
        ({"methods": "mtad"}, "No method is chosen"),
        ({"taus": "0.3, abc"}, "τ holds 'abc', which is not a number"),
        ({"taus": "0"}, "accept_threshold is 0.0, but must be a number greater than 0"),
        ({"taus": "nan"}, "accept_threshold is nan"),
        ({"taus": " "}, "There is no value of τ, but a chosen method reads accept_threshold"),
        ({"gammas": "4.5"}, "γ holds '4.5', which is not a whole number"),
        ({"gammas": "65"}, "num_draft_tokens is 65, but must be a whole number from 1 to 64"),
        ({"widths": "0"}, "beam_width is 0, but must be a whole number from 1 to 64"),
        ({"widths": "auto"}, "W holds 'auto', which is not a whole number"),
        ({"prompts": (0, 0)}, "The prompt set is empty"),
        ({"prompts": (17, 0)}, "compare prompts is 17, but must be a whole number from 0 to 16"),
        ({"prompts": (1, -1)}, "held-out prompts is -1, but must be a whole number from 0 to 70"),
        ({"prompts": (1.5, 0)}, "compare prompts is 1.5"),
        ({"prompts": (None, 0)}, "compare prompts is None"),
        (
            {"prompts": (16, 70), "taus": "0.1, 0.2, 0.3, 0.4, 0.5"},
            f"6 settings × 86 prompts are 516 runs, but a sweep takes at most {MAX_RUNS}",
        ),
        (
            {"taus": " ".join(f"0.{k:03}" for k in range(1, 40))},
            f"make 40 settings, but a chart takes at most {MAX_SETTINGS}",
        ),
        ({"max_new_tokens": 513}, f"513, but must be at most {MAX_NEW_TOKENS} in a sweep"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be a whole number from 1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
    ],
)
def test_a_bad_request_is_answered(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        request(**change)
    assert message in str(raised.value)


# ------------------------------------------------------------------ turns


def test_each_turn_is_one_run_and_the_last_ends_the_sweep() -> None:
    sweep = Sweep(request())
    order = []
    turn: int | None = 0
    while turn is not None:
        job = sweep.snapshot().job
        assert job is not None
        order.append((job[0].id, str(job[1])))
        *_, turn = play_turn(sweep, turn, ReadyPair(), handmade_stream(WORDS, 3), Shelf())
    now = sweep.snapshot()
    assert (now.state, now.done, now.job) == ("done", 6, None)
    assert [task for task, _ in order] == ["fact-sky"] * 3 + [order[3][0]] * 3
    assert len(set(order)) == 6
    assert {row.prompts for row in now.rows.values()} == {2}


def test_a_turn_begins_once() -> None:
    sweep = Sweep(request())
    first = play_turn(sweep, 0, ReadyPair(), handmade_stream(WORDS, 3), Shelf())
    next(first)
    assert list(play_turn(sweep, 0, ReadyPair(), handmade_stream(WORDS, 3), Shelf())) == []
    assert list(play_turn(sweep, 1, ReadyPair(), handmade_stream(WORDS, 3), Shelf())) == []
    *_, following = first
    assert following == 1 and sweep.snapshot().done == 1


def test_stop_keeps_what_is_done_and_the_same_settings_go_on() -> None:
    sweeps = Sweeps()
    sweep = sweeps.open("me", request())
    assert finish(sweep, turns=2) == 2

    def stopping(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for event in handmade_stream(WORDS, 50)(*args, **kwargs):
            yield event
            sweep.stop()

    assert finish(sweep, stopping) is None
    now = sweep.snapshot()
    assert (now.state, now.done) == ("stopped", 2), "the run that was stopped is not kept"
    assert "2 of 6 runs are kept" in view(sweep)["status"]

    assert sweeps.already("me", request()) == 2 and sweeps.already("you", request()) == 0
    made: list[str] = []

    def counting(method: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        made.append(method)
        return handmade_stream(WORDS, 3)(method, *args, **kwargs)

    again = sweeps.open("me", request())
    assert again.id != sweep.id and again.snapshot().done == 2
    finish(again, counting)
    assert len(made) == 4 and again.snapshot().state == "done"
    # One more value: only its runs are missing. Another number of tokens: nothing fits.
    assert len(sweeps.open("me", request(taus="0.3, 0.5, 0.9")).missing()) == 2
    assert len(sweeps.open("me", request(max_new_tokens=32)).missing()) == 6
    sweeps.forget("me")
    assert sweeps.already("me", request(max_new_tokens=32)) == 0


def test_stop_in_line_ends_at_once_and_the_turn_does_nothing() -> None:
    sweep = Sweep(request())
    sweep.stop()
    assert sweep.snapshot().state == "stopped"
    assert list(play_turn(sweep, 0, ReadyPair(), handmade_stream(WORDS, 3), Shelf())) == []


def test_a_closed_page_stops_the_run_and_asks_for_no_other() -> None:
    stopped = threading.Event()

    def watched(*args: Any, cancel: threading.Event, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from handmade_stream(WORDS, 500)(*args, cancel=cancel, **kwargs)
        finally:
            stopped.set()

    sweep = Sweep(request())
    turn = play_turn(sweep, 0, ReadyPair(), watched, Shelf())
    next(turn)
    turn.close()
    assert stopped.is_set() and sweep.cancel.is_set()
    assert sweep.snapshot().state == "stopped" and not sweep.begin(1)


def test_only_the_prompts_of_the_request_count() -> None:
    sweeps = Sweeps()
    finish(sweeps.open("me", request(prompts=(3, 0))))
    fewer = sweeps.open("me", request(prompts=(2, 0)))
    assert fewer.missing() == []
    assert {row.prompts for row in fewer.snapshot().rows.values()} == {2}


def test_what_another_pair_measured_is_left_out() -> None:
    class OtherPair(ReadyPair):
        name = "another"

    sweeps = Sweeps()
    finish(sweeps.open("me", request()))
    again = sweeps.open("me", request(taus="0.3, 0.5, 0.9"))
    finish(again, turns=1, source=OtherPair())
    assert again.snapshot().done == 1


def test_a_setting_that_fails_is_left_out_and_said() -> None:
    def failing(method: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if method == "mtad":
            raise BudgetError("too many nodes")
        return handmade_stream(WORDS, 3)(method, *args, **kwargs)

    sweep = Sweep(request())
    finish(sweep, failing)
    now = sweep.snapshot()
    assert now.state == "done" and now.done == 2
    assert set(map(str, now.failures)) == {"mtad γ 4 τ 0.3 W 4", "mtad γ 4 τ 0.9 W 4"}
    shown = view(sweep)
    assert "too many nodes" in shown["rows"][1]["failure"]
    assert any("was left out: prompt fact-sky: too many nodes" in note for note in shown["notes"])
    assert "some settings failed" in shown["status"]


def test_a_fault_of_the_program_names_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: Any, **kwargs: Any) -> Iterator[Any]:
        raise RuntimeError("secret path")

    sweep = Sweep(request(["autoregressive"]))
    finish(sweep, broken)
    (failure,) = sweep.snapshot().failures.values()
    assert "RuntimeError" in failure and "secret" not in failure
    assert "secret path" in caplog.text


def test_a_pair_that_cannot_be_loaded_ends_the_sweep() -> None:
    def load(progress: Any) -> Any:
        raise FetchError("no network here")

    sweep = Sweep(request())
    finish(sweep, source=PairLoader(load=load))
    now = sweep.snapshot()
    assert (now.state, now.error) == ("failed", "no network here")
    assert view(sweep)["error"] == "no network here"


def test_a_lost_place_in_the_line_is_said() -> None:
    sweep = Sweep(request())
    finish(sweep, turns=1)
    sweep.interrupt()
    now = sweep.snapshot()
    assert now.state == "failed" and "press Run to go on" in now.error and now.done == 1
    sweep.interrupt()
    assert sweep.snapshot() == now


def test_old_sweeps_are_forgotten() -> None:
    sweeps = Sweeps(limit=2)
    kept = [sweeps.open(f"visit {k}", request()) for k in range(3)]
    assert sweeps.get(kept[0].id) is None and sweeps.get(kept[2].id) is kept[2]
    assert sweeps.get(None) is None and sweeps.already("visit 0", request()) == 0


def test_the_time_left_is_that_of_the_missing_runs() -> None:
    sweep = Sweep(request())
    assert sweep.snapshot().remaining_seconds is None
    finish(sweep, handmade_stream(WORDS, 3, 0.02), turns=2)
    left = sweep.snapshot().remaining_seconds
    assert left is not None and 4 * 0.05 < left < 4 * 2
    assert "left" in view(sweep)["remaining"]


# ------------------------------------------------------------------ figures


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (1.5, 2.0), (3.0, 2.5), (3.0, 2.5), None, (0.5, 9.0)]
    assert pareto(points) == [False, True, False, True, True, False, False]
    assert pareto([]) == [] and pareto([None]) == [False]


def test_labels_say_what_differs() -> None:
    settings = request(["speculative", "mtad"], "2, 4", "0.5").settings
    assert [parameters(one, settings) for one in settings] == ["γ 2", "γ 4", "γ 2", "γ 4"]
    assert label(settings[2]) == "Multi-token assisted decoding, γ 2, τ 0.5, W 4"
    assert label(Setting("autoregressive")) == "Single-token sampling"


def measured(joules: bool) -> Sweep:
    """Two settings on two prompts with chosen figures."""
    sweep = Sweep(request(["autoregressive", "speculative"]))
    for setting, seconds in zip(sweep.request.settings, (1.0, 0.5), strict=True):
        for k, task in enumerate(sweep.request.tasks):
            trace = handmade_trace(setting.method, [])
            run = Run.of(trace, setting, task)
            record = dataclasses.replace(
                run.record,
                tokens=20,
                target_passes=10,
                nll=20.0 * (k + 1),
                decode_seconds=seconds * (k + 1),
                ngrams=17,
                distinct_ngrams=17 - k,
            )
            energy = EnergyReading(40.0 * seconds, 2.0, "nvml-counter", "a board", 0.1)
            run = dataclasses.replace(
                run,
                record=record,
                timed_tokens=20,
                energy=energy if joules else run.energy,
            )
            sweep.add(setting, task, run, f"key-{k}")
    return sweep


def test_the_figures_of_a_setting() -> None:
    shown = view(measured(joules=True))
    first, second = shown["rows"]
    # 20 tokens in 1 and 2 s; e^(60 / 40); 40 + 40 J over 40 tokens; 1 of 34 repeated.
    assert [cell[0] for cell in first["cells"]] == [
        "15.0",
        "4.48",
        "2.00",
        "3 %",
        "2.00",
        "2 of 2",
    ]
    assert first["speed"][0] == 15.0 and second["speed"][0] == 30.0
    assert (first["front"], second["front"]) == (
        {"perplexity": False, "joules": False},
        {"perplexity": True, "joules": True},
    )
    assert shown["energy"] == "" and not shown["estimated"]
    assert "at least 5 prompts" in " ".join(shown["notes"])


def test_energy_that_was_not_measured_is_a_dash_with_a_reason() -> None:
    shown = view(measured(joules=False))
    assert shown["energy"] == "no sensor on this machine"
    assert shown["rows"][0]["joules"] is None and shown["rows"][0]["cells"][4][0] == "–"
    assert not any(row["front"]["joules"] for row in shown["rows"])


def test_the_runs_behind_a_point() -> None:
    sweep = measured(joules=True)
    runs = run_list(sweep, sweep.request.settings[1], lambda key: key == "key-0")
    assert [(run["prompt"], run["key"]) for run in runs] == [
        (sweep.request.tasks[0].id, "key-0"),
        (sweep.request.tasks[1].id, ""),
    ]
    assert runs[0]["text"] == "Why is the sky blue?"
    assert runs[0]["cells"] == ["20", "40.0", "2.00", "2.72", "1.00"]


def test_exports_parse_and_hold_unrounded_figures() -> None:
    sweep = measured(joules=True)
    lines = list(csv.DictReader(io.StringIO(to_csv(sweep))))
    assert [line["method"] for line in lines] == ["autoregressive", "speculative"]
    assert float(lines[0]["perplexity"]) == pytest.approx(4.4816890703)
    assert lines[0]["accept_threshold"] == "" and lines[1]["front_perplexity"] == "True"
    whole = json.loads(to_json(sweep))
    assert whole["config"]["max_new_tokens"] == 128
    assert [one["id"] for one in whole["prompts"]] == [task.id for task in sweep.request.tasks]
    assert len(whole["runs"]) == 4 and whole["runs"][0]["record"]["setting"]["method"]
    assert whole["settings"][1]["joules_per_token"] == pytest.approx(1.0)


def test_a_view_can_be_sent_at_any_time() -> None:
    sweep = Sweep(request())
    for turns in (0, 1, 100):
        finish(sweep, turns=turns)
        shown = json.loads(encode(view(sweep)))
        assert len(shown["rows"]) == 3
        assert all(len(row["cells"]) == len(shown["columns"]) - 1 for row in shown["rows"])
    assert shown["say"] == "Finished: 6 runs, 3 settings on 2 prompts."
