"""What an adapter does to the weights of its base: one list of edits per tensor, read from peft's files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage.tools.finetune.merging.tensor_files import StoredTensor, stored_tensors
from sage_contracts.adapter_starts import start_in_the_base
from sage_contracts.errors import InvalidRequestError, ModelNotFoundError

Rows = Callable[[Any, int], Any]
"""(fp32 rows, number of the first one) -> the same rows, edited."""

_PREFIX = "base_model.model."
_PART = re.compile(r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(\.weight|\.bias)?$")
# Each changes what a forward pass does in a way that no single weight matrix can hold, or not W + BA.
_NOT_MERGED = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)


@dataclass(frozen=True)
class AdapterConfig:
    """What merging needs of `adapter_config.json`. Source: peft, `LoraConfig`."""

    lora_alpha: float
    use_rslora: bool
    alpha_pattern: dict[str, float]
    fan_in_fan_out: bool
    ensure_weight_tying: bool

    def scaling(self, module: str, rank: int) -> float:
        """Source: Hu et al., arXiv:2106.09685; with rsLoRA Kalajdzievski, arXiv:2312.03732."""
        alpha = self.lora_alpha
        for pattern, value in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass
class ModuleEdits:
    """The parts of one module (`model.layers.0.self_attn.q_proj`)."""

    name: str
    scaling: float = 1.0
    a: StoredTensor | None = None
    b: StoredTensor | None = None
    is_embedding: bool = False
    bias_of_b: StoredTensor | None = None
    magnitude: StoredTensor | None = None


@dataclass(frozen=True)
class Adapter:
    config: AdapterConfig
    modules: dict[str, ModuleEdits]
    replaced: dict[str, StoredTensor] = field(default_factory=dict)
    """Whole tensors that were trained: `modules_to_save`, biases."""


NO_ADAPTER = Adapter(AdapterConfig(1.0, False, {}, False, False), {})


def read_adapter(folder: Path) -> Adapter:
    """Raises: ModelNotFoundError, InvalidRequestError for a kind that cannot be merged."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{folder} holds no adapter (no adapter_config.json).")
    config = _config_of(json.loads(path.read_text(encoding="utf-8")), folder)
    modules: dict[str, ModuleEdits] = {}
    replaced: dict[str, StoredTensor] = {}
    for key, tensor in stored_tensors(folder, "adapter_model").items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        found = _PART.search(name)
        if found is None:
            if "lora_" in name or "token_adapter" in name:
                raise InvalidRequestError(
                    f"{folder} holds {key}, a part of an adapter that cannot be merged."
                )
            replaced[name] = tensor
            continue
        module = modules.setdefault(name[: found.start()], ModuleEdits(name[: found.start()]))
        _put(module, found[1], found[2] or "", tensor)
    for module in modules.values():
        if module.a is None or module.b is None or len(module.a.shape) != 2 or len(module.b.shape) != 2:
            raise InvalidRequestError(f"{folder}: {module.name} has no pair of matrices A and B to merge.")
        module.scaling = config.scaling(module.name, module.a.shape[0])
    return Adapter(config, modules, replaced)


def _put(module: ModuleEdits, part: str, suffix: str, tensor: StoredTensor) -> None:
    if part == "lora_magnitude_vector":
        module.magnitude = tensor
    elif suffix == ".bias":
        module.bias_of_b = tensor
    elif part.endswith("A"):
        module.a = tensor
    else:
        module.b = tensor
    module.is_embedding |= "embedding" in part


def _config_of(stored: dict[str, Any], folder: Path) -> AdapterConfig:
    if (kind := stored.get("peft_type")) != "LORA":
        raise InvalidRequestError(f"{folder} holds a {kind} adapter; LoRA and DoRA adapters can be merged.")
    if unusual := [name for name in _NOT_MERGED if stored.get(name)]:
        raise InvalidRequestError(
            f"{folder} is a LoRA adapter with {', '.join(unusual)}, which cannot be merged."
        )
    if (start := start_in_the_base(stored)) is not None:
        raise InvalidRequestError(
            f"{folder} was started with init_lora_weights={start!r}, which changes the base. Convert it with "
            "peft's path_initial_model_for_weight_conversion, then merge."
        )
    return AdapterConfig(
        lora_alpha=stored.get("lora_alpha", 8),
        use_rslora=bool(stored.get("use_rslora")),
        alpha_pattern=stored.get("alpha_pattern") or {},
        fan_in_fan_out=bool(stored.get("fan_in_fan_out")),
        ensure_weight_tying=bool(stored.get("ensure_weight_tying")),
    )


def low_rank(module: ModuleEdits, *, is_transposed: bool, blocks: Callable[[], Iterator[Any]]) -> Rows:
    """W + scaling · BA, by rows of W; with a magnitude DoRA's m · (W + scaling · BA) / its norm.

    `is_transposed` means that W lies as (in, out), as embeddings and GPT-2's layers do. `blocks` gives the
    unedited (first row, rows) once more, for the norm of a column.
    Source: Liu et al., "DoRA", arXiv:2402.09353.
    """
    import numpy as np

    assert module.a is not None and module.b is not None
    a, b = module.a.read(), module.b.read()
    if is_transposed:
        left, right = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    else:
        left, right = b, a
    scaling = np.float32(module.scaling)

    def add(values: Any, first: int) -> Any:
        delta = left[first : first + len(values)] @ right
        delta *= scaling
        values += delta
        return values

    if module.magnitude is None:
        return add
    magnitude = module.magnitude.read().reshape(-1)
    if is_transposed:
        squares = sum(np.square(add(rows, first)).sum(axis=0, dtype=np.float64) for first, rows in blocks())
        factor = magnitude / np.sqrt(squares).astype(np.float32)
        return lambda values, first: factor * add(values, first)

    def scale(values: Any, first: int) -> Any:
        values = add(values, first)
        norm = np.linalg.norm(values, axis=1)
        return (magnitude[first : first + len(values)] / norm)[:, None] * values

    return scale


def add_bias(module: ModuleEdits) -> Rows:
    """The bias of B, which peft trains with `lora_bias`."""
    import numpy as np

    assert module.bias_of_b is not None
    bias = module.bias_of_b.read().reshape(-1, 1) * np.float32(module.scaling)
    return lambda values, first: values + bias[first : first + len(values)]
