"""Meters: the windows, the parsing, the order of the probe. No GPU and no RAPL is needed.

NVML is a stand-in that answers or refuses as the real one does; RAPL is a real folder of files.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtad.energy import EnergyReading, Meter, ReplayMeter, SensorMeter, none_meter, probe
from mtad.energy.estimate import ESTIMATE_WATTS_VARIABLE
from mtad.energy.meter import SensorError
from mtad.energy.nvml import find_board, torch_cuda_uuid
from mtad.energy.nvml_power import POWER_INSTANT_FIELD, NvmlPower
from mtad.errors import ConfigError

UUID_A = "11111111-aaaa-bbbb-cccc-000000000001"
UUID_B = "22222222-aaaa-bbbb-cccc-000000000002"
UUID_SLICE = "33333333-aaaa-bbbb-cccc-000000000003"


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> None:
        self.seconds += seconds


class FakeNvmlError(Exception):
    pass


class FakeNvml:
    """Boards as dictionaries; what a board lacks is refused as "Not Supported"."""

    NVMLError = FakeNvmlError

    def __init__(self, *boards: dict[str, Any], starts: bool = True) -> None:
        self.boards = boards
        self.starts = starts

    def _get(self, handle: dict[str, Any], key: str) -> Any:
        value = handle.get(key)
        if value is None:
            raise FakeNvmlError("Not Supported")
        return value

    def nvmlInit(self) -> None:
        if not self.starts:
            raise FakeNvmlError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if self.boards[index].get("hidden"):
            raise FakeNvmlError("Insufficient Permissions")
        return self.boards[index]

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return str(self._get(handle, "uuid"))

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return str(handle.get("name", "NVIDIA Test"))

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        return [int(self._get(handle, "mig")), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        self._get(handle, "mig")
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:
        slices = handle.get("slices", {})
        if index not in slices:
            raise FakeNvmlError("Not Found")
        return {"uuid": slices[index]}

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        return int(self._get(handle, "millijoules"))

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return int(self._get(handle, "average_milliwatts"))

    def nvmlDeviceGetFieldValues(self, handle: Any, fields: list[int]) -> list[Any]:
        assert fields == [186]
        milliwatts = handle.get("instant_milliwatts")
        if milliwatts is None:
            return [SimpleNamespace(nvmlReturn=3, valueType=0, value=None)]
        value = SimpleNamespace(uiVal=milliwatts, dVal=-1.0)
        return [SimpleNamespace(nvmlReturn=0, valueType=1, value=value)]


def cuda_meter(nvml: FakeNvml, clock: FakeClock, uuid: str = UUID_A, **more: Any) -> SensorMeter:
    return probe("cuda:0", nvml=nvml, clock=clock, cuda_uuid=lambda _device: uuid, **more)


def sampling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mtad-nvml-power"]


def write_package(
    root: Path, index: int, microjoules: int, name: str = "", range_microjoules: int = 10**9
) -> Path:
    folder = root / f"intel-rapl:{index}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name or f'package-{index}'}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_microjoules}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


# The two windows


def test_two_windows_share_the_end() -> None:
    clock, board = FakeClock(), {"uuid": f"GPU-{UUID_A}", "name": "NVIDIA H200", "millijoules": 500}
    meter = cuda_meter(FakeNvml(board), clock)
    meter.start()
    clock.wait(3.0)
    board["millijoules"] += 900_000
    meter.mark()
    clock.wait(2.0)
    board["millijoules"] += 700_500
    decode, end_to_end = meter.stop()
    assert decode == EnergyReading(
        joules=700.5,
        seconds=2.0,
        method="nvml-counter",
        scope="NVIDIA H200 (whole board)",
        resolution_s=0.1,
    )
    assert decode.relative_error == pytest.approx(0.05)
    assert (end_to_end.joules, end_to_end.seconds) == (1600.5, 5.0)
    assert meter.describe() == (
        "Energy is read from the counter of NVIDIA H200 (whole board), refreshed about every 0.1 s."
    )


def test_a_window_under_one_second_gets_no_joules_and_says_so() -> None:
    clock, board = FakeClock(), {"uuid": UUID_A, "millijoules": 1000}
    meter = cuda_meter(FakeNvml(board), clock)
    meter.start()
    clock.wait(0.75)
    meter.mark()
    clock.wait(0.75)
    board["millijoules"] += 300_000
    decode, end_to_end = meter.stop()
    assert decode.joules is None and decode.relative_error is None
    assert decode.reason is not None and "0.75 s" in decode.reason and "1 s" in decode.reason
    assert end_to_end.joules == 300.0 and end_to_end.reason is None


def test_joules_so_far_counts_from_the_mark_and_asks_the_sensor_at_most_every_tenth() -> None:
    clock, board = FakeClock(), {"uuid": UUID_A, "millijoules": 1000}
    meter = cuda_meter(FakeNvml(board), clock)
    assert meter.joules_so_far() is None
    meter.start()
    clock.wait(5.0)
    board["millijoules"] += 50_000
    assert meter.joules_so_far() == 50.0
    meter.mark()
    clock.wait(0.9)
    board["millijoules"] += 8_000
    assert meter.joules_so_far() is None  # under a second
    clock.wait(0.2)
    assert meter.joules_so_far() == 8.0
    board["millijoules"] += 1_000
    clock.wait(0.05)
    assert meter.joules_so_far() == 8.0  # cached
    clock.wait(0.06)
    assert meter.joules_so_far() == 9.0
    meter.stop()
    assert meter.joules_so_far() is None


def test_a_run_that_ends_in_the_prefill_has_no_decode_window() -> None:
    clock, board = FakeClock(), {"uuid": UUID_A, "millijoules": 1000}
    meter = cuda_meter(FakeNvml(board), clock)
    meter.start()
    clock.wait(2.0)
    board["millijoules"] += 10_000
    decode, end_to_end = meter.stop()
    assert (decode.joules, decode.seconds) == (None, 0.0)
    assert decode.reason == "The run ended before decoding began."
    assert end_to_end.joules == 10.0


def test_a_sensor_that_stands_still_gives_none_and_never_zero() -> None:
    clock, board = FakeClock(), {"uuid": UUID_A, "millijoules": 1000}
    meter = cuda_meter(FakeNvml(board), clock)
    meter.start()
    meter.mark()
    clock.wait(4.0)
    assert meter.joules_so_far() is None
    decode, _ = meter.stop()
    assert decode.joules is None
    assert decode.reason is not None and "did not move in 4.00 s" in decode.reason


def test_a_sensor_that_fails_in_the_run_ends_no_run_and_gives_the_reason() -> None:
    clock = FakeClock()
    board: dict[str, Any] = {"uuid": UUID_A, "millijoules": 1000}
    meter = cuda_meter(FakeNvml(board), clock)
    meter.start()
    meter.mark()
    clock.wait(4.0)
    board["millijoules"] = None
    assert meter.joules_so_far() is None
    board["millijoules"] = 9000  # answering again does not heal the hole
    for reading in meter.stop():
        assert reading.joules is None and reading.seconds == 4.0
        assert reading.reason == (
            "NVML: nvmlDeviceGetTotalEnergyConsumption answers Not Supported."
        )
    meter.start()
    meter.mark()
    clock.wait(1.0)
    board["millijoules"] += 1000
    assert meter.stop().decode.joules == 1.0


def test_a_counter_that_falls_is_refused() -> None:
    clock, board = FakeClock(), {"uuid": UUID_A, "millijoules": 5000}
    meter = cuda_meter(FakeNvml(board), clock)
    meter.start()
    meter.mark()
    clock.wait(2.0)
    board["millijoules"] = 40
    reading = meter.stop().decode
    assert reading.joules is None
    assert reading.reason is not None and "fell from 5000 to 40 mJ" in reading.reason


@pytest.mark.parametrize("call", ["mark", "stop"])
def test_a_meter_that_was_not_started_refuses(call: str) -> None:
    reading = EnergyReading(joules=2.0, seconds=2.0, method="replay", scope="test")
    meters: list[Meter] = [none_meter("no sensor"), ReplayMeter(reading, reading)]
    for meter in meters:
        with pytest.raises(RuntimeError, match=r"call start\(\) first"):
            getattr(meter, call)()


# Which board


def test_the_board_is_found_by_uuid_and_not_by_index() -> None:
    first = {"uuid": f"GPU-{UUID_B}", "name": "first in NVML"}
    second = {"uuid": f"GPU-{UUID_A.upper()}", "name": "second in NVML"}
    board = find_board(FakeNvml(first, second), UUID_A)
    assert (board.name, board.handle, board.sliced) == ("second in NVML", second, False)


def test_a_hidden_or_broken_board_does_not_hide_the_right_one() -> None:
    boards = ({"hidden": True}, {"uuid": None}, {"uuid": f"GPU-{UUID_A}", "name": "right"})
    assert find_board(FakeNvml(*boards), UUID_A).name == "right"


def test_no_board_with_the_uuid_is_a_reason_and_never_another_board() -> None:
    nvml = FakeNvml({"uuid": f"GPU-{UUID_B}", "millijoules": 7, "instant_milliwatts": 9})
    meter = cuda_meter(nvml, FakeClock())
    meter.start()
    reading = meter.stop().end_to_end
    assert reading.method == "none" and reading.joules is None
    assert reading.reason is not None and UUID_A in reading.reason
    assert "none of the 1 boards" in reading.reason


@pytest.mark.parametrize("uuid", [UUID_SLICE, f"MIG-{UUID_SLICE}", UUID_A])
def test_a_mig_slice_reports_the_whole_board_and_says_so(uuid: str) -> None:
    board = {
        "uuid": f"GPU-{UUID_A}",
        "name": "NVIDIA A100",
        "mig": 1,
        "slices": {0: "MIG-0", 3: f"MIG-{UUID_SLICE}"},  # with a hole, as NVML has
        "millijoules": 1000,
    }
    clock = FakeClock()
    meter = cuda_meter(FakeNvml({"uuid": f"GPU-{UUID_B}"}, board), clock, uuid)
    meter.start()
    meter.mark()
    clock.wait(2.0)
    board["millijoules"] = 3000
    reading = meter.stop().decode
    assert reading.joules == 2.0
    assert reading.scope == "NVIDIA A100 (whole board, all MIG slices)"
    assert reading.reason is not None and "other slices included" in reading.reason
    assert "MIG" in meter.describe()


def test_the_old_form_of_a_mig_uuid_names_its_board() -> None:
    nvml = FakeNvml({"uuid": f"GPU-{UUID_A}", "mig": 1})
    assert find_board(nvml, f"MIG-GPU-{UUID_A}/1/0").sliced


def test_torch_without_such_a_device_is_a_reason() -> None:
    torch = pytest.importorskip("torch")
    index = torch.cuda.device_count() + 7
    with pytest.raises(SensorError, match=f"torch gives no UUID for cuda:{index}: "):
        torch_cuda_uuid(f"cuda:{index}")


# Power


def power_board(**more: Any) -> dict[str, Any]:
    return {"uuid": UUID_A, "name": "NVIDIA T4", **more}


def test_without_a_counter_the_instantaneous_power_is_integrated() -> None:
    clock, board = FakeClock(), power_board(instant_milliwatts=100_000, average_milliwatts=1)
    sensor = NvmlPower(find_board(FakeNvml(board), UUID_A), clock, interval_seconds=3600.0)
    meter = SensorMeter(sensor, clock)
    meter.start()
    clock.wait(2.0)
    board["instant_milliwatts"] = 300_000
    meter.mark()  # trapezoid: 2 s at a mean of 200 W
    clock.wait(1.0)
    board["instant_milliwatts"] = 100_000
    assert meter.joules_so_far() == 200.0
    clock.wait(1.0)
    decode, end_to_end = meter.stop()
    assert (decode.joules, end_to_end.joules) == (300.0, 700.0)
    assert decode.method == "nvml-power"
    assert decode.reason == "Integrated from samples of the instantaneous power."
    assert decode.resolution_s == 2.0  # the widest gap, as no thread sampled in between
    assert not sampling_threads()


def test_probe_falls_from_the_counter_to_the_power_and_then_to_its_average() -> None:
    clock, board = FakeClock(), power_board(instant_milliwatts=70_000)
    assert cuda_meter(FakeNvml(board), clock).sensor.method == "nvml-power"
    board = power_board(millijoules=0, average_milliwatts=70_000)  # a counter at 0 is none
    meter = cuda_meter(FakeNvml(board), clock)
    assert meter.sensor.method == "nvml-power"
    assert meter.sensor.resolution_seconds == 1.0
    assert meter.sensor.note is not None and "one-second average" in meter.sensor.note


def test_without_any_sensor_all_reasons_are_told() -> None:
    board = power_board(average_milliwatts=0)
    meter = cuda_meter(FakeNvml(board), FakeClock())
    text = meter.describe()
    assert meter.sensor.method == "none"
    assert "nvmlDeviceGetTotalEnergyConsumption answers Not Supported" in text
    assert "field 186" in text and "code 3" in text
    assert "nvmlDeviceGetPowerUsage gives 0 mW" in text


def test_a_driver_that_does_not_start_is_a_reason() -> None:
    text = cuda_meter(FakeNvml(starts=False), FakeClock()).describe()
    assert "nvmlInit answers NVML Shared Library Not Found" in text


def test_the_real_package_without_the_device_is_a_reason() -> None:
    pytest.importorskip("pynvml")
    text = probe("cuda:0", cuda_uuid=lambda _device: UUID_A).describe()
    assert text.startswith("Energy cannot be measured here. NVML: ")


def test_the_fields_of_the_real_package_are_read() -> None:
    pynvml = pytest.importorskip("pynvml")
    value = pynvml.c_nvmlFieldValue_t()
    value.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
    value.value.uiVal = 123_456
    nvml = FakeNvml(power_board())
    nvml.nvmlDeviceGetFieldValues = lambda _handle, _fields: [value]  # type: ignore[method-assign]
    sensor = NvmlPower(find_board(nvml, UUID_A), FakeClock())
    assert sensor._read_watts() == 123.456
    assert pynvml.NVML_FI_DEV_POWER_INSTANT == POWER_INSTANT_FIELD


def test_the_thread_samples_and_ends_with_stop_with_a_restart_and_when_dropped() -> None:
    board = power_board(instant_milliwatts=50_000)
    nvml = FakeNvml(board)

    def make() -> SensorMeter:
        sensor = NvmlPower(find_board(nvml, UUID_A), time.perf_counter, interval_seconds=0.001)
        return SensorMeter(sensor)

    meter = make()
    assert not sampling_threads()
    meter.start()
    meter.start()
    assert len(sampling_threads()) == 1
    meter.sensor.open()  # a sensor opened twice has one thread, too
    assert len(sampling_threads()) == 1
    integral = meter.sensor._integral  # type: ignore[attr-defined]
    samples = []
    integral._read_watts = lambda: samples.append(1) or 50.0
    deadline = time.monotonic() + 30
    while len(samples) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert len(samples) >= 3
    meter.stop()
    assert not sampling_threads()

    dropped = make()
    dropped.start()
    [thread] = sampling_threads()
    del dropped
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_a_failure_in_the_thread_becomes_the_reason() -> None:
    board = power_board(instant_milliwatts=50_000)
    sensor = NvmlPower(find_board(FakeNvml(board), UUID_A), time.perf_counter, 0.001)
    meter = SensorMeter(sensor)
    meter.start()
    meter.mark()
    [thread] = sampling_threads()
    board["instant_milliwatts"] = None
    thread.join(30)  # it ends by itself
    assert not thread.is_alive()
    board["instant_milliwatts"] = 50_000
    reading = meter.stop().decode
    assert reading.joules is None
    assert reading.reason is not None and "field 186" in reading.reason


# RAPL


def test_rapl_adds_packages_and_nothing_else(tmp_path: Path) -> None:
    files = [write_package(tmp_path, 0, 1_000_000), write_package(tmp_path, 1, 500)]
    psys = write_package(tmp_path, 2, 10, name="psys")
    core = tmp_path / "intel-rapl:0:0"
    core.mkdir()
    (core / "name").write_text("core\n")  # no counter: must not even be read
    clock = FakeClock()
    meter = probe("cpu", clock=clock, powercap_root=tmp_path)
    meter.start()
    clock.wait(1.0)
    files[0].write_text("3000000\n")
    psys.write_text("900000000\n")
    meter.mark()
    clock.wait(2.0)
    files[0].write_text("4000000\n")
    files[1].write_text("500500\n")
    decode, end_to_end = meter.stop()
    assert (decode.joules, end_to_end.joules) == (1.5, 3.5)
    assert decode.method == "rapl" and decode.resolution_s == 0.001
    assert decode.scope.startswith("CPU package-0 + package-1 (")


def test_rapl_counters_wrap_even_more_than_once(tmp_path: Path) -> None:
    counter = write_package(tmp_path, 0, 90_000_000, range_microjoules=100_000_000)
    clock = FakeClock()
    meter = probe("cpu", clock=clock, powercap_root=tmp_path)
    meter.start()
    meter.mark()
    clock.wait(1.0)
    counter.write_text("20000000")
    assert meter.joules_so_far() == 30.0
    clock.wait(1.0)
    counter.write_text("95000000")
    assert meter.joules_so_far() == 105.0
    clock.wait(1.0)
    counter.write_text("1000000")
    assert meter.stop().decode.joules == 111.0


def test_a_rapl_counter_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    counter = write_package(tmp_path, 0, 90, range_microjoules=50)
    clock = FakeClock()
    meter = probe("cpu", clock=clock, powercap_root=tmp_path)
    meter.start()
    meter.mark()
    clock.wait(2.0)
    counter.write_text("1")
    reading = meter.stop().decode
    assert reading.joules is None
    assert reading.reason is not None and "fell from 90 to 1" in reading.reason
    counter.write_text("many")
    assert "holds 'many' instead of a number" in probe("cpu", powercap_root=tmp_path).describe()


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Drops root for a while, as root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_rapl_that_this_user_may_not_read_says_how_to_allow_it() -> None:
    root = Path(tempfile.mkdtemp())  # not tmp_path, whose parents only the owner may enter
    try:
        root.chmod(0o755)
        write_package(root, 0, 12).chmod(0o000)
        with unprivileged():
            meter = probe("cpu", powercap_root=root)
        assert meter.sensor.method == "none"
        assert "this user may not read" in meter.describe()
        assert "chmod a+r" in meter.describe()
    finally:
        shutil.rmtree(root)


def test_rapl_counters_that_nothing_feeds_are_no_sensor(tmp_path: Path) -> None:
    write_package(tmp_path, 0, 0)
    assert "stand at 0" in probe("cpu", powercap_root=tmp_path).describe()


# None, estimate, replay


def test_a_cpu_without_a_sensor_gets_the_time_and_the_reason(tmp_path: Path) -> None:
    clock = FakeClock()
    meter = probe("cpu", clock=clock, powercap_root=tmp_path / "absent")
    meter.start()
    clock.wait(1.0)
    meter.mark()
    clock.wait(3.0)
    assert meter.joules_so_far() is None
    decode, end_to_end = meter.stop()
    assert (decode.joules, decode.seconds, decode.method) == (None, 3.0, "none")
    assert (end_to_end.joules, end_to_end.seconds) == (None, 4.0)
    assert decode.reason is not None and "shows no CPU package" in decode.reason
    assert meter.describe() == f"Energy cannot be measured here. {decode.reason}"


def test_the_real_probe_of_this_machine_never_raises_and_never_says_zero() -> None:
    meter = probe("cpu")
    meter.start()
    meter.mark()
    decode, _ = meter.stop()
    assert decode.joules is None  # too short or no sensor
    assert decode.reason


def test_other_devices_have_no_meter() -> None:
    assert "There is no meter for the device mps" in probe("mps").describe()


def test_an_estimate_is_off_unless_asked_for_and_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ESTIMATE_WATTS_VARIABLE, raising=False)
    assert probe("cpu", powercap_root=tmp_path).sensor.method == "none"
    monkeypatch.setenv(ESTIMATE_WATTS_VARIABLE, "40")
    assert probe("cpu", powercap_root=tmp_path).sensor.method == "estimate"
    clock = FakeClock()
    meter = probe("cpu", estimate_watts=65, clock=clock, powercap_root=tmp_path)
    meter.start()
    meter.mark()
    clock.wait(2.0)
    reading = meter.stop().decode
    assert reading.joules == 130.0 and reading.estimated
    assert reading.scope == "an assumed constant draw of 65 W"
    assert reading.reason is not None and reading.reason.startswith("Not measured: 65 W")
    assert "shows no CPU package" in reading.reason
    assert "≈" in meter.describe()


def test_a_sensor_beats_the_estimate(tmp_path: Path) -> None:
    write_package(tmp_path, 0, 5)
    assert probe("cpu", estimate_watts=65, powercap_root=tmp_path).sensor.method == "rapl"


@pytest.mark.parametrize("watts", [0, -3.0, float("nan"), float("inf"), True])
def test_watts_out_of_range_are_refused(watts: float) -> None:
    with pytest.raises(ConfigError, match=rf"estimate_watts is {watts!r}, but must be"):
        probe("cpu", estimate_watts=watts)


def test_an_environment_variable_that_is_no_number_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ESTIMATE_WATTS_VARIABLE, "65 W")
    with pytest.raises(ConfigError, match="MTAD_ESTIMATE_WATTS is '65 W'"):
        probe("cpu")


def test_the_replay_meter_gives_back_what_was_recorded() -> None:
    decode = EnergyReading(joules=12.0, seconds=3.0, method="replay", scope="test")
    whole = EnergyReading(joules=15.0, seconds=4.0, method="replay", scope="test")
    meter = ReplayMeter(decode, whole, [None, 4.0, 9.0])
    for _ in range(2):
        meter.start()
        meter.mark()
        assert [meter.joules_so_far() for _ in range(4)] == [None, 4.0, 9.0, 9.0]
        assert meter.stop() == (decode, whole)


def test_importing_and_probing_the_cpu_loads_neither_torch_nor_pynvml() -> None:
    program = (
        "import sys, mtad.energy, mtad.metrics, mtad.whatif; mtad.energy.probe('cpu');"
        "print([name for name in ('torch', 'transformers', 'pynvml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
