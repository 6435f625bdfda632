"""Picks the meter that works for a device on this machine, and remembers why others do not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtad.energy.estimate import ConstantDraw, resolve_estimate_watts
from mtad.energy.meter import Clock, Sensor, SensorError, SensorMeter
from mtad.energy.none import NoSensor
from mtad.energy.nvml import find_board, import_nvml, torch_cuda_uuid
from mtad.energy.nvml_counter import NvmlCounter
from mtad.energy.nvml_power import NvmlPower
from mtad.energy.rapl import POWERCAP_ROOT, RaplSensor


def probe(
    device: object,
    estimate_watts: float | None = None,
    *,
    clock: Clock = time.perf_counter,
    nvml: Any = None,
    cuda_uuid: Callable[[str], str] = torch_cuda_uuid,
    powercap_root: Path = POWERCAP_ROOT,
) -> SensorMeter:
    """The best meter for `device`: a sensor, else the estimate if one is asked for, else none.

    CUDA devices are tried with NVML's energy counter and then its power; the CPU with RAPL. A
    GPU's figure does not hold the CPU's and the other way round: the scope says what it covers.

    Args:
        device: a torch.device or its name: "cpu", "cuda", "cuda:1".
        estimate_watts: a constant draw to assume where nothing can be measured. None takes the
            environment variable MTAD_ESTIMATE_WATTS; without that there is no estimate.
        clock: gives seconds.
        nvml: the pynvml module; None imports it when it is needed.
        cuda_uuid: gives the UUID of a CUDA device by its name.
        powercap_root: where Linux shows the RAPL counters.

    Raises:
        ConfigError: the watts to assume are not a finite number greater than 0.
    """
    watts = resolve_estimate_watts(estimate_watts)
    try:
        sensor = _find_sensor(str(device), clock, nvml, cuda_uuid, powercap_root)
    except SensorError as error:
        reason = str(error)
        sensor = NoSensor(reason) if watts is None else ConstantDraw(watts, reason, clock)
    return SensorMeter(sensor, clock)


def _find_sensor(
    device: str, clock: Clock, nvml: Any, cuda_uuid: Callable[[str], str], powercap_root: Path
) -> Sensor:
    kind = device.partition(":")[0]
    if kind == "cpu":
        return RaplSensor(powercap_root)
    if kind != "cuda":
        raise SensorError(f"There is no meter for the device {device}, only for cpu and cuda.")
    board = find_board(import_nvml() if nvml is None else nvml, cuda_uuid(device))
    try:
        return NvmlCounter(board)
    except SensorError as counter_error:
        try:
            return NvmlPower(board, clock)
        except SensorError as power_error:
            raise SensorError(f"{counter_error} {power_error}") from None
