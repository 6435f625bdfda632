"""The board's own energy counter: millijoules since the driver was loaded (Volta and newer)."""

from __future__ import annotations

from mtad.energy.meter import SensorError
from mtad.energy.nvml import MIG_NOTE, Board

_MILLIJOULES_PER_JOULE = 1000


class NvmlCounter:
    """Differences of `nvmlDeviceGetTotalEnergyConsumption`.

    Args:
        board: which board.

    Raises:
        SensorError: the board has no such counter. Only calling it tells.
    """

    method = "nvml-counter"
    resolution_seconds: float | None = 0.1

    def __init__(self, board: Board) -> None:
        self._board = board
        self.scope = board.scope
        self.note = MIG_NOTE if board.sliced else None
        self._opened_millijoules = self._read()
        if self._opened_millijoules == 0:
            raise SensorError("NVML: the energy counter stands at 0.")

    def open(self) -> None:
        """Starts counting from zero.

        Raises:
            SensorError: the counter does not answer.
        """
        self._opened_millijoules = self._read()

    def joules(self) -> float:
        """Joules since `open()`.

        Raises:
            SensorError: the counter does not answer, or fell.
        """
        now = self._read()
        if now < self._opened_millijoules:
            raise SensorError(
                f"NVML: the energy counter fell from {self._opened_millijoules} to {now} mJ; the"
                " driver was loaded again."
            )
        return (now - self._opened_millijoules) / _MILLIJOULES_PER_JOULE

    def close(self) -> None:
        """Nothing to free."""

    def describe(self) -> str:
        """Names the counter and what it covers."""
        return (
            f"Energy is read from the counter of {self.scope}, refreshed about every"
            f" {self.resolution_seconds:g} s.{f' {self.note}' if self.note else ''}"
        )

    def _read(self) -> int:
        return int(self._board.call("nvmlDeviceGetTotalEnergyConsumption"))
