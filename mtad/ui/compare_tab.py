"""The Compare tab: one prompt, two to four methods, one lane each.

Wires components to the functions of `mtad.ui.comparison`; decides nothing about decoding. Every
value of a visitor is checked on the server, by `check_request` and then by the library, and what
they say is shown word for word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from mtad.catalogue import method_info, methods
from mtad.errors import MtadError
from mtad.ui.board import encode, error_message
from mtad.ui.comparison import Comparisons, check_request, play
from mtad.ui.site import MODEL_SLOT, QUIET, Site, script

DEFAULT_METHODS = ["autoregressive", "speculative", "mtad"]
EXAMPLES = [
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain to a ten-year-old how a bicycle stays upright.",
    "List five things to check before a long train journey.",
]
# Constant, because gradio runs templates as code. All that changes is filled in by the scripts.
_BOARD = """<div class="mtad-board"></div>"""


def compare_tab(site: Site, visit: gr.State) -> None:
    """Fills the tab. Finished traces are put on the shelf for `visit`."""
    comparisons = site.comparisons
    with gr.Group():
        prompt = gr.Textbox(
            EXAMPLES[0],
            label="Prompt",
            lines=2,
            max_lines=12,
            placeholder="Type a question, or choose an example below.",
            elem_id="mtad-prompt",
        )
        chosen = gr.CheckboxGroup(
            [(info.title, info.id) for info in methods()],
            value=DEFAULT_METHODS,
            label="Methods",
            info="Two to four. They run one after another on the same models.",
            elem_id="mtad-methods",
        )
    gr.Examples([[text] for text in EXAMPLES], prompt, label="Examples", api_visibility="private")
    with gr.Accordion("Parameters", open=False):
        fields = _parameters()
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id="mtad-run", scale=3)
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="mtad-stop", scale=1)
    place = gr.HTML("", elem_id="mtad-place", apply_default_css=False)
    board = gr.HTML(
        "",
        html_template=_BOARD,
        js_on_load=script("lanes.js"),
        apply_default_css=False,
        elem_id="mtad-board",
        server_functions=_board_functions(comparisons),
    )
    run_id = gr.State("")

    names = list(fields)

    def prepare(text: str, method_ids: list[str], *values: Any) -> tuple[Any, Any, Any, Any]:
        """Checks the request at once, also while another visitor's run holds the device."""
        try:
            parameters = dict(zip(names, values, strict=True))
            comparison = comparisons.open(check_request(text, method_ids, **parameters))
        except MtadError as error:
            return gr.skip(), error_message(str(error)), gr.skip(), gr.skip()
        comparison.board.status("Waiting for the device.")
        first = encode(comparison.board.message())
        return comparison.run_id, first, gr.Button(interactive=False), gr.Button(interactive=True)

    def decode(name: str, visitor: str) -> Iterator[str]:
        comparison = comparisons.get(name)
        if comparison is None:
            return
        try:
            yield from play(comparison, site.source, site.stream)
        finally:
            for method, trace in comparison.traces().items():
                label = f"{method_info(method).title}: {comparison.request.prompt}"
                site.shelf.put(visitor, label, trace)

    def halt(name: str) -> tuple[Any, Any, Any]:
        comparison = comparisons.get(name)
        if comparison is None:
            return gr.skip(), gr.skip(), gr.skip()
        comparison.stop()
        if comparison.started:
            # The run itself sends the rest, as soon as its last pass is over.
            return gr.skip(), gr.skip(), gr.Button(interactive=False)
        first = encode(comparison.board.message())
        return first, gr.Button(interactive=True), gr.Button(interactive=False)

    run.click(
        prepare,
        [prompt, chosen, *fields.values()],
        [run_id, board, run, stop],
        # In the queue, because only there a changed State sets off its listeners; with a slot of
        # its own, so that a bad request is answered while another visitor's run goes on.
        concurrency_id="check",
        concurrency_limit=None,
        **QUIET,
    )
    run_id.change(
        decode,
        [run_id, visit],
        board,
        concurrency_id=MODEL_SLOT,
        concurrency_limit=1,
        # Gradio's own line: the place in the queue while another visitor's run goes on.
        show_progress="minimal",
        show_progress_on=place,
        api_visibility="private",
    ).then(
        lambda: (gr.Button(interactive=True), gr.Button(interactive=False)),
        outputs=[run, stop],
        queue=False,
        **QUIET,
    )
    stop.click(halt, run_id, [board, run, stop], queue=False, **QUIET)


def _parameters() -> dict[str, Any]:
    """The main parameters, by their names in `DecodeConfig`."""
    with gr.Row():
        max_new_tokens = gr.Number(
            96, label="max_new_tokens", info="Most tokens of an answer.", precision=None
        )
        seed = gr.Number(0, label="seed", info="The same seed gives the same answer.")
    with gr.Row():
        num_draft_tokens = gr.Slider(
            1,
            16,
            4,
            step=1,
            label="num_draft_tokens (γ)",
            info="Tokens that the draft proposes for one target pass.",
        )
        beam_width = gr.Slider(
            1,
            16,
            4,
            step=1,
            label="beam_width (W)",
            info="Beams of the draft's search (MTAD) or of beam sampling.",
        )
        accept_threshold = gr.Slider(
            0.01,
            1,
            0.5,
            step=0.01,
            label="accept_threshold (τ)",
            info="MTAD accepts a prefix while joint p/q is above τ; lower accepts more.",
        )
    with gr.Row():
        temperature = gr.Slider(
            0,
            2,
            1,
            step=0.05,
            label="temperature",
            info="Below 1 sharpens both models; 0 always takes the most probable.",
        )
        top_k = gr.Number(10, label="top_k", info="Keeps the k most probable tokens; 0 keeps all.")
        top_p = gr.Slider(
            0.05,
            1,
            0.9,
            step=0.05,
            label="top_p",
            info="Keeps the smallest set of tokens of this probability; 1 keeps all.",
        )
    return {
        "max_new_tokens": max_new_tokens,
        "num_draft_tokens": num_draft_tokens,
        "beam_width": beam_width,
        "accept_threshold": accept_threshold,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }


def _board_functions(comparisons: Comparisons) -> list[Any]:
    """What tokens.js may ask the server; everything that it sends is checked here."""

    def resync(request: Any) -> str | None:
        """What a token view lacks that has the steps `request["have"]` of `request["run"]`."""
        comparison = comparisons.get(request.get("run")) if isinstance(request, dict) else None
        if comparison is None:
            return None
        claimed = request.get("have")
        have: dict[str, tuple[int, int]] = {}
        for name, position in claimed.items() if isinstance(claimed, dict) else ():
            whole = isinstance(position, list) and all(type(part) is int for part in position)
            if whole and len(position) == 2:
                have[name] = (position[0], position[1])
        return encode(comparison.board.message(have))

    def traces(request: Any) -> str | None:
        """The trace of `request["method"]` as JSON, or the list of all traces if that is ""."""
        comparison = comparisons.get(request.get("run")) if isinstance(request, dict) else None
        if comparison is None:
            return None
        found = comparison.traces()
        method = request.get("method")
        if method == "":
            return json.dumps([json.loads(trace.to_json()) for trace in found.values()], indent=1)
        if not isinstance(method, str) or method not in found:
            return None
        return found[method].to_json(indent=1)

    return [resync, traces]
