"""What Linux says of the processor; nothing where it says nothing. Imports no torch."""

from __future__ import annotations

from pathlib import Path


def cpu_info() -> list[str]:
    """Lines of /proc/cpuinfo; none where there is no such file."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def cpu_name() -> str:
    """Such as "AMD EPYC 7763"; empty if unknown."""
    names = [line for line in cpu_info() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else ""


def cpu_flags() -> set[str]:
    """Instruction sets, such as "avx2"; empty if unknown."""
    lines = [line for line in cpu_info() if line.startswith("flags")]
    return set(lines[0].split()) if lines else set()
