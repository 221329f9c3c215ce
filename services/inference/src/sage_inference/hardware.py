"""What the machine has, read without importing torch."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_QUERY_TIMEOUT_S = 10
_MEMORY_BACK_S = 15.0
_MEMORY_SLACK_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Device:
    """A place to put an engine."""

    name: str
    """`cpu`, `cuda:0`, …"""
    total_bytes: int

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")

    @property
    def index(self) -> str:
        return self.name.partition(":")[2] or "0"


def find_device(wanted: str) -> Device:
    """The device of that name; `auto` prefers the first NVIDIA one."""
    # The driver's file is also there in containers that were given no device: ask what can be seen.
    if wanted == "auto":
        wanted = "cuda:0" if _NVIDIA_DRIVER.exists() and gpu_memory("0") is not None else "cpu"
    if wanted == "cpu":
        return Device("cpu", machine_bytes())
    device = Device(wanted, 0)
    memory = gpu_memory(device.index)
    return Device(wanted, memory[1] if memory else 0)


def gpu_memory(index: str) -> tuple[int, int] | None:
    """(used, total) bytes of a GPU, or None when it cannot be asked."""
    what = "--query-gpu=memory.used,memory.total"
    query = ["nvidia-smi", what, "--format=csv,noheader,nounits", "-i", index]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True)
        used, total = answer.stdout.strip().split(",")
        return int(used) * 2**20, int(total) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


async def gpu_bytes_used(device: Device) -> int | None:
    """Bytes in use on the device by anybody; None on a CPU."""
    memory = await asyncio.to_thread(gpu_memory, device.index) if device.is_cuda else None
    return memory[0] if memory else None


async def wait_memory_back(device: Device, used_before: int | None) -> None:
    """After a stop: until the GPU has about as much free as before the start, or a deadline passes.

    A driver frees a dead process's memory a moment after the process is gone; on a CPU it is at once.
    """
    deadline = time.monotonic() + _MEMORY_BACK_S
    while used_before is not None and time.monotonic() < deadline:
        used = await gpu_bytes_used(device)
        if used is None or used <= used_before + _MEMORY_SLACK_BYTES:
            return
        await asyncio.sleep(0.2)


def machine_bytes() -> int:
    """Physical memory, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def cpu_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 natively; without it bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
