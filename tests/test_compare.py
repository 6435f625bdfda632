"""What the Compare tab computes, without a browser: form and links, results, recordings."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from mtad.catalogue import method_info, methods
from mtad.config import DecodeConfig
from mtad.errors import ConfigError, MtadError, PromptError
from mtad.trace import EnergyReading, Trace
from mtad.ui.about import about, question
from mtad.ui.compare_tab import DEFAULT_METHODS, EXAMPLES, recall
from mtad.ui.form import (
    BY_NAME,
    FIELDS,
    MAX_LINK,
    OWN_LENGTH,
    fields_read,
    link_of,
    read_draft,
    read_link,
    request_of,
    unread_line,
)
from mtad.ui.lanes import Lane
from mtad.ui.recordings import FOLDER, Gallery
from mtad.ui.results import MAX_POWER_POINTS, power, results_csv, results_table
from tests.test_ui import HOSTILE, WORDS, handmade_steps, handmade_trace, powered

ALL = [info.id for info in methods()]
DEFAULTS = {field.name: field.default for field in FIELDS}


def long_trace(method: str, count: int = 60, seed: int = 0) -> Trace:
    return handmade_trace(method, list(handmade_steps(method, WORDS, count, seed)))


class TestForm:
    def test_every_parameter_has_a_field_but_the_one_that_is_measured(self) -> None:
        library = {field.name for field in dataclasses.fields(DecodeConfig)}
        assert library - {field.name for field in FIELDS} == {"iteration_costs", "tree_costs"}
        assert fields_read(ALL) >= {field.name for field in FIELDS}

    def test_the_form_opens_with_the_defaults_of_the_library_and_adapts_the_draft(self) -> None:
        request = request_of("hello", ALL[:4], DEFAULTS)
        adapts = {"num_draft_tokens": "auto", "k_config": "auto"}
        assert request.config == DecodeConfig(max_new_tokens=96, **adapts)
        for method in ALL:
            other = ALL[0] if method != ALL[0] else ALL[1]
            length = "auto" if "num_draft_tokens" in fields_read([method, other]) else None
            expected = DecodeConfig(max_new_tokens=96, num_draft_tokens=length, k_config="auto")
            assert request_of("hello", [method, other], DEFAULTS).config == expected

    def test_each_field_says_in_one_line_what_it_does(self) -> None:
        for field in FIELDS:
            assert field.label.startswith(field.name)
            assert 10 < len(field.meaning) < 70
            assert field.meaning.endswith(".")
            assert "\n" not in field.meaning

    def test_hidden_fields_are_named_with_the_methods_that_read_them(self) -> None:
        line = unread_line(DEFAULT_METHODS)
        assert "k_config, replacement (SpecInfer)" in line
        assert "fallback_threshold, rollback_threshold (BiLD)" in line
        assert "num_draft_tokens" not in line
        assert unread_line(ALL) == ""

    @pytest.mark.parametrize(
        ("value", "config"), [(OWN_LENGTH, None), ("auto", "auto"), ("7", 7), (None, None), (3, 3)]
    )
    def test_draft_lengths(self, value: Any, config: Any) -> None:
        request = request_of("hello", ["mtad", "bild"], {"num_draft_tokens": value})
        assert request.config.num_draft_tokens == config

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"num_draft_tokens": "65"}, "num_draft_tokens is 65, but must be a whole number"),
            ({"num_draft_tokens": "٣"}, "num_draft_tokens is '٣', but must be"),
            ({"k_config": "4, x"}, "k_config"),
            ({"k_config": ""}, "k_config"),
            ({"accept_threshold": 0}, "accept_threshold is 0"),
            ({"stop": "\n".join("abcdefghijklmnopq")}, "stop"),
        ],
    )
    def test_what_makes_no_sense_is_refused_by_the_library(
        self, values: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            request_of("hello", ["specinfer", "mtad"], values)

    def test_a_width_that_cannot_adapt_without_a_length_is_left_to_the_method(self) -> None:
        values = DEFAULTS | {"beam_width": "auto"}
        assert request_of("hello", ["mtad", "beam"], values).config.beam_width == "auto"
        assert request_of("hello", ["autoregressive", "beam"], values).config.beam_width == 4

    def test_a_field_that_no_chosen_method_reads_is_left_out(self) -> None:
        request = request_of("hello", ["mtad", "speculative"], {"k_config": "nonsense"})
        assert request.config == DecodeConfig(k_config="auto")

    def test_lists_are_texts_in_the_form(self) -> None:
        values = {"k_config": " 3,2 , 1", "stop": "END\n\n###"}
        config = request_of("hello", ["specinfer", "mtad"], values).config
        assert (config.k_config, config.stop) == ((3, 2, 1), ("END", "###"))

    @pytest.mark.parametrize("chosen", [None, "mtad", [], ["mtad"], [["mtad"], "beam"], [3, 4]])
    def test_methods_come_from_anyone(self, chosen: Any) -> None:
        with pytest.raises(MtadError):
            request_of("hello", chosen, DEFAULTS)

    def test_examples_can_be_run(self) -> None:
        for text in EXAMPLES:
            assert request_of(text, DEFAULT_METHODS, DEFAULTS).prompt == text


class TestLinks:
    def test_a_link_brings_back_what_it_was_made_of(self) -> None:
        values = {
            **DEFAULTS,
            "max_new_tokens": 17,
            "num_draft_tokens": "auto",
            "accept_threshold": 0.25,
            "temperature": 0.7,
            "seed": 4294967295,
            "k_config": "3, 2",
            "replacement": False,
            "stop": "END\n& more=1",
            "ignore_eos": True,
        }
        chosen = ["autoregressive", "mtad", "specinfer", "bild"]
        prompt = "Tell me\nabout “ß” & = % + # ?"
        found = read_link("?" + link_of(prompt, chosen, values))
        assert found is not None
        assert (found["prompt"], found["methods"]) == (prompt, chosen)
        rest = {name: value for name, value in found.items() if name in BY_NAME}
        assert rest == {name: values[name] for name in rest}
        again = request_of(prompt, chosen, {**DEFAULTS, **rest})
        assert again == request_of(prompt, chosen, values)

    @pytest.mark.parametrize("text", [text for text in HOSTILE if text.strip()])
    def test_hostile_prompts_are_carried_as_they_are(self, text: str) -> None:
        found = read_link(link_of(text, ["mtad", "beam"], DEFAULTS))
        assert found is not None
        assert found["prompt"] == text

    def test_only_what_is_read_is_carried(self) -> None:
        query = link_of("hello", ["autoregressive", "mtad"], DEFAULTS)
        assert "k_config" not in query
        assert "iteration_costs" not in query
        assert "num_draft_tokens=auto" in query

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ("methods=mtad,magic", "There is no method 'magic'"),
            ("methods=mtad", "1 methods are chosen"),
            ("prompt=+", "The prompt is empty"),
            ("top_k=many", "top_k is 'many', but must be a number"),
            ("top_k=nan", "top_k is 'nan', but must be a number"),
            ("top_k=1e400", "top_k is '1e400', but must be a number"),
            ("top_k=-1", "top_k is -1, but must be a whole number from 0 to"),
            ("temperature=3", "temperature is 3, but this page offers 0 to 2"),
            ("search=wide", "search is 'wide'"),
            ("num_draft_tokens=63", "num_draft_tokens is '63', but this page offers"),
            ("num_draft_tokens=99", "num_draft_tokens is 99"),
            ("ignore_eos=1", "ignore_eos is '1', but must be true or false"),
            ("seed=1&seed=2", "it names seed 2 times"),
            ("&".join(f"x{k}=1" for k in range(200)), "no well-formed query"),
            ("prompt=%ff%fe", "no well-formed query"),
            ("prompt=" + "x" * 200_000, "more than 200,000 characters"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, query: str, message: str) -> None:
        with pytest.raises((ConfigError, PromptError), match=message):
            read_link(query)

    def test_parts_of_others_are_ignored(self) -> None:
        assert read_link("") is None
        assert read_link("?__theme=dark&utm_source=mail&iteration_costs=1,2") is None
        assert read_link("__theme=dark&seed=5") == {"seed": 5}

    def test_a_link_that_would_be_cut_is_not_made(self) -> None:
        with pytest.raises(ConfigError, match=f"at most {MAX_LINK:,} survive"):
            link_of("é" * 2000, ["mtad", "beam"], DEFAULTS)

    def test_a_draft_keeps_what_can_be_kept(self) -> None:
        query = urlencode({"prompt": "half", "methods": "mtad,gone", "top_k": "x", "seed": "3"})
        assert read_draft(query) == {"prompt": "half", "methods": ["mtad"], "seed": 3}
        assert read_draft("prompt=") == {"prompt": ""}
        assert read_draft("") is None
        assert read_draft("seed=1&seed=2") is None


class TestRecall:
    def test_what_was_typed_comes_back_after_a_restart(self) -> None:
        packed = json.dumps({"link": "?prompt=old", "draft": "prompt=new", "restarted": True})
        found, word = recall(packed)
        assert found == {"prompt": "new"}
        assert word["note"].startswith("The server was started again. Your prompt and settings")

    def test_a_restart_before_anything_was_typed_is_said_too(self) -> None:
        found, word = recall(json.dumps({"link": "", "draft": "", "restarted": True}))
        assert found is None
        assert "Nothing was typed" in word["note"]

    def test_a_reload_is_no_restart(self) -> None:
        packed = json.dumps({"link": "?seed=1", "draft": "seed=2", "restarted": False})
        assert recall(packed) == ({"seed": 2}, {})

    def test_a_link_fills_in_and_a_bad_one_says_why(self) -> None:
        assert recall(json.dumps({"link": "?seed=1", "draft": ""})) == ({"seed": 1}, {})
        found, word = recall(json.dumps({"link": "?seed=-1", "draft": ""}))
        assert found is None
        assert word["error"].startswith("This link cannot be used: seed is -1")
        assert word["error"].endswith("The form keeps its defaults.")

    @pytest.mark.parametrize(
        "packed", [None, 3, "", "{", "[]", "null", "[" * 5000, '{"link": 3, "draft": []}']
    )
    def test_a_browser_may_send_anything(self, packed: Any) -> None:
        found, _ = recall(packed)
        assert found is None


class TestResults:
    def test_the_csv_holds_the_figures_of_the_traces(self) -> None:
        traces = [long_trace("autoregressive"), long_trace("speculative"), long_trace("mtad")]
        rows = list(csv.DictReader(io.StringIO(results_csv(traces))))
        assert [row["method"] for row in rows] == [trace.method for trace in traces]
        for row, trace in zip(rows, traces, strict=True):
            summary = trace.summary
            assert int(row["tokens"]) == summary.tokens
            assert float(row["tokens_per_second"]) == summary.tokens_per_second
            assert float(row["perplexity"]) == summary.perplexity
            assert row["joules"] == row["joules_per_token"] == row["watts"] == ""
            assert row["stop_reason"] == "length"
            for baseline in traces[:2]:
                own, other = summary.tokens_per_second, baseline.summary.tokens_per_second
                assert own and other
                assert float(row[f"speed_vs_{baseline.method}"]) == own / other

    def test_a_ratio_without_its_baseline_is_empty(self) -> None:
        row = next(csv.DictReader(io.StringIO(results_csv([long_trace("mtad")]))))
        assert row["speed_vs_speculative"] == row["speed_vs_autoregressive"] == ""

    def test_the_table_says_what_repetition_did(self) -> None:
        lane = Lane(method_info("mtad"), DecodeConfig())
        trace = long_trace("mtad")
        summary = dataclasses.replace(trace.summary, distinct_4=0.25, repeated_4gram_share=0.75)
        lane.finish(dataclasses.replace(trace, summary=summary))
        table = results_table([lane])
        assert table is not None
        cells = dict(zip(table["columns"][1:], table["rows"][0]["cells"], strict=True))
        assert cells["distinct-4"] == ["0.25", ""]
        assert cells["repeated 4-grams"] == ["75 %", ""]
        assert cells["perplexity"] == ["1.65", ""]
        assert cells["J per token"] == ["–", "no sensor on this machine"]

    def test_watts_are_means_over_spans_that_the_sensor_resolves(self) -> None:
        trace = powered(long_trace("mtad", 2000), watts=250.0)
        points = power(trace)
        assert 10 < len(points) <= MAX_POWER_POINTS
        assert {watts for _, watts in points} == {250.0}
        gaps = [b[0] - a[0] for a, b in zip(points, points[1:], strict=False)]
        assert min(gaps) >= 0.2 - 1e-9

    def test_no_watts_where_nothing_was_measured(self) -> None:
        trace = long_trace("mtad")
        assert power(trace) == []
        guess = EnergyReading(12.0, 4.0, "estimate", "CPU", None, "from its rated power")
        assert power(dataclasses.replace(powered(trace, 250.0), energy=guess)) == []


SHIPPED = sorted(FOLDER.glob("*.jsonl"))


class TestRecordings:
    @pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
    def test_each_shipped_recording_is_one_comparison(self, file: Path) -> None:
        recording = Gallery().get(file.stem)
        assert recording is not None
        traces = list(recording.traces().values())
        assert 2 <= len(traces) <= 4
        assert len({trace.prompt for trace in traces}) == 1
        assert len({about([trace])["machine"] for trace in traces}) == 1
        assert {"autoregressive", "speculative"} <= {trace.method for trace in traces}
        message = json.loads(recording.first)
        assert message["recorded"] is message["over"] is True
        assert message["say"] == "", "nobody has asked for it"
        assert {lane["state"] for lane in message["lanes"]} == {"done"}
        assert [lane["count"] for lane in message["lanes"]] == [len(t.steps) for t in traces]
        assert message["about"]["made"] == traces[0].started_at[:10]
        assert traces[0].versions["hardware"] in message["about"]["machine"]
        assert "<|im_" not in message["about"]["prompt"]
        assert len(recording.first) < 300_000, "it comes with the page"
        assert "<" not in recording.first

    def test_the_page_opens_with_the_default_comparison_of_this_kind_of_machine(self) -> None:
        first = Gallery().get("")
        assert first is not None
        assert first.id == "cpu-smollm2"
        assert list(first.traces()) == DEFAULT_METHODS
        trace = first.traces()["mtad"]
        assert question(trace.prompt) == EXAMPLES[0]
        assert trace.config.max_new_tokens == BY_NAME["max_new_tokens"].default

    def test_what_cannot_be_read_is_left_out_and_logged(self, tmp_path: Path, caplog: Any) -> None:
        shutil.copy(SHIPPED[0], tmp_path / "good.jsonl")
        for name, text in (("empty", "\n"), ("torn", '{"method":'), ("foreign", '{"a": 1}\n')):
            (tmp_path / f"{name}.jsonl").write_text(text)
        (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
        with caplog.at_level(logging.WARNING):
            gallery = Gallery(tmp_path)
        assert [name for name, _ in gallery.choices()] == ["good"]
        assert len(caplog.records) == 4
        assert Gallery(tmp_path / "none").get("") is None

    @pytest.mark.parametrize(
        "name", ["../traces/cpu-smollm2", "cpu-smollm2.jsonl", "/etc/passwd", None, 3, ["x"], "x"]
    )
    def test_a_name_chooses_among_these_and_nothing_else(self, name: Any) -> None:
        gallery = Gallery()
        assert gallery.get(name) is None
        assert gallery.by_run(name) is None

    def test_the_browser_knows_a_recording_by_its_run(self) -> None:
        gallery = Gallery()
        first = gallery.get("")
        assert first is not None
        assert gallery.by_run("recorded-cpu-smollm2") is first
        assert gallery.by_run("recorded-") is None

    def test_the_prompt_is_what_was_typed(self) -> None:
        def prompt(text: str) -> str:
            return question(text)

        end = "<|im_end|>\n<|im_start|>assistant\n"
        assert prompt(f"<|im_start|>user\nHi{end}") == "Hi"
        assert prompt(f"<|im_start|>user\nA{end}b<|im_end|>\n<|im_start|>user\nC{end}") == "C"
        assert prompt("raw text") == "raw text"
