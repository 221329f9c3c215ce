"""Frozen weights in 8 or 4 bits, held and multiplied by bitsandbytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from sage.tools.finetune.hardware import ResolvedPrecision, memory_reason, torch_dtype
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import OutOfMemoryError


def base_bits(config: TrainingConfig) -> int | None:
    """Of a base that a run quantises."""
    if config.load_in_8bit:
        return 8
    return 4 if config.load_in_4bit else None


def quantisation_of(config: TrainingConfig, precision: ResolvedPrecision) -> Any:
    """What a config that asks for 8 or 4 bits tells transformers."""
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=torch_dtype(precision),
    )


@contextmanager
def quantising_errors() -> Iterator[None]:
    """Tell a lack of memory from other reasons why weights were not quantised. Raises: OutOfMemoryError.

    transformers goes on without a weight whose conversion fails, and at the end raises an error that says
    only that some did: why is told in what it reports from.
    """
    try:
        yield
    except RuntimeError as error:
        for frame, _ in walk_tb(error.__traceback__):
            report = getattr(frame.f_locals.get("loading_info"), "conversion_errors", {})
            for line in (line for told in report.values() for line in reversed(told.splitlines())):
                if reason := memory_reason(RuntimeError(line)):
                    raise OutOfMemoryError(f"There was not enough memory ({reason}).") from error
        raise


def keep_differentiable(model: Any) -> None:
    """Let no evaluation pack the 4-bit weights of a model that trains.

    On CPUs with AVX512-BF16 bitsandbytes packs them in their first pass without gradients, for good and for a
    product that has no backward pass: what lies below learns from gradients that are missing.
    """
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
