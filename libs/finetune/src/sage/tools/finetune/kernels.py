"""Which kernels a run uses: a pure choice by chip, precision and what is installed. No torch on import.

Whatever attention uses is exact: with adapters, the loss proves itself on rows of the run, forwards and
backwards, before a step is taken. Where the whole model trains, it takes none of them (see loss_choice.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from sage.tools.finetune.hardware import memory_reason

AttentionKernel = Literal["torch_varlen", "flash_attn"]
VarlenAttention = Callable[..., Any]
"""(query, key, value, lengths, scaling, window) -> (tokens, heads, dim), causal within each row.

query (tokens, heads, dim), key and value (tokens, kv_heads, dim), in half precision. `window` is how many
tokens each sees, itself included; None: all before it.
"""
AMPERE = (8, 0)
"""Compute capability from which on flash attention runs."""
OPTIONAL_PACKAGES = ("flash_attn", "liger_kernel")


@dataclass(frozen=True)
class Kernels:
    """`attention` keeps packed rows apart in one call for all of them by their lengths.

    The fastest first. Where there is none, or none proves to work, every row is a call of its own.
    """

    attention: tuple[AttentionKernel, ...] = ()
    has_liger: bool = False
    """Liger's norms, rotations and activations."""
    problem: str = ""
    """What is installed and cannot be used, for people."""


def choose_kernels(
    device: str, precision: str, capability: tuple[int, int] | None, installed: Collection[str]
) -> Kernels:
    """`capability` is the GPU's compute capability; None on a CPU."""
    if not device.startswith("cuda") or capability is None:
        return Kernels()
    attention: tuple[AttentionKernel, ...] = ()
    if capability >= AMPERE and precision in ("bf16", "fp16"):
        attention = ("flash_attn", "torch_varlen") if "flash_attn" in installed else ("torch_varlen",)
    return Kernels(attention, has_liger="liger_kernel" in installed)


@cache
def kernels_of(device: str, precision: str) -> Kernels:
    """The choice for this machine."""
    capability = None
    if device.startswith("cuda"):
        import torch

        capability = torch.cuda.get_device_capability()
    installed = [name for name in OPTIONAL_PACKAGES if find_spec(name)]
    broken = broken_packages(installed) if capability else {}
    chosen = choose_kernels(device, precision, capability, [name for name in installed if name not in broken])
    problems = (f"{name} is installed but cannot be imported: {why}" for name, why in broken.items())
    return replace(chosen, problem="; ".join(problems))


def broken_packages(names: Collection[str]) -> dict[str, str]:
    """Why those of them cannot be imported that cannot: mostly, they were built for another torch."""
    broken = {}
    for name in names:
        try:
            import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            broken[name] = str(error)
    return broken


def apply_liger(model: Any, report: Callable[[str], None]) -> None:
    """Liger's kernels on a loaded model, where it knows the family. Our own loss stays."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if memory_reason(error):
            raise
        report(f"Liger kernels are not used: {error}")


def varlen_attentions(kernels: Sequence[AttentionKernel]) -> Mapping[str, VarlenAttention]:
    """Those kernels, in that order."""
    known: dict[AttentionKernel, VarlenAttention] = {"flash_attn": _flash_attn, "torch_varlen": _torch_varlen}
    return {name: known[name] for name in kernels}


def _starts(lengths: list[int], device: Any) -> Any:
    """Where each row begins, and the end: what kernels with variable lengths go by."""
    import torch

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def _sides(window: int | None) -> tuple[int, int]:
    """How many tokens are seen (before, after) one's own; -1: all."""
    return (-1 if window is None else window - 1), 0


def _torch_varlen(
    query: Any, key: Any, value: Any, lengths: list[int], scaling: float | None, window: int | None
) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = _starts(lengths, query.device), max(lengths)
    return varlen_attn(
        query, key, value, starts, starts, longest, longest,
        scale=scaling, window_size=_sides(window), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _flash_attn(
    query: Any, key: Any, value: Any, lengths: list[int], scaling: float | None, window: int | None
) -> Any:
    from flash_attn import flash_attn_varlen_func

    starts, longest = _starts(lengths, query.device), max(lengths)
    return flash_attn_varlen_func(
        query, key, value, starts, starts, longest, longest,
        softmax_scale=scaling, causal=True, window_size=_sides(window),
    )  # fmt: skip
