"""Finds the NVML board behind a CUDA device, by UUID. NVML itself comes as a parameter.

CUDA and NVML number devices differently, and CUDA_VISIBLE_DEVICES renumbers only CUDA's, so an
index says nothing. pynvml (package nvidia-ml-py) and torch are imported only when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mtad.energy.meter import SensorError

MIG_NOTE = "The device is a MIG slice; the figure is of the whole board, other slices included."


@dataclass(frozen=True)
class Board:
    """One board.

    Attributes:
        nvml: the pynvml module, or what stands in for it.
        handle: NVML's handle of the board, never of a MIG slice: slices have no sensor.
        name: as NVML gives it.
        sliced: True if the CUDA device is a MIG slice of the board.
    """

    nvml: Any
    handle: Any
    name: str
    sliced: bool

    @property
    def scope(self) -> str:
        """What a figure of this board covers."""
        return f"{self.name} (whole board{', all MIG slices' if self.sliced else ''})"

    def call(self, function: str, *arguments: Any) -> Any:
        """NVML's answer for this board.

        Raises:
            SensorError: NVML refuses; the message names the function.
        """
        return call(self.nvml, function, self.handle, *arguments)


def import_nvml() -> Any:
    """The pynvml module.

    Raises:
        SensorError: the package is missing.
    """
    try:
        return import_module("pynvml")
    except ImportError:
        raise SensorError(
            "NVML: the package nvidia-ml-py is not installed. Run pip install nvidia-ml-py."
        ) from None


def torch_cuda_uuid(device: str) -> str:
    """The UUID of a CUDA device such as "cuda" or "cuda:1", as torch reports it.

    Raises:
        SensorError: torch is missing, has no such device, or is too old to report UUIDs.
    """
    try:
        torch = import_module("torch")
        return str(torch.cuda.get_device_properties(device).uuid)
    except (ImportError, AssertionError, AttributeError, RuntimeError, ValueError) as error:
        # torch raises any of these for a missing CUDA, a wrong index or a missing property.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SensorError(f"torch gives no UUID for {device}: {first_line}") from None


def call(nvml: Any, function: str, *arguments: Any) -> Any:
    """NVML's answer.

    Raises:
        SensorError: NVML refuses; the message names the function.
    """
    try:
        return getattr(nvml, function)(*arguments)
    except nvml.NVMLError as error:
        raise SensorError(f"NVML: {function} answers {error}.") from None


def find_board(nvml: Any, uuid: str) -> Board:
    """The board with this UUID, or the board that a MIG slice with this UUID belongs to.

    Args:
        nvml: the pynvml module. It is initialised here and never shut down: NVML lives as long
            as the process, and a meter may be used until its end.
        uuid: of the CUDA device, with or without the prefix "GPU-" or "MIG-".

    Raises:
        SensorError: NVML does not start, or shows no such device.
    """
    call(nvml, "nvmlInit")
    wanted = _bare(uuid)
    count = call(nvml, "nvmlDeviceGetCount")
    boards = list(_identified(nvml, count, "nvmlDeviceGetHandleByIndex"))
    for handle, board_uuid in boards:
        if board_uuid == wanted:
            # CUDA may report the board's UUID for a slice, too.
            return Board(nvml, handle, _name(nvml, handle), sliced=_in_mig_mode(nvml, handle))
    for handle, _board_uuid in boards:
        if wanted in _slice_uuids(nvml, handle):
            return Board(nvml, handle, _name(nvml, handle), sliced=True)
    raise SensorError(
        f"NVML: none of the {len(boards)} boards that it can read (of {count}) has the UUID {uuid}."
    )


def _identified(nvml: Any, count: int, function: str, *arguments: Any) -> Iterator[tuple[Any, str]]:
    """Handle and bare UUID by index, without those that NVML cannot read.

    Containers hide single boards, a broken board answers nothing, and slices leave holes in
    their numbering: none of these may hide the device that is looked for.
    """
    for index in range(count):
        try:
            handle = call(nvml, function, *arguments, index)
            yield handle, _bare(call(nvml, "nvmlDeviceGetUUID", handle))
        except SensorError:
            continue


def _slice_uuids(nvml: Any, handle: Any) -> set[str]:
    try:
        count = call(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle)
    except SensorError:  # a board that knows no MIG
        return set()
    slices = _identified(nvml, count, "nvmlDeviceGetMigDeviceHandleByIndex", handle)
    return {uuid for _handle, uuid in slices}


def _in_mig_mode(nvml: Any, handle: Any) -> bool:
    try:
        current, _pending = call(nvml, "nvmlDeviceGetMigMode", handle)
    except SensorError:  # a board that knows no MIG
        return False
    return bool(current)


def _name(nvml: Any, handle: Any) -> str:
    return str(call(nvml, "nvmlDeviceGetName", handle))


def _bare(uuid: str) -> str:
    """The UUID without prefixes: torch gives none, NVML "GPU-…", "MIG-…" or "MIG-GPU-…/1/0"."""
    return uuid.lower().removeprefix("mig-").removeprefix("gpu-").split("/")[0]
