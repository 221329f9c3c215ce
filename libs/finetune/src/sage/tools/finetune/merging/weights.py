"""The merged model's tensors, computed a few rows at a time: neither base nor result is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sage.tools.finetune.merging.adapter import (
    NO_ADAPTER,
    Adapter,
    ModuleEdits,
    Rows,
    add_bias,
    low_rank,
    read_adapter,
)
from sage.tools.finetune.merging.numbers import FLOATS, from_fp32, is_finite
from sage.tools.finetune.merging.tensor_files import StoredTensor, stored_tensors
from sage_contracts.errors import InvalidRequestError, ModelNotFoundError, TrainingFailedError

_BLOCK_ELEMENTS = 1 << 20
_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")
# GPT-2's family keeps the weights of its Conv1D layers as (in, out).
_CONV1D_MODELS = {"gpt2", "imagegpt", "openai-gpt", "decision_transformer"}


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model: where its values come from, and what the adapter does to them."""

    name: str
    source: StoredTensor
    code: str
    """The dtype that the base keeps it in."""
    edits: tuple[ModuleEdits, ...] = ()
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def is_number(self) -> bool:
        """Whether it can be computed with; masks and positions are copied as they are."""
        return self.source.code in FLOATS

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(number of the first row, merged fp32 rows), in order. Each block is the caller's to change."""
        editors = [self._editor(edit) for edit in self.edits]
        for first, values in self._stored_rows():
            for edit in editors:
                values = edit(values, first)
            yield first, values

    def read(self) -> Any:
        """All of it, fp32."""
        import numpy as np

        return np.concatenate([rows for _, rows in self.rows()]).reshape(self.shape)

    def write(self, out: IO[bytes], code: str) -> None:
        """Raises: TrainingFailedError when a value is no number, or too large for the target."""
        if not self.edits and (code == self.source.code or not self.is_number):
            self.source.copy_to(out)
            return
        for _, values in self.rows():
            stored = from_fp32(values, code)
            if not is_finite(stored, code):
                raise TrainingFailedError(
                    f"{self.name} would hold NaN or infinite values in {FLOATS[code]}: the adapter is broken"
                    + (", or its weights are too large for fp16: use bf16." if code == "F16" else ".")
                )
            out.write(memoryview(stored).cast("B"))

    def _stored_rows(self) -> Iterator[tuple[int, Any]]:
        step = max(1, _BLOCK_ELEMENTS // max(1, self.source.row_elements))
        for first in range(0, self.source.rows, step):
            yield first, self.source.read_rows(first, min(first + step, self.source.rows))

    def _editor(self, module: ModuleEdits) -> Rows:
        if self.name.endswith(".bias"):
            return add_bias(module)
        return low_rank(module, is_transposed=self.is_transposed, blocks=self._stored_rows)


@dataclass(frozen=True)
class MergedWeights:
    """The tensors and the configuration of base + adapter, to be written in whichever format."""

    base: Path
    adapter_dir: Path
    """Where the tokenizer is that was trained with; without an adapter the base itself."""
    tensors: tuple[MergedTensor, ...]
    config: dict[str, Any]
    """The base's, except for ties that the merge breaks."""
    main_code: str
    """The dtype of most of the base's weights."""

    @property
    def elements(self) -> int:
        return sum(tensor.source.rows * tensor.source.row_elements for tensor in self.tensors)


def merged_weights(base: Path, adapter_dir: Path | None) -> MergedWeights:
    """Reads headers only; without an adapter they are the base's own.

    Raises: ModelNotFoundError, InvalidRequestError where they do not fit together.
    """
    config = _config_of(base)
    stored = stored_tensors(base)
    adapter = read_adapter(adapter_dir) if adapter_dir else NO_ADAPTER
    edits, replaced = _by_tensor(adapter)
    head = next((name for name in _OUTPUT_EMBEDDINGS if name in stored or name in edits | replaced), None)
    embedding = next((name for name in stored if name.endswith(_INPUT_EMBEDDINGS)), None)
    if embedding and _ends_tie(config, adapter, stored, {*edits, *replaced}, embedding, head):
        head = head or _OUTPUT_EMBEDDINGS[0]
        # Merged as peft does it, in place, a tied output layer would change with its input, or the other
        # way round: not what the adapter does. Apart, each is what it was beside the adapter.
        stored.setdefault(head, stored[embedding])
        config["tie_word_embeddings"] = False
    names = {name: _stored_name(name, stored) for name in [*edits, *replaced]}
    known = {names[name]: edit for name, edit in edits.items()}
    whole = {names[name]: tensor for name, tensor in replaced.items()}
    transposes = adapter.config.fan_in_fan_out or config.get("model_type") in _CONV1D_MODELS
    tensors = tuple(
        _merged(name, tensor, whole.get(name), known.get(name), transposes=transposes)
        for name, tensor in stored.items()
    )
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        sizes[tensor.code] = sizes.get(tensor.code, 0) + tensor.size_bytes
    main_code = max((code for code in sizes if code in FLOATS), key=sizes.__getitem__)
    return MergedWeights(base, adapter_dir or base, tensors, config, main_code)


def _config_of(base: Path) -> dict[str, Any]:
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{base} holds no model that can be loaded: {error}") from error
    if config.get("quantization_config"):
        raise InvalidRequestError(
            f"{base} is a quantised model, and an adapter cannot be added to quantised numbers. Merge onto "
            "the full-precision model that it was made from: adapters trained on 8 or 4 bits fit it.",
            param="model",
        )
    return dict(config)


def _by_tensor(adapter: Adapter) -> tuple[dict[str, ModuleEdits], dict[str, StoredTensor]]:
    edits: dict[str, ModuleEdits] = {}
    for module in adapter.modules.values():
        edits[f"{module.name}.weight"] = module
        if module.bias_of_b is not None:
            edits[f"{module.name}.bias"] = module
    replaced = dict(adapter.replaced)
    if adapter.config.ensure_weight_tying:
        # The tied pair was trained as one: the embedding's edits are the output layer's too.
        for name in _OUTPUT_EMBEDDINGS:
            edits.pop(name, None)
            replaced.pop(name, None)
    return edits, replaced


def _ends_tie(
    config: dict[str, Any],
    adapter: Adapter,
    stored: dict[str, StoredTensor],
    changed: set[str],
    embedding: str,
    head: str | None,
) -> bool:
    has_head = head is not None and head in stored
    if adapter.config.ensure_weight_tying or not config.get("tie_word_embeddings", not has_head):
        return False
    return head in changed or any(name.endswith(_INPUT_EMBEDDINGS) for name in changed)


def _stored_name(name: str, stored: dict[str, StoredTensor]) -> str:
    """The name in the files; some leave out the model's own prefix. Raises: InvalidRequestError."""
    if name in stored:
        return name
    shorter = name.partition(".")[2]
    if shorter in stored:
        return shorter
    raise InvalidRequestError(
        f"The base has no weight {name} for the adapter to change: it is not the model that the adapter was "
        "trained on, or its files name their tensors otherwise.",
        param="model",
    )


def _merged(
    name: str,
    stored: StoredTensor,
    whole: StoredTensor | None,
    module: ModuleEdits | None,
    *,
    transposes: bool,
) -> MergedTensor:
    source = whole or stored
    if source.shape != stored.shape:
        raise InvalidRequestError(
            f"The adapter's {name} has the shape {source.shape}, the base's {stored.shape}: they do not "
            "belong together."
        )
    if module is None:
        return MergedTensor(name, source, stored.code)
    if stored.code not in FLOATS:
        raise InvalidRequestError(
            f"The base keeps {name} as {stored.code}: merge onto the full-precision model."
        )
    if name.endswith(".bias"):
        return MergedTensor(name, source, stored.code, (module,))
    assert module.a is not None and module.b is not None
    straight = (module.b.shape[0], module.a.shape[1])
    is_transposed = module.is_embedding or (transposes and not name.endswith(_OUTPUT_EMBEDDINGS))
    if stored.shape != (straight[::-1] if is_transposed else straight):
        raise InvalidRequestError(
            f"The adapter changes {name} as {straight}, but the base's is {stored.shape}: it is not the "
            "model that the adapter was trained on.",
            param="model",
        )
    return MergedTensor(name, source, stored.code, (module,), is_transposed)
