"""What a meter is, and the one that turns any sensor into readings over two windows.

A `Sensor` is a source of cumulative joules that may fail; a `Meter` is what the runner talks
to. `SensorMeter` joins them and holds every rule that is the same for all sensors: windows under
one second get no figure, a sensor that fails or does not move gives None with the reason, and a
failing sensor never ends a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from mtad.trace import EnergyReading

MIN_WINDOW_SECONDS = 1.0
"""Shorter windows get no joules: a sensor that refreshes every 0.1 s would be off by over 10 %."""

LIVE_REFRESH_SECONDS = 0.1
"""`joules_so_far` asks the sensor at most this often, so that it may be called at every step."""

Clock = Callable[[], float]
"""Gives seconds from an arbitrary origin, never going backwards."""


class SensorError(Exception):
    """A sensor is absent or failed. The message becomes the reason of the reading."""


class EnergyWindows(NamedTuple):
    """The two readings of a run.

    Attributes:
        decode: from `mark()` to `stop()`.
        end_to_end: from `start()` to `stop()`.
    """

    decode: EnergyReading
    end_to_end: EnergyReading


class Meter(Protocol):
    """Measures one run at a time: start, mark, stop. Can be started again after a stop.

    A meter that was started must be stopped, also when the run fails: the call belongs into a
    `finally`. None of its methods raises because a sensor fails.
    """

    def start(self) -> None:
        """Opens the end-to-end window: called before the prefill."""

    def mark(self) -> None:
        """Opens the decode window: called when the prefill is done."""

    def joules_so_far(self) -> float | None:
        """Joules since `mark()` (since `start()` before it), for the live display.

        Cheap, and up to 0.1 s old. None where the meter cannot say, and in the first second.
        """

    def stop(self) -> EnergyWindows:
        """Closes both windows and lets go of the sensor.

        Raises:
            RuntimeError: the meter was not started.
        """

    def describe(self) -> str:
        """One line for people: how energy is measured here, or why it cannot be."""


class Sensor(Protocol):
    """A source of cumulative energy.

    Attributes:
        method: as in `EnergyReading.method`.
        scope: what the figure covers.
        note: what must be said beside every figure; None if nothing.
    """

    method: str
    scope: str
    note: str | None

    @property
    def resolution_seconds(self) -> float | None:
        """The refresh interval; None if there is no such thing."""

    def open(self) -> None:
        """Starts counting from zero.

        Raises:
            SensorError: the sensor does not answer.
        """

    def joules(self) -> float:
        """Joules since `open()`.

        Raises:
            SensorError: the sensor does not answer, or its answers make no sense.
        """

    def close(self) -> None:
        """Frees what `open()` took. May be called at any time, also twice."""

    def describe(self) -> str:
        """One line for people."""


class _Point(NamedTuple):
    seconds: float
    joules: float | None


class SensorMeter:
    """A `Meter` over any `Sensor`.

    Args:
        sensor: where the joules come from.
        clock: gives seconds; injected so that tests need not wait.
    """

    def __init__(self, sensor: Sensor, clock: Clock = time.perf_counter) -> None:
        self.sensor = sensor
        self._clock = clock
        self._started: _Point | None = None
        self._marked: _Point | None = None
        self._live: _Point | None = None
        self._failure: str | None = None

    def start(self) -> None:
        """Opens the end-to-end window. A run that was never stopped is forgotten."""
        self.sensor.close()
        self._marked = self._live = self._failure = None
        try:
            self.sensor.open()
        except SensorError as error:
            self._failure = str(error)
        self._started = self._read()

    def mark(self) -> None:
        """Opens the decode window; a second call opens it anew.

        Raises:
            RuntimeError: the meter was not started.
        """
        self._require_started("mark")
        self._marked = self._read()

    def joules_so_far(self) -> float | None:
        """Joules since `mark()`, or since `start()` before it; None where there is no figure."""
        origin = self._marked or self._started
        if origin is None or self._failure is not None:
            return None
        now = self._clock()
        if now - origin.seconds < MIN_WINDOW_SECONDS:
            return None
        if self._live is None or now - self._live.seconds >= LIVE_REFRESH_SECONDS:
            self._live = self._read()
        return _difference(origin, self._live)

    def stop(self) -> EnergyWindows:
        """Closes both windows and the sensor.

        Raises:
            RuntimeError: the meter was not started.
        """
        started = self._require_started("stop")
        try:
            end = self._read()
            return EnergyWindows(self._reading(self._marked, end), self._reading(started, end))
        finally:
            self._started = self._marked = None
            self.sensor.close()

    def describe(self) -> str:
        """One line for people: how energy is measured here, or why it cannot be."""
        return self.sensor.describe()

    def _require_started(self, call: str) -> _Point:
        if self._started is None:
            raise RuntimeError(f"{call}() needs a running meter: call start() first.")
        return self._started

    def _read(self) -> _Point:
        joules = None
        if self._failure is None:
            try:
                joules = self.sensor.joules()
            except SensorError as error:
                # After one failed read no sum can be trusted: both windows lose their figure.
                self._failure = str(error)
        return _Point(self._clock(), joules)

    def _reading(self, begin: _Point | None, end: _Point) -> EnergyReading:
        if begin is None:
            return self._unmeasured(0.0, self._failure or "The run ended before decoding began.")
        seconds = end.seconds - begin.seconds
        if self._failure is not None:
            return self._unmeasured(seconds, self._failure)
        if seconds < MIN_WINDOW_SECONDS:
            return self._unmeasured(
                seconds,
                f"Joules are given for windows of at least {MIN_WINDOW_SECONDS:g} s, but this one"
                f" lasted {seconds:.2f} s. Decode more tokens.",
            )
        joules = _difference(begin, end)
        if joules is None:
            return self._unmeasured(
                seconds, f"The sensor of {self.sensor.scope} did not move in {seconds:.2f} s."
            )
        return EnergyReading(
            joules=joules,
            seconds=seconds,
            method=self.sensor.method,
            scope=self.sensor.scope,
            resolution_s=self.sensor.resolution_seconds,
            reason=self.sensor.note,
        )

    def _unmeasured(self, seconds: float, reason: str) -> EnergyReading:
        return EnergyReading(
            joules=None,
            seconds=seconds,
            method=self.sensor.method,
            scope=self.sensor.scope,
            resolution_s=self.sensor.resolution_seconds,
            reason=reason,
        )


def _difference(begin: _Point, end: _Point) -> float | None:
    """Joules between two points; None for a sensor that failed or stood still (never 0 J)."""
    if begin.joules is None or end.joules is None or end.joules <= begin.joules:
        return None
    return end.joules - begin.joules
