"""The named endpoint /compare: a comparison for programs. Knows no gradio component."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from gradio import Error

from mtad.errors import MtadError, PairError
from mtad.trace import Trace
from mtad.ui.comparison import (
    DEADLINE_SECONDS,
    PairSource,
    Stream,
    check_request,
    wait_for_models,
)

# Between two answers of the generator; a client that has gone is noticed at the next one.
_BEAT_SECONDS = 1.0


def compare_endpoint(source: PairSource, stream: Stream) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function behind /compare for this pair and runner."""

    def compare(
        prompt: str,
        methods: list[str] = ["autoregressive", "speculative", "mtad"],  # noqa: B006
        max_new_tokens: int = 96,
        num_draft_tokens: int = 4,
        beam_width: int = 4,
        accept_threshold: float = 0.5,
        temperature: float = 1.0,
        top_k: int = 10,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> Iterator[dict]:
        """Answers one prompt with several decoding methods and returns their traces.

        The methods run one after another on the pair of this page. The answer is a dictionary:
        "traces" holds one trace a finished method, in the JSON form that
        mtad.Trace.from_json reads; "running" is the method at work, null at the end; "tokens"
        counts what it has emitted. The values arrive about once a second; the last is complete.

        Args:
            prompt: the question; the chat template of the pair is applied to it.
            methods: 2 to 4 ids of decoding methods, such as "autoregressive" and "mtad".
            max_new_tokens: most tokens of an answer.
            num_draft_tokens: tokens that the draft proposes for one target pass.
            beam_width: beams of the draft's search, or of beam sampling.
            accept_threshold: τ, greater than 0; MTAD accepts while joint p/q is above it.
            temperature: 0 always takes the most probable token.
            top_k: keeps the k most probable tokens; 0 keeps all.
            top_p: keeps the smallest set of tokens of this probability.
            seed: the same seed gives the same answers.
        """
        parameters = {
            "max_new_tokens": max_new_tokens,
            "num_draft_tokens": num_draft_tokens,
            "beam_width": beam_width,
            "accept_threshold": accept_threshold,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        }
        cancel = threading.Event()
        traces: list[Any] = []
        try:
            request = check_request(prompt, methods, **parameters)
            nothing = {"traces": [], "running": None, "tokens": 0}
            yield from wait_for_models(source, cancel, lambda _: nothing, _BEAT_SECONDS)
            if source.pair is None:
                raise PairError(source.status().text)
            for info in request.methods:
                tokens, sent_at = 0, time.monotonic()
                for event in stream(
                    info.id,
                    source.pair,
                    prompt=request.prompt,
                    config=request.config,
                    cancel=cancel,
                    deadline_seconds=DEADLINE_SECONDS,
                ):
                    if isinstance(event, Trace):
                        traces.append(json.loads(event.to_json()))
                        break
                    tokens += len(event.decision.emitted)
                    if time.monotonic() - sent_at >= _BEAT_SECONDS:
                        sent_at = time.monotonic()
                        yield {"traces": list(traces), "running": info.id, "tokens": tokens}
            yield {"traces": traces, "running": None, "tokens": 0}
        except MtadError as error:
            raise Error(str(error), print_exception=False) from error
        finally:
            cancel.set()

    return compare
