"""What a hosted page refuses, in every tab and endpoint, and what one's own page allows."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mtad.config import DecodeConfig
from mtad.errors import ConfigError, MtadError, PromptError
from mtad.ui.chats import Chats, answering
from mtad.ui.comparison import Comparisons, check_request
from mtad.ui.conversation import Conversation, check_settings
from mtad.ui.endpoint import compare_endpoint, generate_endpoint
from mtad.ui.limits import HOSTED, Limits, limits_from_environment
from mtad.ui.loading import header_view
from mtad.ui.site import Site
from mtad.ui.sweeping import check_limits, check_sweep
from mtad.ui.tradeoff_tab import DEFAULT_METHODS, HOSTED_PROMPTS
from tests.test_ui import WORDS, ReadyPair, handmade_stream

SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 10, "top_p": 0.9, "seed": 0}


class Told:
    """A stream that writes down how it is called."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, method: str, pair: Any, **kwargs: Any) -> Any:
        self.calls.append({"method": method, **kwargs})
        for name in ("messages", "session", "raw_prompt"):
            kwargs.pop(name, None)
        kwargs.setdefault("prompt", "hello")
        kwargs.setdefault("config", DecodeConfig())
        kwargs.setdefault("cancel", threading.Event())
        return handmade_stream(WORDS, 3)(method, pair, **kwargs)


def sweep(prompts: tuple[int, int], **parameters: Any) -> Any:
    values = {"max_new_tokens": 64.0, **SAMPLING, **parameters}
    return check_sweep(DEFAULT_METHODS, "4", "0.1, 0.3, 0.5, 0.9", "4", prompts, **values)


class TestEnvironment:
    @pytest.mark.parametrize(
        ("value", "space", "hosted"),
        [
            (None, None, False),
            ("", None, False),
            ("1", None, True),
            (" Yes ", None, True),
            ("0", None, False),
            (None, "someone/playground", True),
            ("0", "someone/playground", False),
        ],
    )
    def test_what_says_that_a_page_is_hosted(
        self, monkeypatch: Any, value: str | None, space: str | None, hosted: bool
    ) -> None:
        for name, given in (("MTAD_HOSTED", value), ("SPACE_ID", space)):
            monkeypatch.delenv(name, raising=False)
            if given is not None:
                monkeypatch.setenv(name, given)
        assert limits_from_environment().hosted is hosted

    def test_anything_else_is_refused(self, monkeypatch: Any) -> None:
        monkeypatch.setenv("MTAD_HOSTED", "maybe")
        with pytest.raises(ConfigError, match="MTAD_HOSTED is 'maybe', but must be 1"):
            limits_from_environment()


class TestGuard:
    def test_what_is_within_the_limits_goes_through_unchanged(self) -> None:
        told = Told()
        config = DecodeConfig(max_new_tokens=16)
        list(HOSTED.guard(told)("mtad", None, prompt="hi", config=config, deadline_seconds=900.0))
        assert told.calls[0]["prompt"] == "hi"
        assert told.calls[0]["config"] is config
        assert told.calls[0]["deadline_seconds"] == HOSTED.deadline_seconds
        Limits().guard(told)("mtad", None, prompt="hi", deadline_seconds=900.0)
        assert told.calls[1]["deadline_seconds"] == 900.0

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ({"config": DecodeConfig(max_new_tokens=257)}, "max_new_tokens is 257.*at most 256"),
            ({"config": DecodeConfig(num_draft_tokens=17)}, "num_draft_tokens is 17.*at most 16"),
            ({"config": DecodeConfig(beam_width=17)}, "beam_width is 17.*at most 16"),
            ({"config": DecodeConfig(node_budget=5000)}, "node_budget is 5,000.*at most 4,096"),
            ({"prompt": "x" * 8001}, "The prompt has 8,001 characters.*at most 8,000"),
            ({"raw_prompt": "x" * 8001}, "8,001 characters"),
            (
                {"messages": [{"role": "user", "content": "x" * 4001}] * 2},
                "8,002 characters",
            ),
        ],
    )
    def test_what_is_beyond_them_is_refused_before_it_runs(
        self, request_: dict[str, Any], message: str
    ) -> None:
        told = Told()
        with pytest.raises(MtadError, match=message) as caught:
            HOSTED.guard(told)("mtad", None, **request_)
        assert "on a machine of your own" in str(caught.value)
        assert told.calls == []
        Limits().guard(told)("mtad", None, **request_)
        assert len(told.calls) == 1

    def test_a_draft_of_measured_length_passes(self) -> None:
        HOSTED.check_config(DecodeConfig(num_draft_tokens="auto"))


class TestCompare:
    def test_too_much_is_refused_before_a_place_in_the_line(self) -> None:
        kept = Comparisons(limits=HOSTED)
        four = ["autoregressive", "beam", "speculative", "mtad"]
        with pytest.raises(ConfigError, match="4 methods are chosen.*at most 3.*Untick some"):
            kept.open(check_request("hello", four))
        with pytest.raises(ConfigError, match="max_new_tokens is 300"):
            kept.open(check_request("hello", four[:2], max_new_tokens=300))
        with pytest.raises(PromptError, match="9,000 characters"):
            kept.open(check_request("x" * 9000, four[:2]))
        assert kept.open(check_request("hello", four[:3])).run_id
        assert Comparisons().open(check_request("x" * 9000, four, max_new_tokens=3000)).run_id


class TestChat:
    def test_old_turns_drop_where_the_page_reads_no_more(self) -> None:
        pytest.importorskip("tokenizers")
        told = Told()
        limits = Limits(hosted=True, max_prompt_characters=400)
        chats = Chats(limits=limits)
        source = ReadyPair()
        source.tokenizer, source.context_length = _Tokenizer(), 10_000  # type: ignore[attr-defined]
        conversation = chats.of("visit")
        for turn in range(8):
            conversation.ask(f"{turn} " + "word " * 25, "", check_settings("mtad"))
            list(answering(conversation, source, limits.guard(told), chats))
        assert len(told.calls) == 8, "every question was answered"
        sizes = [sum(len(each["content"]) for each in call["messages"]) for call in told.calls]
        assert max(sizes) <= 400
        assert [turn.dropped for turn in conversation.turns].count(True) >= 4
        assert not conversation.turns[-1].dropped

    def test_without_a_limit_none_does(self) -> None:
        conversation = Conversation()
        for _ in range(5):
            answer = conversation.ask("word " * 100, "", check_settings("mtad"))
            conversation.fail(answer, "")
        assert not any(turn.dropped for turn in conversation.turns)


class _Tokenizer:
    """Letters as tokens; no template."""

    chat_template = "yes"
    all_special_tokens: tuple[str, ...] = ()
    added_tokens_decoder: dict[int, str] = {}

    def apply_chat_template(self, turns: Any, **_: Any) -> str:
        return "\n".join(turn["content"] for turn in turns)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class TestSweep:
    def test_the_form_of_a_hosted_page_begins_within_its_limits(self) -> None:
        check_limits(sweep(HOSTED_PROMPTS), HOSTED)

    def test_too_many_runs(self) -> None:
        request = sweep((6, 0))
        with pytest.raises(ConfigError, match="The sweep has 36 runs.*at most 24"):
            check_limits(request, HOSTED)
        check_limits(request, Limits())

    def test_too_many_tokens_or_methods(self) -> None:
        with pytest.raises(ConfigError, match="max_new_tokens is 300"):
            check_limits(sweep((1, 0), max_new_tokens=300), HOSTED)
        methods = ["autoregressive", "beam", "speculative", "mtad"]
        request = check_sweep(methods, "4", "0.5", "4", (1, 0), max_new_tokens=8, **SAMPLING)
        with pytest.raises(ConfigError, match="4 methods are chosen.*at most 3"):
            check_limits(request, HOSTED)


class TestEndpoints:
    def test_they_refuse_like_the_page(self) -> None:
        told = Told()
        source = ReadyPair()
        compare = compare_endpoint(source, told, HOSTED)
        generate = generate_endpoint(source, told, HOSTED)
        with pytest.raises(Exception, match="max_new_tokens is 500.*at most 256"):
            list(compare("hi", max_new_tokens=500))
        with pytest.raises(Exception, match="4 methods are chosen.*at most 3"):
            list(compare("hi", ["autoregressive", "beam", "speculative", "mtad"]))
        with pytest.raises(Exception, match="beam_width is 20.*at most 16"):
            list(generate("hi", beam_width=20))
        assert told.calls == []

    def test_a_site_guards_what_all_tabs_run(self) -> None:
        told = Told()
        site = Site.within(HOSTED, ReadyPair(), told)
        with pytest.raises(ConfigError, match="max_new_tokens is 500"):
            site.stream("mtad", None, prompt="hi", config=DecodeConfig(max_new_tokens=500))
        with pytest.raises(ConfigError, match="max_new_tokens is 500"):
            site.comparisons.open(check_request("hi", ["mtad", "beam"], max_new_tokens=500))
        assert site.chats.limits is HOSTED
        assert told.calls == []


class TestNote:
    def test_the_header_says_it_on_a_hosted_page_only(self) -> None:
        note = HOSTED.note()
        assert "256 tokens" in note and "24 runs" in note
        assert header_view(ReadyPair(), note)["notes"][0] == note  # type: ignore[arg-type]
        assert Limits().note() == ""
        assert "Hosted" not in " ".join(header_view(ReadyPair())["notes"])  # type: ignore[arg-type]
