"""The gated half of a llama layer: down(silu(gate) * up), with the adapters on it."""

from __future__ import annotations

from copy import copy
from typing import Any

from sage.tools.finetune.projections import Projections
from sage.tools.finetune.step_kernels import StepKernels


class GatedMLP:
    """Raises: NotFusableError."""

    def __init__(self, mlp: Any) -> None:
        self.gate_up = Projections([mlp.gate_proj, mlp.up_proj])
        self.down = Projections([mlp.down_proj])

    @property
    def parameters(self) -> list[Any]:
        """What is trained, in the order that `backward` returns gradients in."""
        return [*self.gate_up.parameters, *self.down.parameters]

    def without_adapters(self) -> GatedMLP:
        bare = copy(self)
        bare.gate_up, bare.down = self.gate_up.without_adapters(), self.down.without_adapters()
        return bare

    def forward(self, kernels: StepKernels, x: Any, is_training: bool, added: Any) -> tuple[Any, list[Any]]:
        """x and added (tokens, width) -> (what comes out + added, five tensors or Nones for `backward`)."""
        if self._is_bare:
            y, kept = kernels.mlp(x, self.gate_up.weight, self.down.weight, added)
            return y, [kept, None, None, None, None]
        gate_up, *from_gate_up = self.gate_up.forward(kernels, x, is_training)
        y, *from_down = self.down.forward(kernels, kernels.gate(gate_up), is_training, added)
        return y, [gate_up, *from_gate_up, *from_down]

    def backward(self, kernels: StepKernels, gradient: Any, x: Any, kept: list[Any]) -> tuple[Any, list[Any]]:
        """(gradient of x, gradients of `parameters`). `x` counts only where adapters read it."""
        gate_up, seen, narrow, seen_by_down, narrow_of_down = kept
        if self._is_bare:
            return kernels.mlp_backward(gradient, gate_up, self.gate_up.weight, self.down.weight), []
        acted = kernels.gate(gate_up) if self.down.adapters else None
        of_acted, of_down = self.down.backward(kernels, gradient, acted, seen_by_down, narrow_of_down, True)
        of_gate_up = kernels.gate_backward(of_acted, gate_up)
        del acted, of_acted
        of_x, of_first = self.gate_up.backward(kernels, of_gate_up, x, seen, narrow, True)
        return of_x, [*of_first, *of_down]

    @property
    def _is_bare(self) -> bool:
        return not any(part.adapters or part.bias is not None for part in (self.gate_up, self.down))
