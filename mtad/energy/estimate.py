"""A labelled estimate: a stated constant draw in watts times seconds. Off by default.

It measures nothing. Its readings have the method "estimate", so that they start with ≈ wherever
they are shown and never share a chart or a ranking with a measured figure.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from mtad.energy.meter import Clock
from mtad.errors import ConfigError

ESTIMATE_WATTS_VARIABLE = "MTAD_ESTIMATE_WATTS"


class ConstantDraw:
    """Pretends a constant draw, and says so.

    Args:
        watts: the assumed draw.
        because: why nothing is measured.
        clock: gives seconds.
    """

    method = "estimate"
    resolution_seconds: float | None = None

    def __init__(self, watts: float, because: str, clock: Clock) -> None:
        self.watts = watts
        self.scope = f"an assumed constant draw of {watts:g} W"
        self.note: str | None = (
            f"Not measured: {watts:g} W, the figure given by the user, times seconds. {because}"
        )
        self._clock = clock
        self._opened_seconds = 0.0

    def open(self) -> None:
        """Starts counting from zero."""
        self._opened_seconds = self._clock()

    def joules(self) -> float:
        """Watts times the seconds since `open()`."""
        return self.watts * (self._clock() - self._opened_seconds)

    def close(self) -> None:
        """Nothing to free."""

    def describe(self) -> str:
        """Says that the figure is assumed, and why."""
        return f"Energy is estimated (≈) from {self.scope}. {self.note}"


def resolve_estimate_watts(
    given: float | None, environ: Mapping[str, str] = os.environ
) -> float | None:
    """The assumed draw in watts: the caller's, else that of the environment, else None.

    Raises:
        ConfigError: it is no number, not finite, or not greater than 0.
    """
    if given is not None:
        name, value = "estimate_watts", given
    elif environ.get(ESTIMATE_WATTS_VARIABLE, "").strip():
        name = f"The environment variable {ESTIMATE_WATTS_VARIABLE}"
        text = environ[ESTIMATE_WATTS_VARIABLE]
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(_refusal(name, repr(text[:40]))) from None
    else:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(_refusal(name, repr(value)[:40]))
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(_refusal(name, repr(value)))
    return float(value)


def _refusal(name: str, shown: str) -> str:
    return (
        f"{name} is {shown}, but must be a finite number of watts greater than 0."
        " Leave it out to get no estimate."
    )
