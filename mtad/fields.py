"""Checks of single values and of the fields of a frozen dataclass. Imports no torch.

A value is what JSON or a caller gave: anything at all. A number is an `int` or a finite `float`
and never a `bool`; a text is a string that can be written. What does not fit is refused with one
sentence that names the field, the value and what is allowed.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

from mtad.errors import ConfigError


def is_whole(value: object) -> bool:
    """True for an `int` that is no `bool`."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True for a whole number and for a finite `float`."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_text(value: object) -> bool:
    """True for a string of whole characters: a lone surrogate is none, and cannot be written."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Says that the field `name` holds `value`, of which at most 60 characters are shown.

    Raises:
        ConfigError: always.
    """
    try:
        shown = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        shown = "a number of thousands of digits"
    if len(shown) > 60:
        shown = shown[:57] + "..."
    raise ConfigError(f"{name} is {shown}, but must be {allowed}.")


class FieldCheck:
    """Checks the fields of one frozen dataclass, and puts in what they come to.

    All but `put` raise ConfigError for a value that is not allowed.

    Args:
        part: the dataclass.
        prefix: what messages write before a field's name, such as "training" in "training.epochs".
    """

    def __init__(self, part: Any, prefix: str = "") -> None:
        self._part = part
        self._prefix = f"{prefix}." if prefix else ""

    def refuse(self, name: str, value: object, allowed: str) -> NoReturn:
        """Refuses a value, the field's or a part of it, in the name of the field."""
        refuse(self._prefix + name, value, allowed)

    def put(self, name: str, value: object) -> None:
        """Sets the field, frozen or not."""
        object.__setattr__(self._part, name, value)

    def whole(self, name: str, low: int, high: int) -> None:
        """Wants a whole number from `low` to `high`."""
        value = getattr(self._part, name)
        if not is_whole(value) or not low <= value <= high:
            self.refuse(name, value, f"a whole number from {low} to {high}")

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        """Wants a number from `low`, or `above` it, to `high`; puts it in as a `float`."""
        value = getattr(self._part, name)
        inside = is_number(value) and (low < value if above else low <= value) and value <= high
        if not inside:
            span = f"above {low:g} and at most" if above else f"from {low:g} to"
            self.refuse(name, value, f"a number {span} {high:g}")
        self.put(name, float(value))

    def items(self, name: str, least: int, most: int, what: str) -> tuple[Any, ...]:
        """The items of a list or tuple of `least` to `most` of `what`; looks at none of them."""
        value = getattr(self._part, name)
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            count = str(least) if least == most else f"{least} to {most}"
            self.refuse(name, value, f"a list of {count} items: {what}")
        return tuple(value)
