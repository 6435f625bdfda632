"""What watching costs the decoder, on the real pair: roughly, but in every run of the tests.

The figure itself takes more pairs and a quiet machine: `python -m tests.streaming_cost`.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.browser import ROOT

pytestmark = pytest.mark.timeout(300)


def test_a_viewer_does_not_slow_the_decoder_down() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.streaming_cost", "--pairs", "5", "--viewers", "client"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = re.search(r"gradio_client: median ([\d.]+) of 5 pairs", done.stdout)
    assert found, done.stdout + done.stderr[-2000:]
    assert float(found[1]) > 0.8, done.stdout
