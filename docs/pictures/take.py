"""Takes the pictures of the page: every tab in light, dark and on a phone, and the replay.

    make pictures

Serves `app.py` with the real pair, asks it what a visitor would, and writes beside this file.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.browser import ARGUMENTS, CHROMIUM, server  # noqa: E402

LOOKS = {"light": (1280, "light"), "dark": (1280, "dark"), "phone": (360, "light")}
TALLEST = {1280: 1400, 360: 1500}
FRAMES = 24
FRAME_MS = 300


def compare(page: Any) -> None:
    """The recorded comparison, as it stands before anyone has clicked."""
    page.wait_for_selector(".mtad-lane")


def chat(page: Any) -> None:
    """One answer, and what it was made of."""
    page.fill("#mtad-chat-question textarea", "Name three rivers in Europe.")
    page.press("#mtad-chat-question textarea", "Enter")
    page.wait_for_selector(".mtad-answer[data-state=done]", state="attached", timeout=120_000)
    page.wait_for_selector(".mtad-chat:not(.mtad-busy)", timeout=120_000)
    page.locator(".mtad-answer details summary").first.click()


def inspect(page: Any) -> None:
    """The recorded pass that opens first."""
    page.wait_for_selector(".mtad-stage svg")


def trade_off(page: Any) -> None:
    """A small sweep, to its end."""
    page.wait_for_selector(".mtad-plan:not(:empty)")
    for name, value in {"tau": "0.1, 0.3, 0.9", "compare": 6, "tokens": 48}.items():
        box = page.locator(f"#mtad-sweep-{name} input, #mtad-sweep-{name} textarea").last
        for _ in range(20):
            box.fill(str(value))
            box.press("Tab")
            page.wait_for_timeout(400)
            if box.input_value() == str(value):
                break
    page.click("#mtad-sweep-run")
    page.wait_for_selector(".mtad-sweep-over", timeout=240_000)
    page.wait_for_timeout(1500)


def method(page: Any) -> None:
    """The page of words and its drawn example."""
    page.wait_for_selector(".mtad-method svg")


TABS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "compare": ("Compare", compare),
    "chat": ("Chat", chat),
    "inspect": ("Inspect", inspect),
    "trade-off": ("Trade-off", trade_off),
    "method": ("Method", method),
}


def picture(page: Any, width: int) -> Image.Image:
    """The page from its top, as tall as a picture of it may be."""
    height = page.evaluate("document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, TALLEST[width])}
    return Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip)))


def save(image: Image.Image, name: str) -> None:
    """With a palette: flat colours need no more."""
    palette = image.convert("RGB").quantize(200, method=Image.Quantize.MEDIANCUT)
    palette.save(HERE / f"{name}.png", optimize=True)


def replay(page: Any) -> None:
    """The race of the recorded comparison, scrubbed from its begin to its end."""
    page.wait_for_selector(".mtad-lane")
    board = page.locator("#mtad-board")
    scrub = board.locator("input[type=range]").first
    last = float(scrub.get_attribute("max") or 1)
    frames = []
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    clip = {**box, "height": min(box["height"], 560)}
    for frame in range(FRAMES + 1):
        scrub.evaluate(
            "(bar, at) => { bar.value = at; bar.dispatchEvent(new Event('input')); }",
            last * frame / FRAMES,
        )
        page.wait_for_timeout(120)
        shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
        frames.append(shot.resize((shot.width * 3 // 4, shot.height * 3 // 4), Image.LANCZOS))
    palette = frames[-1].quantize(96)
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    drawn[0].save(
        HERE / "replay.gif",
        save_all=True,
        append_images=drawn[1:],
        duration=[FRAME_MS] * FRAMES + [3000],
        loop=0,
        optimize=True,
    )


def main() -> None:
    """Everything, with one server and one browser."""
    with server("app.py") as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for look, (width, scheme) in LOOKS.items():
            for name, (title, prepare) in TABS.items():
                page = browser.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                ).new_page()
                page.goto(f"{address}?__theme={scheme}")
                page.wait_for_selector(".mtad-lane")
                page.wait_for_selector("[data-state=ready] .mtad-pair", timeout=120_000)
                page.get_by_role("tab", name=title).click()
                prepare(page)
                page.wait_for_timeout(700)
                save(picture(page, width), f"{name}-{look}")
                print(f"{name}-{look}.png", flush=True)
                page.context.close()
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.goto(f"{address}?__theme=light")
        replay(page)
        print("replay.gif")
        browser.close()


if __name__ == "__main__":
    main()
