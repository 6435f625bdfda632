"""The runner: stopping, locks, deadlines, stop strings, meters, and what it writes into a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mtad
from mtad import recording, runner
from mtad.draft import LMDrafter
from mtad.energy import ReplayMeter
from mtad.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    MtadError,
    PairError,
    PromptError,
)
from mtad.lm import CachedLM
from mtad.pairs import ModelPair
from mtad.recording import meter_for
from mtad.runner import device_lock
from mtad.trace import EnergyReading, Step, Trace
from tests.models import tiny

METHODS = tuple(info.id for info in mtad.methods())
WITH_DRAFT = tuple(info.id for info in mtad.methods() if info.uses_draft)
PROMPT = [1, 2, 3, 4]
CPU = torch.device("cpu")


class Passes:
    """Watches a model: who called it and with how many tokens; may act in the middle of a pass."""

    def __init__(self, name: str, model: torch.nn.Module, diary: list[str]) -> None:
        self.count = 0
        self.act: Callable[[int], object] = lambda count: None
        self._name, self._diary = name, diary
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.count += 1
        self._diary.append(f"{self._name} {kwargs['input_ids'].shape[1]}")
        self.act(self.count)

    def forget(self) -> None:
        self.count = 0
        self.act = lambda count: None


@dataclasses.dataclass
class Watched:
    pair: mtad.ModelPair
    target: Passes
    draft: Passes
    diary: list[str]

    def forget(self) -> None:
        self.diary.clear()
        self.target.forget()
        self.draft.forget()


def watch(**overrides: Any) -> Watched:
    target, draft = tiny("llama", seed=1, **overrides), tiny("llama", seed=2, **overrides)
    diary: list[str] = []
    return Watched(
        mtad.ModelPair(target=target, draft=draft),
        Passes("target", target, diary),
        Passes("draft", draft, diary),
        diary,
    )


@pytest.fixture(scope="module")
def warm() -> Watched:
    """A pair whose warm-up is behind it: every pass that is seen belongs to a run."""
    watched = watch()
    mtad.run("speculative", watched.pair, prompt_ids=PROMPT, config=config(max_new_tokens=1))
    return watched


@pytest.fixture
def watched(warm: Watched) -> Iterator[Watched]:
    warm.forget()
    yield warm
    warm.forget()
    assert_free()


def config(**changes: Any) -> mtad.DecodeConfig:
    values = {"max_new_tokens": 12, "num_draft_tokens": 2, "top_k": 8, "top_p": 1.0, **changes}
    return mtad.DecodeConfig(**values)


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mtad-")]


def assert_free() -> None:
    """No worker is left, and the device can be taken."""
    assert workers() == []
    lock = device_lock(CPU)
    assert lock.acquire(blocking=False)
    lock.release()


# Stop means stop


@pytest.mark.parametrize("method", METHODS)
def test_a_cancelled_run_makes_no_further_pass_and_keeps_its_steps(
    watched: Watched, method: str
) -> None:
    cancel = threading.Event()
    watched.target.act = lambda count: cancel.set() if count == 5 else None
    *steps, trace = mtad.stream(
        method, watched.pair, prompt_ids=PROMPT, config=config(max_new_tokens=60), cancel=cancel
    )
    assert watched.target.count == 5  # the pass that was running is the last one
    draft_passes = watched.draft.count
    assert isinstance(trace, Trace)
    assert trace.stop_reason == "cancelled"
    assert not any(step.decision.provisional for step in trace.steps)
    if method == "beam":
        # The last hypothesis is what was decoded.
        (kept,) = trace.steps
        last = steps[-1]
        assert isinstance(last, Step) and last.decision.provisional
        assert kept.decision == dataclasses.replace(last.decision, provisional=False)
        assert len(trace.token_ids) == 4  # passes 2 to 4; the first one is the prefill
    else:
        assert trace.steps == tuple(steps)
    assert len(trace.token_ids) == trace.summary.tokens > 0
    assert Trace.from_json(trace.to_json()) == trace
    time.sleep(0.02)
    assert (watched.target.count, watched.draft.count) == (5, draft_passes)


@pytest.mark.parametrize("method", WITH_DRAFT)
def test_a_run_that_is_cancelled_while_it_drafts_verifies_no_more(
    watched: Watched, method: str
) -> None:
    cancel = threading.Event()
    passes: list[int] = []

    def stop(count: int) -> None:
        if count == 4:
            cancel.set()
            passes.append(watched.target.count)

    watched.draft.act = stop
    trace = mtad.run(
        method, watched.pair, prompt_ids=PROMPT, config=config(max_new_tokens=60), cancel=cancel
    )
    assert trace.stop_reason == "cancelled"
    assert passes == [watched.target.count]
    assert watched.draft.count == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_cancelled_before_it_starts_makes_no_pass_at_all(method: str) -> None:
    """Not even those of the warm-up."""
    fresh = watch()
    cancel = threading.Event()
    cancel.set()
    trace = mtad.run(method, fresh.pair, prompt_ids=PROMPT, cancel=cancel)
    assert fresh.target.count == fresh.draft.count == 0
    assert (trace.stop_reason, trace.steps, trace.text) == ("cancelled", (), "")
    assert trace.summary.tokens == trace.summary.target_passes == 0
    assert trace.summary.tokens_per_second is None
    assert trace.summary.time_to_first_token_seconds is None
    assert Trace.from_json(trace.to_json()) == trace


def test_a_run_that_is_cancelled_in_its_prefill_decoded_for_no_second() -> None:
    long = watch(max_position_embeddings=2048)
    cancel = threading.Event()
    mtad.run("mtad", long.pair, prompt_ids=PROMPT, config=config(max_new_tokens=1))
    long.forget()
    long.target.act = lambda count: cancel.set()
    meter = LoggedMeter(long.diary)
    trace = mtad.run("mtad", long.pair, prompt_ids=[1] * 1500, cancel=cancel, meter=meter)
    assert long.diary == ["start", "target 512", "stop"]  # the first chunk of three
    assert trace.summary.decode_seconds == 0.0
    assert trace.summary.prefill_seconds == trace.summary.end_to_end_seconds > 0.0
    assert trace.summary.tokens_per_second is None


def test_the_deadline_ends_a_run_and_keeps_what_was_decoded(watched: Watched) -> None:
    watched.target.act = lambda count: time.sleep(0.02)
    started = time.perf_counter()
    trace = mtad.run(
        "autoregressive",
        watched.pair,
        prompt_ids=PROMPT,
        config=config(max_new_tokens=400),
        deadline_seconds=0.3,
    )
    assert trace.stop_reason == "deadline"
    assert 0 < len(trace.token_ids) < 16  # 0.3 s hold 15 passes of 0.02 s, the prefill is one
    assert time.perf_counter() - started < 5.0


def test_a_deadline_that_is_far_away_changes_nothing(watched: Watched) -> None:
    run = [
        mtad.run("mtad", watched.pair, prompt_ids=PROMPT, config=config(), deadline_seconds=seconds)
        for seconds in (None, 3600, math.inf)
    ]
    assert run[0].stop_reason == "length"
    assert run[0].decisions() == run[1].decisions() == run[2].decisions()


@pytest.mark.parametrize("seconds", [0, -1, 0.0, -0.5, math.nan, -math.inf, "5", [1]])
def test_a_deadline_that_is_no_positive_number_is_refused(watched: Watched, seconds: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        mtad.stream("mtad", watched.pair, prompt_ids=PROMPT, deadline_seconds=seconds)
    expected = f"deadline_seconds is {seconds!r}, but must be a number greater than 0."
    assert str(caught.value) == expected
    assert watched.target.count == 0


# One run at a time


def test_while_it_waits_for_the_device_a_run_can_be_stopped(watched: Watched) -> None:
    cancel = threading.Event()
    with device_lock(CPU):
        with pytest.raises(DeadlineExceeded, match=r"took longer than 0\.1 s"):
            mtad.run("mtad", watched.pair, prompt_ids=PROMPT, deadline_seconds=0.1)
        threading.Timer(0.1, cancel.set).start()
        with pytest.raises(Cancelled, match="was stopped"):
            mtad.run("mtad", watched.pair, prompt_ids=PROMPT, cancel=cancel)
    assert watched.target.count == watched.draft.count == 0


def test_a_caller_that_leaves_while_its_run_waits_leaves_nothing_behind(watched: Watched) -> None:
    def wait_for_first(events: Iterator[Step | Trace]) -> None:
        with contextlib.suppress(Cancelled):
            next(events)

    cancel = threading.Event()
    with device_lock(CPU):
        events = mtad.stream("mtad", watched.pair, prompt_ids=PROMPT, cancel=cancel)
        caller = threading.Thread(target=wait_for_first, args=(events,))
        caller.start()
        deadline = time.perf_counter() + 5
        while not workers() and time.perf_counter() < deadline:
            time.sleep(0.005)
        assert workers() == ["mtad-mtad"]
        cancel.set()
        caller.join(5)
        assert not caller.is_alive()
        assert workers() == []
    assert watched.target.count == 0


@pytest.mark.parametrize("method", METHODS)
def test_closing_the_iterator_stops_the_worker_and_frees_the_device(
    watched: Watched, method: str
) -> None:
    watched.target.act = lambda count: time.sleep(0.005)
    events = mtad.stream(method, watched.pair, prompt_ids=PROMPT, config=config(max_new_tokens=400))
    assert isinstance(next(events), Step)
    events.close()  # type: ignore[attr-defined]
    assert_free()
    passes = watched.target.count
    time.sleep(0.02)
    assert watched.target.count == passes < 250
    with pytest.raises(StopIteration):
        next(events)


def test_closing_waits_for_no_more_than_the_pass_that_is_running(watched: Watched) -> None:
    inside = threading.Event()

    def slow(count: int) -> None:
        if count == 3:
            inside.set()
            time.sleep(0.2)

    watched.target.act = slow
    events = mtad.stream("autoregressive", watched.pair, prompt_ids=PROMPT, config=config())
    next(events)
    assert inside.wait(5)
    events.close()  # type: ignore[attr-defined]
    assert watched.target.count == 3
    assert_free()


@pytest.mark.parametrize("interval_seconds", [0.05, math.inf])
def test_steps_in_bunches_are_the_same_steps(watched: Watched, interval_seconds: float) -> None:
    def steps(**more: Any) -> list[tuple[int, ...]]:
        events = runner.stream(
            "mtad", watched.pair, prompt_ids=PROMPT, config=config(max_new_tokens=40), **more
        )
        *found, trace = events
        assert isinstance(trace, Trace)
        assert found == list(trace.steps)
        return [step.decision.emitted for step in trace.steps]

    assert steps(interval_seconds=interval_seconds) == steps()


def test_of_bunches_the_first_holds_one_step(watched: Watched) -> None:
    events = runner.stream(
        "autoregressive",
        watched.pair,
        prompt_ids=PROMPT,
        config=config(max_new_tokens=40),
        interval_seconds=math.inf,
    )
    assert isinstance(next(events), Step)
    following = next(events)
    # All the others came with the end of the run, when the worker had nothing left to do.
    deadline = time.monotonic() + 5
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers() == []
    assert isinstance(following, Step)
    assert len(list(events)) == 39


def test_of_hypotheses_that_nobody_sees_only_the_last_is_spelled(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is spelled from its first token on: all of them would take longer than the run."""
    spelled: list[int] = []
    write = recording.Scribe._step

    def counted(self: recording.Scribe, noted: Any) -> Step:
        spelled.append(len(noted.outcome.emitted))
        return write(self, noted)

    monkeypatch.setattr(recording.Scribe, "_step", counted)
    trace = mtad.run("beam", watched.pair, prompt_ids=PROMPT, config=config(max_new_tokens=40))
    assert 1 <= len(spelled) <= 2  # the first one, which is handed over at once, and the last
    assert trace.summary.draft_seconds + trace.summary.verify_seconds > 0
    assert len(trace.token_ids) == 40


def test_what_was_written_before_writing_failed_is_handed_over(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = recording.Scribe._step

    def failing(self: recording.Scribe, noted: Any) -> Step:
        if len(self.steps) == 3:
            raise RuntimeError("no such piece")
        return write(self, noted)

    monkeypatch.setattr(recording.Scribe, "_step", failing)
    events = runner.stream(
        "autoregressive",
        watched.pair,
        prompt_ids=PROMPT,
        config=config(max_new_tokens=40),
        interval_seconds=math.inf,
    )
    seen = 0
    with pytest.raises(RuntimeError, match="no such piece"):
        for _ in events:
            seen += 1
    assert seen == 3


def handed_over(watched: Watched, **options: Any) -> tuple[int, Exception]:
    """How many steps a run that fails hands over, in one bunch, and what its reader is told."""
    events = runner.stream(
        *("autoregressive", watched.pair),
        prompt_ids=PROMPT,
        config=config(max_new_tokens=20),
        interval_seconds=math.inf,
        **options,
    )
    seen = 0
    try:
        for event in events:
            seen += isinstance(event, Step)
    except Exception as error:
        return seen, error
    raise AssertionError("nothing failed")


def test_a_sensor_that_fails_at_the_end_loses_no_step(watched: Watched) -> None:
    class Failing(LoggedMeter):
        def stop(self) -> Any:
            super().stop()
            raise OSError("the sensor is gone")

    seen, error = handed_over(watched, meter=Failing(watched.diary))
    assert seen == 20 and str(error) == "the sensor is gone"


def test_what_ended_a_run_is_what_its_reader_is_told(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what was decided before cannot be written."""

    def fail(count: int) -> None:
        if count == 10:
            raise Boom("the model broke")

    watched.target.act = fail
    seen, error = handed_over(watched)
    assert seen == 8 and isinstance(error, Boom)  # the prompt is a pass

    write = recording.Scribe._step

    def unwritable(self: recording.Scribe, noted: Any) -> Step:
        if self.steps:  # the first one is handed over while the run goes on
            raise RuntimeError("no such piece")
        return write(self, noted)

    watched.forget()
    watched.target.act = fail
    monkeypatch.setattr(recording.Scribe, "_step", unwritable)
    assert isinstance(handed_over(watched)[1], Boom)


def test_the_clock_stands_while_the_last_steps_are_written(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = recording.Scribe._step

    def slow(self: recording.Scribe, noted: Any) -> Step:
        if self.steps:  # the first one is handed over at once
            time.sleep(0.1)
        return write(self, noted)

    monkeypatch.setattr(recording.Scribe, "_step", slow)
    trace = mtad.run("autoregressive", watched.pair, prompt_ids=PROMPT, config=config())
    assert trace.summary.decode_seconds < 0.1 * (len(trace.steps) - 1)


def test_an_iterator_that_is_forgotten_stops_its_run(watched: Watched) -> None:
    events = mtad.stream("mtad", watched.pair, prompt_ids=PROMPT, config=config(max_new_tokens=400))
    next(events)
    del events
    assert_free()


def test_an_iterator_that_was_never_started_starts_nothing(watched: Watched) -> None:
    events = mtad.stream("mtad", watched.pair, prompt_ids=PROMPT)
    assert workers() == []
    events.close()  # type: ignore[attr-defined]
    assert watched.target.count == 0


def test_runs_on_one_device_follow_each_other(watched: Watched) -> None:
    """Six callers at once: their passes never interleave, and nobody's result changes."""
    jobs = [(method, seed) for method in ("mtad", "autoregressive", "beam") for seed in (1, 2)]
    alone = [
        mtad.run(method, watched.pair, prompt_ids=PROMPT, config=config(seed=seed)).decisions()
        for method, seed in jobs
    ]
    watched.forget()
    together: dict[int, Any] = {}
    barrier = threading.Barrier(len(jobs))

    def job(index: int) -> None:
        method, seed = jobs[index]
        barrier.wait(10)
        trace = mtad.run(method, watched.pair, prompt_ids=PROMPT, config=config(seed=seed))
        together[index] = trace.decisions()

    everything: list[int] = []
    watched.target.act = lambda count: everything.append(threading.get_ident())
    watched.draft.act = lambda count: everything.append(threading.get_ident())
    callers = [threading.Thread(target=job, args=(index,)) for index in range(len(jobs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert [together[index] for index in range(len(jobs))] == alone
    changes = sum(a != b for a, b in zip(everything, everything[1:], strict=False))
    assert changes == len(jobs) - 1


def test_two_devices_have_two_locks() -> None:
    assert device_lock(CPU) is device_lock(torch.device("cpu"))
    assert device_lock(CPU) is not device_lock(torch.device("cuda", 0))
    assert device_lock(torch.device("cuda", 0)) is not device_lock(torch.device("cuda", 1))


# Failures


class Boom(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_a_pass_reaches_the_caller_and_frees_the_device(
    watched: Watched, method: str
) -> None:
    def fail(count: int) -> None:
        if count == 4:
            raise Boom("the model broke")

    meter = LoggedMeter(watched.diary)
    watched.target.act = fail
    seen = []
    with pytest.raises(Boom, match="the model broke"):
        for event in mtad.stream(
            method, watched.pair, prompt_ids=PROMPT, config=config(), meter=meter
        ):
            seen.append(event)
    assert all(isinstance(event, Step) for event in seen)
    assert watched.diary[-1] == "stop" and not meter.running
    assert_free()
    watched.forget()
    again = mtad.run(method, watched.pair, prompt_ids=PROMPT, config=config())
    assert again.stop_reason == "length"


def test_an_exception_in_a_decoder_reaches_the_caller(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*args: Any, **kwargs: Any) -> Iterator[Any]:
        raise Boom("the decoder broke")
        yield

    monkeypatch.setattr(runner, "load_decoder", lambda method: decode)
    with pytest.raises(Boom, match="the decoder broke"):
        mtad.run("mtad", watched.pair, prompt_ids=PROMPT)
    assert_free()


def test_a_search_over_its_budget_says_so(watched: Watched) -> None:
    small = config(search="exact", num_draft_tokens=4, node_budget=10)
    with pytest.raises(mtad.errors.BudgetError, match="node_budget is 10. Lower num_draft_tokens"):
        mtad.run("mtjd", watched.pair, prompt_ids=PROMPT, config=small)


def broken(seed: int, token: int | None) -> Any:
    """Not a number everywhere, or only after one token."""
    model = tiny("llama", seed=seed)
    with torch.no_grad():
        if token is None:
            model.model.norm.weight[0] = math.nan
        else:
            model.model.embed_tokens.weight[token] = math.nan
    return model


@pytest.mark.parametrize("token", [None, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("method", "search"), [*((m, "beam") for m in METHODS), ("mtjd", "exact")])
def test_a_target_whose_logits_are_no_numbers_is_refused(
    method: str, search: str, temperature: float, token: int | None
) -> None:
    pair = mtad.ModelPair(target=broken(1, token), draft=tiny("llama", seed=2))
    settings = config(max_new_tokens=60, temperature=temperature, search=search, top_k=0, top_p=1.0)
    prompt = PROMPT if token is None else [*PROMPT, token]
    with pytest.raises(PairError, match="The target's logits are not numbers .NaN.*float32"):
        mtad.run(method, pair, prompt_ids=prompt, config=settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_target_whose_logits_overflow_is_refused_at_once(method: str) -> None:
    """Even if the token that is infinitely likely is not the one that was drawn."""
    target = tiny("llama", seed=1)
    with torch.no_grad():
        target.lm_head.weight[7] *= 1e5
    target = target.half()
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    target.register_forward_pre_hook(count)
    pair = mtad.ModelPair(target=target, draft=tiny("llama", seed=2).half())
    with pytest.raises(PairError, match="The target's logits are not numbers"):
        mtad.run(method, pair, prompt_ids=PROMPT, config=config(max_new_tokens=200, top_k=0))
    assert passes < 40


@pytest.mark.parametrize("method", ["speculative", "mtad", "mtad_tree", "specinfer", "typical"])
def test_a_draft_whose_logits_are_no_numbers_is_refused(method: str) -> None:
    pair = mtad.ModelPair(target=tiny("llama", seed=1), draft=broken(2, None))
    with pytest.raises(PairError, match="The draft's logits are not numbers .NaN.*float32"):
        mtad.run(method, pair, prompt_ids=PROMPT, config=config())


# Requests that make no sense


@pytest.mark.parametrize(
    ("size", "excess"), [(512, "1 too many"), (513, "2 too many"), (1700, "1,189 too many")]
)
def test_a_prompt_that_is_too_long_says_by_how_much(
    watched: Watched, size: int, excess: str
) -> None:
    with pytest.raises(PromptError) as caught:
        mtad.stream("mtad", watched.pair, prompt_ids=[1] * size)
    assert str(caught.value).startswith(f"The prompt has {size:,} tokens, {excess}: ")
    assert "holds 512, one of them for the answer. Shorten the prompt." in str(caught.value)


def test_the_longest_prompt_that_fits_gives_one_token(watched: Watched) -> None:
    trace = mtad.run("speculative", watched.pair, prompt_ids=[1] * 511, config=config())
    assert len(trace.token_ids) == 1
    assert trace.stop_reason == "context"


@pytest.mark.parametrize("token", [-1, 32, 10**30])
def test_an_id_outside_the_vocabulary_is_refused(watched: Watched, token: int) -> None:
    with pytest.raises(PromptError, match=f"token id {token}, but ids must be from 0 to 31"):
        mtad.stream("mtad", watched.pair, prompt_ids=[1, token, 2])


def test_a_prompt_needs_a_tokenizer(watched: Watched) -> None:
    with pytest.raises(PromptError, match="needs a tokenizer, and this pair has none"):
        mtad.run("mtad", watched.pair, "Why?")
    with pytest.raises(PromptError, match="got none"):
        mtad.run("mtad", watched.pair)
    with pytest.raises(PromptError, match="got prompt, prompt_ids"):
        mtad.run("mtad", watched.pair, "Why?", prompt_ids=PROMPT)


@pytest.mark.parametrize("method", METHODS)
def test_a_pair_without_a_draft_runs_only_what_needs_none(watched: Watched, method: str) -> None:
    alone = mtad.ModelPair(target=watched.pair.target)
    if method in WITH_DRAFT:
        with pytest.raises(
            PairError, match=f"{method} needs a draft model, and this pair has none"
        ):
            mtad.stream(method, alone, prompt_ids=PROMPT)
    else:
        trace = mtad.run(method, alone, prompt_ids=PROMPT, config=config())
        assert len(trace.token_ids) == 12
        assert trace.draft is None


@pytest.mark.parametrize("method", METHODS)
def test_more_beams_than_tokens_are_refused_where_there_are_beams(
    watched: Watched, method: str
) -> None:
    wide = config(beam_width=33, max_new_tokens=2)
    if method in ("beam", "mtjd", "mtad", "mtad_tree"):
        with pytest.raises(ConfigError, match="beam_width is 33, but the vocabulary .* has 32"):
            mtad.stream(method, watched.pair, prompt_ids=PROMPT, config=wide)
    else:
        assert mtad.run(method, watched.pair, prompt_ids=PROMPT, config=wide).token_ids


def test_an_unknown_method_is_refused_at_once(watched: Watched) -> None:
    with pytest.raises(ConfigError, match="There is no method 'magic'. Choose one of: autoregr"):
        mtad.stream("magic", watched.pair, prompt_ids=PROMPT)


def test_every_refusal_is_meant_for_a_user(watched: Watched) -> None:
    for wrong in ({"prompt_ids": []}, {"prompt_ids": [99]}, {"raw_prompt": "a"}):
        with pytest.raises(MtadError):
            mtad.stream("mtad", watched.pair, **wrong)  # type: ignore[arg-type]
    assert watched.target.count == 0


# Stop strings. Without a tokenizer the text is "5 17 3 ", so that any cut can be asked for.


def uncut(watched: Watched, method: str) -> Trace:
    settings = config(max_new_tokens=24, accept_threshold=0.05)
    trace = mtad.run(method, watched.pair, prompt_ids=PROMPT, config=settings)
    assert trace.text == "".join(f"{token} " for token in trace.token_ids)
    return trace


@pytest.mark.parametrize("method", METHODS)
def test_a_stop_string_cuts_the_text_wherever_it_stands(watched: Watched, method: str) -> None:
    """Inside a block, at its end, over two steps: every third place of the text."""
    whole = uncut(watched, method)
    for start in range(0, len(whole.text) - 1, 3):
        stop = whole.text[start : start + 1 + start % 7]
        assert_cut(watched, method, whole, (stop,))


@pytest.mark.parametrize("method", ["autoregressive", "mtad", "mtad_tree", "beam"])
def test_a_stop_string_may_span_many_steps(watched: Watched, method: str) -> None:
    whole = uncut(watched, method)
    middle = len(whole.text) // 2
    assert_cut(watched, method, whole, (whole.text[middle - 20 : middle + 5],))
    assert_cut(watched, method, whole, (whole.text[:-1],))
    assert_cut(watched, method, whole, (whole.text,))


def assert_cut(watched: Watched, method: str, whole: Trace, stops: tuple[str, ...]) -> None:
    pieces = [f"{token} " for token in whole.token_ids]
    settings = dataclasses.replace(whole.config, stop=stops)
    trace = mtad.run(method, watched.pair, prompt_ids=PROMPT, config=settings)
    count = next(n for n in range(1, 25) if any(stop in "".join(pieces[:n]) for stop in stops))
    shown = "".join(pieces[:count])
    assert trace.token_ids == whole.token_ids[:count]
    assert trace.text == shown[: min(shown.find(stop) for stop in stops if stop in shown)]
    assert not any(stop in trace.text for stop in stops)
    assert trace.text == "".join(step.text for step in trace.steps)
    assert trace.stop_reason == "stop"
    assert trace.summary.tokens == count
    # What came before the cut is what would have come without it.
    assert trace.decisions()[:-1] == whole.decisions()[: len(trace.steps) - 1]
    assert Trace.from_json(trace.to_json()) == trace


def test_of_several_stop_strings_the_first_in_the_text_counts(watched: Watched) -> None:
    whole = uncut(watched, "mtad")
    late, early = whole.text[30:36], whole.text[9:14]
    assert_cut(watched, "mtad", whole, (late, early, "not there"))
    assert_cut(watched, "mtad", whole, (early, late))


def test_a_stop_string_that_never_comes_changes_nothing(watched: Watched) -> None:
    whole = uncut(watched, "mtad")
    settings = dataclasses.replace(whole.config, stop=("never",))
    trace = mtad.run("mtad", watched.pair, prompt_ids=PROMPT, config=settings)
    assert trace.decisions() == whole.decisions()
    assert (trace.text, trace.stop_reason) == (whole.text, "length")


def test_a_hypothesis_with_a_stop_string_is_shown_cut_and_does_not_end_the_search(
    watched: Watched,
) -> None:
    """The final hypothesis may lack what an earlier one had."""
    whole = uncut(watched, "beam")

    def shown(settings: mtad.DecodeConfig) -> tuple[list[Step], Trace]:
        *steps, trace = mtad.stream("beam", watched.pair, prompt_ids=PROMPT, config=settings)
        assert isinstance(trace, Trace)
        return [step for step in steps if isinstance(step, Step)], trace

    steps, _ = shown(whole.config)
    assert [step.decision.provisional for step in steps] == [True] * 23 + [False]
    texts = [step.text for step in steps]
    assert texts == ["".join(f"{t} " for t in step.decision.emitted) for step in steps]
    stop = next(text[-6:] for text in texts if len(text) > 6 and text[-6:] not in whole.text)
    cut_steps, trace = shown(dataclasses.replace(whole.config, stop=(stop,)))
    assert (trace.text, trace.stop_reason) == (whole.text, "length")
    cut_texts = [step.text for step in cut_steps]
    assert cut_texts == [text.partition(stop)[0] for text in texts] != texts


# Seconds and joules


class LoggedMeter(ReplayMeter):
    """A replay meter that writes its calls into the diary of the models."""

    def __init__(self, diary: list[str]) -> None:
        super().__init__(
            EnergyReading(30.0, 2.0, "replay", "made up", 0.1),
            EnergyReading(50.0, 4.0, "replay", "made up", 0.1),
            live_joules=(1.0, 2.5),
        )
        self._diary = diary

    def start(self) -> None:
        self._diary.append("start")
        super().start()

    def mark(self) -> None:
        self._diary.append("mark")
        super().mark()

    def stop(self) -> Any:
        self._diary.append("stop")
        return super().stop()


@pytest.mark.parametrize("method", METHODS)
def test_the_meter_opens_the_decode_window_between_prefill_and_first_pass(
    watched: Watched, method: str
) -> None:
    meter = LoggedMeter(watched.diary)
    trace = mtad.run(method, watched.pair, prompt_ids=PROMPT, config=config(), meter=meter)
    prefill = ["target 3", "draft 3"] if method in WITH_DRAFT else ["target 3"]
    assert watched.diary[: 2 + len(prefill)] == ["start", *prefill, "mark"]
    assert watched.diary[-1] == "stop"
    passes = watched.diary[2 + len(prefill) : -1]
    decisions = trace.decisions()
    assert passes and not {"start", "mark", "stop"} & set(passes)
    verified = [int(entry.split()[1]) for entry in passes if entry.startswith("target")]
    assert len(verified) == sum(decision.target_passes for decision in decisions)
    assert sum(verified) == sum(decision.target_positions for decision in decisions)
    assert sum(entry.startswith("draft") for entry in passes) == sum(
        decision.draft_passes for decision in decisions
    )


def test_the_readings_of_the_meter_land_in_the_trace(watched: Watched) -> None:
    meter = LoggedMeter(watched.diary)
    trace = mtad.run("mtad", watched.pair, prompt_ids=PROMPT, config=config(), meter=meter)
    summary = trace.summary
    assert (trace.energy.joules, trace.end_to_end_energy.joules) == (30.0, 50.0)
    assert (summary.joules, summary.end_to_end_joules) == (30.0, 50.0)
    assert summary.joules_per_token == 30.0 / 12
    assert summary.watts == 30.0 / summary.decode_seconds
    assert [step.joules for step in trace.steps][:3] == [1.0, 2.5, 2.5]


def test_without_a_sensor_joules_are_missing_with_a_reason(watched: Watched) -> None:
    trace = mtad.run("mtad", watched.pair, prompt_ids=PROMPT, config=config())
    assert trace.energy.joules is None and trace.energy.reason  # under a second, if not more
    assert trace.summary.joules is trace.summary.joules_per_token is trace.summary.watts is None
    assert all(step.joules is None for step in trace.steps)


def test_a_target_on_several_devices_has_no_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")]
    spread = SimpleNamespace(target=torch.nn.Sequential(*parts), device=CPU)
    meter = meter_for(spread.target, spread.device)
    meter.start()
    reading = meter.stop().end_to_end
    assert reading.joules is None
    assert "spread over 2 devices" in str(reading.reason)


@pytest.mark.parametrize("method", METHODS)
def test_seconds_add_up_and_the_prefill_stands_apart(watched: Watched, method: str) -> None:
    watched.target.act = lambda count: time.sleep(0.25) if count == 1 else None
    started = time.perf_counter()
    trace = mtad.run(method, watched.pair, prompt_ids=PROMPT, config=config(max_new_tokens=3))
    elapsed = time.perf_counter() - started
    summary = trace.summary
    assert summary.prefill_seconds >= 0.25
    assert summary.decode_seconds < elapsed - 0.25
    assert summary.end_to_end_seconds == summary.prefill_seconds + summary.decode_seconds < elapsed
    assert summary.time_to_first_token_seconds is not None
    assert summary.prefill_seconds < summary.time_to_first_token_seconds
    assert summary.time_to_first_token_seconds <= summary.end_to_end_seconds
    seconds = [step.seconds for step in trace.steps]
    assert seconds == sorted(seconds) and seconds[0] > 0 and seconds[-1] <= summary.decode_seconds
    spent = [step.draft_seconds + step.verify_seconds for step in trace.steps]
    assert all(x > 0 for x in spent) and sum(spent) <= summary.decode_seconds
    assert all((step.draft_seconds > 0) == (method in WITH_DRAFT) for step in trace.steps[:1])
    parts = summary.draft_seconds + summary.verify_seconds + summary.other_seconds
    assert parts == pytest.approx(summary.decode_seconds)
    assert summary.tokens_per_second == 3 / summary.decode_seconds


def test_the_warm_up_belongs_to_no_run() -> None:
    fresh = watch()
    fresh.target.act = lambda count: time.sleep(1.0) if count == 1 else None
    trace = mtad.run("mtad", fresh.pair, prompt_ids=PROMPT, config=config(max_new_tokens=2))
    assert trace.summary.end_to_end_seconds < 1.0
    passes = fresh.target.count
    mtad.run("mtad", fresh.pair, prompt_ids=PROMPT, config=config(max_new_tokens=2))
    assert fresh.target.count - passes < passes  # the second run has none


def test_a_full_collection_leaves_alone_what_was_there_before_the_first_run() -> None:
    gc.unfreeze()
    mtad.run("mtad", watch().pair, prompt_ids=PROMPT, config=config(max_new_tokens=2))
    kept_apart = gc.get_freeze_count()
    assert kept_apart > 100_000  # torch and transformers
    # Only once: what many pairs of a program's own leave is collected as ever.
    mtad.run("mtad", watch().pair, prompt_ids=PROMPT, config=config(max_new_tokens=2))
    assert gc.get_freeze_count() <= kept_apart


# What else stands in a trace


@pytest.mark.parametrize("method", METHODS)
def test_the_header_says_what_ran(watched: Watched, method: str) -> None:
    pair = dataclasses.replace(watched.pair, target_name="big", draft_name="small", notes=("hm",))
    settings = mtad.DecodeConfig(max_new_tokens=3)
    before = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    trace = mtad.run(method, pair, prompt_ids=PROMPT, config=settings)
    assert (trace.method, trace.prompt, trace.prompt_ids) == (method, "", tuple(PROMPT))
    assert (trace.device, trace.dtype, trace.engine) == ("cpu", "float32", "eager")
    assert trace.target.name == "big" and trace.target.weight_bytes > 0
    if method in WITH_DRAFT:
        assert trace.draft is not None and trace.draft.name == "small"
        assert trace.notes == ("hm",)
    else:
        # What is said of the draft does not hold for a run without one.
        assert trace.draft is None and trace.notes == ()
    assert trace.config == settings.with_draft_length(10 if method == "bild" else 4)
    assert {"mtad", "torch", "transformers", "python", "hardware"} <= set(trace.versions)
    assert before <= datetime.datetime.fromisoformat(trace.started_at)
    for step in trace.steps:
        for alternatives in step.decision.alternatives:
            assert [a.text for a in alternatives] == [f"{a.token_id} " for a in alternatives]


def test_stream_and_run_give_the_same(watched: Watched) -> None:
    *steps, streamed = mtad.stream("mtad", watched.pair, prompt_ids=PROMPT, config=config())
    assert isinstance(streamed, Trace)
    assert tuple(steps) == streamed.steps
    trace = mtad.run("mtad", watched.pair, prompt_ids=PROMPT, config=config())
    assert trace.decisions() == streamed.decisions()


def test_the_global_generator_is_left_alone(watched: Watched) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    mtad.run("mtad", watched.pair, prompt_ids=PROMPT, config=config())
    assert torch.equal(torch.rand(3), expected)


def test_a_real_answer(smollm2: Any) -> None:
    """The embedded pair: text, prompt and a stop string that spans tokens."""
    # Asked more shortly, the first token is a near tie that 8-bit inputs decide otherwise.
    question = "What is the capital city of France? Answer in one sentence."
    settings = mtad.DecodeConfig(max_new_tokens=12, temperature=0.0)
    trace = mtad.run("mtad", smollm2, question, config=settings)
    assert "Paris" in trace.text
    decoded = smollm2.tokenizer.decode(trace.token_ids, skip_special_tokens=True)
    assert trace.text == decoded == "".join(step.text for step in trace.steps)
    assert trace.prompt.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n")
    assert Trace.from_json(trace.to_json()) == trace
    middle = trace.text.index("Paris") - 4
    stop = trace.text[middle : middle + 6]
    cut = mtad.run(
        "mtad",
        smollm2,
        question,
        config=dataclasses.replace(settings, stop=(stop,)),
    )
    assert cut.stop_reason == "stop"
    assert cut.text == trace.text[: trace.text.index(stop)]
    assert cut.token_ids == trace.token_ids[: len(cut.token_ids)]


def test_a_drafter_of_ones_own_is_one_object_and_holds_one_text() -> None:
    """Its iterations of all lengths are measured one after the other."""
    target, draft = tiny("llama", seed=1), tiny("llama", seed=2)
    drafter = LMDrafter(CachedLM(draft))
    config = mtad.DecodeConfig(max_new_tokens=20, num_draft_tokens="auto")
    pair = ModelPair(target, drafter)
    for _ in range(2):
        trace = mtad.run("mtad", pair, prompt_ids=[1, 2, 3], config=config)
        assert len(trace.token_ids) == 20
        assert trace.config.iteration_costs is not None
