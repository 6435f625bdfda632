"""The Inspect tab: any trace, pass by pass.

Wires the drawing of assets/inspect.js to the pure files beside this one. The browser gets a
trace's columns at once and the passes themselves a few at a time, as they are walked. Every value
that it sends is checked here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from mtad.errors import MtadError, TraceError
from mtad.trace import Trace
from mtad.ui.board import encode
from mtad.ui.collection import Collection, read_file
from mtad.ui.gap import GapJobs, measure_gap, why_no_gap
from mtad.ui.passes import pass_view, shown, trace_view
from mtad.ui.site import MODEL_SLOT, QUIET, Site, script
from mtad.ui.what_if import strip_view, what_if_at, what_if_view
from mtad.whatif import JOINT_METHODS

# Passes that the browser gets at once.
CHUNK_PASSES = 8
GONE = (
    "The server no longer keeps this trace: it keeps the latest ones, and none over a restart."
    " Choose another one, or open its file."
)
# Constant, because gradio runs templates as code. All that changes is filled in by the script.
_ROOM = """<div class="mtad-inspect"></div>"""
_log = logging.getLogger(__name__)


def inspect_tab(site: Site, visit: gr.State, tab: gr.Tab) -> None:
    """Fills the tab; the list of traces is brought up to date whenever it is chosen."""
    collection = Collection(site.shelf)
    jobs = GapJobs()
    room = gr.HTML(
        "",
        html_template=_ROOM,
        js_on_load=script("inspect.js"),
        apply_default_css=False,
        elem_id="mtad-inspect",
        server_functions=_functions(site, collection, jobs),
    )
    # Gradio's own line: the place in the queue while another visitor's run goes on.
    place = gr.HTML("", elem_id="mtad-inspect-place", apply_default_css=False)
    job_id = gr.State("")

    def take_stock(visitor: str) -> str:
        return encode({"list": collection.listing(visitor)})

    def add_file(visitor: str, event: gr.EventData) -> str:
        """A file that the visitor has opened: checked, put on the shelf, named to the page."""
        try:
            data = event._data if isinstance(event._data, dict) else {}
            found = read_file(data.get("name"), data.get("text"))
        except MtadError as error:
            return encode({"error": f"{_file_name(event)}: {error}"})
        keys = [site.shelf.put(visitor, label, trace) for label, trace in found]
        return encode({"list": collection.listing(visitor), "open": keys[0]})

    def ask(event: gr.EventData) -> tuple[Any, Any]:
        """Checks a request for the true gap at once, also while a run holds the device."""
        data = event._data if isinstance(event._data, dict) else {}
        try:
            job = jobs.open(collection, site.source.pair, data.get("key"), data.get("i"))
        except MtadError as error:
            return gr.skip(), encode({"error": str(error)})
        return job.job_id, encode(job.message("waiting", "Waiting for the device."))

    def search(name: str) -> Iterator[str]:
        job = jobs.get(name)
        if job is not None:
            yield from map(encode, measure_gap(job, collection, site.source))

    tab.select(take_stock, visit, room, queue=False, **QUIET)
    room.open_file(add_file, visit, room, queue=False, **QUIET)
    # In the queue, because only there a changed State sets off its listeners; with a slot of its
    # own, so that a request that cannot be met is answered while another visitor's run goes on.
    room.measure_gap(
        ask, None, [job_id, room], concurrency_id="check", concurrency_limit=None, **QUIET
    )
    job_id.change(
        search,
        job_id,
        room,
        concurrency_id=MODEL_SLOT,
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=place,
        api_visibility="private",
    )


def _file_name(event: gr.EventData) -> str:
    name = event._data.get("name") if isinstance(event._data, dict) else None
    return shown(name[:80]) if isinstance(name, str) else "The file"


def _functions(site: Site, collection: Collection, jobs: GapJobs) -> list[Callable[[Any], Any]]:
    """What inspect.js may ask the server. None means that the trace is no longer kept."""

    def find(request: Any) -> tuple[str, Trace] | None:
        return collection.get(request.get("key")) if isinstance(request, dict) else None

    def answer(view: Callable[[], dict[str, Any]]) -> str:
        """A view, encoded; an error that its reader may see, or that it cannot be drawn."""
        try:
            return encode(view())
        except MtadError as error:
            return encode({"error": str(error)})
        except (ArithmeticError, ValueError):
            _log.exception("a trace cannot be drawn")
            return encode({"error": "This trace holds figures that cannot be drawn."})

    def views(trace: Trace, first: int) -> list[dict[str, Any]]:
        pair = site.source.pair
        no_gap = why_no_gap(trace, pair)
        texts_of = None if pair is None or no_gap else functools.partial(_decode, pair)
        indices = range(first, min(first + CHUNK_PASSES, len(trace.steps)))
        return [pass_view(trace, index, texts_of, no_gap) for index in indices]

    def open_trace(request: Any) -> str | None:
        """Header, strip, slider and first passes of the trace `request["key"]`."""
        found = find(request)
        if found is None:
            return None
        label, trace = found

        def view() -> dict[str, Any]:
            strip = strip_view(trace)
            first = strip["start"] - strip["start"] % CHUNK_PASSES
            return {
                "key": request["key"],
                "chunk": CHUNK_PASSES,
                "head": trace_view(trace, label),
                "strip": strip,
                "what_if": what_if_view(trace),
                "from": first,
                "passes": views(trace, first),
            }

        return answer(view)

    def passes(request: Any) -> str | None:
        """The passes of a trace from `request["from"]` on."""
        found = find(request)
        if found is None:
            return None
        first = request.get("from")
        if type(first) is not int or not 0 <= first < len(found[1].steps):
            return encode({"error": f"There is no pass {str(first)[:40]} in this trace."})
        return answer(lambda: {"from": first, "passes": views(found[1], first)})

    def what_if(request: Any) -> str | None:
        """Accepted lengths at the τ `request["tau"]`, any that the library takes."""
        found = find(request)
        if found is None:
            return None
        tau = request.get("tau")
        trace = found[1]

        def view() -> dict[str, Any]:
            if trace.method not in JOINT_METHODS or not trace.steps:
                raise TraceError("This trace has no threshold τ to change.")
            value = tau if type(tau) in (int, float) else float("nan")
            return what_if_at(trace, float(value))

        return answer(view)

    def save_trace(request: Any) -> str | None:
        """The trace as JSON, bounds that were measured included."""
        found = find(request)
        return None if found is None else found[1].to_json(indent=1)

    def stop_gap(request: Any) -> str | None:
        """Stops a search; what the page is told if it had not begun."""
        job = jobs.get(request.get("job")) if isinstance(request, dict) else None
        if job is None:
            return None
        job.cancel.set()
        if job.started:
            return encode({})
        return encode(job.message("stopped", "Stopped before it began."))

    return [open_trace, passes, what_if, save_trace, stop_gap]


def _decode(pair: Any, token_ids: Sequence[int]) -> list[str]:
    if pair.tokenizer is None:
        return [f"token {token}" for token in token_ids]
    return [str(pair.tokenizer.decode([token])) for token in token_ids]
