"""One visitor's conversation: turns, answers, what the model is told of them, what the page shows.

A turn is a question with one answer or more: whoever retries gets another answer, and the last
one that has a text counts. Pure but for a lock: the decoding generator writes while a server
function reads. Knows no gradio and imports no torch before something is decoded.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import threading
from dataclasses import dataclass, field
from typing import Any

from mtad.catalogue import MethodInfo, method_info
from mtad.config import DecodeConfig
from mtad.errors import ConfigError, PromptError
from mtad.trace import EnergyReading, Step, Trace
from mtad.ui.board import Board
from mtad.ui.comparison import config_of
from mtad.ui.lanes import Lane
from mtad.ui.steps import DASH, duration, number

# So many turns that a browser still scrolls smoothly; the context is full long before.
MAX_TURNS = 500


@dataclass(frozen=True)
class Settings:
    """How an answer is to be made, checked.

    Attributes:
        info: the method.
        config: its parameters.
    """

    info: MethodInfo
    config: DecodeConfig


def check_settings(method: str, **parameters: Any) -> Settings:
    """Checks method and parameters.

    Args:
        method: an id of `mtad.methods()`.
        parameters: fields of `DecodeConfig`; None means the default.

    Raises:
        ConfigError: a parameter is out of range, or the method unknown.
    """
    return Settings(method_info(method), config_of(parameters))


class Answer:
    """One answer, grown step by step.

    Attributes:
        key: names it towards the browser; nobody can guess it.
        settings: how it is made.
        lane: the same run as the Compare tab sees it.
        epoch: counts how often the text became another; it only grows otherwise.
        text: without what is provisional.
        cached: tokens of the prompt that were in the cache, and of the prompt; None if unknown.
    """

    def __init__(self, settings: Settings) -> None:
        self.key = secrets.token_hex(16)
        self.settings = settings
        self.lane = Lane(settings.info, settings.config)
        self.epoch = 0
        self.text = ""
        self.cached: tuple[int, int] | None = None
        self._provisional = ""

    def add(self, step: Step) -> None:
        """A step has happened."""
        self.lane.add(step)
        if step.decision.provisional:
            self._provisional = step.text
        else:
            self._provisional = ""
            self.text += step.text

    def finish(self, trace: Trace) -> None:
        """The run has ended; the trace is the truth."""
        self.lane.finish(trace)
        self._provisional = ""
        if not trace.text.startswith(self.text):
            self.epoch += 1
        self.text = trace.text

    def view(self, start: int = 0) -> dict[str, Any]:
        """What is drawn, with the text from `start` on."""
        trace = self.lane.trace
        return {
            "key": self.key,
            "title": self.settings.info.title,
            "state": self.lane.state,
            "epoch": self.epoch,
            "from": start,
            "text": self.text[start:],
            "provisional": self._provisional,
            "figures": self.figures(),
            "message": "" if self.lane.state == "waiting" else self.lane.message,
            "trace": trace is not None and bool(trace.steps),
        }

    def figures(self) -> list[list[str]]:
        """[figure, unit, why it is missing or how it came about] for the line below the text."""
        trace = self.lane.trace
        if trace is None:
            if self.lane.state != "running" or not self.text:
                return []
            live = {meter["id"]: meter["value"] for meter in self.lane.meters()}
            return [[live["rate"], "tokens/s", ""], [live["block"], "tokens per target pass", ""]]
        summary = trace.summary
        figures = [
            [number(summary.tokens_per_second, 1), "tokens/s", "too short to measure"],
            [number(summary.block_efficiency), "tokens per target pass", "no target pass"],
            [joules(trace.energy), "J", trace.energy.reason or "not measured"],
        ]
        figures = [[value, unit, why if value == DASH else ""] for value, unit, why in figures]
        figures.append([f"{summary.tokens:,}", "tokens", ""])
        if summary.time_to_first_token_seconds is not None:
            reused = "" if self.cached is None else "{:,} of {:,} prompt tokens in the cache"
            figures.append(
                [
                    duration(summary.time_to_first_token_seconds),
                    "to the first token",
                    reused.format(*self.cached or ()),
                ]
            )
        return figures

    def provenance(self) -> dict[str, Any] | None:
        """The message that draws this answer in a lane; None before it is finished."""
        trace = self.lane.trace
        if trace is None:
            return None
        board = Board(self.key, [self.settings.info], trace.config)
        board.finish(self.settings.info.id, trace)
        return board.message()


def joules(energy: EnergyReading) -> str:
    """Joules of an answer; an estimate starts with ≈."""
    if energy.joules is None:
        return DASH
    return ("≈ " if energy.estimated else "") + number(energy.joules, 1)


@dataclass
class Turn:
    """A question and its answers.

    Attributes:
        question: what the visitor typed.
        answers: the last one counts, unless it has no text and an earlier one has.
        dropped: True once the context was too full for this turn.
    """

    question: str
    answers: list[Answer] = field(default_factory=list)
    dropped: bool = False

    @property
    def counts(self) -> Answer | None:
        """The answer that the conversation goes on from; None while there is none."""
        return next((answer for answer in reversed(self.answers) if answer.text.strip()), None)


class Conversation:
    """Turns, the system prompt, and the run that is going on.

    Attributes:
        chat_id: names it towards the browser; nobody can guess it.
        generation: later conversations of one page have higher ones.
        browser: the connection that asked last.
        system: the system prompt; "" for the template's own.
        turns: from the first to the last.
        current: the answer that is being made, or waits for the device; None between runs.
        cancel: stops the current run.
        closed: True once it was cleared: nothing of it is shown any more.
    """

    def __init__(self, generation: int = 0) -> None:
        self.chat_id = secrets.token_hex(16)
        self.generation = generation
        self.browser = ""
        self.system = ""
        self.turns: list[Turn] = []
        self.current: Answer | None = None
        self.cancel = threading.Event()
        self.closed = False
        self._lock = threading.RLock()
        self._tick = 0
        self._version = 0
        self._status = ""
        self._error = ""
        self._spoken = ""

    # ------------------------------------------------------------------ what a visitor asks for

    def ask(self, question: str, system: str, settings: Settings) -> Answer:
        """A new turn.

        Raises:
            PromptError: the question is empty, or an answer is still being made.
        """
        if not isinstance(question, str) or not question.strip():
            raise PromptError("The message is empty. Type a question.")
        with self._lock:
            self._check_idle()
            if len(self.turns) >= MAX_TURNS:
                raise PromptError(
                    f"This conversation has {MAX_TURNS} turns, the most that are kept. Press Clear"
                    " and start a new one."
                )
            self.system = system if isinstance(system, str) else ""
            # A question that nothing came of is not asked again beside the new one.
            self.turns.append(Turn(question))
            return self._open(settings)

    def retry(self, system: str, settings: Settings | None, **parameters: Any) -> Answer:
        """Another answer to the last question.

        Args:
            system: the system prompt.
            settings: of another method; None takes the method of the last answer again, with
                `parameters` and a seed that was not used for it, so that it can be another text.
            parameters: fields of `DecodeConfig`.

        Raises:
            PromptError: there is no question, or an answer is still being made.
            ConfigError: the last answer is by the method of `settings`, or a bad parameter.
        """
        with self._lock:
            self._check_idle()
            if not self.turns:
                raise PromptError("There is nothing to retry yet. Type a question and press Send.")
            turn = self.turns[-1]
            last = turn.answers[-1].settings
            if settings is None:
                settings = check_settings(last.info.id, **parameters)
                settings = Settings(settings.info, _fresh_seed(settings, turn.answers))
            elif settings.info is last.info:
                raise ConfigError(
                    f"The last answer is by {last.info.title} already. Choose another method in"
                    " the list, or press Retry for another answer by this one."
                )
            self.system = system if isinstance(system, str) else ""
            return self._open(settings)

    def _check_idle(self) -> None:
        if self.current is not None:
            raise PromptError(
                "An answer is still being made. Wait for it, or press Stop; what you typed stays."
            )

    def _open(self, settings: Settings) -> Answer:
        self.current = Answer(settings)
        self.turns[-1].answers.append(self.current)
        self.cancel = threading.Event()
        self._status = "Waiting for the device."
        self._error = self._spoken = ""
        self._version += 1
        return self.current

    def withdraw(self) -> None:
        """Takes the current question back, as if it had not been asked."""
        with self._lock:
            turn = self.turns[-1]
            turn.answers.pop()
            if not turn.answers:
                self.turns.pop()
            self._settle()

    # ------------------------------------------------------------------ what the model is told

    def messages(self) -> list[dict[str, str]]:
        """The turns for `mtad.stream`: what was dropped, or has no text, is left out."""
        with self._lock:
            told = [{"role": "system", "content": self.system}] if self.system.strip() else []
            for turn in self.turns[:-1]:
                answer = turn.counts
                if turn.dropped or answer is None:
                    continue
                told.append({"role": "user", "content": turn.question})
                told.append({"role": "assistant", "content": answer.text})
            told.append({"role": "user", "content": self.turns[-1].question})
            return told

    def fit(self, pair: Any, max_new_tokens: int, max_characters: float = math.inf) -> None:
        """Drops the oldest turns while prompt and answer do not fit into the context together.

        They also drop where the prompt has more than `max_characters`, which a page may set.

        An answer asks for `max_new_tokens`, but for no more than half of the context. When turns
        have to go, a quarter of the room goes with them: dropping one turn each time would move
        the beginning of every prompt, and nothing of the cache could be used again.

        Raises:
            PromptError: the last question alone, with the system prompt, does not fit.
        """
        from mtad.text import encode_prompt

        if pair.tokenizer is None:
            return
        context = pair.context_length
        room = context - min(max_new_tokens, context // 2)

        def size() -> tuple[int, int]:
            told = self.messages()
            characters = sum(len(one["content"]) for one in told)
            return len(encode_prompt(pair.tokenizer, messages=told)), characters

        with self._lock:
            tokens, characters = size()
            share = 1.0 if tokens <= room and characters <= max_characters else 0.75
            gone = []
            for turn in self.turns[:-1]:
                if tokens <= share * room and characters <= share * max_characters:
                    break
                if not turn.dropped:
                    turn.dropped = True
                    gone.append(turn)
                    tokens, characters = size()
            self._version += bool(gone)
            if tokens >= context:
                for turn in gone:  # it was of no use
                    turn.dropped = False
                what = "message with the system prompt" if self.system.strip() else "message"
                raise PromptError(
                    f"The {what} alone has {tokens:,} tokens, {tokens - context + 1:,} too many:"
                    f" the context of this pair holds {context:,}, one of them for the answer."
                    " Shorten it."
                )

    # ------------------------------------------------------------------ what happens

    def status(self, text: str) -> None:
        """Sets the line below the turns."""
        with self._lock:
            self._status = text

    # A run that was stopped while it waited may report when another answer is being made.

    def start(self, answer: Answer) -> None:
        """The run of an answer has the device."""
        with self._lock:
            if answer is self.current:
                answer.lane.start("reading the prompt")
                self._status = f"{answer.settings.info.title} is answering."

    def add(self, answer: Answer, step: Step) -> None:
        """A step of the run."""
        with self._lock:
            if answer is self.current:
                answer.add(step)

    def finish(self, answer: Answer, trace: Trace, cached: tuple[int, int] | None = None) -> None:
        """The run has ended with a trace."""
        with self._lock:
            if answer is not self.current:
                return
            answer.finish(trace)
            answer.cached = cached
            self._spoken = answer.lane.spoken()
            self._settle()

    def fail(self, answer: Answer, message: str, *, aloud: bool = True) -> None:
        """The run has ended without a trace; `aloud` shows why above the text field."""
        with self._lock:
            if answer is not self.current:
                return
            answer.lane.fail(message)
            if aloud:
                self._error = message
            self._spoken = answer.lane.spoken()
            self._settle()

    def stop(self) -> bool:
        """The Stop button; True if the run had not begun and is over at once."""
        with self._lock:
            self.cancel.set()
            if self.current is None or self.current.lane.state != "waiting":
                return False
            self.fail(self.current, "stopped before it began", aloud=False)
            return True

    def close(self) -> None:
        """Clears it for good, and stops its run."""
        with self._lock:
            self.closed = True
            self.cancel.set()

    def _settle(self) -> None:
        self.current = None
        self._status = ""
        self._version += 1

    # ------------------------------------------------------------------ what is shown

    def find(self, key: object) -> Answer | None:
        """The answer of a key."""
        with self._lock:
            found = (answer for turn in self.turns for answer in turn.answers)
            return next((answer for answer in found if answer.key == key), None)

    def message(self, have: tuple[int, int, int] | None = None) -> dict[str, Any]:
        """What a reader needs who has `have`: version, epoch and characters of the current answer.

        Everything, unless all that is new is text of the current answer.
        """
        with self._lock:
            self._tick += 1
            message: dict[str, Any] = {
                "chat": self.chat_id,
                "generation": self.generation,
                "tick": self._tick,
                "version": self._version,
                "status": self._status,
                "error": self._error,
                "say": self._spoken,
                "busy": self.current is not None,
            }
            if have is not None and have[0] == self._version and self.current is not None:
                answer = self.current
                start = have[2] if have[1] == answer.epoch and have[2] <= len(answer.text) else 0
                message["answer"] = answer.view(start)
            else:
                message["turns"] = [self._turn(turn) for turn in self.turns]
                message["notes"] = self._notes()
            return message

    def position(self) -> tuple[int, int, int]:
        """Version, epoch and characters of the current answer, as they are now."""
        with self._lock:
            answer = self.current
            return (self._version, *((answer.epoch, len(answer.text)) if answer else (0, 0)))

    def _turn(self, turn: Turn) -> dict[str, Any]:
        return {
            "question": turn.question,
            "dropped": turn.dropped,
            "answers": [answer.view() for answer in turn.answers],
        }

    def _notes(self) -> list[str]:
        """What must be read beside the figures, each once."""
        traces = [
            answer.lane.trace
            for turn in self.turns
            for answer in turn.answers
            if answer.lane.trace is not None
        ]
        reasons = [
            f"– J: {trace.energy.reason or 'not measured'}"
            for trace in traces
            if trace.energy.joules is None
        ]
        return list(dict.fromkeys(reasons))


def _fresh_seed(settings: Settings, answers: list[Answer]) -> DecodeConfig:
    """The config with the first seed from its own on that no answer of this method had."""
    info, config = settings.info, settings.config
    used = {answer.settings.config.seed for answer in answers if answer.settings.info is info}
    seed = config.seed
    while seed in used:
        seed = (seed + 1) % 2**32
    return dataclasses.replace(config, seed=seed)
