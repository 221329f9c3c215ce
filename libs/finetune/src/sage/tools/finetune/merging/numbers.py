"""Numbers as safetensors stores them, to fp32 and back. numpy alone: torch costs 200 MB and seconds."""

from __future__ import annotations

from typing import Any

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
"""Bytes of one element by safetensors' dtype code; every other code takes one."""
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The codes whose values can be computed with, and how torch calls them."""
CODES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}

_STORED_AS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def to_fp32(raw: bytes | bytearray | memoryview, code: str) -> Any:
    """A flat fp32 array that may be written to."""
    import numpy as np

    stored = np.frombuffer(raw, dtype=_STORED_AS[code])
    if code != "BF16":
        return stored.astype(np.float32)
    widened = stored.astype(np.uint32)
    widened <<= 16  # bf16 is the upper half of fp32
    return widened.view(np.float32)


def from_fp32(values: Any, code: str) -> Any:
    """The values as they are stored, rounded to nearest, ties to even."""
    import numpy as np

    if code != "BF16":
        with np.errstate(over="ignore"):  # the caller looks for infinities
            return values.astype(_STORED_AS[code], copy=False)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def is_finite(stored: Any, code: str) -> bool:
    """Whether none of the stored values is NaN or infinite."""
    import numpy as np

    if code != "BF16":
        return bool(np.isfinite(stored).all())
    return bool(((stored & 0x7F80) != 0x7F80).all())
