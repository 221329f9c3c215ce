"""What the machine has, read without importing torch."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from sage_servicekit.machine import Device, look_again

_MEMORY_BACK_S = 15.0
_MEMORY_SLACK_BYTES = 512 * 2**20


async def gpu_bytes_used(device: Device) -> int | None:
    """Bytes in use on the device by anybody; None on a CPU, and where it cannot be asked."""
    now = await asyncio.to_thread(look_again, device) if device.is_cuda else None
    return None if now is None or now.free_bytes is None else now.total_bytes - now.free_bytes


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
