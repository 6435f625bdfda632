"""The methods and what their parameters mean, as plain data for programs. Knows no gradio.

The meanings are those of the docstring of `DecodeConfig`, so that there is one place for them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from typing import Any

from mtad.catalogue import methods
from mtad.config import DecodeConfig

_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


@functools.cache
def meanings() -> dict[str, str]:
    """By field of `DecodeConfig`, what it does; empty where Python runs without docstrings."""
    text = inspect.getdoc(DecodeConfig) or ""
    entries = text.partition("\nAttributes:\n")[2].partition("\n\n")[0]
    return {name: " ".join(words.split()) for name, words in _ENTRY.findall(entries)}


def method_list() -> list[dict[str, Any]]:
    """Every method with its parameters, their defaults and meanings; JSON can hold it."""
    defaults = {field.name: field.default for field in dataclasses.fields(DecodeConfig)}
    listed = []
    for info in methods():
        parameters = []
        for name in info.parameters:
            default: Any = defaults[name]
            if name == "num_draft_tokens":
                default = info.draft_length
            if isinstance(default, tuple):
                default = list(default)
            parameters.append(
                {"name": name, "default": default, "meaning": meanings().get(name, "")}
            )
        listed.append(
            {
                "id": info.id,
                "title": info.title,
                "summary": info.summary,
                "lossless": info.lossless,
                "uses_draft": info.uses_draft,
                "citation": info.citation,
                "parameters": parameters,
            }
        )
    return listed
