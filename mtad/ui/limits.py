"""What a visitor may ask of a page: little of one that is hosted for everyone, all of one's own.

`MTAD_HOSTED=1` says that a page is hosted. Every run of every tab and endpoint goes through
`Limits.guard`, so that a tab that checks nothing itself is capped all the same. Knows no gradio
and no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mtad.config import MAX_NEW_TOKENS, DecodeConfig
from mtad.errors import ConfigError, PromptError
from mtad.trace import Step, Trace

HOSTED_VARIABLE = "MTAD_HOSTED"
# Set in every Hugging Face Space: whoever starts one has a page for strangers.
SPACE_VARIABLE = "SPACE_ID"
_NEXT = "Ask for less, or run the page on a machine of your own, where there is no such limit."
_NO = ("", "0", "false", "no", "off")
_YES = ("1", "true", "yes", "on")

Stream = Callable[..., Iterator[Step | Trace]]


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
        hosted: True for a page that strangers share; its pair is fixed, too.
        max_new_tokens: of one answer.
        max_methods: of one comparison or sweep.
        max_cells: runs of one sweep: prompts × settings.
        max_prompt_characters: of a prompt, or of a conversation taken together.
        max_num_draft_tokens: of a block.
        max_beam_width: of a search.
        max_node_budget: of exact joint decoding.
        deadline_seconds: of one run, the wait for the device included.
    """

    hosted: bool = False
    max_new_tokens: int = MAX_NEW_TOKENS
    max_methods: int = 4
    max_cells: int = 400
    max_prompt_characters: int = 1_000_000
    max_num_draft_tokens: int = 64
    max_beam_width: int = 64
    max_node_budget: int = 65_536
    deadline_seconds: float = 900.0

    def check_prompt(self, text: str) -> None:
        """Raises PromptError if a prompt is longer than this page reads."""
        if len(text) > self.max_prompt_characters:
            raise PromptError(
                f"The prompt has {len(text):,} characters, but {self._here} reads at most"
                f" {self.max_prompt_characters:,}. {self._next('Shorten it')}"
            )

    def check_config(self, config: DecodeConfig) -> None:
        """Raises ConfigError if a run would be longer or wider than this page allows."""
        for name in ("max_new_tokens", "num_draft_tokens", "beam_width", "node_budget"):
            value = getattr(config, name)
            most = getattr(self, name if name.startswith("max_") else f"max_{name}")
            if isinstance(value, int) and value > most:
                raise ConfigError(
                    f"{name} is {value:,}, but {self._here} allows at most {most:,}. {self._next()}"
                )

    def check_methods(self, count: int) -> None:
        """Raises ConfigError if so many methods are too many for one request."""
        if count > self.max_methods:
            raise ConfigError(
                f"{count} methods are chosen, but {self._here} runs at most {self.max_methods} of"
                f" them in one go. {self._next('Untick some')}"
            )

    def check_cells(self, count: int) -> None:
        """Raises ConfigError if a sweep of so many runs is too large."""
        if count > self.max_cells:
            raise ConfigError(
                f"The sweep has {count:,} runs, but {self._here} does at most {self.max_cells:,}."
                f" {self._next('Take fewer prompts, methods or values')}"
            )

    def check_request(self, prompt: str, methods: int, config: DecodeConfig) -> None:
        """Raises ConfigError or PromptError if a comparison is more than this page allows."""
        self.check_prompt(prompt)
        self.check_methods(methods)
        self.check_config(config)

    def guard(self, stream: Stream) -> Stream:
        """`stream`, which has the signature of `mtad.runner.stream`, within these limits."""

        def guarded(method: str, pair: Any, **kwargs: Any) -> Any:
            texts = [kwargs.get("prompt"), kwargs.get("raw_prompt")]
            turns = kwargs.get("messages") or ()
            texts += [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
            self.check_prompt("".join(text for text in texts if isinstance(text, str)))
            self.check_config(kwargs.get("config") or DecodeConfig())
            asked = kwargs.pop("deadline_seconds", None)
            seconds = self.deadline_seconds if asked is None else min(asked, self.deadline_seconds)
            return stream(method, pair, deadline_seconds=seconds, **kwargs)

        return guarded

    def note(self) -> str:
        """What a visitor should know before asking; "" where there is nothing to say."""
        if not self.hosted:
            return ""
        return (
            f"Hosted page: at most {self.max_new_tokens:,} tokens an answer,"
            f" {self.max_methods} methods, {self.max_cells:,} runs a sweep; one pair."
        )

    @property
    def _here(self) -> str:
        return "this hosted page" if self.hosted else "this page"

    def _next(self, first: str = "") -> str:
        if not self.hosted:
            return f"{first or 'Ask for less'}."
        return _NEXT if not first else f"{first}, or{_NEXT.partition(', or')[2]}"


HOSTED = Limits(
    hosted=True,
    max_new_tokens=256,
    max_methods=3,
    max_cells=24,
    max_prompt_characters=8_000,
    max_num_draft_tokens=16,
    max_beam_width=16,
    max_node_budget=4_096,
    deadline_seconds=120.0,
)


def limits_from_environment() -> Limits:
    """The limits of this process, by `MTAD_HOSTED`; where that is unset, a Space is hosted.

    Raises:
        ConfigError: the variable is neither yes nor no.
    """
    in_space = "1" if os.environ.get(SPACE_VARIABLE) else ""
    value = os.environ.get(HOSTED_VARIABLE, in_space).strip().lower()
    if value not in _NO + _YES:
        raise ConfigError(
            f"{HOSTED_VARIABLE} is {value[:60]!r}, but must be 1 for a hosted page, or 0 or unset"
            " for one of your own."
        )
    return HOSTED if value in _YES else Limits()
