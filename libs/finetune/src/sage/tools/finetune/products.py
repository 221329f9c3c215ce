"""Products with frozen matrices on a CPU."""

from __future__ import annotations

from typing import Any

from sage.tools.finetune.hardware import cpu_facts

WIDENED_AT_ONCE = 1 << 20
"""Elements of a matrix in half precision that are held as fp32 beside it."""


def product(x: Any, weight: Any, added: Any = None, out: Any = None) -> Any:
    """By torch: see `StepKernels.product`."""
    import torch

    if weight.dtype != x.dtype:
        return _widening_product(x, weight, added, out)
    if added is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(added, x, weight.t(), out=out)


def _widening_product(x: Any, weight: Any, added: Any, out: Any) -> Any:
    """Some rows of the matrix at a time."""
    y = x.new_empty(len(x), len(weight)) if out is None else out
    at_once = max(1, WIDENED_AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), at_once):
        part = slice(first, first + at_once)
        found = x @ weight[part].to(x.dtype).t()
        y[:, part] = found if added is None else found.add_(added[..., part])
    return y


def is_mkl_slow_here() -> bool:
    """Whether kernels of our own multiply faster in fp32.

    torch leaves these products to MKL, which goes at full speed on Intel's chips only.
    """
    facts = cpu_facts()
    return bool(facts) and "GenuineIntel" not in facts
