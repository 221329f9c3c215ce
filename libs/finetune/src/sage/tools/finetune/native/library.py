"""The compiled library: found, or compiled once and kept."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from sage.tools.finetune.hardware import cpu_facts
from sage.tools.finetune.native.build import CompilerError, compile_into, file_name, require_known_machine

_SWITCH = "SAGE_CPU_KERNELS"
_BUILT = Path(sys.prefix) / "lib" / "sage-finetune"
"""Where images bring what was compiled when they were built."""
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_LAYER = [*[_POINTER] * 3, _LONG, *[_INT] * 3, _FLOAT, _POINTER, _INT]
_ATTENTION = {
    "sage_attention": [*_LAYER, *[_POINTER] * 2, _INT],
    "sage_attention_backward": [*_LAYER, *[_POINTER] * 3, _LONG, *[_POINTER] * 4, _LONG, _INT],
}
_MATRIX = [_POINTER, _INT, *[_LONG] * 2]
_SIGNATURES = {
    "sage_norm": [*[_POINTER] * 3, *[_LONG] * 2, _FLOAT, *[_INT] * 2],
    "sage_norm_backward": [*[_POINTER] * 5, *[_LONG] * 2, _FLOAT, *[_INT] * 2],
    "sage_rotate": [*[_POINTER] * 4, _FLOAT, *[_LONG] * 4, *[_INT] * 3],
    "sage_gate": [*[_POINTER] * 2, *[_LONG] * 2, *[_INT] * 2],
    "sage_gate_backward": [*[_POINTER] * 3, *[_LONG] * 2, *[_INT] * 2],
    "sage_cross_entropy": [*[_POINTER] * 4, *[_LONG] * 2, *[_INT] * 3],
    "sage_draw": [ctypes.c_uint64, _INT, _POINTER, _LONG, _INT],
    "sage_product": [_POINTER, *_MATRIX, _POINTER, _LONG, *[_POINTER] * 2, *[_LONG] * 3, _INT],
    "sage_product_scratch": [_LONG] * 2,
    "sage_mlp": [*[_POINTER] * 3, _INT, *[_POINTER] * 4, *[_LONG] * 3, _INT],
    "sage_mlp_backward": [*[_POINTER] * 3, _INT, *[_POINTER] * 3, *[_LONG] * 3, _INT],
    "sage_mlp_kept": [_LONG] * 2,
    "sage_mlp_room": [_LONG] * 3,
    "sage_adapt_room": [_POINTER, _INT, _LONG, _INT],
    "sage_adapt": [_POINTER, _INT, *[_POINTER] * 4, _LONG, _POINTER, *[_LONG] * 3, *[_INT] * 2],
    "sage_adapt_backward": [
        _POINTER,
        _INT,
        *[_POINTER] * 4,
        _LONG,
        *[_POINTER] * 2,
        *[_LONG] * 3,
        *[_INT] * 2,
    ],
    **_ATTENTION,
}
_SIZES = ("sage_product_scratch", "sage_adapt_room", "sage_mlp_kept", "sage_mlp_room")
_WITH_BF16 = {f"{name}_half": arguments for name, arguments in _ATTENTION.items()}


def load_library() -> Any:
    """Its functions as ctypes has them. Compiles for a second or two where nobody has.

    Raises: CompilerError with what is missing.
    """
    found = _found()
    if isinstance(found, str):
        raise CompilerError(found)
    return found


@cache
def _found() -> Any:
    """The library, or why there is none: looked for once in a process."""
    if is_switched_off():
        return f"{_SWITCH} is 0"
    try:
        return open_library(level_of_this_chip())
    except (CompilerError, OSError) as error:
        return str(error)


def is_switched_off() -> bool:
    return os.environ.get(_SWITCH, "").strip() == "0"


def is_for_this_chip() -> bool:
    try:
        level_of_this_chip()
    except CompilerError:
        return False
    return True


def open_library(level: str) -> Any:
    """Raises: CompilerError, OSError."""
    kept = _cache()
    places = [folder / file_name(level) for folder in (_BUILT, kept)]
    path = next((place for place in places if place.is_file()), None) or compile_into(kept, level)
    # torch's OpenMP is already here under the name that the library asks for, and so are its threads.
    library = ctypes.CDLL(str(path))
    for name, arguments in (_SIGNATURES | (_WITH_BF16 if "bf16" in level else {})).items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    for name in _SIZES:
        getattr(library, name).restype = _LONG
    return library


def level_of_this_chip() -> str:
    """Raises: CompilerError."""
    import torch

    require_known_machine()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        has_tiles = cpu_facts() >= {"avx512_bf16", "amx_tile", "amx_bf16"} and _may_use_tiles()
        has_bf16 = "avx512_bf16" in cpu_facts()
        return "x86-64-v4-bf16-amx" if has_tiles else "x86-64-v4-bf16" if has_bf16 else "x86-64-v4"
    if capability == "AVX2":
        return "x86-64-v3"
    raise CompilerError(f"this chip has no AVX2 ({capability})")


def _may_use_tiles() -> bool:
    """Ask the system for this process's room for tiles, which it gives to nobody unasked.

    Source: the kernel's documentation, "Using XSTATE features in user space applications".
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return int(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)) == 0


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sage-finetune"
