"""Merged weights as a plain Hugging Face folder, with the tokenizer and template that the adapter brought."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from sage.tools.finetune.merging.numbers import FLOATS, ITEM_BYTES
from sage.tools.finetune.merging.tensor_files import MAX_SHARD_BYTES, PlannedTensor, write_tensors
from sage.tools.finetune.merging.weights import MergedWeights
from sage.tools.finetune.model_card import model_card
from sage.tools.finetune.storage import write_json
from sage.tools.finetune.turn_ends import generation_settings, taught_turn_ends
from sage_contracts.config import TrainingConfig

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# What else a server reads, or a person has to: own model code, generation defaults, the licence.
_BASE_FILES = ("generation_config.json", "preprocessor_config.json", "LICENSE*", "*.py")
# What was written beside the weights of a model tuned in full, and holds of it in any other form.
_TUNED_FILES = ("README.md", "training_config.json", "finetune_meta.json")


def write_model(
    weights: MergedWeights, folder: Path, code: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Fill an empty folder. `code` is safetensors' dtype for every weight; None leaves each in the base's.

    Raises: TrainingFailedError when a value does not fit the dtype.
    """
    planned = []
    for tensor in weights.tensors:
        target = (code or tensor.code) if tensor.is_number else tensor.source.code
        planned.append(PlannedTensor(tensor.name, target, tensor.shape, partial(tensor.write, code=target)))
    write_tensors(folder, planned, max_shard_bytes)
    config = dict(weights.config)
    dtype = FLOATS[code or weights.main_code]
    config["dtype"] = dtype
    if "torch_dtype" in config:  # the key's older name; both are read
        config["torch_dtype"] = dtype
    write_json(folder / "config.json", config)
    copy_tokenizer(weights.adapter_dir, weights.base, folder)
    is_tuned_in_full = weights.adapter_dir == weights.base
    for pattern in (*_BASE_FILES, *(_TUNED_FILES if is_tuned_in_full else ())):
        for path in weights.base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    if ends := taught_turn_ends(weights.adapter_dir):
        settings = generation_settings(weights.base, weights.config, ends)
        write_json(folder / "generation_config.json", settings)
    if not is_tuned_in_full:
        _write_record(weights.adapter_dir, folder)


def _write_record(adapter_dir: Path, folder: Path) -> None:
    """What was written beside the adapter, and a card for what it is now; nothing for others' adapters."""
    config_file, meta_file = adapter_dir / "training_config.json", adapter_dir / "finetune_meta.json"
    try:
        config = TrainingConfig.model_validate_json(config_file.read_bytes())
        card = model_card(config, json.loads(meta_file.read_bytes()), is_merged=True)
    except (OSError, ValueError, KeyError):
        return
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in (config_file, meta_file):
        shutil.copyfile(path, folder / path.name)


def model_bytes(weights: MergedWeights, code: str | None) -> int:
    """What the weights take in that dtype."""
    if code is None:
        return sum(tensor.source.size_bytes for tensor in weights.tensors)
    return weights.elements * ITEM_BYTES[code]


def copy_tokenizer(adapter_dir: Path, base: Path, folder: Path) -> None:
    """The files as they are: what was trained with is what is served with."""
    source = adapter_dir if (adapter_dir / "tokenizer_config.json").is_file() else base
    for pattern in _TOKENIZER_FILES:
        for path in filter(Path.is_file, source.glob(pattern)):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
