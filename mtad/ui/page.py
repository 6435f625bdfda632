"""The page: header, tabs and endpoints put together. Each tab is built by a file of its own.

Only `mtad.ui` imports gradio, and in it only this file, `theme.py`, `site.py`, `form_fields.py`,
the endpoints and the files of the tabs. What they show is computed by files that know no gradio.
"""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr

from mtad.errors import MtadError
from mtad.ui.board import encode
from mtad.ui.chat_tab import chat_tab
from mtad.ui.compare_tab import compare_tab
from mtad.ui.comparison import PairSource, Stream
from mtad.ui.endpoint import compare_endpoint, generate_endpoint, methods_endpoint
from mtad.ui.inspect_tab import inspect_tab
from mtad.ui.limits import Limits
from mtad.ui.loading import PairLoader, header_view
from mtad.ui.method_tab import method_tab
from mtad.ui.pair_menu import PairMenu, menu_view
from mtad.ui.shelf import new_visit
from mtad.ui.site import MODEL_SLOT, QUIET, Site, library_stream, script, stylesheet
from mtad.ui.theme import theme
from mtad.ui.tradeoff_tab import tradeoff_tab

QUEUE_SIZE = 32
# Between two looks at a header where all is loaded.
_LOOK_SECONDS = 5.0

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
  <label class="mtad-pair-choice" hidden>Pair <select></select></label>
  <div class="mtad-pair-next" role="status"></div>
</div>
</div>"""


def build(
    source: PairSource | None = None,
    stream: Stream = library_stream,
    limits: Limits | None = None,
) -> gr.Blocks:
    """The page.

    Args:
        source: of the pair; a `PairLoader` of the default preset if None. The caller starts it.
        stream: what runs a method; has the signature of `mtad.runner.stream`.
        limits: what a visitor may ask for; those of one's own machine if None.
    """
    site = Site.within(limits or Limits(), source or PairLoader(), stream)
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
            compare_tab(site, visit, page)
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
                functools.partial(_tick, site),
                outputs=[header, clock],
                queue=False,
                **QUIET,
            )

        # Not a partial: gradio would not see that it takes an event.
        def choose(event: gr.EventData) -> tuple[str, Any]:
            return _choose(site, event)

        header.choose_pair(choose, outputs=[header, clock], queue=False, **QUIET)
        for name, endpoint in (("compare", compare_endpoint), ("generate", generate_endpoint)):
            gr.api(
                endpoint(site.source, site.stream, site.limits),
                api_name=name,
                concurrency_id=MODEL_SLOT,
                concurrency_limit=1,
            )
        gr.api(methods_endpoint(), api_name="methods", queue=False)
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


def _tick(site: Site, error: str = "") -> tuple[str, Any]:
    """The header as it is now, and when to look again."""
    source = site.source
    view = header_view(source, site.limits.note())
    going_on = view["state"] != "ready"
    if not isinstance(source, PairMenu):
        return encode(view), gr.Timer(active=going_on)
    view |= menu_view(source)
    if error:
        view["refused"] = error
    going_on = going_on or source.loading() is not None
    # Another visitor may choose another pair: every open page looks now and then.
    return encode(view), gr.Timer(1.0 if going_on else _LOOK_SECONDS)


def _choose(site: Site, event: gr.EventData) -> tuple[str, Any]:
    """A visitor chose from the menu: a name, and nothing but a name of a preset."""
    data = event._data if isinstance(event._data, dict) else {}
    if not isinstance(site.source, PairMenu):
        return _tick(site)
    try:
        site.source.choose(data.get("id"))
    except MtadError as error:
        return _tick(site, str(error))
    return _tick(site)
