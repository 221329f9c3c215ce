"""What a training process imports, done ahead of the job that needs it."""

from __future__ import annotations

import gc


def import_for_training() -> None:
    """Import what every run imports late. Touches no device, reads no model and starts no threads of work."""
    from sage.tools.finetune.hardware import has_cuda, wait_politely
    from sage.tools.finetune.modeling import bitsandbytes_for

    wait_politely()
    with bitsandbytes_for(has_cuda()):  # on GPUs most bases are quantised
        import peft  # noqa: F401
    import torch  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import sage.tools.finetune.trainer  # noqa: F401

    # Libraries stay: a collector that walks their million objects again and again doubles the time in which a
    # tokenizer is read.
    gc.collect()
    gc.freeze()
