"""What live streaming costs the decoder, in its own tokens/s.

    python -m tests.streaming_cost --pairs 12

In one process, in turns: the page's own generator with a viewer, and a plain drain of the same
runner with the same seed, so that both decode the same tokens. The ratio of their decode seconds
is taken pair by pair. Viewers: `gradio_client` in a process of its own; then a browser on the
same cores, which draws as well.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import gradio as gr

import mtad
from mtad.trace import Step, Trace
from mtad.ui.comparison import Comparison, check_request, play
from mtad.ui.limits import Limits
from mtad.ui.loading import PairLoader
from mtad.ui.page import build, launch_options
from mtad.ui.site import library_stream
from tests.browser import ARGUMENTS, CHROMIUM, ROOT, Visit

PROMPT = "Write a short story about a lighthouse keeper who finds a letter."
METHODS = ("autoregressive", "mtad")
TITLES = {"client": "gradio_client", "browser": "a browser on the same cores"}
FIELDS = {"max_new_tokens": 256, "num_draft_tokens": 4, "ignore_eos": True}
VIEWER = """
import sys
from gradio_client import Client
client = Client(sys.argv[1], verbose=False)
for line in sys.stdin:
    client.predict(api_name="/watched")  # receives every update; iterating would poll as well
    print("seen", flush=True)
"""


class Traces:
    """`library_stream` that remembers how long the runs of one turn took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def stream(self, *arguments: Any, **more: Any) -> Iterator[Step | Trace]:
        for event in library_stream(*arguments, **more):
            if isinstance(event, Trace):
                self.seconds += event.summary.decode_seconds
            yield event

    def take(self) -> float:
        """Decode seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def drain(traces: Traces, pair: Any) -> float:
    """Decode seconds of the same runs with nobody watching."""
    config = mtad.DecodeConfig(**FIELDS)  # type: ignore[arg-type]
    for method in METHODS:
        for _ in traces.stream(method, pair, prompt=PROMPT, config=config):
            pass
    return traces.take()


def ratios(pairs: int, traces: Traces, pair: Any, watched: Callable[[], None]) -> list[float]:
    """Of each pair: decode seconds drained / watched, which is tokens/s watched / drained."""
    drain(traces, pair)
    watched()
    traces.take()
    found = []
    for turn in range(pairs):
        seconds = {}
        for kind in ("drained", "watched") if turn % 2 else ("watched", "drained"):
            if kind == "watched":
                watched()
                seconds[kind] = traces.take()
            else:
                seconds[kind] = drain(traces, pair)
        found.append(seconds["drained"] / seconds["watched"])
    return found


def with_client(pairs: int, loader: PairLoader, traces: Traces) -> list[float]:
    """The viewer is `gradio_client`."""

    def watch() -> Iterator[str]:
        request = check_request(PROMPT, METHODS, **FIELDS)
        yield from play(Comparison(request), loader, traces.stream)

    with gr.Blocks(analytics_enabled=False) as page:
        gr.api(watch, api_name="watched")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    viewer = subprocess.Popen(
        [sys.executable, "-c", VIEWER, address],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert viewer.stdin is not None and viewer.stdout is not None

    def watched() -> None:
        viewer.stdin.write("go\n")
        viewer.stdin.flush()
        assert viewer.stdout.readline() == "seen\n"

    try:
        return ratios(pairs, traces, loader.pair, watched)
    finally:
        viewer.stdin.close()
        viewer.wait(30)
        page.close()


def with_browser(pairs: int, loader: PairLoader, traces: Traces) -> list[float]:
    """The viewer is Chromium, which draws what it sees."""
    from playwright.sync_api import sync_playwright

    page = build(loader, traces.stream, Limits())
    options = {**launch_options(), "prevent_thread_lock": True, "quiet": True}
    _, address, _ = page.launch(**options)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        fields = {name: str(value).lower() for name, value in FIELDS.items()}
        asked = {"prompt": PROMPT, "methods": ",".join(METHODS), **fields}
        one = Visit(browser.new_page(), f"{address}?{urlencode(asked)}")

        def watched() -> None:
            one.page.click("#mtad-run:enabled")
            one.page.wait_for_selector(".mtad-board:not(.mtad-over)", timeout=60_000)
            one.wait(120)

        try:
            return ratios(pairs, traces, loader.pair, watched)
        finally:
            browser.close()
            page.close()


def measure(pairs: int, viewer: str) -> list[float]:
    """Ratios with one kind of viewer, "client" or "browser"."""
    pair = mtad.load_pair("smollm2")
    loader, traces = PairLoader(load=lambda progress: pair), Traces()
    loader.start()
    while not loader.wait(1.0):
        pass
    with_viewer = with_client if viewer == "client" else with_browser
    return with_viewer(pairs, loader, traces)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--viewers", nargs="+", choices=TITLES, default=list(TITLES))
    chosen = parser.parse_args()
    for viewer in chosen.viewers:
        found = measure(chosen.pairs, viewer)
        shown = " ".join(f"{ratio:.3f}" for ratio in found)
        median = statistics.median(found)
        print(f"{TITLES[viewer]}: median {median:.3f} of {len(found)} pairs: {shown}")


if __name__ == "__main__":
    main()
