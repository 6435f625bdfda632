"""Sessions: a kept cache gives the tokens of a fresh one, costs less, and stays within bounds."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mtad
from mtad.copy_drafter import CopyDrafter
from mtad.draft import LMDrafter, Resumable
from mtad.hidden_draft import HiddenDraft, HiddenDraftConfig
from mtad.lm import CachedLM
from mtad.pairs import CUDA, EAGER, NATIVE_FLOAT32, ModelPair, as_drafter
from mtad.session import Session, Sessions
from tests.models import tiny

METHODS = tuple(info.id for info in mtad.methods())
V = 64


def llama(seed: int, **overrides: Any) -> Any:
    """A Llama that all engines take: heads and vocabulary in multiples of 16, widths of 32."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    return tiny("llama", V, seed=seed, initializer_range=0.2, **{**shape, **overrides})


def hidden_draft(target: Any, copies: tuple[float, ...] = (0.1, 0.5)) -> HiddenDraft:
    config = HiddenDraftConfig(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        mlp_size=64,
        target_layers=(0, 1, 2),
        copy_weights=copies,
    )
    torch.manual_seed(3)
    return HiddenDraft(config, torch.arange(0, V, 2)).eval()


class OwnDrafter:
    """A drafter as a user may write one: it can draft and nothing else."""

    def __init__(self, drafter: Any) -> None:
        self.vocab_size, self.target_layers = drafter.vocab_size, drafter.target_layers
        self.prefills: list[int] = []
        self._drafter = drafter

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        self.prefills.append(token_ids.shape[0])
        self._drafter.prefill(token_ids, target_hidden)

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Any:
        return self._drafter.next_logits(token_ids, parents)

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        self._drafter.keep(path, target_hidden)


def pair_of(engine: str, draft: str) -> ModelPair:
    target = llama(0)
    if draft == "model":
        return ModelPair(target, llama(1), engine=engine)
    if draft == "hidden":
        return ModelPair(target, hidden_draft(target), engine=engine)
    if draft == "hidden, no copies":
        return ModelPair(target, hidden_draft(target, ()), engine=engine)
    inner = "model" if draft == "own" else "hidden"
    return ModelPair(target, OwnDrafter(as_drafter(pair_of(EAGER, inner))))


PAIRS = [
    *[(engine, draft) for engine in (EAGER, NATIVE_FLOAT32, CUDA) for draft in ("model", "hidden")],
    (EAGER, "hidden, no copies"),
    (EAGER, "own"),
    (EAGER, "own, hidden"),
]


def config(**fields: Any) -> mtad.DecodeConfig:
    given = {"max_new_tokens": 12, "top_k": 0, "top_p": 1.0, "ignore_eos": True, **fields}
    return mtad.DecodeConfig(**given)


def turn(before: Sequence[int], count: int, seed: int) -> list[int]:
    """A prompt that goes on from an earlier text."""
    return [*before, *random.Random(seed).choices(range(V), k=count)]


@pytest.mark.parametrize(("engine", "draft"), PAIRS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_kept_cache_gives_the_tokens_of_a_fresh_one(
    engine: str, draft: str, temperature: float
) -> None:
    """A chat whose method changes with every turn, with retries and an answer that is cut."""
    pair = pair_of(engine, draft)
    session, text = Session(), [1, 2, 3]
    order = random.Random(5).sample(METHODS, len(METHODS)) + ["mtad", "mtad", "speculative"]
    for index, method in enumerate(order):
        prompt = turn(text, 6, index)
        settings = config(temperature=temperature, seed=index)
        kept = mtad.run(method, pair, prompt_ids=prompt, config=settings, session=session)
        fresh = mtad.run(method, pair, prompt_ids=prompt, config=settings)
        assert kept.token_ids == fresh.token_ids, (method, index)
        for ours, theirs in zip(kept.decisions(), fresh.decisions(), strict=True):
            assert ours.tree.token_ids == theirs.tree.token_ids
            assert ours.path == theirs.path
        if index % 3 == 1:
            again = mtad.run(method, pair, prompt_ids=prompt, config=settings, session=session)
            assert again.token_ids == fresh.token_ids
        # Every third answer goes on from its middle: the caches hold more than the next prompt.
        text = [*prompt, *kept.token_ids[: 5 if index % 3 == 2 else None]]
    assert session.size_bytes > 0


@pytest.mark.parametrize(("engine", "draft"), PAIRS)
def test_how_much_is_not_read_again(engine: str, draft: str) -> None:
    pair = pair_of(engine, draft)
    session = Session()
    first = turn([], 20, 0)
    trace = mtad.run("mtad", pair, prompt_ids=first, config=config(), session=session)
    assert session.reused_tokens == 0
    assert not any("cache of the conversation" in note for note in trace.notes)
    second = turn([*first, *trace.token_ids], 7, 1)
    trace = mtad.run("mtad", pair, prompt_ids=second, config=config(), session=session)
    answered = len(first) + len(trace.token_ids)
    if draft == "own, hidden":
        assert session.reused_tokens == 0, "its own drafter needs every hidden state"
    else:
        # All but the last token of the answer; a draft on hidden states may be a block behind.
        assert answered - 7 <= session.reused_tokens <= answered - 1
        note = f"{session.reused_tokens} of {len(second)} prompt tokens were in the cache"
        assert any(note in each for each in trace.notes)
    if draft.startswith("own"):
        assert pair.draft.prefills[-1] == len(second) - 1
    # After a run without a draft, what the draft had is still of use.
    third = turn([*second, *trace.token_ids], 3, 2)
    plain = mtad.run("autoregressive", pair, prompt_ids=third, config=config(), session=session)
    before = session.reused_tokens
    assert before >= len(second)
    mtad.run("mtad", pair, prompt_ids=[*third, *plain.token_ids], config=config(), session=session)
    if draft == "hidden":
        assert len(second) - 7 <= session.reused_tokens < before
    elif draft == "model":
        assert session.reused_tokens == len(third) + len(plain.token_ids) - 1


def test_a_shorter_an_other_and_the_same_prompt() -> None:
    pair = pair_of(NATIVE_FLOAT32, "hidden")
    session = Session()
    long = turn([], 40, 0)
    for prompt, least, most in (
        (long, 0, 0),
        (long, 37, 38),  # the last token is never prefilled
        (long[:10], 7, 8),
        ([*long[:5], (long[5] + 1) % V, *long[6:]], 3, 4),
        ([(long[0] + 1) % V, *long[1:]], 0, 0),
        (long[:1], 0, 0),
        (long[:2], 0, 0),
    ):
        fresh = mtad.run("mtad", pair, prompt_ids=prompt, config=config())
        kept = mtad.run("mtad", pair, prompt_ids=prompt, config=config(), session=session)
        assert least <= session.reused_tokens <= most
        assert kept.token_ids == fresh.token_ids


def test_a_text_that_began_with_one_token() -> None:
    """Its first token was read as the first of an empty prefix, which no longer prompt does."""
    for engine in (EAGER, NATIVE_FLOAT32, CUDA):
        pair = pair_of(engine, "hidden")
        session = Session()
        one = mtad.run("mtad", pair, prompt_ids=[7], config=config(), session=session)
        longer = [7, *one.token_ids, 5]
        kept = mtad.run("mtad", pair, prompt_ids=longer, config=config(), session=session)
        fresh = mtad.run("mtad", pair, prompt_ids=longer, config=config())
        assert kept.token_ids == fresh.token_ids


def test_a_stopped_run_leaves_what_it_decoded() -> None:
    pair = pair_of(NATIVE_FLOAT32, "hidden")
    session, cancel = Session(), threading.Event()
    prompt, steps = turn([], 30, 0), []
    events = mtad.stream(
        "mtad",
        pair,
        prompt_ids=prompt,
        config=config(max_new_tokens=400),
        session=session,
        cancel=cancel,
    )
    for event in events:
        if isinstance(event, mtad.Trace):
            trace = event
        else:
            steps.append(event)
            if len(steps) == 4:
                cancel.set()
    assert trace.stop_reason == "cancelled"
    text = [*prompt, *trace.token_ids, 9]
    kept = mtad.run("speculative", pair, prompt_ids=text, config=config(), session=session)
    assert session.reused_tokens >= len(text) - 8
    assert (
        kept.token_ids == mtad.run("speculative", pair, prompt_ids=text, config=config()).token_ids
    )


def test_a_stop_before_the_first_pass_and_a_failure_leave_the_session_whole() -> None:
    pair = pair_of(EAGER, "model")
    session, text = Session(), turn([], 30, 0)
    mtad.run("mtad", pair, prompt_ids=text, config=config(), session=session)
    stopped = threading.Event()
    stopped.set()
    trace = mtad.run(
        "mtad", pair, prompt_ids=text, config=config(), session=session, cancel=stopped
    )
    assert (trace.stop_reason, trace.token_ids) == ("cancelled", ())
    mtad.run("mtad", pair, prompt_ids=text, config=config(), session=session)
    assert session.reused_tokens == len(text) - 1

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("in the middle of a pass")

    hook = pair.draft.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        mtad.run("mtad", pair, prompt_ids=[*text, 1, 2], config=config(), session=session)
    hook.remove()
    mtad.run("mtad", pair, prompt_ids=[*text, 1], config=config(), session=session)
    assert session.reused_tokens == len(text)


def test_a_stop_string_cuts_what_is_kept(smollm2: Any) -> None:
    settings = mtad.DecodeConfig(max_new_tokens=40, temperature=0.0, stop=("the",))
    session = Session()
    trace = mtad.run("mtad", smollm2, "Why is the sky blue?", config=settings, session=session)
    assert trace.stop_reason == "stop"
    again = [*trace.prompt_ids, *trace.token_ids, 28]
    settings = dataclasses.replace(settings, stop=(), max_new_tokens=8)
    mtad.run("mtad", smollm2, prompt_ids=again, config=settings, session=session)
    assert 0 < session.reused_tokens <= len(again) - 1


def test_another_pair_starts_anew() -> None:
    first, second = pair_of(EAGER, "model"), pair_of(NATIVE_FLOAT32, "hidden")
    session, text = Session(), turn([], 20, 0)
    mtad.run("mtad", first, prompt_ids=text, config=config(), session=session)
    fresh = mtad.run("mtad", second, prompt_ids=text, config=config())
    for _ in range(2):
        kept = mtad.run("mtad", second, prompt_ids=text, config=config(), session=session)
        assert kept.token_ids == fresh.token_ids
    assert session.reused_tokens == len(text) - 2


def test_a_closed_session_keeps_nothing() -> None:
    pair = pair_of(EAGER, "model")
    session = Session()
    mtad.run("mtad", pair, prompt_ids=[1, 2, 3], config=config(), session=session)
    session.close()
    assert session.size_bytes == 0
    mtad.run("mtad", pair, prompt_ids=[1, 2, 3], config=config(), session=session)
    assert (session.size_bytes, session.reused_tokens) == (0, 0)


def test_sessions_are_bounded_in_number_and_bytes() -> None:
    pair = pair_of(EAGER, "model")
    sessions = Sessions(most=2)

    def run(name: str, store: Sessions, size: int = 30) -> None:
        text = turn([], size, 0)
        mtad.run("mtad", pair, prompt_ids=text, config=config(), session=store.get(name))

    one = sessions.get("one")
    run("one", sessions)
    size = one.size_bytes
    # Two layers of two models, keys and values of two heads of 16 floats, 30 + 12 − 1 tokens;
    # the draft may be a token behind.
    row = 2 * 2 * 2 * 16 * 4
    assert 2 * row * 38 <= size <= 2 * row * 41
    run("two", sessions)
    run("one", sessions)
    run("three", sessions)
    assert len(sessions) == 2
    assert sessions.get("one") is one, "the one that was used longest ago has gone"
    assert sessions.get("two").size_bytes == 0

    small = Sessions(most=16, max_bytes=int(2.5 * size))
    for name in ("one", "two", "three"):
        run(name, small)
    assert len(small) == 2
    assert small.size_bytes <= 2.5 * size
    run("large", small, 300)
    assert small.size_bytes <= 2.5 * size
    small.drop("two")
    small.drop("never there")


def test_the_seam_names_what_can_go_on() -> None:
    assert isinstance(LMDrafter(CachedLM(llama(0))), Resumable)
    assert isinstance(as_drafter(pair_of(NATIVE_FLOAT32, "hidden")), Resumable)
    assert isinstance(as_drafter(pair_of(CUDA, "hidden")), Resumable)
    own = OwnDrafter(as_drafter(pair_of(EAGER, "model")))
    assert not isinstance(own, Resumable)
    assert CopyDrafter(own, (0.1,)).save() is None


def test_a_cache_that_is_not_empty_is_not_loaded() -> None:
    lm = CachedLM(llama(0))
    lm.prefill(torch.tensor([1, 2, 3]))
    saved = lm.save()
    with pytest.raises(ValueError, match="the cache empty"):
        lm.load(saved, 2)
    with pytest.raises(ValueError, match="from 0 to 3"):
        CachedLM(llama(0)).load(saved, 4)


# ------------------------------------------------------------------ the real pair


@pytest.fixture(scope="module")
def exact() -> Any:
    return mtad.load_pair("smollm2", dtype="float32")


QUESTIONS = (
    "Why is the sky blue? Explain it step by step to somebody who knows no physics.",
    "And why is it red in the evening?",
    "Say that in one sentence.",
)


def conversation(
    pair: Any, method: str, session: Session | None, size: int = 48, **fields: Any
) -> list[Any]:
    messages: list[dict[str, str]] = []
    traces = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        settings = mtad.DecodeConfig(max_new_tokens=size, seed=1, **fields)
        traces.append(mtad.run(method, pair, messages=messages, config=settings, session=session))
        messages.append({"role": "assistant", "content": traces[-1].text})
    return traces


@pytest.mark.parametrize(("method", "temperature"), [("mtad", 0.0), ("speculative", 1.0)])
def test_the_real_pair_in_float32(
    smollm2: Any, exact: Any, method: str, temperature: float
) -> None:
    del smollm2  # asks for all threads
    session = Session()
    kept = conversation(exact, method, session, 16, temperature=temperature)
    assert session.reused_tokens > 80, "answers are read again as they were written"
    fresh = conversation(exact, method, None, 16, temperature=temperature)
    assert [trace.token_ids for trace in kept] == [trace.token_ids for trace in fresh]


def test_a_third_turn_saves_most_of_its_prefill(smollm2: Any) -> None:
    again, whole = [], []
    for _ in range(3):  # a thread that wakes late costs as much as the prefill; the fastest counts
        session = Session()
        kept = conversation(smollm2, "mtad", session)[-1]
        fresh = mtad.run(
            "mtad", smollm2, prompt_ids=kept.prompt_ids, config=mtad.DecodeConfig(max_new_tokens=2)
        )
        again.append(kept.summary.prefill_seconds)
        whole.append(fresh.summary.prefill_seconds)
    reused, size = session.reused_tokens, len(kept.prompt_ids)
    print(f"prompt {size}, reused {reused}; prefill {min(again):.3f} s, without {min(whole):.3f} s")
    assert reused > 0.8 * size
    assert min(again) < 0.5 * min(whole)
    assert kept.summary.time_to_first_token_seconds > kept.summary.prefill_seconds
    assert f"{reused} of {size} prompt tokens" in kept.notes[-1]
