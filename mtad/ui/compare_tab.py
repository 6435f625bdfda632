"""The Compare tab: one prompt, two to four methods, one lane each.

Wires components to the functions of `mtad.ui.comparison`; decides nothing about decoding. Every
value of a visitor is checked on the server, by `check_request` and then by the library, and what
they say is shown word for word.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from mtad.catalogue import method_info, methods
from mtad.errors import MtadError
from mtad.ui.board import encode, error_message
from mtad.ui.comparison import play
from mtad.ui.form import (
    FIELDS,
    fields_read,
    link_of,
    read_draft,
    read_link,
    request_of,
    unread_line,
)
from mtad.ui.form_fields import field_component
from mtad.ui.names import short_name
from mtad.ui.results import results_csv
from mtad.ui.site import MODEL_SLOT, QUIET, Site, script

DEFAULT_METHODS = ["autoregressive", "speculative", "mtad"]
EXAMPLES = [
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Why is the sky blue?",
    "List five things to check before a long train journey.",
    "Explain to a ten-year-old how a bicycle stays upright.",
    "Write a Python function that says whether a word is a palindrome.",
]
# Constant, because gradio runs templates as code. All that changes is filled in by the scripts.
_BOARD = """<div class="mtad-board"></div>"""
_SHARE = """<div class="mtad-share"></div>"""

# What is typed stays in this browser tab, in the form of a link: when a server comes back after a
# restart, gradio loads the page again, and the prompt must not be lost.
_NAMES = json.dumps(["prompt", "methods", *(field.name for field in FIELDS)])
_KEEP = (
    "(...values) => { const names = "
    + _NAMES
    + """;
  const parts = new URLSearchParams();
  names.forEach((name, k) => {
    const value = values[k];
    if (value !== null && value !== undefined) {
      parts.set(name, Array.isArray(value) ? value.join(",") : String(value));
    }
  });
  try { sessionStorage.setItem("mtad-compare", parts.toString()); } catch { /* not allowed */ }
}"""
)
_RECALL = """() => {
  let draft = "", restarted = false;
  try {
    const entry = performance.getEntriesByType("navigation")[0];
    const again = Boolean(entry) && entry.type === "reload";
    const server = String(window.gradio_config.app_id);
    if (again) {
      draft = sessionStorage.getItem("mtad-compare") || "";
      const before = sessionStorage.getItem("mtad-server");
      restarted = before !== null && before !== server;
    } else sessionStorage.removeItem("mtad-compare");
    sessionStorage.setItem("mtad-server", server);
  } catch { /* storage is not allowed here */ }
  return JSON.stringify({ link: location.search, draft, restarted });
}"""


def compare_tab(site: Site, visit: gr.State, page: gr.Blocks) -> None:
    """Fills the tab. Finished traces are put on the shelf for `visit`."""
    comparisons, gallery = site.comparisons, site.gallery
    with gr.Row(elem_id="mtad-ask", equal_height=True):
        prompt = gr.Textbox(
            EXAMPLES[0],
            label="Prompt",
            lines=2,
            max_lines=10,
            placeholder="Type a question, or choose an example.",
            elem_id="mtad-prompt",
            scale=5,
            min_width=280,
        )
        with gr.Column(scale=2, min_width=280, elem_id="mtad-act"):
            example = gr.Dropdown(
                [("Choose an example…", ""), *((text, text) for text in EXAMPLES)],
                value="",
                label="Examples",
                show_label=False,
                container=False,
                filterable=False,
                elem_id="mtad-examples",
            )
            with gr.Row(elem_id="mtad-buttons"):
                run = gr.Button("Run", variant="primary", elem_id="mtad-run", min_width=90)
                stop = gr.Button(
                    "Stop", variant="stop", interactive=False, elem_id="mtad-stop", min_width=70
                )
                copy = gr.Button("Copy link", elem_id="mtad-copy", min_width=90)
    chosen = gr.CheckboxGroup(
        [(short_name(info.id), info.id) for info in methods()],
        value=DEFAULT_METHODS,
        label="Methods, two to four",
        elem_id="mtad-methods",
    )
    with gr.Accordion("Parameters", open=False, elem_id="mtad-drawer"):
        fields = _parameters(fields_read(DEFAULT_METHODS))
        unread = gr.HTML(
            unread_line(DEFAULT_METHODS),
            html_template="""<p class="mtad-unread"></p>""",
            js_on_load=script("plain.js"),
            apply_default_css=False,
        )
    share = gr.HTML(
        "",
        html_template=_SHARE,
        js_on_load=script("share.js"),
        apply_default_css=False,
        elem_id="mtad-share",
    )
    place = gr.HTML("", elem_id="mtad-place", apply_default_css=False)
    first = gallery.get("")
    board = gr.HTML(
        # With the page itself, so that the lanes stand before the first question to the server.
        first.first if first is not None else "",
        html_template=_BOARD,
        js_on_load=script("chart.js", "lanes.js", "race.js"),
        apply_default_css=False,
        elem_id="mtad-board",
        server_functions=_board_functions(site),
    )
    run_id = gr.State("")

    names = list(fields)
    form = [prompt, chosen, *fields.values()]

    def prepare(text: str, method_ids: list[str], *values: Any) -> tuple[Any, ...]:
        """Checks the request at once, also while another visitor's run holds the device."""
        parameters = dict(zip(names, values, strict=True))
        try:
            comparison = comparisons.open(request_of(text, method_ids, parameters))
        except MtadError as error:
            return gr.skip(), error_message(str(error)), gr.skip(), gr.skip(), gr.skip()
        comparison.board.status("Waiting for the device.")
        first = encode(comparison.board.message())
        try:
            address = encode({"query": link_of(text, method_ids, parameters), "copy": False})
        except MtadError:  # it runs all the same; the address bar keeps what it had
            address = encode({})
        start = gr.Button(interactive=False), gr.Button(interactive=True)
        return comparison.run_id, first, *start, address

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

    def link(text: str, method_ids: list[str], *values: Any) -> str:
        try:
            query = link_of(text, method_ids, dict(zip(names, values, strict=True)))
        except MtadError as error:
            return encode({"error": f"There is no link to copy: {error}", "at": time.time()})
        # The time makes it a new value, also for the second copy of one link.
        return encode({"query": query, "copy": True, "at": time.time()})

    def fill(packed: str) -> list[Any]:
        """Fills the form from a link, or from what was typed before the page loaded again."""
        found, word = recall(packed)
        if found is None:
            return [*(gr.skip() for _ in form), encode(word) if word else gr.skip()]
        keys = ["prompt", "methods", *names]
        return [*(found.get(key, gr.skip()) for key in keys), encode(word)]

    run.click(
        prepare,
        form,
        [run_id, board, run, stop, share],
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
    copy.click(link, form, share, queue=False, **QUIET)
    example.input(
        None,
        [example, prompt],
        [prompt, example],
        js="(text, typed) => [text || typed, '']",
        api_visibility="private",
    )
    chosen.change(
        _show_fields,
        chosen,
        [*fields.values(), unread],
        queue=False,
        trigger_mode="always_last",
        **QUIET,
    )
    gr.on([component.change for component in form], None, form, js=_KEEP, api_visibility="private")
    page.load(fill, share, [*form, share], js=_RECALL, queue=False, **QUIET)


def recall(packed: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What the form shall be filled with, None for nothing, and what is said about it.

    Args:
        packed: JSON of `_RECALL`; comes from a browser, so that it may be anything.
    """
    try:
        given = json.loads(packed)
    except (TypeError, ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        return None, {}
    draft = read_draft(given.get("draft", ""))
    if given.get("restarted") is True:
        note = "The server was started again."
        note += " Your prompt and settings are as you left them" if draft else " Nothing was typed"
        note += "; a run that was going on is lost. Press Run to run it again."
        return draft, {"note": note}
    if draft is not None:
        return draft, {}
    try:
        return read_link(given.get("link", "")), {}
    except MtadError as error:
        text = f"This link cannot be used: {error}".rstrip(".")
        return None, {"error": f"{text}. The form keeps its defaults."}


def _show_fields(method_ids: list[str]) -> list[Any]:
    """Shows the fields that the chosen methods read."""
    read = fields_read(method_ids)
    shown = [gr.update(visible=field.name in read) for field in FIELDS]
    return [*shown, unread_line(method_ids)]


def _parameters(read: set[str]) -> dict[str, Any]:
    """All parameters, by their names in `DecodeConfig`; those in `read` are shown."""
    with gr.Row(elem_id="mtad-fields"):
        return {field.name: field_component(field, field.name in read) for field in FIELDS}


def _board_functions(site: Site) -> list[Any]:
    """What the scripts of the board may ask the server; everything they send is checked here."""

    def find(request: Any) -> Any:
        """The comparison or the recording that `request["run"]` names."""
        run = request.get("run") if isinstance(request, dict) else None
        return site.comparisons.get(run) or site.gallery.by_run(run)

    def resync(request: Any) -> str | None:
        """What a token view lacks that has the steps `request["have"]` of `request["run"]`."""
        comparison = find(request)
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
        comparison = find(request)
        if comparison is None:
            return None
        found = comparison.traces()
        method = request.get("method")
        if method == "":
            return json.dumps([json.loads(trace.to_json()) for trace in found.values()], indent=1)
        if not isinstance(method, str) or method not in found:
            return None
        return found[method].to_json(indent=1)

    def table(request: Any) -> str | None:
        """The results table of `request["run"]` as CSV."""
        comparison = find(request)
        return None if comparison is None else results_csv(list(comparison.traces().values()))

    def recordings(request: Any) -> list[list[str]]:
        """[id, label] of the recorded comparisons."""
        return site.gallery.choices()

    def recording(request: Any) -> str | None:
        """The recorded comparison of that id as a message."""
        found = site.gallery.get(request) if request else None
        return None if found is None else found.first

    return [resync, traces, table, recordings, recording]
