"""What a training process imports, done ahead of the job that needs it."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path


def import_for_training() -> None:
    """Import what every run imports late. Touches no device, reads no model and starts no threads of work.

    Without a GPU this also has the kernels for CPUs compiled, where nobody has yet.
    """
    from sage.tools.finetune.hardware import has_cuda, wait_politely
    from sage.tools.finetune.modeling import bitsandbytes_for

    wait_politely()
    is_cpu = not has_cuda()
    with bitsandbytes_for(not is_cpu):  # on GPUs most bases are quantised
        import peft  # noqa: F401
    import torch  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import sage.tools.finetune.trainer  # noqa: F401
    from sage.tools.finetune.native.build import CompilerError
    from sage.tools.finetune.native.library import load_library

    if is_cpu:
        with suppress(CompilerError):  # the run tells of it
            load_library()

    _leave_out_of_collections()


def read_for_training(base: str, home: Path) -> None:
    """Read what the next run begins with, if it is of this base model and that is on this machine already."""
    from sage.tools.finetune.base_models import local_base
    from sage.tools.finetune.modeling import read_ahead

    folder = local_base(base, home)
    if folder is not None:
        with suppress(Exception):  # whatever it is, the run tells of it
            read_ahead(folder)
        _leave_out_of_collections()


def _leave_out_of_collections() -> None:
    # Libraries stay: a collector that walks their million objects again and again doubles the time in which a
    # tokenizer is read.
    gc.collect()
    gc.freeze()
