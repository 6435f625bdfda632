"""Energy over a window of decoding: the meters, and `probe`, which picks the one that works here.

Every meter gives an `EnergyReading` for two windows at once: decoding, and everything since the
start of the prefill. Where nothing can be measured the reading says None and why, never 0 J.
Importing this package loads neither torch nor pynvml.
"""

from mtad.energy.estimate import ESTIMATE_WATTS_VARIABLE
from mtad.energy.meter import (
    MIN_WINDOW_SECONDS,
    EnergyWindows,
    Meter,
    Sensor,
    SensorError,
    SensorMeter,
)
from mtad.energy.none import none_meter
from mtad.energy.probe import probe
from mtad.energy.replay import ReplayMeter
from mtad.trace import EnergyReading

__all__ = [
    "ESTIMATE_WATTS_VARIABLE",
    "MIN_WINDOW_SECONDS",
    "EnergyReading",
    "EnergyWindows",
    "Meter",
    "ReplayMeter",
    "Sensor",
    "SensorError",
    "SensorMeter",
    "none_meter",
    "probe",
]
