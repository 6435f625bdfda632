"""The page: header, tabs and endpoints put together. Each tab is built by a file of its own.

Only `mtad.ui` imports gradio, and in it only this file, `theme.py`, `site.py`, the endpoints and
the files of the tabs. What they show is computed by files that know no gradio.
"""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr

from mtad.ui.board import encode
from mtad.ui.chat_tab import chat_tab
from mtad.ui.compare_tab import compare_tab
from mtad.ui.comparison import PairSource, Stream
from mtad.ui.endpoint import compare_endpoint
from mtad.ui.inspect_tab import inspect_tab
from mtad.ui.loading import PairLoader, header_view
from mtad.ui.method_tab import method_tab
from mtad.ui.shelf import new_visit
from mtad.ui.site import MODEL_SLOT, QUIET, Site, library_stream, script, stylesheet
from mtad.ui.theme import theme
from mtad.ui.tradeoff_tab import tradeoff_tab

QUEUE_SIZE = 32

# Constant, because gradio runs templates as code. All that changes is filled in by the scripts.
_HEADER = """<div class="mtad-header">
<div>
  <h1>MTAD playground</h1>
  <p class="mtad-tagline">
    One prompt, several decoders: see which words came for free, and what they cost.
  </p>
</div>
<div class="mtad-pairbox">
  <div class="mtad-pair"></div>
  <div class="mtad-device"></div>
  <progress hidden aria-label="loading the models"></progress>
  <ul class="mtad-pair-notes"></ul>
</div>
</div>"""


def build(source: PairSource | None = None, stream: Stream = library_stream) -> gr.Blocks:
    """The page.

    Args:
        source: of the pair; a `PairLoader` of the default preset if None. The caller starts it.
        stream: what runs a method; has the signature of `mtad.runner.stream`.
    """
    site = Site(source or PairLoader(), stream)
    with gr.Blocks(
        title="MTAD playground", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        header = gr.HTML(
            "",
            html_template=_HEADER,
            js_on_load=script("header.js"),
            apply_default_css=False,
            elem_id="mtad-header",
        )
        clock = gr.Timer(1.0)
        # Filled in anew for every page that is opened; the traces of a visit are listed under it.
        visit = gr.State("")
        page.load(new_visit, outputs=visit, queue=False, **QUIET)
        with gr.Tab("Compare"):
            compare_tab(site, visit)
        with gr.Tab("Chat"):
            chat_tab(site, visit, page)
        with gr.Tab("Inspect") as tab:
            inspect_tab(site, visit, tab)
        with gr.Tab("Trade-off"):
            tradeoff_tab(site, visit)
        with gr.Tab("Method") as method:
            method_tab(site, method)
        for event in (page.load, clock.tick):
            event(
                functools.partial(_tick, site.source),
                outputs=[header, clock],
                queue=False,
                **QUIET,
            )
        gr.api(
            compare_endpoint(site.source, site.stream),
            api_name="compare",
            concurrency_id=MODEL_SLOT,
            concurrency_limit=1,
        )
    page.queue(max_size=QUEUE_SIZE)
    return page


def launch_options() -> dict[str, Any]:
    """Arguments for `Blocks.launch`, all but host and port.

    Those are gradio's own: GRADIO_SERVER_NAME and GRADIO_SERVER_PORT; 127.0.0.1 and the first
    free port from 7860 without them.
    """
    return {
        "theme": theme(),
        # Not as `css`: Gradio would add a second copy with prefixed selectors, splitting them at
        # every comma, also inside :is().
        "head": f"<style>{stylesheet()}</style>",
        "ssr_mode": False,
        # Gradio would keep every visitor's prompts in the browser and offer them again.
        "run_history": False,
        "enable_monitoring": False,
        "state_session_capacity": 512,
        "max_file_size": "1mb",
        "footer_links": ["api", "settings"],
    }


def _tick(source: PairSource) -> tuple[str, Any]:
    return encode(header_view(source)), gr.Timer(active=source.status().state != "ready")
