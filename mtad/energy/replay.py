"""A meter that hands back recorded readings, so that tests need no sensor and no waiting."""

from __future__ import annotations

from collections.abc import Sequence

from mtad.energy.meter import EnergyWindows
from mtad.trace import EnergyReading


class ReplayMeter:
    """Gives the same readings after every run, unchanged.

    Args:
        decode: the reading of the decode window. Made-up ones carry the method "replay".
        end_to_end: the reading of the whole run.
        live_joules: what `joules_so_far` answers, call by call; then the last one for ever.
            Empty means None. Every `start()` goes back to the first.
    """

    def __init__(
        self,
        decode: EnergyReading,
        end_to_end: EnergyReading,
        live_joules: Sequence[float | None] = (),
    ) -> None:
        self._windows = EnergyWindows(decode, end_to_end)
        self._live_joules = tuple(live_joules)
        self._calls = 0
        self.running = False
        self.marked = False

    def start(self) -> None:
        """Goes back to the first live figure."""
        self.running, self.marked, self._calls = True, False, 0

    def mark(self) -> None:
        """Remembers that decoding began.

        Raises:
            RuntimeError: the meter was not started.
        """
        if not self.running:
            raise RuntimeError("mark() needs a running meter: call start() first.")
        self.marked = True

    def joules_so_far(self) -> float | None:
        """The next live figure."""
        if not self.running or not self._live_joules:
            return None
        index = min(self._calls, len(self._live_joules) - 1)
        self._calls += 1
        return self._live_joules[index]

    def stop(self) -> EnergyWindows:
        """The recorded readings.

        Raises:
            RuntimeError: the meter was not started.
        """
        if not self.running:
            raise RuntimeError("stop() needs a running meter: call start() first.")
        self.running = False
        return self._windows

    def describe(self) -> str:
        """Says that nothing is measured now."""
        return "Energy is replayed from recorded readings; nothing is measured now."
