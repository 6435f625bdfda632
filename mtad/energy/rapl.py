"""The energy counters of CPU packages that Linux shows under /sys/class/powercap (RAPL).

Intel and AMD processors share this interface. Only package domains are added up: cores and
memory are inside or beside them and would be counted twice, or only on some machines. The
counters cover every process on the package. They wrap; a wrap is seen as long as the sensor is
read at least once a turn (minutes to hours), which the live display of a run does.
"""

from __future__ import annotations

from pathlib import Path

from mtad.energy.meter import SensorError

POWERCAP_ROOT = Path("/sys/class/powercap")
_MICROJOULES_PER_JOULE = 1_000_000


class _Package:
    """One package domain: a counter in microjoules that starts again at 0 after its range."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._counter = folder / "energy_uj"
        self._range_microjoules = _read_int(folder / "max_energy_range_uj")
        self.last_microjoules = self.read()

    def read(self) -> int:
        return _read_int(self._counter)

    def advance(self) -> int:
        """Microjoules since the previous call."""
        now = self.read()
        difference = now - self.last_microjoules
        if difference < 0:
            difference += self._range_microjoules
        if difference < 0:
            raise SensorError(
                f"{self._counter} fell from {self.last_microjoules} to {now}, more than its range"
                f" of {self._range_microjoules} µJ."
            )
        self.last_microjoules = now
        return difference


class RaplSensor:
    """The sum of all CPU packages.

    Args:
        root: the powercap folder.

    Raises:
        SensorError: there is no package domain, or this user may not read it.
    """

    method = "rapl"
    resolution_seconds: float | None = 0.001
    note: str | None = None

    def __init__(self, root: Path = POWERCAP_ROOT) -> None:
        self._packages = _find_packages(root)
        names = " + ".join(package.name for package in self._packages)
        self.scope = f"CPU {names} (every process; memory and other devices not included)"
        self._microjoules = 0

    def open(self) -> None:
        """Starts counting from zero.

        Raises:
            SensorError: a counter cannot be read.
        """
        self._microjoules = 0
        for package in self._packages:
            package.last_microjoules = package.read()

    def joules(self) -> float:
        """Joules since `open()`, wraps included.

        Raises:
            SensorError: a counter cannot be read, or fell by more than its range.
        """
        for package in self._packages:
            self._microjoules += package.advance()
        return self._microjoules / _MICROJOULES_PER_JOULE

    def close(self) -> None:
        """Nothing to free."""

    def describe(self) -> str:
        """Names the counters."""
        return f"Energy is read from the RAPL counters of {self.scope}."


def _find_packages(root: Path) -> list[_Package]:
    packages = []
    for folder in sorted(root.glob("intel-rapl:*")):
        name = _read_text(folder / "name")
        # "psys" holds the packages once more; sub-domains (core, uncore, dram) are parts.
        if name.startswith("package"):
            packages.append(_Package(folder, name))
    if not packages:
        raise SensorError(
            f"RAPL: {root} shows no CPU package, as is usual in virtual machines and containers."
        )
    if all(package.last_microjoules == 0 for package in packages):
        raise SensorError(f"RAPL: the counters under {root} stand at 0: nothing feeds them.")
    return packages


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except PermissionError:
        raise SensorError(
            f"RAPL: this user may not read {path}. An administrator can allow it with"
            f" chmod a+r {path}, until the next start of the machine."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SensorError(f"RAPL: {path} cannot be read ({error}).") from None


def _read_int(path: Path) -> int:
    text = _read_text(path)
    try:
        return int(text)
    except ValueError:
        raise SensorError(f"RAPL: {path} holds {text[:40]!r} instead of a number.") from None
