"""The examples, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtad.shipped import ASSETS
from tests.browser import ROOT

pytestmark = pytest.mark.timeout(300)


def output_of(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_all_are_run_here() -> None:
    names = {file.name for file in (ROOT / "examples").glob("*.py")}
    assert names == {"library.py", "endpoint.py", "replay.py"}


def test_library(smollm2: Any) -> None:
    said = output_of("library.py", "Name three rivers.")
    assert said.count("perplexity") == 2
    assert " accepted  " in said


def test_endpoint(app: str) -> None:
    first, *_, speculative, mtad = output_of("endpoint.py", app).splitlines()
    assert first == "lossless: autoregressive, speculative, specinfer"
    assert speculative.startswith("speculative: ") and mtad.startswith("mtad: ")


def test_replay(tmp_path: Path) -> None:
    recorded = (ASSETS / "traces" / "cpu-smollm2.jsonl").read_text(encoding="utf-8")
    trace = next(line for line in recorded.splitlines() if line.startswith('{"method":"mtad"'))
    file = tmp_path / "trace.json"
    file.write_text(trace, encoding="utf-8")
    said = output_of("replay.py", str(file))
    assert said.startswith("mtad, SmolLM2-135M-Instruct")
    assert "bonus" in said and "-'" in said
