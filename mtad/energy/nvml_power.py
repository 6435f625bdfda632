"""Power samples of a board, integrated over time by a background thread (trapezoid rule).

For boards without an energy counter. The instantaneous power (field 186) is taken where it
answers, else `nvmlDeviceGetPowerUsage`, which most boards average over one second.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from mtad.energy.meter import Clock, SensorError
from mtad.energy.nvml import MIG_NOTE, Board

POWER_INSTANT_FIELD = 186
SAMPLE_INTERVAL_SECONDS = 0.05
_MILLIWATTS_PER_WATT = 1000.0
# NVML's value types in their order: which member of the union a field value uses.
_UNION_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


class PowerIntegral:
    """Joules from power samples, and the widest gap between two of them.

    Safe to use from several threads.

    Args:
        read_watts: gives the power now.
        clock: gives seconds.
    """

    def __init__(self, read_watts: Callable[[], float], clock: Clock) -> None:
        self._read_watts = read_watts
        self._clock = clock
        self._lock = threading.Lock()
        self._last: tuple[float, float] | None = None
        self._joules = 0.0
        self._failure: str | None = None
        self.widest_gap_seconds = 0.0

    def sample(self) -> float:
        """Takes a sample and gives the joules since the first one.

        Raises:
            SensorError: this sample or an earlier one failed: the integral has a hole.
        """
        with self._lock:
            if self._failure is None:
                try:
                    self._add(self._read_watts(), self._clock())
                except SensorError as error:
                    self._failure = str(error)
            if self._failure is not None:
                raise SensorError(self._failure)
            return self._joules

    def _add(self, watts: float, seconds: float) -> None:
        if self._last is not None:
            last_watts, last_seconds = self._last
            gap_seconds = seconds - last_seconds
            self._joules += 0.5 * (watts + last_watts) * gap_seconds
            self.widest_gap_seconds = max(self.widest_gap_seconds, gap_seconds)
        self._last = (watts, seconds)


def _keep_sampling(integral: PowerIntegral, stopped: threading.Event, interval: float) -> None:
    # It holds no reference to the sensor: one that is dropped without close() is collected,
    # and its finalizer ends this thread.
    while not stopped.wait(interval):
        try:
            integral.sample()
        except SensorError:  # remembered by the integral, which raises it at the next reading
            return


class NvmlPower:
    """The integral of a board's power. One thread between `open()` and `close()`.

    Args:
        board: which board.
        clock: gives seconds.
        interval_seconds: between two samples.

    Raises:
        SensorError: the board reports no power.
    """

    method = "nvml-power"

    def __init__(
        self, board: Board, clock: Clock, interval_seconds: float = SAMPLE_INTERVAL_SECONDS
    ) -> None:
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._read_watts, self._refresh_seconds, kind = _choose_reader(board)
        self.scope = board.scope
        notes = [f"Integrated from samples of the {kind} power."]
        if board.sliced:
            notes.append(MIG_NOTE)
        self.note: str | None = " ".join(notes)
        self._integral = PowerIntegral(self._read_watts, clock)
        self._thread: threading.Thread | None = None
        self._stop_thread: Callable[[], object] = lambda: None

    @property
    def resolution_seconds(self) -> float | None:
        """The refresh interval of the power, or the widest gap between samples if that is more."""
        return max(self._refresh_seconds, self._integral.widest_gap_seconds)

    def open(self) -> None:
        """Takes the first sample and starts the thread.

        Raises:
            SensorError: the board does not answer.
        """
        self.close()
        self._integral = PowerIntegral(self._read_watts, self._clock)
        self._integral.sample()
        stopped = threading.Event()
        self._stop_thread = weakref.finalize(self, stopped.set)
        self._thread = threading.Thread(
            target=_keep_sampling,
            args=(self._integral, stopped, self._interval_seconds),
            name="mtad-nvml-power",
            daemon=True,
        )
        self._thread.start()

    def joules(self) -> float:
        """Joules since `open()`, up to a sample taken now.

        Raises:
            SensorError: a sample failed.
        """
        return self._integral.sample()

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._stop_thread()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def describe(self) -> str:
        """Names the samples and what they cover."""
        return f"Energy of {self.scope}. {self.note}"


def _choose_reader(board: Board) -> tuple[Callable[[], float], float, str]:
    """How to read watts, how often they are refreshed (seconds), and what to call them."""
    try:
        _instant_watts(board)
        return (lambda: _instant_watts(board)), 0.1, "instantaneous"
    except SensorError as instant_error:
        try:
            _average_watts(board)
        except SensorError as average_error:
            raise SensorError(f"{instant_error} {average_error}") from None
    return (lambda: _average_watts(board)), 1.0, "one-second average"


def _instant_watts(board: Board) -> float:
    value = board.call("nvmlDeviceGetFieldValues", [POWER_INSTANT_FIELD])[0]
    if value.nvmlReturn != 0:
        raise SensorError(
            f"NVML: field {POWER_INSTANT_FIELD} (instantaneous power) answers with code"
            f" {value.nvmlReturn}."
        )
    if not 0 <= value.valueType < len(_UNION_MEMBERS):
        raise SensorError(
            f"NVML: field {POWER_INSTANT_FIELD} has the unknown value type {value.valueType}."
        )
    return _watts(getattr(value.value, _UNION_MEMBERS[value.valueType]), "the instantaneous power")


def _average_watts(board: Board) -> float:
    return _watts(board.call("nvmlDeviceGetPowerUsage"), "nvmlDeviceGetPowerUsage")


def _watts(milliwatts: float, source: str) -> float:
    if milliwatts <= 0:  # a running board draws something: this is no measurement
        raise SensorError(f"NVML: {source} gives {milliwatts} mW.")
    return milliwatts / _MILLIWATTS_PER_WATT
