"""Products with frozen matrices on a CPU."""

from __future__ import annotations

from typing import Any

from sage.tools.finetune.hardware import cpu_facts


def product(x: Any, weight: Any, added: Any = None, out: Any = None) -> Any:
    """By torch: see `StepKernels.product`."""
    import torch

    if added is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(added, x, weight.t(), out=out)


def is_mkl_slow_here() -> bool:
    """Whether kernels of our own multiply faster in fp32.

    torch leaves these products to MKL, which goes at full speed on Intel's chips only.
    """
    facts = cpu_facts()
    return bool(facts) and "GenuineIntel" not in facts
