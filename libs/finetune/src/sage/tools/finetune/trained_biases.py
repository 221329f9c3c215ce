"""Biases of a base in half precision that train beside adapters: held in fp32, computed with as before."""

from __future__ import annotations

from typing import Any


def train_in_fp32(model: Any) -> None:
    """Hold what trains in half precision in fp32: updates are too small for half, and fp16's scaler refuses.

    The module that has it computes with it as it was. A layer of bitsandbytes would round its bias for good.
    """
    for module in model.modules():
        halves = {
            name: value.dtype
            for name, value in module.named_parameters(recurse=False)
            if value.requires_grad and value.is_floating_point() and value.itemsize < 4
        }
        if halves:
            for name in halves:
                value = module.get_parameter(name)
                value.data = value.data.float()
            rounded = _Rounded(halves)
            module.register_forward_pre_hook(rounded.put_in)
            module.register_forward_hook(rounded.take_out, always_call=True)


class _Rounded:
    """In the place of a module's parameters for as long as its forward pass takes."""

    def __init__(self, dtypes: dict[str, Any]) -> None:
        self._dtypes = dtypes
        self._held: dict[str, Any] = {}

    def put_in(self, module: Any, _: Any) -> None:
        self._held = {name: module._parameters[name] for name in self._dtypes}
        for name, value in self._held.items():
            module._parameters[name] = value.to(self._dtypes[name])

    def take_out(self, module: Any, *_: Any) -> None:
        module._parameters.update(self._held)
        self._held = {}
