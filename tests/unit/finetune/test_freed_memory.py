"""What becomes of memory that is freed: each case in a process of its own, whose allocator it changes."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc"
)

COUNTING = """
import resource
from pathlib import Path
from sage.tools.finetune.hardware import give_back_memory, keep_freed_memory

PAGE = resource.getpagesize()
SIZES = [40 << 20, 8 << 20, 1 << 20]

def use_and_free():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(b"x") * size for size in SIZES]
    del held
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * PAGE

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
"""


def numbers_of(code: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", COUNTING + code], capture_output=True, text=True, timeout=60, check=True
    )
    return [int(word) for word in done.stdout.split()]


def test_what_was_freed_once_is_had_again_without_asking_the_system() -> None:
    first, again = numbers_of("keep_freed_memory()\nprint(use_and_free(), use_and_free())")
    assert first > 40 << 20
    assert again < 1 << 20


def test_it_is_given_back_when_that_is_asked_for() -> None:
    before, kept, left = numbers_of(
        "keep_freed_memory()\nbefore = resident()\nuse_and_free()\nkept = resident()\n"
        "give_back_memory()\nprint(before, kept, resident())"
    )
    assert kept > before + (40 << 20)
    assert left < before + (4 << 20)
