"""What this process may use of the machine it runs on, and what it need not keep. Heeds container limits."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Device:
    """Where a model would be allocated."""

    name: str
    """`cpu`, `cuda:0`, …"""
    total_bytes: int
    free_bytes: int | None = None


def total_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Main memory, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = _read(cgroup / name)
        if limit.isdecimal():
            total = min(total, int(limit))
    return total


def oom_kill_count(cgroup: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Processes beside this one that the kernel has killed for lack of memory; None where nobody counts."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, name = (cgroup / "memory", "memory.oom_control") if controllers else (cgroup, "memory.events")
        # A container sees its own group at the mount's root, whatever the path says.
        for folder in (mount / path.lstrip("/"), mount):
            counts = dict(row.split() for row in _read(folder / name).splitlines())
            if counts.get("oom_kill", "").isdecimal():
                return int(counts["oom_kill"])
    return None


def find_device(wanted: str = "auto") -> Device:
    """The device to compute on: the first NVIDIA GPU, else the CPU. `wanted` names one instead of "auto".

    Asks nvidia-smi, so that no process has to import torch to know.
    """
    if wanted != "cpu":
        gpus = _nvidia_gpus()
        chosen = [gpu for gpu in gpus if wanted in ("auto", "cuda", gpu.name)]
        if chosen:
            return chosen[0]
    return Device("cpu", total_memory_bytes())


def _nvidia_gpus() -> list[Device]:
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(
            query, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for index, line in enumerate(shown.splitlines()):
        total_mib, _, free_mib = line.partition(",")
        if total_mib.strip().isdecimal() and free_mib.strip().isdecimal():
            gpus.append(Device(f"cuda:{index}", int(total_mib) << 20, int(free_mib) << 20))
    return gpus


def return_free_memory() -> None:
    """Give the allocator's free pages back to the system, once start-up or a burst of work is over.

    glibc keeps what importing and compiling schemas took: 13 MB in an idle worker.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
