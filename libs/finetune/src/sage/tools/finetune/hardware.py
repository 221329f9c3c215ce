"""What the machine has, and the settings that follow from it. No torch where no device is used."""

from __future__ import annotations

import errno
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from sage_contracts.errors import OutOfMemoryError, SageError

ResolvedPrecision = Literal["fp32", "fp16", "bf16"]


@cache
def has_cuda() -> bool:
    """Whether there is an NVIDIA device that torch is built for, found without importing torch."""
    return _has_card() and _torch_build() != ""


def _has_card() -> bool:
    # Of the driver's own files, some show in containers that were given no device, and WSL has none.
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and b"GPU" in listing.stdout


def _torch_build() -> str | None:
    """The CUDA that torch is built for, "" for none; None where there is no torch to ask."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    return str(runpy.run_path(str(Path(found.origin).with_name("version.py")))["cuda"] or "")


def unused_card() -> str:
    """Why torch leaves a card alone that is there; empty where it uses it, or there is none."""
    import torch

    if torch.cuda.is_available() or not _has_card():
        return ""
    if torch.version.cuda is None:
        return (
            f"There is an NVIDIA GPU, but this torch ({torch.__version__}) is a build for the CPU: "
            "install one that is built for CUDA"
        )
    return (
        f"There is an NVIDIA GPU, but torch {torch.__version__} cannot use it: "
        f"its CUDA {torch.version.cuda} may need a newer driver"
    )


def pick_device() -> str:
    """`cuda` or `cpu`, as torch sees it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_memory_bytes(device: str) -> int:
    """All memory of a device; for `cpu` the machine's, or the container's limit where that is lower."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info()[1])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # `max` is no number
            total = min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
    return total


def physical_cores() -> int:
    """Cores this process may use: its affinity, siblings counted once, within the cgroup's quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _cgroup_cpus() or len(cores)))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> int | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def wait_politely() -> None:
    """Let threads that wait for each other sleep instead of spin. Counts only before torch is first imported.

    Spinning gains little on idle cores and loses 4 to 15 times on cores that something else wants too.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def set_threads() -> int:
    """Give torch one thread per core; OMP_NUM_THREADS wins where it is set. Returns the number."""
    import torch

    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdigit() and int(asked) > 0 else physical_cores()
    torch.set_num_threads(threads)
    return threads


@cache
def cpu_facts() -> frozenset[str]:
    """What the system calls this chip, its maker and abilities, word by word; empty where it does not say."""
    try:
        told = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset()
    return frozenset(told.partition("\n\n")[0].split())


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively; without that bf16 is slower than fp32."""
    return not cpu_facts().isdisjoint({"avx512_bf16", "amx_bf16"})


def resolve_precision(asked: str, device: str) -> tuple[ResolvedPrecision, str]:
    """(precision to run in, why it differs from what was asked, or "")."""
    if device == "cpu":
        natural: ResolvedPrecision = "bf16" if cpu_has_bf16() else "fp32"
        if asked == "fp16":
            return natural, f"fp16 has no fast path on a CPU; this run uses {natural}"
        if asked == "bf16" and natural == "fp32":
            return "fp32", "this CPU has no bf16 units; this run uses fp32"
        return (natural if asked == "auto" else asked), ""  # type: ignore[return-value]
    import torch

    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        return ("bf16" if has_bf16 else "fp16"), ""
    if asked == "bf16" and not has_bf16:
        return "fp16", "this GPU has no bf16 units; this run uses fp16"
    return asked, ""  # type: ignore[return-value]


def torch_dtype(precision: ResolvedPrecision) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


_MEMORY_TEXTS = ("out of memory", "t allocate memory", "Cannot allocate memory", "ALLOC_FAILED", "bad_alloc")
"""What CUDA, torch's CPU allocator, the loader, cuBLAS and C++ say."""
_ONEDNN_TEXT = "could not create a primitive"
"""Alone. What it cannot do at all fails earlier, with a `primitive descriptor`."""

_LAST_TEXTS = ("bad_alloc", "Error out of memory at line")
"""What C++ and bitsandbytes write before they end a process that got no memory."""


def last_memory_words(log: str) -> str | None:
    """The line in which a process that ended without raising anything says that it got no memory."""
    lines = reversed(log.splitlines())
    return next((line.strip() for line in lines if any(text in line for text in _LAST_TEXTS)), None)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a device's or the machine's lack of memory into OutOfMemoryError."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        reason = memory_reason(error)
        if reason is None:
            raise
        raise OutOfMemoryError(f"There was not enough memory ({reason}).") from error


def memory_reason(error: BaseException) -> str | None:
    """The first line of the lack of memory behind an error; None when it is something else."""
    behind: BaseException | None = error
    while behind is not None:
        text = str(behind)
        is_errno = isinstance(behind, OSError) and behind.errno == errno.ENOMEM
        # Our own messages may quote a user's rows; what they were raised from is what counts.
        is_said = text == _ONEDNN_TEXT or any(part in text for part in _MEMORY_TEXTS)
        if isinstance(behind, MemoryError) or is_errno or (is_said and not isinstance(behind, SageError)):
            return text.splitlines()[0].rstrip(".") if text else type(behind).__name__
        behind = behind.__cause__
    return None


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for what is asked for next, where it can (glibc).

    Every pass frees what the next one needs, and to have it from the system again costs a fault a page.
    Counts for the whole process, until `give_back_memory` for what is free by then. Source: mallopt(3).
    """
    import ctypes

    trim_threshold, mmap_max = -1, -4
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, -1)
        library.mallopt(mmap_max, 0)


def give_back_memory() -> None:
    """Return what the C library keeps of freed memory to the system, where it can (glibc).

    Worth a call after a model was loaded and rearranged: the holes that its old weights leave are of little
    use to a training step.
    """
    import ctypes

    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_bytes(device: str) -> int:
    """The most the device held: CUDA's allocator, or this process's resident set."""
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError, StopIteration):
        # Not getrusage: what that says begins with the parent's peak.
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
