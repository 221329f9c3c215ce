"""What this process may use of the machine it runs on, and what it need not keep. Heeds container limits."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sage_contracts.errors import InvalidRequestError

_CGROUP = Path("/sys/fs/cgroup")
_PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Device:
    """Where a model would be allocated."""

    name: str
    """`cpu`, `cuda:1` or `MIG-…`. The number is nvidia-smi's, which no variable changes: processes that are
    shown different cards mean the same one by it."""
    total_bytes: int
    free_bytes: int | None = None

    @property
    def is_cuda(self) -> bool:
        return self.name != "cpu"

    @property
    def env(self) -> dict[str, str]:
        """The environment of a child that is to compute here and nowhere else."""
        visible = self.name.removeprefix("cuda:") if self.is_cuda else ""
        # Left alone, CUDA counts the fastest card first.
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


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
    """The device of that name, which may also be a UUID. `cuda` means the first GPU of CUDA_VISIBLE_DEVICES,
    and without that variable the largest; `auto` the same, or the CPU where there is none.

    Asks nvidia-smi, so that no process has to import torch to know. Raises: InvalidRequestError when there is
    no such device, or the variable hides it.
    """
    cpu = Device("cpu", total_memory_bytes())
    if wanted == "cpu":
        return cpu
    gpus = _visible_gpus()
    for gpu in gpus:
        if wanted in ("auto", "cuda", gpu.device.name) or gpu.is_named(wanted):
            return gpu.device
    if wanted == "auto":
        return cpu
    there = ", ".join(["cpu", *(gpu.device.name for gpu in gpus)])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if visible is None else f" (numbers are nvidia-smi's, and CUDA_VISIBLE_DEVICES is {visible!r})"
    raise InvalidRequestError(f"There is no device {wanted!r} here. There are: {there}{why}.")


def look_again(device: Device) -> Device | None:
    """The GPU with the memory that is free now; None when it cannot be asked."""
    return next((gpu.device for gpu in _nvidia_gpus() if gpu.device.name == device.name), None)


@dataclass(frozen=True)
class _Gpu:
    """A card, or a MIG instance of one."""

    number: str
    uuid: str
    device: Device

    def is_named(self, entry: str) -> bool:
        """Whether an entry of CUDA_VISIBLE_DEVICES means this one: a card's number, or how a UUID begins."""
        is_uuid = entry.startswith(("GPU-", "MIG-")) and self.uuid.startswith(entry)
        return is_uuid or entry == self.number


def _visible_gpus() -> list[_Gpu]:
    """In the order in which they are preferred."""
    gpus = _nvidia_gpus()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return sorted(gpus, key=lambda gpu: -gpu.device.total_bytes)
    visible: list[_Gpu] = []
    for entry in named.split(","):
        found = next((gpu for gpu in gpus if gpu.is_named(entry.strip())), None)
        if found is None:
            break  # CUDA, too, hides what follows an entry that means nothing
        visible.append(found)
    return visible


def _nvidia_gpus() -> list[_Gpu]:
    fields = "index,uuid,memory.total,memory.free,mig.mode.current"
    lines = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    cards = [[field.strip() for field in line.split(",")] for line in lines if line.count(",") == 4]
    gpus = [
        _Gpu(number, uuid, Device(f"cuda:{number}", int(total_mib) << 20, int(free_mib) << 20))
        for number, uuid, total_mib, free_mib, mig in cards
        if mig != "Enabled" and total_mib.isdecimal() and free_mib.isdecimal()
    ]
    return gpus if all(card[-1] != "Enabled" for card in cards) else gpus + _mig_instances()


def _mig_instances() -> list[_Gpu]:
    """What takes the place of a card that is cut up. No query tells their memory, but their profiles do."""
    instances, number = [], ""
    for line in _nvidia_smi("-L"):
        if card := re.match(r"GPU (\d+):", line):
            number = card[1]
        elif part := re.match(r"\s+MIG \S*?(\d+)gb.*\(UUID: (MIG-[^)]+)\)", line):
            instances.append(_Gpu(number, part[2], Device(part[2], int(part[1]) * 10**9)))
    return instances


def _nvidia_smi(*arguments: str) -> list[str]:
    """The lines that it prints; none where it is missing or fails."""
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


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
