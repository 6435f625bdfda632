"""Text in and out of token ids: prompts to ids, ids to the pieces that a reader sees.

The rest of the library knows ids only. Text that a user typed is data: the name of a special
token in it is encoded as the characters it consists of and can open no other role.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from mtad.errors import PromptError
from mtad.fields import is_text

_ROLES = ("system", "user", "assistant")
_UNFINISHED = "\ufffd"


def encode_prompt(
    tokenizer: Any,
    *,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    raw_prompt: str | None = None,
    prompt_ids: Sequence[int] | None = None,
) -> list[int]:
    """Token ids of whichever one of the four was given.

    Args:
        tokenizer: of the pair; may be None if prompt_ids is given.
        prompt: one user turn; the chat template is applied if the model has one.
        messages: turns with "role" and "content", the last one the user's.
        raw_prompt: text that is encoded as it stands, special tokens included.
        prompt_ids: token ids.

    Raises:
        PromptError: none or several were given, it is empty, or it needs a tokenizer.
    """
    given = {
        "prompt": prompt,
        "messages": messages,
        "raw_prompt": raw_prompt,
        "prompt_ids": prompt_ids,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        shown = ", ".join(names) or "none"
        raise PromptError(
            f"Exactly one of prompt, messages, raw_prompt and prompt_ids is needed; got {shown}."
        )
    if prompt_ids is not None:
        if not len(prompt_ids):
            raise PromptError("prompt_ids is empty. Give at least one token.")
        return [_checked_id(token) for token in prompt_ids]
    if tokenizer is None:
        raise PromptError(f"{names[0]} needs a tokenizer, and this pair has none. Use prompt_ids.")
    if raw_prompt is not None:
        check_content(raw_prompt, "raw_prompt")
        return _some_ids(tokenizer(raw_prompt)["input_ids"])
    if prompt is not None:
        check_content(prompt, "The prompt")
        messages = [{"role": "user", "content": prompt}]
    turns = _checked_turns(messages or [])
    if not getattr(tokenizer, "chat_template", None):
        if len(turns) > 1:
            raise PromptError(
                "This pair has no chat template, so it takes one prompt and no conversation."
                " Use raw_prompt, or a pair of instruct models."
            )
        return _some_ids(tokenizer(turns[0]["content"], split_special_tokens=True)["input_ids"])
    return _some_ids(_encode_chat(tokenizer, turns))


def _checked_id(token: object) -> int:
    try:
        return operator.index(token)  # type: ignore[arg-type]
    except TypeError:
        shown = repr(token)[:60]
        raise PromptError(f"prompt_ids holds {shown}, but must hold whole numbers.") from None


def _check_text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise PromptError(f"{name} is {type(text).__name__}, but must be text.")
    if not is_text(text):
        raise PromptError(f"{name} holds half of a character (a lone surrogate). Remove it.")
    return text


def check_content(text: object, name: str) -> str:
    """A prompt's text, if it is one.

    Raises:
        PromptError: it is no text, or holds no word.
    """
    content = _check_text(text, name)
    if not content.strip():
        raise PromptError(f"{name} is empty. Write at least one word.")
    return content


def _checked_turns(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(
                f"messages[{index}] is {type(message).__name__}, but must have a role and content."
            )
        role = message.get("role")
        if role not in _ROLES:
            raise PromptError(
                f"messages[{index}] has role {role!r}, but must have one of: {', '.join(_ROLES)}."
            )
        check = _check_text if role == "system" else check_content  # a system turn may be empty
        content = message.get("content")
        content = check("" if content is None else content, f"messages[{index}]")
        turns.append({"role": role, "content": content})
    if not turns or turns[-1]["role"] != "user":
        raise PromptError("messages is empty or does not end with a user's turn. Add one.")
    return turns


def _some_ids(token_ids: Sequence[int]) -> list[int]:
    if not token_ids:
        raise PromptError("The prompt has no tokens. Write at least one word.")
    return list(token_ids)


def _encode_chat(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """The chat template's own tokens are special; what the turns contain is plain text."""
    rendered = _render(tokenizer, turns)
    special = [name for name in tokenizer.all_special_tokens if name]
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    reserved = set(special) | set(added)
    if not any(name in turn["content"] for turn in turns for name in reserved):
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    # Some turn spells a special token: encode the template around the turns and each turn apart.
    mark = "mtad-turn"
    while any(mark in turn["content"] for turn in turns) or mark in rendered:
        mark += "-x"
    marks = [f"{mark}-{index}." for index in range(len(turns))]
    template = _render(
        tokenizer,
        [{"role": turn["role"], "content": name} for turn, name in zip(turns, marks, strict=True)],
    )
    if [template.count(name) for name in marks] != [1] * len(marks) or (
        sorted(marks, key=template.index) != marks
    ):
        raise PromptError(
            "The chat template of this pair does not keep every turn as it stands, so that the"
            " names of special tokens in a message cannot be told from real ones. Take them out."
        )
    token_ids: list[int] = []
    for name, turn in zip(marks, turns, strict=True):
        before, _, template = template.partition(name)
        token_ids += tokenizer(before, add_special_tokens=False)["input_ids"]
        token_ids += tokenizer(
            turn["content"], add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
    return token_ids + list(tokenizer(template, add_special_tokens=False)["input_ids"])


def _render(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise PromptError(
            f"The chat template of this pair refuses these messages: {error}. Many take no system"
            " turn, or want user and assistant to alternate."
        ) from None
    return str(rendered)


# What `Detokenizer.piece` has found, so that a run need not find it again.
_pieces: weakref.WeakKeyDictionary[Any, dict[int, str]] = weakref.WeakKeyDictionary()


def _pieces_of(tokenizer: Any) -> dict[int, str]:
    try:
        return _pieces.setdefault(tokenizer, {})
    except TypeError:  # one that has no hash, or that cannot be referred to weakly
        return {}


class Detokenizer:
    """Turns emitted ids into pieces of text whose concatenation is the answer.

    A token that ends in the middle of a character adds "" and its character appears with the
    token that completes it. Special tokens add "". Without a tokenizer, ids stand for text.
    """

    def __init__(self, tokenizer: Any | None, prompt_ids: Sequence[int] = ()) -> None:
        """Starts after the prompt, whose last tokens say whether a space leads."""
        self._tokenizer = tokenizer
        self._pieces = {} if tokenizer is None else _pieces_of(tokenizer)
        self._special: frozenset[int] = frozenset()
        self._window: list[int] = []
        self._shown = 0
        if tokenizer is not None:
            added = tokenizer.added_tokens_decoder.items()
            self._special = frozenset(tokenizer.all_special_ids) | {
                token_id for token_id, token in added if token.special
            }
            self._window = [t for t in prompt_ids[-8:] if t not in self._special]
            self._shown = len(self._decode(self._window))
            self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
            self._anchor_length = len(self._decode(self._anchor))

    def push(self, token_id: int) -> str:
        """The text that an emitted token adds."""
        if self._tokenizer is None:
            return f"{token_id} "
        if token_id in self._special:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_UNFINISHED) and len(self._window) < 32:
            return ""
        new = text[self._shown :]
        self._shown = len(text)
        if len(self._window) >= 16 and not text.endswith(_UNFINISHED):
            self._window = self._window[-4:]
            self._shown = len(self._decode(self._window))
        return new

    def piece(self, token_id: int) -> str:
        """The text of a token by itself, for drafts and alternatives; special ones by name."""
        if self._tokenizer is None:
            return f"{token_id} "
        if token_id not in self._pieces:
            if token_id in self._special:
                text = str(self._tokenizer.convert_ids_to_tokens(token_id))
            else:
                text = self._decode([*self._anchor, token_id])[self._anchor_length :]
            self._pieces[token_id] = text
        return self._pieces[token_id]

    def _decode(self, token_ids: Sequence[int]) -> str:
        decoded = self._tokenizer.decode(  # type: ignore[union-attr]
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded)
