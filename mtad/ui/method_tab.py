"""The Method tab: prose, one drawn pass, and what is true of this very machine.

The machine is asked when the tab is opened, not when the page is: a sensor may take its time.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from mtad.shipped import ASSETS
from mtad.ui.board import encode
from mtad.ui.method import still
from mtad.ui.site import QUIET, Site, script

# While the models are still being loaded.
_POLL_SECONDS = 2.0


def method_tab(site: Site, tab: gr.Tab) -> None:
    """Fills `tab`."""
    clock = gr.Timer(_POLL_SECONDS, active=False)
    board = gr.HTML(
        "",
        # Constant, because gradio runs templates as code. What changes is filled in by the script.
        html_template=(ASSETS / "method.html").read_text(encoding="utf-8"),
        js_on_load=script("method.js"),
        apply_default_css=False,
        elem_id="mtad-method",
    )

    def fill() -> tuple[Any, Any]:
        shown = still(site.source)
        return encode(shown), gr.Timer(active=not shown["ready"])

    for event in (tab.select, clock.tick):
        event(fill, outputs=[board, clock], queue=False, **QUIET)
