"""What the tests of the page share: server processes, a browser, a page that is watched.

`serve` starts the page over hand-made steps, for texts, lengths and losses that no model can be
made to give: `python -m tests.browser KIND`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(*command: str, port: int | None = None, **variables: str) -> Iterator[str]:
    """A process that serves the page, on a free port where none is given; its address.

    `variables` are added to its environment.
    """
    port = port or free_port()
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    environment.pop("GRADIO_SERVER_NAME", None)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                output, _ = process.communicate()
                pytest.fail(f"the server did not come up: {output.decode()[-2000:]}")
            time.sleep(0.3)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)


TABS = ("Compare", "Chat", "Inspect", "Trade-off", "Method")


class Visit:
    """A page, and everything that must not happen on it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.drawer_open = False
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.on("dialog", lambda dialog: (self.problems.append("dialog"), dialog.dismiss()))
        page.on("pageerror", lambda error: self.problems.append(f"script error: {error}"))
        page.on("console", self._console)
        home = address.partition("?")[0]
        page.on("request", lambda request: self._request(request.url, home))
        page.goto(address)
        page.wait_for_selector("#mtad-run")
        # The scripts of the components have run when the board has its hint, or a recording.
        page.wait_for_selector("#mtad-board :is(.mtad-hint:not([hidden]), .mtad-lane)")

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text}")

    def _request(self, url: str, address: str) -> None:
        self.requests.append(url)
        if not url.startswith((address, "data:", "blob:")):
            self.problems.append(f"request to {url}")

    def wait_for_pair(self) -> None:
        """Returns when the header says what runs the loaded pair."""
        self.page.locator(".mtad-device", has_text="engine").wait_for(timeout=120_000)

    def set(self, **fields: object) -> None:
        """Opens the drawer, types values into its number fields and sets its ticks."""
        if not self.drawer_open:
            self.page.get_by_role("button", name="Parameters").click()
            self.drawer_open = True
        for name, value in fields.items():
            box = self.page.get_by_label(name).first
            box.wait_for(state="visible")
            if isinstance(value, bool):
                box.set_checked(value)
                continue
            # Gradio fills in a field's own value some moments after it has appeared, later on a
            # busy machine: type until the value stays.
            for _ in range(20):
                box.fill(str(value))
                box.press("Tab")
                self.page.wait_for_timeout(1000)
                if box.input_value() == str(value):
                    break
            assert box.input_value() == str(value)

    def run(self) -> None:
        """Presses Run; returns when the board holds that run, or says why there is none."""
        self.page.click("#mtad-run")
        self.page.wait_for_selector(
            ".mtad-board:is(:not(:has(.mtad-recorded)), :has(.mtad-error:not(:empty)))"
        )

    def wait(self, seconds: float = 240) -> None:
        self.page.wait_for_selector(".mtad-board.mtad-over", timeout=seconds * 1000)

    def states(self) -> list[str]:
        lanes = self.page.locator(".mtad-lane")
        return [str(lanes.nth(k).get_attribute("data-state")) for k in range(lanes.count())]

    def answer(self, lane: int) -> str:
        """The text of a lane without what was struck out."""
        return str(
            self.page.locator(".mtad-lane")
            .nth(lane)
            .evaluate(
                "lane => [...lane.querySelectorAll('.mtad-text .mtad-tok')]"
                ".map(token => token.textContent).join('')"
            )
        )


# Counts frames and slow ones.
WATCH_FRAMES = """() => {
  window.slowFrames = 0; window.frames = 0;
  let last = performance.now();
  const tick = now => {
    window.frames += 1;
    if (now - last > 250) window.slowFrames += 1;
    last = now;
    requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
}"""

# Every visible text against the colour behind it, transparent layers blended: WCAG 2 ratios.
CONTRAST = """(smallest) => {
  const parse = colour => {
    const match = colour.match(/rgba?\\(([^)]+)\\)/);
    if (!match) return [0, 0, 0, 0];
    const parts = match[1].split(/[ ,/]+/).map(Number);
    return [parts[0], parts[1], parts[2], parts.length > 3 ? parts[3] : 1];
  };
  const over = (top, under) =>
    [0, 1, 2].map(k => top[k] * top[3] + under[k] * (1 - top[3])).concat(1);
  const luminance = colour => {
    const [r, g, b] = [0, 1, 2].map(k => {
      const v = colour[k] / 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const faint = [];
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const element = node.parentElement;
    if (!node.data.trim() || element.closest(".mtad-hidden, :disabled, script, style")) continue;
    if (!element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    const layers = [];
    for (let each = element; each; each = each.parentElement) {
      layers.unshift(parse(getComputedStyle(each).backgroundColor));
    }
    const ground = layers.reduce((under, top) => over(top, under), [255, 255, 255, 1]);
    const ink = over(parse(getComputedStyle(element).color), ground);
    const [a, b] = [luminance(ink), luminance(ground)];
    texts += 1;
    const ratio = Math.max(a, b) / Math.min(a, b);
    if (ratio < smallest) faint.push([node.data.trim().slice(0, 40), ratio.toFixed(2)]);
  }
  return [texts, faint];
}"""


def serve(kind: str) -> None:
    """The page over hand-made steps: hostile texts, losses, long runs, an endless load."""
    from mtad.ui import comparison
    from mtad.ui.loading import PairLoader
    from mtad.ui.page import build, launch_options
    from tests.test_ui import HOSTILE, WORDS, ReadyPair, handmade_stream, with_joules

    if kind == "lossy":
        send = comparison._Sender.send
        # Every message but the last few hides one that never arrives.
        comparison._Sender.send = lambda self: (send(self), send(self))[1]  # type: ignore[method-assign]
    stream = {
        "hostile": handmade_stream(HOSTILE, 12),
        "lossy": handmade_stream(WORDS, 60, 0.02),
        "long": handmade_stream(WORDS, 2000, 0.003),
        # 2,000 blocks a lane at the pace of a GPU: a replay of ten seconds.
        "race": with_joules(handmade_stream(WORDS, 2000, step_seconds=0.005), watts=250.0),
        "loading": handmade_stream(WORDS, 12),
    }[kind]
    source: Any = ReadyPair()
    if kind == "loading":

        def load(progress: Any) -> None:
            progress("download", 34, 100)
            threading.Event().wait()

        source = PairLoader("smollm2", load)
        source.start()
    build(source, stream).launch(**launch_options())


def serve_chat(kind: str) -> None:
    """The page over hand-made answers for the Chat tab, and the real words in a small context."""
    from transformers import AutoTokenizer

    from mtad.fetch import fetch
    from mtad.ui.page import build, launch_options
    from tests.test_chat import MARKDOWN, ChatPair, chat_stream
    from tests.test_ui import HOSTILE, WORDS

    stream = {
        "chat-hostile": chat_stream((*HOSTILE, *MARKDOWN), 12),
        "chat-long": chat_stream(WORDS, 3000, 0.03),
    }[kind]
    pair = ChatPair()
    pair.tokenizer, pair.context_length = AutoTokenizer.from_pretrained(fetch()), 2000
    build(pair, stream).launch(**launch_options())


if __name__ == "__main__":
    (serve_chat if sys.argv[1].startswith("chat") else serve)(sys.argv[1])
