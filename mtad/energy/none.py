"""The meter of a machine without a sensor: it keeps the time and says why there are no joules."""

from __future__ import annotations

import time

from mtad.energy.meter import Clock, SensorError, SensorMeter


class NoSensor:
    """A sensor that never answers.

    Args:
        reason: why nothing can be measured; it stands in every reading.
    """

    method = "none"
    scope = "nothing"
    resolution_seconds: float | None = None
    note: str | None = None

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def open(self) -> None:
        """Raises SensorError with the reason, always."""
        raise SensorError(self.reason)

    def joules(self) -> float:
        """Raises SensorError with the reason, always."""
        raise SensorError(self.reason)

    def close(self) -> None:
        """Nothing to free."""

    def describe(self) -> str:
        """Why energy cannot be measured here."""
        return f"Energy cannot be measured here. {self.reason}"


def none_meter(reason: str, clock: Clock = time.perf_counter) -> SensorMeter:
    """A meter whose readings have the right seconds, no joules, and `reason`."""
    return SensorMeter(NoSensor(reason), clock)
