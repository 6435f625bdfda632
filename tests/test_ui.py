"""The page without a browser: step views, lanes, board, requests, loading. No torch, no gradio.

`handmade_stream` stands in for the runner where a test must provoke texts that no model can be
made to write, or times and failures that a real run does not have.
"""

from __future__ import annotations

import json
import math
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mtad.catalogue import method_info
from mtad.config import DecodeConfig
from mtad.errors import BudgetError, Cancelled, ConfigError, FetchError, PromptError
from mtad.shipped import ASSETS
from mtad.trace import (
    Decision,
    DraftTree,
    EnergyReading,
    ModelInfo,
    Step,
    Summary,
    Trace,
)
from mtad.ui.board import Board, encode
from mtad.ui.comparison import Comparison, Comparisons, check_request, play
from mtad.ui.lanes import Lane, energy_meter
from mtad.ui.loading import LoadStatus, PairLoader, header_view
from mtad.ui.results import results_table
from mtad.ui.steps import columns, duration, headline, number, step_view, visible

HOSTILE = (
    "${alert(1)}",
    "`${document.title='owned'}`",
    "\\u0041",
    "<img src=x onerror=alert(2)>",
    "</script><script>alert(3)</script>",
    "{{constructor}}",
    "\u202eright to left",
    "עברית",
    "zero\u200bwidth\u2060\ufeff",
    "\n",
    " <b>bold</b>",
    "",
)


def handmade_steps(
    method: str, texts: tuple[str, ...], count: int, seed: int, step_seconds: float = 0.05
) -> Iterator[Step]:
    """Steps with given texts and invented but consistent log-probabilities; no model."""
    rng = random.Random(seed)
    info = method_info(method)
    seconds = 0.0
    position = 0

    def take(number: int) -> list[int]:
        nonlocal position
        ids = [(position + k) % len(texts) for k in range(number)]
        position += number
        return ids

    for index in range(count):
        seconds += step_seconds
        tree, path, kind = DraftTree(), (), "sampled"
        emitted = take(1)
        if info.uses_draft:
            gamma = 4
            accepted = rng.randint(0, gamma)
            position -= 1
            block = take(gamma)
            position -= gamma - accepted
            final = take(1)
            draft = tuple(-rng.random() for _ in range(gamma))
            target = tuple(-0.3 * rng.random() if k < accepted else -5.0 for k in range(gamma))
            scores: dict[str, Any] = {}
            if method == "speculative":
                ratios = tuple(0.9 if k < accepted else 0.1 for k in range(gamma))
                scores = {"scores": ratios, "thresholds": (0.5,) * gamma}
            tree = DraftTree(tuple(block), (-1, 0, 1, 2), draft, target, **scores)
            path = tuple(range(accepted))
            emitted = block[:accepted] + final
            kind = "bonus" if accepted == gamma or method == "mtad" else "corrected"
        decision = Decision(
            tree=tree,
            reference_logprobs=tree.draft_logprobs if method == "mtad" else (),
            path=path,
            emitted=tuple(emitted),
            emitted_logprobs=(-0.5,) * len(emitted),
            final_kind=kind,  # type: ignore[arg-type]
            target_positions=1 + len(tree.token_ids),
        )
        yield Step(
            index=index,
            decision=decision,
            emitted_texts=tuple(texts[k] for k in emitted),
            node_texts=tuple(texts[k] for k in tree.token_ids),
            draft_seconds=0.01 if info.uses_draft else 0.0,
            verify_seconds=0.04,
            seconds=seconds,
        )


def handmade_trace(method: str, steps: list[Step], stop_reason: str = "length") -> Trace:
    """The trace of hand-made steps, its figures counted from them."""
    tokens = sum(len(step.decision.emitted) for step in steps)
    offered = sum(step.decision.tree.depth for step in steps)
    accepted = sum(step.decision.accepted_length for step in steps)
    seconds = steps[-1].seconds if steps else 0.0
    energy = EnergyReading(None, seconds, "none", "", None, "no sensor on this machine")
    return Trace(
        method=method,
        config=DecodeConfig(),
        target=ModelInfo("hand-made target"),
        draft=ModelInfo("hand-made draft"),
        device="cpu",
        dtype="float32",
        engine="eager",
        versions={},
        prompt="",
        prompt_ids=(),
        started_at="2025-01-01T00:00:00Z",
        text="".join(step.text for step in steps),
        stop_reason=stop_reason,  # type: ignore[arg-type]
        steps=tuple(steps),
        energy=energy,
        end_to_end_energy=energy,
        summary=Summary(
            tokens=tokens,
            target_passes=len(steps),
            decode_seconds=seconds,
            prefill_seconds=0.1,
            time_to_first_token_seconds=0.15,
            end_to_end_seconds=seconds + 0.1,
            tokens_per_second=tokens / seconds if seconds else None,
            block_efficiency=tokens / len(steps) if steps else None,
            acceptance_rate=accepted / offered if offered else None,
            perplexity=math.exp(0.5) if tokens else None,
            distinct_4=None,
            repeated_4gram_share=None,
            joules=None,
            joules_per_token=None,
            watts=None,
            end_to_end_joules=None,
            weight_bytes_per_token=None,
            draft_seconds=0.0,
            verify_seconds=seconds,
            other_seconds=0.0,
        ),
        notes=("The draft is hand-made.",),
    )


def handmade_stream(
    texts: tuple[str, ...], count: int, pause_seconds: float = 0.0, step_seconds: float = 0.05
) -> Any:
    """A stand-in for `mtad.runner.stream` that plays hand-made steps and heeds `cancel`."""

    def stream(
        method: str,
        pair: Any,
        *,
        prompt: str,
        config: DecodeConfig,
        cancel: threading.Event,
        deadline_seconds: float,
    ) -> Iterator[Step | Trace]:
        done: list[Step] = []
        for step in handmade_steps(method, texts, count, config.seed, step_seconds):
            if cancel.is_set():
                yield handmade_trace(method, done, "cancelled")
                return
            time.sleep(pause_seconds)
            done.append(step)
            yield step
        yield handmade_trace(method, done)

    return stream


def with_joules(stream: Any, watts: float) -> Any:
    """The same stream on a machine with a sensor, that draws `watts` all the time."""

    def measured(*args: Any, **kwargs: Any) -> Iterator[Step | Trace]:
        for event in stream(*args, **kwargs):
            yield powered(event, watts)

    return measured


def powered(event: Step | Trace, watts: float) -> Any:
    """A hand-made step or trace with the joules of a sensor that always shows `watts`."""
    if isinstance(event, Step):
        return replace(event, joules=watts * event.seconds)
    seconds, tokens = event.summary.decode_seconds, event.summary.tokens
    joules = watts * seconds
    summary = replace(event.summary, joules=joules, joules_per_token=joules / tokens, watts=watts)
    energy = EnergyReading(joules, seconds, "nvml-counter", "board", 0.1)
    steps = tuple(powered(step, watts) for step in event.steps)
    return replace(event, steps=steps, energy=energy, summary=summary)


class ReadyPair:
    """A pair source that is ready at once and holds nothing."""

    name = "hand-made"
    notes = ("Hand-made steps: no model runs here.",)
    device, weights, engine = "cpu", "float32", "none"
    target_info, draft_info = ModelInfo("hand-made target"), ModelInfo("hand-made draft")

    def start(self) -> None:
        pass

    def wait(self, seconds: float) -> bool:
        return True

    def status(self) -> Any:
        return LoadStatus("ready", "ready")

    @property
    def pair(self) -> Any:
        return self


WORDS = tuple(" one two three four five six seven".replace(" ", "| ").split("|")[1:])


def block_step(
    target: tuple[float, ...],
    draft: tuple[float, ...],
    accepted: int,
    *,
    reference: tuple[float, ...] = (),
    parents: tuple[int, ...] | None = None,
    path: tuple[int, ...] | None = None,
) -> Step:
    """A step of one drafted block (or tree), the bonus being token 99."""
    size = len(target)
    chosen = tuple(range(accepted)) if path is None else path
    tree = DraftTree(tuple(range(size)), parents or tuple(range(-1, size - 1)), draft, target)
    decision = Decision(
        tree=tree,
        reference_logprobs=reference,
        path=chosen,
        emitted=(*chosen, 99),
        emitted_logprobs=(-1.0,) * (len(chosen) + 1),
        final_kind="bonus",
    )
    return Step(
        index=0,
        decision=decision,
        emitted_texts=tuple(WORDS[node % 7] for node in chosen) + (" bonus",),
        node_texts=tuple(WORDS[node % 7] for node in range(size)),
        draft_seconds=0.01,
        verify_seconds=0.02,
        seconds=0.03,
    )


def final_lane(method: str, count: int = 5) -> Lane:
    lane = Lane(method_info(method), DecodeConfig())
    steps = list(handmade_steps(method, WORDS, count, seed=1))
    for step in steps:
        lane.add(step)
    lane.finish(handmade_trace(method, steps))
    return lane


class TestStepView:
    def test_figures_as_people_read_them(self) -> None:
        assert number(-1.234) == "−1.23"
        assert number(-0.001) == "0.00"
        assert number(-math.inf) == "−∞"
        assert number(None) == "–"
        assert number(12345.6, 1) == "12,345.6"
        assert duration(0.0123) == "12 ms"
        assert duration(61.25) == "61.2 s"
        assert visible("a\r\nb\n\tc\r") == "a↵b↵⇥c↵"

    def test_a_rescued_dip_is_shown_as_accepted_and_not_passed(self) -> None:
        # log p/q after 1, 2, 3, 4 tokens: -1.0, -0.5, -1.0, -1.5; log 0.5 = -0.69.
        step = block_step((-2.0, -0.5, -1.5, -1.5), (-1.0, -1.0, -1.0, -1.0), accepted=2)
        view = step_view(step, method_info("mtad"), DecodeConfig(accept_threshold=0.5))
        assert [row[0] for row in view["n"]] == [True, True, False, False]
        assert [row[-1] for row in view["n"]] == [False, True, False, False]
        assert [row[4] for row in view["n"]] == ["−1.00", "−0.50", "−1.00", "−1.50"]
        assert view["x"] == [" three", " four"]
        assert [kind for kind, _ in view["t"]] == ["a", "a", "b"]
        assert headline(step) == "Block 1: accepted 2 of 4 offered, 1 bonus"
        assert ["log τ", "−0.69"] in view["f"]

    def test_a_token_that_the_target_cannot_write_never_passes(self) -> None:
        step = block_step((-1.0, -math.inf), (-1.0, -math.inf), accepted=1)
        view = step_view(step, method_info("mtad"), DecodeConfig())
        assert view["n"][1][2:] == ["−∞", "−∞", "−∞", False]

    def test_the_reference_block_is_what_the_tree_is_measured_against(self) -> None:
        # Two beams: nodes 0, 1 at depth 1; 2 under 0, 3 under 1. Accepted: 1 only.
        step = block_step(
            (-3.0, -1.0, -1.0, -4.0),
            (-1.0, -1.5, -1.0, -1.0),
            accepted=1,
            reference=(-1.0, -1.0),
            parents=(-1, -1, 0, 1),
            path=(1,),
        )
        view = step_view(step, method_info("mtad_tree"), DecodeConfig())
        assert view["alt"] is True
        assert view["x"] == [" four"]
        assert view["n"][0][2:] == ["−1.00", "−1.00", "0.00", True]
        assert view["n"][1][2:] == ["−5.00", "−2.00", "−3.00", False]
        assert "4 nodes in the tree" in view["h"]

    def test_a_tree_that_ends_early_shows_the_next_level(self) -> None:
        step = block_step(
            (-1.0, -2.0, -1.0),
            (-1.0, -1.0, -1.0),
            accepted=1,
            reference=(-1.0, -1.0),
            parents=(-1, -1, 1),
            path=(0,),
        )
        assert step_view(step, method_info("mtad_tree"), DecodeConfig())["x"] == [" three"]

    @pytest.mark.parametrize("method", ["autoregressive", "speculative", "mtad"])
    def test_rows_fit_their_headings(self, method: str) -> None:
        info = method_info(method)
        for step in handmade_steps(method, WORDS, 20, seed=3):
            view = step_view(step, info, DecodeConfig())
            assert "".join(text for _, text in view["t"]) == step.text
            assert all(len(row) == len(columns(method)) + 1 for row in view.get("n", []))
            encode(view)

    def test_scores_of_the_rejection_test_are_shown(self) -> None:
        steps = handmade_steps("speculative", WORDS, 20, seed=3)
        step = next(step for step in steps if 0 < step.decision.accepted_length < 4)
        rows = step_view(step, method_info("speculative"), DecodeConfig())["n"]
        assert rows[0][2:] == ["0.90", "0.50", True]
        assert rows[-1][2:] == ["0.10", "0.50", False]


class TestLane:
    def test_live_figures_agree_with_the_summary(self) -> None:
        lane = Lane(method_info("speculative"), DecodeConfig())
        steps = list(handmade_steps("speculative", WORDS, 9, seed=5))
        for step in steps:
            lane.add(step)
        live = {meter["id"]: meter["value"] for meter in lane.meters()}
        lane.finish(handmade_trace("speculative", steps))
        final = {meter["id"]: meter["value"] for meter in lane.meters()}
        for name in ("rate", "block", "acceptance", "passes"):
            assert live[name] == final[name] != "–"
        assert (live["perplexity"], final["perplexity"]) == ("–", "1.65")
        assert lane.epoch == 0

    def test_a_missing_figure_is_a_dash_with_a_reason(self) -> None:
        lane = final_lane("autoregressive")
        meters = {meter["id"]: meter for meter in lane.meters()}
        assert meters["acceptance"]["value"] == "–"
        assert meters["acceptance"]["note"] == "no draft"
        assert meters["energy"]["value"] == "–"
        assert meters["energy"]["title"] == "no sensor on this machine"
        assert "No energy figure: no sensor on this machine" in lane.remarks()

    def test_an_estimate_starts_with_its_sign(self) -> None:
        reading = EnergyReading(12.0, 4.0, "estimate", "CPU", None, "from its rated power")
        meter = energy_meter(reading, 24)
        assert meter["value"] == "≈ 0.50"
        assert meter["note"].startswith("≈ 12.0 J")
        measured = EnergyReading(12.0, 4.0, "nvml-counter", "board", 0.1)
        assert energy_meter(measured, 24)["note"] == "12.0 J ± 2 %"

    def test_a_hypothesis_is_replaced_and_leaves_no_trace(self) -> None:
        lane = Lane(method_info("beam"), DecodeConfig())
        for text in ("first", "second"):
            decision = Decision(
                emitted=(1,), emitted_logprobs=(-1.0,), final_kind="sampled", provisional=True
            )
            lane.add(Step(0, decision, (text,), (), 0.0, 0.1, 0.1))
        assert lane.view()["provisional"] == "second"
        assert lane.steps == []
        steps = list(handmade_steps("beam", WORDS, 1, seed=0))
        lane.finish(handmade_trace("beam", steps))
        assert lane.view()["provisional"] == ""
        assert lane.epoch == 1, "steps that came with the trace alone start a new epoch"

    def test_now_looks_at_the_last_seconds_only(self) -> None:
        lane = Lane(method_info("autoregressive"), DecodeConfig())
        decision = Decision(emitted=(1,), emitted_logprobs=(-1.0,), final_kind="sampled")
        times = [1.0 * (k + 1) for k in range(10)] + [10 + 0.1 * (k + 1) for k in range(30)]
        for index, seconds in enumerate(times):
            lane.add(Step(index, decision, ("x",), (), 0.0, 0.1, seconds))
        rate = lane.meters()[0]
        assert rate["value"] == "3.1"
        assert rate["note"] == "now 10.0"


class TestBoard:
    def board(self, count: int = 0) -> Board:
        infos = [method_info("autoregressive"), method_info("speculative")]
        board = Board("run", infos, DecodeConfig())
        for step in handmade_steps("speculative", WORDS, count, seed=2):
            board.add("speculative", step)
        return board

    def test_every_step_is_sent_once(self) -> None:
        board = self.board()
        have: dict[str, tuple[int, int]] = {}
        sent: list[int] = []
        for step in handmade_steps("speculative", WORDS, 50, seed=2):
            board.add("speculative", step)
            if step.index % 3 == 0:
                message = board.message(have)
                have = {lane["method"]: (lane["epoch"], lane["count"]) for lane in message["lanes"]}
                sent += [view["i"] for view in message["lanes"][1]["steps"]]
        sent += [view["i"] for view in board.message(have)["lanes"][1]["steps"]]
        assert sent == list(range(50))

    def test_a_message_of_a_long_run_is_as_small_as_one_of_a_short_run(self) -> None:
        sizes = []
        for count in (20, 2000):
            board = self.board(count)
            have = {"speculative": (0, count - 1)}
            sizes.append(len(encode(board.message(have))))
        assert sizes[1] < sizes[0] + 200
        assert sizes[1] < 6000

    def test_a_reader_that_missed_something_or_lies_gets_whole_steps(self) -> None:
        board = self.board(10)
        lane = board.message({"speculative": (0, 4)})["lanes"][1]
        assert (lane["from"], lane["count"], len(lane["steps"])) == (4, 10, 6)
        for have in ((0, 11), (0, -3), (1, 4)):
            lane = board.message({"speculative": have})["lanes"][1]
            assert (lane["from"], len(lane["steps"])) == (0, 10)

    def test_a_trace_that_differs_from_its_steps_wins(self) -> None:
        board = self.board(10)
        steps = list(handmade_steps("speculative", WORDS, 9, seed=2))
        board.finish("speculative", handmade_trace("speculative", steps))
        lane = board.message({"speculative": (0, 10)})["lanes"][1]
        assert (lane["epoch"], lane["from"], len(lane["steps"])) == (1, 0, 9)

    def test_later_messages_have_higher_ticks(self) -> None:
        board = self.board()
        assert board.message()["tick"] < board.message()["tick"]

    def test_the_status_line_speaks_when_a_run_ends(self) -> None:
        board = self.board(3)
        assert board.message()["say"] == ""
        steps = list(handmade_steps("speculative", WORDS, 3, seed=2))
        board.finish("speculative", handmade_trace("speculative", steps))
        assert "Speculative decoding done" in board.message()["say"]

    def test_notes_are_shown_once(self) -> None:
        board = self.board()
        board.status("", notes=["The pair is a stand-in."])
        for method in ("autoregressive", "speculative"):
            steps = list(handmade_steps(method, WORDS, 3, seed=2))
            board.finish(method, handmade_trace(method, steps))
        assert board.message()["notes"] == [
            "The pair is a stand-in.",
            "The draft is hand-made.",
            "No energy figure: no sensor on this machine",
        ]

    def test_no_token_can_look_like_a_tag(self) -> None:
        steps = list(handmade_steps("speculative", HOSTILE, 20, seed=2))
        board = self.board()
        for step in steps:
            board.add("speculative", step)
        text = encode(board.message())
        assert "<" not in text
        assert text.isascii()
        tokens = [t for view in json.loads(text)["lanes"][1]["steps"] for _, t in view["t"]]
        assert tokens == [t for step in steps for t in step.emitted_texts]

    def test_ratios_and_their_absence(self) -> None:
        table = results_table([final_lane("autoregressive"), final_lane("mtad")])
        assert table is not None
        heads = table["columns"][1:]
        cells = dict(zip(heads, table["rows"][1]["cells"], strict=True))
        assert cells["speed vs speculative"] == ["–", "not in this comparison"]
        assert cells["speed vs single-token"][0].endswith("×")
        assert float(cells["speed vs single-token"][0][:-1]) > 1
        alone = dict(zip(heads, table["rows"][0]["cells"], strict=True))
        assert alone["speed vs single-token"] == ["1.00×", ""]
        assert alone["accepted"] == ["–", "no draft"]
        assert results_table([Lane(method_info("mtad"), DecodeConfig())]) is None


class TestRequest:
    def test_methods_run_in_the_order_of_the_catalogue(self) -> None:
        request = check_request("hello", ["mtad", "autoregressive", "mtad"])
        assert [info.id for info in request.methods] == ["autoregressive", "mtad"]

    @pytest.mark.parametrize("prompt", ["", "  \n\t"])
    def test_an_empty_prompt_is_refused(self, prompt: str) -> None:
        with pytest.raises(PromptError, match="The prompt is empty"):
            check_request(prompt, ["mtad", "autoregressive"])

    @pytest.mark.parametrize("count", [0, 1, 5])
    def test_two_to_four_methods(self, count: int) -> None:
        ids = ["autoregressive", "speculative", "mtad", "beam", "bild"][:count]
        with pytest.raises(ConfigError, match=f"{count} methods are chosen.* 2 to 4"):
            check_request("hello", ids)

    def test_the_message_of_the_library_is_handed_on(self) -> None:
        with pytest.raises(ConfigError, match="There is no method 'magic'"):
            check_request("hello", ["magic", "mtad"])
        with pytest.raises(ConfigError, match="top_p is 1.5, but must be a number greater than 0"):
            check_request("hello", ["mtad", "beam"], top_p=1.5)
        with pytest.raises(ConfigError, match="max_new_tokens is 2.5"):
            check_request("hello", ["mtad", "beam"], max_new_tokens=2.5)

    def test_a_browser_sends_whole_numbers_as_it_likes(self) -> None:
        config = check_request("hello", ["mtad", "beam"], top_k=5.0, seed=None).config
        assert (config.top_k, config.seed) == (5, 0)

    def test_ids_cannot_be_guessed_and_old_runs_are_forgotten(self) -> None:
        kept = Comparisons(limit=2)
        request = check_request("hello", ["mtad", "beam"])
        first, second, third = (kept.open(request) for _ in range(3))
        assert kept.get(first.run_id) is None
        assert kept.get(second.run_id) is second
        assert kept.get(third.run_id) is third
        assert len(first.run_id) == 32
        assert kept.get(None) is None


def comparison(methods: tuple[str, ...] = ("autoregressive", "mtad")) -> Comparison:
    return Comparison(check_request("hello", methods))


class TestPlay:
    def test_all_methods_run_and_the_steps_arrive_once(self) -> None:
        one = comparison()
        messages = [json.loads(m) for m in play(one, ReadyPair(), handmade_stream(WORDS, 12))]
        assert messages[-1]["over"] is True
        assert [lane["state"] for lane in messages[-1]["lanes"]] == ["done", "done"]
        for index in range(2):
            seen = [view["i"] for message in messages for view in message["lanes"][index]["steps"]]
            assert seen == list(range(12))
        assert len(messages[-1]["table"]["rows"]) == 2
        assert set(one.traces()) == {"autoregressive", "mtad"}

    def test_at_most_eight_messages_a_second_and_a_few_at_turns(self) -> None:
        started = time.monotonic()
        stream = handmade_stream(WORDS, 60, pause_seconds=0.01)
        messages = list(play(comparison(), ReadyPair(), stream))
        seconds = time.monotonic() - started
        assert len(messages) <= 8 * seconds + 6

    def test_stop_keeps_what_was_decoded(self) -> None:
        one = comparison()
        last = {}
        messages = play(one, ReadyPair(), handmade_stream(WORDS, 500, pause_seconds=0.01))
        for index, text in enumerate(messages):
            last = json.loads(text)
            if index == 3:
                one.stop()
        assert [lane["state"] for lane in last["lanes"]] == ["stopped", "stopped"]
        assert 0 < last["lanes"][0]["count"] < 500
        assert last["lanes"][1]["message"] == "stopped before it began"
        assert last["status"].startswith("Stopped.")

    def test_a_closed_tab_stops_the_worker(self) -> None:
        ended = threading.Event()

        def stream(method: str, pair: Any, **kwargs: Any) -> Iterator[Step | Trace]:
            try:
                for step in handmade_steps(method, WORDS, 10_000, seed=0):
                    yield step
                    time.sleep(0.01)
            finally:
                ended.set()

        one = comparison()
        generator = play(one, ReadyPair(), stream)
        for _ in range(2):
            next(generator)
        assert not ended.is_set()
        generator.close()
        assert ended.is_set()
        assert one.cancel.is_set()

    def test_stop_while_waiting_in_line(self) -> None:
        one = comparison()
        one.stop()
        assert one.board.message()["status"] == "Stopped before it began."
        messages = list(play(one, ReadyPair(), handmade_stream(WORDS, 5)))
        assert len(messages) == 1
        assert json.loads(messages[0])["lanes"][0]["count"] == 0

    @pytest.mark.parametrize(
        ("error", "second"),
        [
            (PromptError("The prompt has 9,000 tokens, 809 too many."), "did not run"),
            (BudgetError("Lower k."), "reached max_new_tokens"),
            (RuntimeError("secret path"), "reached max_new_tokens"),
            (Cancelled("stopped"), "reached max_new_tokens"),
        ],
    )
    def test_errors(self, error: Exception, second: str) -> None:
        good = handmade_stream(WORDS, 3)

        def stream(method: str, pair: Any, **kwargs: Any) -> Iterator[Step | Trace]:
            if method == "autoregressive":
                raise error
            return good(method, pair, **kwargs)

        messages = list(play(comparison(), ReadyPair(), stream))
        last = json.loads(messages[-1])
        assert last["lanes"][0]["state"] == "failed"
        assert last["lanes"][1]["message"] == second
        if isinstance(error, (PromptError, BudgetError)):
            assert str(error) in last["error"]
        assert "secret path" not in messages[-1]

    def test_run_waits_for_the_pair_and_says_so(self) -> None:
        release = threading.Event()

        def load(progress: Any) -> Any:
            progress("download", 34, 100)
            release.wait(20)
            return ReadyPair()

        loader = PairLoader("hand-made", load)
        generator = play(comparison(), loader, handmade_stream(WORDS, 2))
        assert "fetching weights 34 %" in json.loads(next(generator))["status"]
        release.set()
        last = json.loads(list(generator)[-1])
        assert last["status"] == "Finished."
        assert last["notes"][0] == "Hand-made steps: no model runs here."


class TestLoading:
    def test_a_failure_is_shown_verbatim_and_can_be_tried_again(self) -> None:
        outcomes: list[Any] = [FetchError("No network. Set a proxy."), ReadyPair()]

        def load(progress: Any) -> Any:
            outcome = outcomes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        loader = PairLoader("hand-made", load)
        assert header_view(loader)["state"] == "idle"
        messages = list(play(comparison(), loader, handmade_stream(WORDS, 2)))
        assert json.loads(messages[-1])["error"] == "No network. Set a proxy."
        assert header_view(loader)["text"] == "No network. Set a proxy."
        loader.start()
        assert loader.wait(10)
        assert header_view(loader)["device"] == "CPU, float32, none engine"

    def test_a_bug_is_logged_and_its_details_stay_on_the_server(self, caplog: Any) -> None:
        def load(progress: Any) -> Any:
            raise KeyError("/secret/path")

        loader = PairLoader("hand-made", load)
        loader.start()
        assert loader.wait(10)
        assert "/secret" not in loader.status().text
        assert "KeyError" in loader.status().text
        assert "/secret/path" in caplog.text


def test_a_class_is_styled_by_one_sheet() -> None:
    """All sheets hold for the whole page: what two of them style alike has to be in page.css."""
    first = re.compile(r"^\s*(\.mtad-[a-z-]+)(?=[\s,{:[.])", re.MULTILINE)
    shared = set(first.findall((ASSETS / "page.css").read_text(encoding="utf-8")))
    owners: dict[str, set[str]] = {}
    for sheet in ASSETS.glob("*.css"):
        if sheet.name != "page.css":
            for name in first.findall(sheet.read_text(encoding="utf-8")):
                owners.setdefault(name, set()).add(sheet.name)
    assert len(owners) > 50
    twice = {name: sheets for name, sheets in owners.items() if len(sheets) > 1}
    assert {name: sheets for name, sheets in twice.items() if name not in shared} == {}
