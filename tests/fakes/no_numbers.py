"""A machine that computes nonsense now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_number_when(is_time: Callable[[], bool]) -> Iterator[None]:
    """Asked in every pass of training: where it is time, nothing of the pass is a number."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook

    def spoil(module: Any, arguments: Any, output: Any) -> Any:
        if not isinstance(module, torch.nn.Embedding) or not torch.is_grad_enabled():
            return None
        return output * float("nan") if is_time() else None

    hook = register_module_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()
