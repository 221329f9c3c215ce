"""Products with frozen matrices on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sage.tools.finetune.hardware import cpu_facts

if TYPE_CHECKING:
    from sage.tools.finetune.step_kernels import StepKernels

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


def mlp(kernels: StepKernels, x: Any, gate_up: Any, down: Any, added: Any) -> tuple[Any, Any]:
    """Of kernels for its parts: see `StepKernels.mlp`."""
    kept = kernels.product(x, gate_up)
    return kernels.product(kernels.gate(kept), down, added), kept


def mlp_backward(kernels: StepKernels, of_y: Any, kept: Any, gate_up: Any, down: Any) -> Any:
    of_gate_up = kernels.gate_backward(kernels.product(of_y, down.t()), kept)
    return kernels.product(of_gate_up, gate_up.t())


def _widening_product(x: Any, weight: Any, added: Any, out: Any) -> Any:
    """A part of the matrix at a time, of what lies together: some outputs, or of a turned one some inputs."""
    y = x.new_empty(len(x), len(weight)) if out is None else out
    if weight.is_contiguous():
        for part in _parts(*weight.shape):
            found = x @ weight[part].to(x.dtype).t()
            y[:, part] = found if added is None else found.add_(added[..., part])
        return y
    if added is None:
        y.zero_()
    elif added is not y:
        y.copy_(added)
    for part in _parts(*weight.t().shape):
        y.addmm_(x[:, part], weight.t()[part].to(x.dtype))
    return y


def _parts(rows: int, width: int) -> Iterator[slice]:
    at_once = max(1, WIDENED_AT_ONCE // width)
    return (slice(first, first + at_once) for first in range(0, rows, at_once))


def is_mkl_slow_here() -> bool:
    """Whether kernels of our own multiply faster in fp32.

    torch leaves these products to MKL, which goes at full speed on Intel's chips only.
    """
    facts = cpu_facts()
    return bool(facts) and "GenuineIntel" not in facts
