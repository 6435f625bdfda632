"""The Chat tab: several turns with one method.

Wires components to `mtad.ui.conversation` and `mtad.ui.chats`; decides nothing about decoding.
Every value of a visitor is checked on the server, and what the library says of it is shown word
for word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from mtad.catalogue import methods
from mtad.errors import MtadError, PromptError
from mtad.ui.board import encode
from mtad.ui.chats import answering
from mtad.ui.conversation import Answer, Conversation, check_settings
from mtad.ui.form import BY_NAME, parameter
from mtad.ui.form_fields import field_component
from mtad.ui.site import MODEL_SLOT, QUIET, Site, script, view_function

DEFAULT_METHOD = "mtad"
_FIELDS = (
    dataclasses.replace(BY_NAME["max_new_tokens"], default=256),
    dataclasses.replace(BY_NAME["seed"], meaning="Retry takes the next ones."),
    *(
        BY_NAME[name]
        for name in (
            "num_draft_tokens",
            "beam_width",
            "accept_threshold",
            "temperature",
            "top_k",
            "top_p",
        )
    ),
)
# Constant, because gradio runs templates as code. All that changes is filled in by the script.
_THREAD = """<div class="mtad-chat"></div>"""
_LOST = (
    "The server was started again and no longer knows this page. Copy what you have typed, and"
    " load the page again."
)


def chat_tab(site: Site, visit: gr.State, page: gr.Blocks) -> None:
    """Fills the tab. Finished traces are put on the shelf for `visit`."""
    chats = site.chats
    thread = gr.HTML(
        "",
        html_template=_THREAD,
        js_on_load=script("chat.js") + view_function("drawLanes", "lanes.js"),
        apply_default_css=False,
        elem_id="mtad-chat",
        server_functions=_thread_functions(site),
    )
    place = gr.HTML("", elem_id="mtad-chat-place", apply_default_css=False)
    with gr.Row(elem_id="mtad-chat-ask"):
        question = gr.Textbox(
            label="Message",
            lines=1,
            max_lines=8,
            placeholder="Type a message. Enter sends it, Shift and Enter begin a new line.",
            elem_id="mtad-chat-question",
            scale=8,
            min_width=220,
        )
        send = gr.Button("Send", variant="primary", elem_id="mtad-chat-send", scale=1, min_width=90)
    with gr.Row(elem_id="mtad-chat-buttons"):
        small: dict[str, Any] = {"size": "md", "min_width": 90, "scale": 1}
        stop = gr.Button(
            "Stop", variant="stop", interactive=False, elem_id="mtad-chat-stop", **small
        )
        retry = gr.Button("Retry", interactive=False, elem_id="mtad-chat-retry", **small)
        other = gr.Button(
            "Retry with another method",
            interactive=False,
            elem_id="mtad-chat-other",
            **{**small, "min_width": 220, "scale": 2},
        )
        clear = gr.Button("Clear", elem_id="mtad-chat-clear", **small)
    with gr.Row():
        method = gr.Dropdown(
            [(info.title, info.id) for info in methods()],
            value=DEFAULT_METHOD,
            label="Method",
            info="Of the next answer, and of Retry with another method.",
            filterable=False,
            elem_id="mtad-chat-method",
            min_width=260,
        )
        system = gr.Textbox(
            label="System prompt (optional)",
            info="Stands before all turns; empty for the model's own.",
            lines=1,
            max_lines=6,
            elem_id="mtad-chat-system",
            min_width=260,
        )
    with gr.Accordion("Parameters of the answers", open=False, elem_id="mtad-chat-parameters"):
        fields = _parameters()
    run_id = gr.State("")
    values = list(fields.values())
    buttons = [send, stop, retry, other]

    def parameters(given: Sequence[Any]) -> dict[str, Any]:
        return {
            field.name: parameter(field, value) for field, value in zip(_FIELDS, given, strict=True)
        }

    def states(conversation: Conversation | None) -> tuple[Any, ...]:
        """Of `buttons`."""
        busy = conversation is not None and conversation.current is not None
        asked = conversation is not None and bool(conversation.turns)
        return (
            gr.Button(interactive=not busy),
            gr.Button(interactive=busy),
            *(gr.Button(interactive=asked and not busy) for _ in (retry, other)),
        )

    def begin(
        visitor: str, browser: str, make: Callable[[Conversation], Answer], *, asks: bool
    ) -> tuple[Any, ...]:
        """Opens an answer, unless something is wrong with the request: then nothing changes."""
        unchanged = (gr.skip(),) * (2 + len(buttons))
        try:
            if not visitor:
                raise PromptError(_LOST)
            conversation = chats.of(visitor)
            conversation.browser = browser
            answer = make(conversation)
            pair = site.source.pair
            try:
                config, question = answer.settings.config, conversation.turns[-1].question
                site.limits.check_request(conversation.system + question, 1, config)
                if pair is not None:
                    room = site.limits.max_prompt_characters
                    conversation.fit(pair, config.max_new_tokens, room)
            except MtadError:
                conversation.withdraw()
                raise
        except MtadError as error:
            message = encode({"chat": None, "error": str(error), "say": str(error)})
            return message, *unchanged
        shown = encode(conversation.message())
        return shown, answer.key, "" if asks else gr.skip(), *states(conversation)

    def ask(
        request: gr.Request, visitor: str, text: str, prompt: str, chosen: str, *given: Any
    ) -> tuple[Any, ...]:
        def make(conversation: Conversation) -> Answer:
            settings = check_settings(chosen, **parameters(given))
            return conversation.ask(text, prompt, settings)

        return begin(visitor, str(request.session_hash), make, asks=True)

    def again(
        request: gr.Request, visitor: str, prompt: str, *given: Any, chosen: str | None = None
    ) -> tuple[Any, ...]:
        def make(conversation: Conversation) -> Answer:
            settings = None if chosen is None else check_settings(chosen, **parameters(given))
            return conversation.retry(prompt, settings, **parameters(given))

        return begin(visitor, str(request.session_hash), make, asks=False)

    def by_another(
        request: gr.Request, visitor: str, prompt: str, chosen: str, *given: Any
    ) -> tuple[Any, ...]:
        return again(request, visitor, prompt, *given, chosen=chosen)

    def decode(key: str, visitor: str) -> Iterator[str]:
        conversation = chats.of(visitor) if visitor else None
        if conversation is None or conversation.current is None:
            return
        if conversation.current.key != key:
            return
        answer = conversation.current
        asked = conversation.turns[-1].question
        try:
            yield from answering(conversation, site.source, site.stream, chats)
        finally:
            trace = answer.lane.trace
            if trace is not None:
                site.shelf.put(visitor, f"Chat, {answer.settings.info.title}: {asked}", trace)

    def halt(visitor: str) -> tuple[Any, ...]:
        conversation = chats.of(visitor) if visitor else None
        if conversation is not None and conversation.stop():
            return encode(conversation.message()), *states(conversation)
        # The run itself sends the rest, as soon as its last pass is over.
        return gr.skip(), gr.skip(), gr.Button(interactive=False), gr.skip(), gr.skip()

    def empty(visitor: str) -> tuple[Any, ...]:
        if not visitor:
            message = encode({"chat": None, "error": _LOST, "say": _LOST})
            return message, *states(None)
        fresh = chats.clear(visitor)
        return encode(fresh.message()), *states(fresh)

    def leave(request: gr.Request) -> None:
        """The page of this connection was closed."""
        chats.leave(str(request.session_hash))

    def settle(visitor: str) -> tuple[Any, ...]:
        return states(chats.of(visitor) if visitor else None)

    outputs = [thread, run_id, question, *buttons]
    # In the queue, because only there a changed State sets off its listeners; with a slot of its
    # own, so that a bad request is answered while another visitor's run goes on.
    check: dict[str, Any] = {"concurrency_id": "check", "concurrency_limit": None, **QUIET}
    for event in (send.click, question.submit):
        event(ask, [visit, question, system, method, *values], outputs, **check)
    retry.click(again, [visit, system, *values], outputs, **check)
    other.click(by_another, [visit, system, method, *values], outputs, **check)
    run_id.change(
        decode,
        [run_id, visit],
        thread,
        concurrency_id=MODEL_SLOT,
        concurrency_limit=1,
        # Gradio's own line: the place in the queue while another visitor's run goes on.
        show_progress="minimal",
        show_progress_on=place,
        api_visibility="private",
    ).then(settle, visit, buttons, queue=False, **QUIET)
    stop.click(halt, visit, [thread, *buttons], queue=False, **QUIET)
    clear.click(empty, visit, [thread, *buttons], queue=False, **QUIET)
    page.unload(leave)


def _parameters() -> dict[str, Any]:
    """The main parameters, by their names in `DecodeConfig`."""
    with gr.Row():
        return {field.name: field_component(field) for field in _FIELDS}


def _thread_functions(site: Site) -> list[Any]:
    """What chat.js may ask the server; everything that it sends is checked here."""

    def find(request: Any) -> tuple[Conversation | None, Answer | None]:
        conversation = site.chats.find(request.get("chat")) if isinstance(request, dict) else None
        answer = None if conversation is None else conversation.find(request.get("answer"))
        return conversation, answer

    def whole(request: Any) -> str | None:
        """Everything of the conversation `request["chat"]`."""
        conversation, _ = find(request)
        return None if conversation is None else encode(conversation.message())

    def provenance(request: Any) -> str | None:
        """The lane of the answer `request["answer"]`."""
        _, answer = find(request)
        message = None if answer is None else answer.provenance()
        return None if message is None else encode(message)

    def trace(request: Any) -> str | None:
        """The trace of the answer `request["answer"]` as JSON."""
        _, answer = find(request)
        found = None if answer is None else answer.lane.trace
        return None if found is None else found.to_json(indent=1)

    return [whole, provenance, trace]
