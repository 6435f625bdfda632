"""The named endpoints for programs: /compare, /generate and /methods. Knows no gradio component.

Values arrive as a client sends them, so that everything is checked here or by the library, whose
messages are handed on word for word.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from gradio import Error

from mtad.catalogue import method_info
from mtad.config import DecodeConfig
from mtad.errors import MtadError, PairError, PromptError
from mtad.trace import Step, Trace
from mtad.ui.comparison import (
    DEADLINE_SECONDS,
    PairSource,
    Stream,
    check_request,
    wait_for_models,
)
from mtad.ui.limits import Limits
from mtad.ui.parameters import method_list

# Between two answers of a generator; a client that has gone is noticed at the next one.
_BEAT_SECONDS = 1.0
# Between two answers of /generate, whose text is read while it grows.
_TEXT_SECONDS = 0.2


def compare_endpoint(
    source: PairSource, stream: Stream, limits: Limits
) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function behind /compare for this pair and runner."""

    def compare(
        prompt: str,
        methods: list[str] = ["autoregressive", "speculative", "mtad"],  # noqa: B006
        max_new_tokens: int = 96,
        num_draft_tokens: int | str | None = "auto",
        beam_width: int | str = 4,
        accept_threshold: float = DecodeConfig.accept_threshold,
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
            num_draft_tokens: the draft's length, "auto", or null for each method's own.
            beam_width: beams of the draft's search, or of beam sampling; "auto" with
                num_draft_tokens "auto".
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
        with _stopped_at_the_end() as cancel:
            request = check_request(prompt, methods, **parameters)
            limits.check_request(request.prompt, len(request.methods), request.config)
            nothing = {"traces": [], "running": None, "tokens": 0}
            yield from wait_for_models(source, cancel, lambda _: nothing, _BEAT_SECONDS)
            pair, traces = _pair(source), []
            for info in request.methods:
                tokens = 0
                for event in _beats(
                    stream(
                        info.id,
                        pair,
                        prompt=request.prompt,
                        config=request.config,
                        cancel=cancel,
                        deadline_seconds=DEADLINE_SECONDS,
                    ),
                    _BEAT_SECONDS,
                ):
                    if isinstance(event, Trace):
                        traces.append(json.loads(event.to_json()))
                        break
                    tokens = sum(len(step.decision.emitted) for step in event)
                    yield {"traces": list(traces), "running": info.id, "tokens": tokens}
            yield {"traces": traces, "running": None, "tokens": 0}

    return compare


def generate_endpoint(
    source: PairSource, stream: Stream, limits: Limits
) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function behind /generate for this pair and runner."""

    def generate(
        prompt: str = "",
        messages: list[dict] = [],  # noqa: B006
        method: str = "mtad",
        max_new_tokens: int = 128,
        num_draft_tokens: int | str | None = "auto",
        beam_width: int | str = 4,
        accept_threshold: float = DecodeConfig.accept_threshold,
        temperature: float = 1.0,
        top_k: int = 10,
        top_p: float = 0.9,
        seed: int = 0,
        k_config: list[int] | str = "auto",
        replacement: bool = True,
        fallback_threshold: float = 0.6,
        rollback_threshold: float = 5.0,
        typical_epsilon: float = 0.09,
        typical_delta: float = 0.3,
        search: str = "beam",
        joint_temperature: float = 1.0,
        node_budget: int = 4096,
        iteration_costs: list | None = None,
        tree_costs: list[float] | None = None,
        ignore_eos: bool = False,
        stop: list[str] = [],  # noqa: B006
        with_trace: bool = False,
    ) -> Iterator[dict]:
        """Answers a prompt or a conversation with one decoding method; the text arrives in parts.

        Each value is a dictionary that replaces the one before: "text" so far, "tokens",
        "target_passes", "tokens_per_second", "tokens_per_pass" and "done". The last one has
        "done" true and adds "stop_reason", "acceptance_rate", "perplexity", "joules" (null with
        "joules_reason" where they cannot be measured), and "trace" if it was asked for, in the
        JSON form that mtad.Trace.from_json reads. What a method does not read is ignored;
        /methods says what each of them reads, and what the parameters mean.

        Args:
            prompt: one question, or
            messages: a conversation: dictionaries with "role" (system, user, assistant) and
                "content", the last one the user's.
            method: the id of a decoding method, such as "mtad".
            max_new_tokens: most tokens of the answer.
            num_draft_tokens: the draft's length, "auto", or null for the method's own.
            beam_width: beams of the draft's search, or of the target's; "auto" with
                num_draft_tokens "auto".
            accept_threshold: τ, greater than 0; MTAD accepts while joint p/q is above it.
            temperature: 0 always takes the most probable token.
            top_k: keeps the k most probable tokens; 0 keeps all.
            top_p: keeps the smallest set of tokens of this probability.
            seed: the same seed gives the same answer.
            k_config: children of a node by depth of the tree of specinfer, or "auto".
            replacement: children are drawn with replacement, of specinfer.
            fallback_threshold: the draft stops where it is less sure, of bild.
            rollback_threshold: nats over which a draft token is replaced, of bild.
            typical_epsilon: the ceiling of the acceptance threshold, of typical.
            typical_delta: the factor in the acceptance threshold, of typical.
            search: "beam" or "exact", of mtjd.
            joint_temperature: of the exact search of mtjd.
            node_budget: most nodes that one exact search may forward.
            iteration_costs: of γ = 0, 1, … for num_draft_tokens "auto", or rows of them for
                beam_width "auto"; null has them measured.
            tree_costs: for k_config "auto"; null has them measured.
            ignore_eos: go on after the end of the text, to max_new_tokens.
            stop: strings that end the text.
            with_trace: true adds the whole trace to the last value.
        """
        with _stopped_at_the_end() as cancel:
            info = method_info(method)
            config = DecodeConfig(
                max_new_tokens=max_new_tokens,
                num_draft_tokens=num_draft_tokens,  # type: ignore[arg-type]
                beam_width=beam_width,  # type: ignore[arg-type]
                accept_threshold=accept_threshold,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                k_config=k_config,  # type: ignore[arg-type]
                replacement=replacement,
                fallback_threshold=fallback_threshold,
                rollback_threshold=rollback_threshold,
                typical_epsilon=typical_epsilon,
                typical_delta=typical_delta,
                search=search,  # type: ignore[arg-type]
                joint_temperature=joint_temperature,
                node_budget=node_budget,
                iteration_costs=iteration_costs,  # type: ignore[arg-type]
                tree_costs=tree_costs,  # type: ignore[arg-type]
                ignore_eos=ignore_eos,
                stop=stop,  # type: ignore[arg-type]
            )
            limits.check_config(config)
            request = _question(prompt, messages)
            view = _Growing()
            yield from wait_for_models(source, cancel, lambda _: view.value(), _BEAT_SECONDS)
            for event in _beats(
                stream(
                    info.id,
                    _pair(source),
                    **request,
                    config=config,
                    cancel=cancel,
                    deadline_seconds=DEADLINE_SECONDS,
                ),
                _TEXT_SECONDS,
            ):
                if isinstance(event, Trace):
                    yield _finished(event, with_trace)
                    break
                view.read(event)
                yield view.value()

    return generate


def methods_endpoint() -> Callable[[], list[dict[str, Any]]]:
    """The function behind /methods."""

    def methods() -> list[dict]:
        """Lists the decoding methods and the parameters that each of them reads.

        Each method is a dictionary: "id", "title", "summary", "lossless" (its text has exactly
        the distribution of sampling the target), "uses_draft", "citation" and "parameters", a
        list of dictionaries with "name", "default" and "meaning".
        """
        return method_list()

    return methods


class _Growing:
    """The text of a run that goes on, and its figures."""

    def __init__(self) -> None:
        self._text = self._provisional = ""
        self._tokens = self._passes = self._seen = 0
        self._seconds = 0.0

    def read(self, steps: list[Step]) -> None:
        """Takes in the steps that are new among all steps of the run."""
        for step in steps[self._seen :]:
            self._passes += 1
            self._seconds = step.seconds
            if step.decision.provisional:
                self._provisional = step.text
                continue
            self._provisional = ""
            self._text += step.text
            self._tokens += len(step.decision.emitted)
        self._seen = len(steps)

    def value(self) -> dict[str, Any]:
        """As /generate sends it."""
        return {
            "text": self._text + self._provisional,
            "tokens": self._tokens,
            "target_passes": self._passes,
            "tokens_per_second": self._tokens / self._seconds if self._seconds else None,
            "tokens_per_pass": self._tokens / self._passes if self._passes else None,
            "done": False,
        }


def _finished(trace: Trace, with_trace: bool) -> dict[str, Any]:
    summary = trace.summary
    value = {
        "text": trace.text,
        "tokens": summary.tokens,
        "target_passes": summary.target_passes,
        "tokens_per_second": summary.tokens_per_second,
        "tokens_per_pass": summary.block_efficiency,
        "done": True,
        "stop_reason": trace.stop_reason,
        "acceptance_rate": summary.acceptance_rate,
        "perplexity": summary.perplexity,
        "joules": trace.energy.joules,
        "joules_reason": trace.energy.reason,
    }
    if with_trace is True:
        value["trace"] = json.loads(trace.to_json())
    return value


def _question(prompt: object, messages: object) -> dict[str, Any]:
    """What the runner is asked: a prompt or messages, checked as far as needed to choose."""
    if not messages:
        if not isinstance(prompt, str) or not prompt.strip():
            raise PromptError("There is no question. Give prompt, or messages.")
        return {"prompt": prompt}
    if prompt:
        raise PromptError("Both prompt and messages are given. Leave one of them out.")
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
        raise PromptError(
            f"messages is {str(messages)[:60]!r}, but must be a list of dictionaries with role and"
            " content."
        )
    return {"messages": messages}


@contextlib.contextmanager
def _stopped_at_the_end() -> Iterator[threading.Event]:
    """The switch of a run, set in the end; the library's errors become messages for the client."""
    cancel = threading.Event()
    try:
        yield cancel
    except MtadError as error:
        raise Error(str(error), print_exception=False) from error
    finally:
        cancel.set()


def _beats(events: Any, seconds: float) -> Generator[list[Step] | Trace, None, None]:
    """The steps so far, at most every so many seconds, and at last the trace."""
    steps: list[Step] = []
    sent_at = time.monotonic()
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Trace):
                yield event
                return
            steps.append(event)
            if time.monotonic() - sent_at >= seconds:
                sent_at = time.monotonic()
                yield steps


def _pair(source: PairSource) -> Any:
    pair = source.pair
    if pair is None:
        raise PairError(source.status().text)
    return pair
