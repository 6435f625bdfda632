"""What the Method tab shows, without a browser."""

from __future__ import annotations

import math
import re

from mtad.catalogue import methods
from mtad.shipped import ASSETS
from mtad.ui.board import encode
from mtad.ui.loading import PairLoader
from mtad.ui.method import (
    BIBTEX,
    energy_line,
    example,
    here,
    licences,
    machine_facts,
    method_table,
    model_facts,
    still,
    telling_passes,
)
from tests.test_ui import ReadyPair


def test_the_drawn_pass_is_a_recorded_one_and_shows_the_rule() -> None:
    drawn = example()
    assert drawn is not None
    trace, step = min(telling_passes(), key=lambda one: len(one[1].node_texts))
    assert int(drawn["source"].split()[1]) == step.index + 1
    tree = step.decision.tree
    assert [row["text"] for row in drawn["rows"]] == list(step.node_texts)
    total = 0.0
    for row, log_p, log_q in zip(
        drawn["rows"], tree.target_logprobs, tree.draft_logprobs, strict=True
    ):
        total += log_p - log_q
        assert math.isclose(row["ratio"], total, abs_tol=1e-9)
        assert row["passes"] == (row["ratio"] > drawn["limit"])
    assert drawn["limit"] == math.log(trace.config.accept_threshold)
    passing = [k + 1 for k, row in enumerate(drawn["rows"]) if row["passes"]]
    assert drawn["accepted"] == step.decision.accepted_length == max(passing)
    # The picture that explains the rule: under the line, back over it, and a rejected end.
    assert any(not row["passes"] for row in drawn["rows"][: drawn["accepted"]])
    assert drawn["accepted"] < len(drawn["rows"])
    assert f"gave {len(step.decision.emitted)} tokens" in " ".join(drawn["sentences"])
    assert trace.target.name in drawn["source"] and trace.versions["hardware"] in drawn["source"]


def test_the_prose_is_no_code_for_gradio() -> None:
    prose = (ASSETS / "method.html").read_text(encoding="utf-8")
    assert not re.search(r"[`\\]|\$\{|\{\{", prose)


def test_all_methods_stand_in_the_table() -> None:
    rows = method_table()
    assert [row["id"] for row in rows] == [info.id for info in methods()]
    assert {row["id"] for row in rows if row["lossless"]} == {
        "autoregressive",
        "speculative",
        "specinfer",
    }
    assert all(row["citation"] for row in rows)


def test_the_citation_names_the_paper() -> None:
    assert "2407.09722" in BIBTEX and "Qin, Zongyue" in BIBTEX and "2025" in BIBTEX
    assert BIBTEX.count("{") == BIBTEX.count("}")


def test_before_the_pair_is_there_the_tab_says_so() -> None:
    shown = here(PairLoader())
    assert not shown["ready"] and "not loaded yet" in shown["energy"]
    assert encode(still(PairLoader()))


def test_facts_of_models_and_machine() -> None:
    shown = here(ReadyPair())
    titles = [title for title, _ in shown["facts"]]
    assert shown["ready"]
    assert titles == ["Target", "Draft", "How they run", "Machine and libraries"]
    assert dict(shown["facts"][0][1]) == {"name": "hand-made target"}
    assert {"processor", "torch", "transformers", "gradio"} <= set(dict(machine_facts("cpu")))
    assert shown["notes"] == list(ReadyPair.notes)
    info = telling_passes()[0][0].target
    found = dict(model_facts(info, "Apache-2.0"))
    assert found["parameters"] == "134.5 million" and found["licence"] == "Apache-2.0"
    assert found["weights read a pass"] == f"{info.weight_bytes / 2**20:,.1f} MiB"


def test_licences_of_a_preset() -> None:
    assert licences("smollm2") == ("Apache-2.0", "Apache-2.0")
    assert licences("llama-2-13b") == ("Llama 2 Community License", "Apache-2.0")
    assert licences("a pair of my own") == ()


def test_energy_is_described_for_the_device() -> None:
    assert energy_line("mps") == (
        "Energy cannot be measured here. There is no meter for the device mps, only for cpu and"
        " cuda."
    )
    assert energy_line("cpu").startswith("Energy ")
