"""Conversations without a browser: turns, retries, what the model is told, what is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import mtad
from mtad.errors import Cancelled, ConfigError, PairError, PromptError
from mtad.text import encode_prompt
from mtad.trace import Step, Trace
from mtad.ui.chats import Chats, answering
from mtad.ui.conversation import Conversation, check_settings
from tests.test_ui import HOSTILE, WORDS, ReadyPair, handmade_steps, handmade_stream

# What a page that rendered Markdown would fetch, follow or show as another element.
MARKDOWN = (
    " ![picture](http://example.org/x.png)",
    " [link](javascript:alert(4))",
    "\n\n```html\n<b>code</b> ${1}\n```\n",
    "| a | b |",
    " **bold** _line_",
    "<|im_end|>",
)


class ChatPair(ReadyPair):
    tokenizer: Any = None
    context_length = 8192


def chat_stream(texts: tuple[str, ...], count: int, pause_seconds: float = 0.0) -> Any:
    """`handmade_stream` with the arguments that a chat gives."""
    play = handmade_stream(texts, count, pause_seconds)

    def stream(method: str, pair: Any, *, messages: Any, session: Any, **rest: Any) -> Any:
        return play(method, pair, prompt=messages[-1]["content"], **rest)

    return stream


class Teller:
    """A stream that writes down what it is told, and answers with given words."""

    def __init__(self, *answers: Any) -> None:
        self.told: list[list[dict[str, str]]] = []
        self.methods: list[str] = []
        self.seeds: list[int] = []
        self._answers = list(answers)

    def __call__(
        self, method: str, pair: Any, *, messages: Any, config: Any, **rest: Any
    ) -> Iterator[Step | Trace]:
        self.told.append(messages)
        self.methods.append(method)
        self.seeds.append(config.seed)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        rest.pop("session")
        yield from handmade_stream((answer,), 1)(
            "autoregressive", pair, prompt="", config=config, **rest
        )


def play(conversation: Conversation, stream: Any, source: Any = None) -> list[dict[str, Any]]:
    messages = answering(conversation, source or ChatPair(), stream, Chats())
    return [json.loads(text) for text in messages]


def told(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[k % 2], "content": text} for k, text in enumerate(turns)]


def settings(method: str = "mtad", **parameters: Any) -> Any:
    return check_settings(method, **parameters)


def dialogue(*answers: Any, system: str = "") -> tuple[Conversation, Teller]:
    """As many turns as answers, asked "Q1", "Q2", …"""
    conversation, stream = Conversation(), Teller(*answers)
    for index in range(len(answers)):
        conversation.ask(f"Q{index + 1}", system, settings())
        play(conversation, stream)
    return conversation, stream


class TestTurns:
    def test_each_turn_is_told_all_before_it(self) -> None:
        conversation, stream = dialogue("A1", "A2", "A3", system="Be kind.")
        system = [{"role": "system", "content": "Be kind."}]
        assert stream.told[0] == system + told("Q1")
        assert stream.told[2] == system + told("Q1", "A1", "Q2", "A2", "Q3")
        assert conversation.message()["turns"][2]["answers"][0]["text"] == "A3"

    def test_a_retry_by_another_method_replaces_the_answer_and_keeps_the_rest(self) -> None:
        conversation, stream = dialogue("A1", "A2")
        conversation.retry("", settings("speculative"))
        stream._answers = ["B2", "A3"]
        play(conversation, stream)
        assert stream.told[-1] == told("Q1", "A1", "Q2")
        assert stream.methods == ["mtad", "mtad", "speculative"]
        conversation.ask("Q3", "", settings())
        play(conversation, stream)
        assert stream.told[-1] == told("Q1", "A1", "Q2", "B2", "Q3")
        answers = conversation.message()["turns"][1]["answers"]
        assert [answer["text"] for answer in answers] == ["A2", "B2"], "what was retried is kept"

    def test_a_retry_takes_a_seed_that_was_not_used(self) -> None:
        conversation, stream = dialogue("A1")
        stream._answers = ["A2", "A3", "A4"]
        for seed in (0, 0, 7.0):
            conversation.retry("", None, seed=seed)
            play(conversation, stream)
        assert stream.seeds == [0, 1, 2, 7]
        assert stream.methods == ["mtad"] * 4

    def test_a_failed_retry_leaves_the_answer_that_was_there(self) -> None:
        conversation, stream = dialogue("A1")
        for failure in (RuntimeError("secret"), PairError("No draft."), ""):
            stream._answers = [failure]
            conversation.retry("", None)
            play(conversation, stream)
        stream._answers = ["A2"]
        conversation.ask("Q2", "", settings())
        play(conversation, stream)
        assert stream.told[-1] == told("Q1", "A1", "Q2")

    def test_a_question_without_an_answer_is_not_told_again(self) -> None:
        conversation, stream = dialogue("A1", Cancelled("stopped"), "A3")
        assert stream.told[-1] == told("Q1", "A1", "Q3")
        states = [turn["answers"][0]["state"] for turn in conversation.message()["turns"]]
        assert states == ["done", "failed", "done"]

    def test_what_cannot_be_asked(self) -> None:
        conversation = Conversation()
        with pytest.raises(PromptError, match="The message is empty. Type a question"):
            conversation.ask(" \n", "", settings())
        with pytest.raises(PromptError, match="nothing to retry"):
            conversation.retry("", None)
        with pytest.raises(ConfigError, match="There is no method 'magic'"):
            settings("magic")
        with pytest.raises(ConfigError, match="max_new_tokens is -1, but must be"):
            settings(max_new_tokens=-1.0)
        conversation.ask("Q1", "", settings())
        with pytest.raises(PromptError, match="still being made"):
            conversation.ask("Q2", "", settings())
        with pytest.raises(PromptError, match="still being made"):
            conversation.retry("", settings("beam"))
        play(conversation, Teller("A1"))
        with pytest.raises(ConfigError, match="is by Multi-token assisted decoding already"):
            conversation.retry("", settings("mtad"))
        assert len(conversation.turns) == 1

    def test_a_withdrawn_question_leaves_no_trace(self) -> None:
        conversation, _ = dialogue("A1")
        conversation.ask("too long", "", settings())
        conversation.withdraw()
        assert [turn.question for turn in conversation.turns] == ["Q1"]
        conversation.retry("", settings("beam"))
        conversation.withdraw()
        assert len(conversation.turns[0].answers) == 1
        conversation.ask("Q2", "", settings())


class TestContext:
    def pair(self, smollm2: Any, context: int) -> Any:
        return SimpleNamespace(tokenizer=smollm2.tokenizer, context_length=context)

    def test_the_oldest_turns_go_and_the_system_prompt_stays(self, smollm2: Any) -> None:
        answers = [f"Answer {k}: " + "word " * 30 for k in range(12)]
        conversation, _ = dialogue(*answers, system="Be kind.")
        conversation.ask("And now?", "Be kind.", settings())
        pair = self.pair(smollm2, 400)
        conversation.fit(pair, 100)
        messages = conversation.messages()
        assert messages[0] == {"role": "system", "content": "Be kind."}
        assert messages[-1] == {"role": "user", "content": "And now?"}
        gone = [turn.dropped for turn in conversation.turns]
        assert 0 < sum(gone) < 12
        assert gone == sorted(gone, reverse=True), "the oldest ones, and those only"
        assert messages[1]["content"] == f"Q{sum(gone) + 1}"
        size = len(encode_prompt(smollm2.tokenizer, messages=messages))
        # Room for the answer, and a quarter of the rest, so that not every turn drops one.
        assert size <= 0.75 * 300
        shown = conversation.message()["turns"]
        assert [turn["dropped"] for turn in shown] == gone

        before = sum(gone)
        play(conversation, Teller("Short."))
        conversation.ask("Go on.", "Be kind.", settings())
        conversation.fit(pair, 100)
        assert sum(turn.dropped for turn in conversation.turns) == before

    def test_nothing_goes_while_there_is_room(self, smollm2: Any) -> None:
        conversation, _ = dialogue("A1", "A2")
        conversation.ask("Q3", "", settings())
        conversation.fit(self.pair(smollm2, 8192), 256)
        assert not any(turn.dropped for turn in conversation.turns)

    def test_a_question_that_fits_in_no_way(self, smollm2: Any) -> None:
        conversation, _ = dialogue("A1")
        conversation.ask("sky " * 500, "", settings())
        with pytest.raises(PromptError, match=r"The message alone has [\d,]+ tokens, [\d,]+ too"):
            conversation.fit(self.pair(smollm2, 300), 100)
        conversation.withdraw()
        assert not conversation.turns[0].dropped, "what was dropped for its sake is back"
        conversation.ask("short", "be kind " * 200, settings())
        with pytest.raises(PromptError, match="The message with the system prompt alone has"):
            conversation.fit(self.pair(smollm2, 300), 100)


class TestMessages:
    def grow(self, texts: tuple[str, ...], count: int) -> list[dict[str, Any]]:
        conversation = Conversation()
        conversation.ask("Hi", "", settings("autoregressive"))
        have = None
        messages = []
        for step in handmade_steps("autoregressive", texts, count, 0):
            conversation.add(conversation.current, step)  # type: ignore[arg-type]
            messages.append(conversation.message(have))
            have = conversation.position()
        return messages

    def test_text_is_sent_once(self) -> None:
        messages = self.grow(WORDS, 40)
        assert "turns" in messages[0]
        assert all("turns" not in message for message in messages[1:])
        text = messages[0]["turns"][0]["answers"][0]["text"]
        for message in messages[1:]:
            assert message["answer"]["from"] == len(text)
            text += message["answer"]["text"]
        assert text == "".join(WORDS[k % len(WORDS)] for k in range(40))

    def test_who_has_something_else_gets_the_whole(self) -> None:
        conversation, _ = dialogue("A1")
        conversation.ask("Q2", "", settings())
        version, *_ = conversation.position()
        assert "turns" in conversation.message((version - 1, 0, 0))
        assert conversation.message((version, 0, 99))["answer"]["from"] == 0
        assert conversation.message((version, 5, 0))["answer"]["from"] == 0

    def test_no_text_can_look_like_a_tag(self) -> None:
        conversation = Conversation()
        conversation.ask("".join(HOSTILE), "", settings())
        texts = [*answering(conversation, ChatPair(), chat_stream(HOSTILE, 12), Chats())]
        assert not any("<" in text for text in texts)
        last = json.loads(texts[-1])["turns"][0]
        assert last["question"] == "".join(HOSTILE)
        assert conversation.turns[0].answers[0].text == last["answers"][0]["text"]

    def test_figures_and_their_absence(self) -> None:
        conversation = Conversation()
        answer = conversation.ask("Hi", "", settings())
        assert answer.figures() == []
        play(conversation, chat_stream(WORDS, 9))
        figures = {unit: (figure, why) for figure, unit, why in answer.figures()}
        summary = answer.lane.trace.summary  # type: ignore[union-attr]
        assert figures["tokens/s"] == (f"{summary.tokens_per_second:.1f}", "")
        assert figures["tokens per target pass"] == (f"{summary.block_efficiency:.2f}", "")
        assert figures["J"] == ("–", "no sensor on this machine")
        assert conversation.message()["notes"] == ["– J: no sensor on this machine"]
        answer.cached = (150, 168)
        assert answer.figures()[-1][2] == "150 of 168 prompt tokens in the cache"
        lane = answer.provenance()["lanes"][0]  # type: ignore[index]
        assert "".join(t for step in lane["steps"] for _, t in step["t"]) == answer.text

    def test_the_status_line_speaks_when_an_answer_ends(self) -> None:
        conversation, _ = dialogue("A1")
        message = conversation.message()
        assert message["say"].startswith("Multi-token assisted decoding done: 1 tokens")
        assert (message["status"], message["busy"]) == ("", False)


class TestAnswering:
    def test_stop_keeps_what_was_decoded_and_it_counts(self) -> None:
        conversation = Conversation()
        answer = conversation.ask("Q1", "", settings("autoregressive"))
        messages = answering(conversation, ChatPair(), chat_stream(WORDS, 900, 0.01), Chats())
        for index, _ in enumerate(messages):
            if index == 3:
                assert conversation.stop() is False
        assert answer.lane.state == "stopped"
        assert 0 < len(answer.text) < 900
        stream = Teller("A2")
        conversation.ask("Q2", "", settings())
        play(conversation, stream)
        assert stream.told[0] == told("Q1", answer.text, "Q2")

    def test_stop_while_waiting_ends_at_once_and_a_late_run_says_nothing(self) -> None:
        conversation = Conversation()
        first = conversation.ask("Q1", "", settings())
        cancel = conversation.cancel
        assert conversation.stop() is True
        assert cancel.is_set()
        assert conversation.message()["turns"][0]["answers"][0]["message"] == (
            "stopped before it began"
        )
        second = conversation.ask("Q2", "", settings())
        conversation.fail(first, "too late")
        assert conversation.current is second
        assert not conversation.cancel.is_set()

    def test_a_closed_tab_stops_the_worker_and_keeps_the_conversation_usable(self) -> None:
        ended = threading.Event()

        def stream(method: str, pair: Any, **_: Any) -> Iterator[Step | Trace]:
            try:
                yield from handmade_steps(method, WORDS, 10_000, seed=0)
            finally:
                ended.set()

        conversation = Conversation()
        conversation.ask("Q1", "", settings())
        messages = answering(conversation, ChatPair(), stream, Chats())
        next(messages), next(messages)
        assert not ended.is_set()
        messages.close()
        assert ended.is_set()
        assert conversation.current is None

    def test_clear_stops_the_run_and_nothing_of_it_is_shown(self) -> None:
        chats = Chats()
        old = chats.of("visit")
        old.ask("Q1", "", settings())
        messages = answering(old, ChatPair(), chat_stream(WORDS, 900, 0.01), chats)
        next(messages)
        fresh = chats.clear("visit")
        assert fresh.generation == old.generation + 1
        assert list(messages) == []
        assert chats.of("visit") is fresh
        assert (chats.find(old.chat_id), chats.find(fresh.chat_id)) == (None, fresh)

    def test_errors_are_shown_and_bugs_are_not(self, caplog: Any) -> None:
        conversation, _ = dialogue(PairError("This pair has no draft."))
        assert conversation.message()["error"] == "This pair has no draft."
        conversation, _ = dialogue(RuntimeError("/secret"))
        assert "/secret" not in json.dumps(conversation.message())
        assert "RuntimeError" in conversation.message()["error"]
        assert "/secret" in caplog.text


class TestChats:
    def test_visits_are_apart_and_the_oldest_is_forgotten(self) -> None:
        chats = Chats(limit=2)
        one, two = chats.of("one"), chats.of("two")
        assert chats.of("one") is one
        chats.of("three")
        assert two.closed and not one.closed
        assert chats.find(two.chat_id) is None
        assert chats.find(None) is None
        assert len(one.chat_id) == 32

    def test_caches_go_with_clear_and_with_a_closed_page(self, smollm2: Any) -> None:
        chats = Chats()
        source = SimpleNamespace(start=lambda: None, wait=lambda _: True, pair=smollm2)

        def ask(visit: str) -> Conversation:
            conversation = chats.of(visit)
            conversation.browser = visit
            conversation.ask("Hi", "", settings(max_new_tokens=4))
            for _ in answering(conversation, source, mtad.stream, chats):  # type: ignore[arg-type]
                pass
            return conversation

        ask("one")
        two = ask("two")
        size = chats._sessions.size_bytes
        assert len(chats._sessions) == 2
        chats.clear("one")
        assert chats._sessions.size_bytes < size
        ask("two")
        reused, size = two.turns[1].answers[0].cached or (0, 0)
        assert reused > 0.5 * size
        chats.leave("another page")
        assert len(chats._sessions) == 1
        chats.leave("two")
        assert chats._sessions.size_bytes == 0
        assert len(two.turns) == 2, "a page that was only cut off goes on"
