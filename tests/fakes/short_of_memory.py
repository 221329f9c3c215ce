"""A machine with too little memory for long forward passes, in three ways; as a program, a training child.

`raise`  CUDA's out-of-memory error, from inside the model's forward
`kill`   SIGKILL, as the kernel does
`limit`  a real limit on the address space (RLIMIT_AS), some bytes above what the libraries take

    SHORT_OF_MEMORY=raise:256 python -m tests.fakes.short_of_memory SPEC.json
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "SHORT_OF_MEMORY"


@contextmanager
def forward_limit(max_tokens: int, *, is_deadly: bool = False) -> Iterator[list[int]]:
    """No training pass of more tokens than this gets through; yields the sizes that were refused."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    refused: list[int] = []

    def check(module: Any, arguments: tuple[Any, ...]) -> None:
        if not isinstance(module, torch.nn.Embedding) or not torch.is_grad_enabled():
            return
        tokens = arguments[0].numel()
        if tokens <= max_tokens:
            return
        if is_deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        refused.append(tokens)
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} KiB. GPU 0 is full.")

    hook = register_module_forward_pre_hook(check)
    try:
        yield refused
    finally:
        hook.remove()


def limit_address_space(spare_bytes: int) -> None:
    """Let this process grow by so much and no more, once everything it imports is loaded."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    torch.ones(64, 64) @ torch.ones(64, 64)  # the threads and buffers of the first product
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + spare_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> int:
    from sage_trainer import child

    way, _, amount = os.environ[VARIABLE].partition(":")
    if way == "limit":
        limit_address_space(int(amount))
        return child.main()
    with forward_limit(int(amount), is_deadly=way == "kill"):
        return child.main()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
