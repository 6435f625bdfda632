"""The Trade-off tab: a prompt set under many settings, tokens/s against perplexity or energy.

Wires components to `mtad.ui.sweeping` and `mtad.ui.tradeoff`. Every run of a sweep is an event of
its own: the event that ends changes the state `turn`, and the browser answers that by asking for
the next one, which takes its place at the end of the queue. So other visitors' runs come in
between, and the sweep of a closed tab ends with the run that was on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from mtad.acceptance.records import Setting, Task
from mtad.catalogue import methods
from mtad.errors import MtadError
from mtad.trace import Trace
from mtad.ui.board import encode, error_message
from mtad.ui.site import MODEL_SLOT, QUIET, Site, script
from mtad.ui.sweeping import (
    PROMPT_SETS,
    Sweep,
    SweepRequest,
    Sweeps,
    check_limits,
    check_sweep,
    play_turn,
    prompt_set,
)
from mtad.ui.tradeoff import label, run_list, to_csv, to_json, view

DEFAULT_METHODS = ["autoregressive", "speculative", "mtad"]
DEFAULT_PROMPTS = (6, 0)
# So many that the sweep which the form begins with fits into the limits of a hosted page.
HOSTED_PROMPTS = (4, 0)
# Constant, because gradio runs templates as code. All that changes is filled in by the scripts.
_BOARD = """<div class="mtad-sweep"></div>"""
_LINE = """<p class="mtad-plan"></p>"""


def tradeoff_tab(site: Site, visit: gr.State) -> None:
    """Fills the tab. Finished traces are put on the shelf for `visit`."""
    sweeps = Sweeps()
    with gr.Group():
        fields = _main_fields(HOSTED_PROMPTS if site.limits.hosted else DEFAULT_PROMPTS)
    with gr.Accordion("Sampling", open=False):
        fields |= _sampling_fields()
    plan = gr.HTML(
        "",
        html_template=_LINE,
        js_on_load=script("plain.js"),
        apply_default_css=False,
        elem_id="mtad-sweep-plan",
    )
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id="mtad-sweep-run", scale=3)
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="mtad-sweep-stop")
        clear = gr.Button("Clear", elem_id="mtad-sweep-clear")
    place = gr.HTML("", elem_classes="mtad-place", apply_default_css=False)
    board = gr.HTML(
        "",
        html_template=_BOARD,
        js_on_load=script("tradeoff.js"),
        apply_default_css=False,
        elem_id="mtad-sweep",
        server_functions=_board_functions(site, sweeps),
    )
    # "id:number" of the run that comes next. A changed state makes the browser ask for it.
    turn = gr.State("")
    names, inputs = list(fields), list(fields.values())
    buttons = [run, stop, clear]

    def request_of(values: tuple[Any, ...]) -> SweepRequest:
        given = dict(zip(names, values, strict=True))
        prompts = [given.pop(name) for name in PROMPT_SETS]
        request = check_sweep(
            given.pop("methods"),
            given.pop("draft_lengths"),
            given.pop("thresholds"),
            given.pop("beam_widths"),
            prompts,
            **given,
        )
        check_limits(request, site.limits)
        return request

    def plan_of(visitor: str, *values: Any) -> str:
        """What a click on Run would do."""
        try:
            request = request_of(values)
        except MtadError as error:
            return str(error)
        return _plan_text(request, sweeps.already(visitor, request))

    def prepare(visitor: str, *values: Any) -> tuple[Any, ...]:
        """Checks the request at once, also while another visitor's run holds the device."""
        try:
            sweep = sweeps.open(visitor, request_of(values))
        except MtadError as error:
            return gr.skip(), error_message(str(error)), *_skip(3)
        if not sweep.missing():
            sweep.settle()
            return gr.skip(), encode(view(sweep)), *_skip(3)
        return f"{sweep.id}:0", encode(view(sweep)), *_active(True)

    def step(current: str, visitor: str) -> Iterator[tuple[Any, ...]]:
        """One run; then the state names the next one."""
        sweep_id, _, number = current.partition(":")
        sweep = sweeps.get(sweep_id)
        if sweep is None:
            return

        def shelve(setting: Setting, task: Task, trace: Trace) -> str:
            return site.shelf.put(visitor, f"{label(setting)}: {task.id}", trace)

        for following in play_turn(sweep, int(number), site.source, site.stream, shelve):
            shown = view(sweep)
            following_turn = gr.skip() if following is None else f"{sweep.id}:{following}"
            changed = _skip(3) if shown["active"] else _active(False)
            yield following_turn, encode(shown), *changed

    def halt(current: str) -> tuple[Any, ...]:
        sweep = sweeps.get(current.partition(":")[0])
        if sweep is None:
            return _skip(4)
        sweep.stop()
        shown = view(sweep)
        if shown["active"]:
            # The run itself says that it has ended, as soon as its last pass is over.
            return gr.skip(), gr.skip(), gr.Button(interactive=False), gr.skip()
        return encode(shown), *_active(False)

    def lost(current: str) -> tuple[Any, ...]:
        sweep = sweeps.get(current.partition(":")[0])
        if sweep is None:
            return gr.skip(), *_active(False)
        sweep.interrupt()
        return encode(view(sweep)), *_active(False)

    def wipe(visitor: str, *values: Any) -> tuple[Any, ...]:
        sweeps.forget(visitor)
        return encode({"sweep": None, "error": "", "say": "Cleared."}), plan_of(visitor, *values)

    plan.value = plan_of("", *(field.value for field in inputs))
    gr.on(
        [field.change for field in inputs],
        plan_of,
        [visit, *inputs],
        plan,
        queue=False,
        trigger_mode="always_last",
        **QUIET,
    )
    run.click(
        prepare,
        [visit, *inputs],
        [turn, board, *buttons],
        # In the queue, because only there a changed State sets off its listeners; with a slot of
        # its own, so that a bad request is answered while another visitor's run goes on.
        concurrency_id="check",
        concurrency_limit=None,
        **QUIET,
    )
    running = turn.change(
        step,
        [turn, visit],
        [turn, board, *buttons],
        concurrency_id=MODEL_SLOT,
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=place,
        api_visibility="private",
    )
    running.failure(lost, turn, [board, *buttons], queue=False, **QUIET)
    # A finished or stopped sweep has changed what a further click would do.
    run_again = gr.on([stop.click], halt, turn, [board, *buttons], queue=False, **QUIET)
    run_again.then(plan_of, [visit, *inputs], plan, queue=False, **QUIET)
    clear.click(wipe, [visit, *inputs], [board, plan], queue=False, **QUIET)


def _skip(count: int) -> tuple[Any, ...]:
    return tuple(gr.skip() for _ in range(count))


def _active(active: bool) -> tuple[Any, ...]:
    """Run, Stop and Clear while a sweep goes on, or while none does."""
    return (
        gr.Button(interactive=not active),
        gr.Button(interactive=active),
        gr.Button(interactive=not active),
    )


def _plan_text(request: SweepRequest, already: int) -> str:
    settings, tasks = len(request.settings), len(request.tasks)
    text = f"{settings} × {tasks} = {request.size} runs (settings × prompts)"
    if not already:
        return text + "."
    if already == request.size:
        return text + ", all of them made already: Clear forgets them."
    return (
        text + f", {already} of them made already: Run makes the missing {request.size - already}."
    )


def _main_fields(prompts: tuple[int, int]) -> dict[str, Any]:
    chosen = gr.CheckboxGroup(
        [(info.title, info.id) for info in methods()],
        value=DEFAULT_METHODS,
        label="Methods",
        info="Each with every value below that it reads. All answer the same prompts.",
        elem_id="mtad-sweep-methods",
    )
    with gr.Row():
        thresholds = gr.Textbox(
            "0.1, 0.3, 0.5, 0.9",
            label="Values of τ",
            info="accept_threshold of MTAD: lower accepts more.",
            elem_id="mtad-sweep-tau",
        )
        draft_lengths = gr.Textbox(
            "4",
            label="Values of γ",
            info="num_draft_tokens: tokens drafted for one target pass.",
            elem_id="mtad-sweep-gamma",
        )
        beam_widths = gr.Textbox(
            "4",
            label="Values of W",
            info="beam_width: beams of the search.",
            elem_id="mtad-sweep-w",
        )
    titles = ("Prompts of every kind", "Held-out prompts")
    infos = ("From the set of the comparisons.", "From the set that mtad acceptance runs.")
    counts = {}
    with gr.Row():
        for name, title, info, default in zip(PROMPT_SETS, titles, infos, prompts, strict=True):
            there = len(prompt_set(name))
            counts[name] = gr.Slider(
                0,
                max(1, there),
                min(default, there),
                step=1,
                label=title,
                info=info,
                elem_id=f"mtad-sweep-{name}",
            )
        max_new_tokens = gr.Number(
            64, label="Tokens of an answer", info="max_new_tokens.", elem_id="mtad-sweep-tokens"
        )
    return {
        "methods": chosen,
        "thresholds": thresholds,
        "draft_lengths": draft_lengths,
        "beam_widths": beam_widths,
        **counts,
        "max_new_tokens": max_new_tokens,
    }


def _sampling_fields() -> dict[str, Any]:
    with gr.Row():
        temperature = gr.Slider(
            0, 2, 1, step=0.05, label="temperature", info="0 takes the most probable token."
        )
        top_k = gr.Number(10, label="top_k", info="Keeps the k most probable; 0 keeps all.")
        top_p = gr.Slider(
            0.05, 1, 0.9, step=0.05, label="top_p", info="Keeps this much probability."
        )
        seed = gr.Number(0, label="seed", info="Each prompt has a seed made of this.")
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}


def _board_functions(site: Site, sweeps: Sweeps) -> list[Any]:
    """What tradeoff.js may ask the server; everything that it sends is checked here."""

    def of(request: Any) -> Sweep | None:
        return sweeps.get(request.get("sweep")) if isinstance(request, dict) else None

    def runs(request: Any) -> list[Any] | None:
        """The runs of the setting with number `request["n"]`, from 1."""
        sweep = of(request)
        if sweep is None:
            return None
        number, settings = request.get("n"), sweep.request.settings
        if type(number) is not int or not 1 <= number <= len(settings):
            return None
        return run_list(sweep, settings[number - 1], lambda key: site.shelf.get(key) is not None)

    def trace(request: Any) -> str | None:
        """The trace under `request["key"]`, if it is one of this sweep and still on the shelf."""
        sweep = of(request)
        if sweep is None or all(key != request.get("key") for _, _, key in sweep.runs()):
            return None
        kept = site.shelf.get(request.get("key"))
        return None if kept is None else kept.trace.to_json(indent=1)

    def export(request: Any) -> str | None:
        """All figures, as `request["kind"]`: "csv" or "json"."""
        sweep = of(request)
        if sweep is None:
            return None
        return {"csv": to_csv, "json": to_json}.get(str(request.get("kind")), lambda _: None)(sweep)

    return [runs, trace, export]
