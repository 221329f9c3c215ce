"""Where a model's weights lie while it trains on a CPU: out of their file, in one piece where one product
reads several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sage.tools.finetune.fused_layer import FAMILY, read_together, require_fusable
from sage.tools.finetune.merging.tensor_files import stored_tensors
from sage.tools.finetune.projections import NotFusableError, put_in_line
from sage.tools.finetune.widening import widen_when_used
from sage_contracts.errors import ModelNotFoundError

_HALVES = {"BF16": "bfloat16", "F16": "float16"}


def is_laid_out(base: Path) -> bool:
    """Whether the model of this folder is one for `lay_out`, once it is loaded, and `stored_half`.

    These families are the same whichever format they are built in. Gemma is not, which rounds the factor that
    it scales embeddings by.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"] in FAMILY
    return False


def stored_half(base: Path) -> Any:
    """The half precision that all weights of a model's folder are stored in; else None."""
    import torch

    codes: set[str] = set()
    with suppress(ModelNotFoundError, OSError, ValueError, KeyError):  # whoever loads it says what is wrong
        codes = {tensor.code for tensor in stored_tensors(base).values()}
    return getattr(torch, _HALVES[codes.pop()]) if len(codes) == 1 and codes <= _HALVES.keys() else None


def lay_out(model: Any, dtype: Any, *, keeps_half: bool = False) -> None:
    """Copy every weight to where it stays, once, and into `dtype` where that is the wider one.

    Those that loading has not converted are windows into their file, whose pages would stay beside what is
    joined later. `keeps_half`: matrices that can be widened where they are used stay in bf16.
    """
    from torch import promote_types

    kept = widen_when_used(model) if keeps_half else set()
    done: set[int] = set()
    for weights in _read_together(model):
        stay = kept.issuperset(map(id, weights))
        put_in_line(weights, weights[0].dtype if stay else promote_types(weights[0].dtype, dtype))
        done |= set(map(id, weights))
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point() and id(value) not in done:
            wanted = value.dtype if id(value) in kept else promote_types(value.dtype, dtype)
            value.data = value.data.to(wanted, copy=True)
    model.config.dtype = dtype


def _read_together(model: Any) -> Iterator[list[Any]]:
    decoder = model.get_decoder()
    with suppress(NotFusableError):
        require_fusable(decoder)
        for layer in decoder.layers:
            yield from read_together(layer)
