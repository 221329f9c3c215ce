"""What counts as a lack of memory, by what libraries say of it."""

from __future__ import annotations

import errno

import pytest

from sage.tools.finetune.hardware import memory_reason
from sage_contracts.errors import InvalidDataError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."),
            "CUDA out of memory. Tried to allocate 2 GiB",
        ),
        # Seen of oneDNN under a limit on the address space, in the middle of a step.
        (RuntimeError("could not create a primitive"), "could not create a primitive"),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (InvalidDataError("row 3 says: out of memory"), None),
    ],
)
def test_it_is_told_by_its_kind_or_its_words(error: Exception, reason: str | None) -> None:
    assert memory_reason(error) == reason


def test_what_an_error_was_raised_from_counts() -> None:
    error = InvalidDataError("the data cannot be read")
    error.__cause__ = MemoryError("std::bad_alloc")
    assert memory_reason(error) == "std::bad_alloc"
