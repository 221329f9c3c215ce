"""What serving a resolved name needs on this machine: folders that exist, sizes, ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sage_contracts.errors import ModelNotFoundError
from sage_contracts.home import Home
from sage_contracts.models import ResolvedModel
from sage_inference.fit import Kind, largest_rank, why_not

_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class BaseModel:
    """A base model as an engine is given it."""

    location: str
    """A folder, or a Hub id."""
    served_name: str
    """The name it answers to inside its engine: `base:smollm2-135m`."""
    is_local: bool
    weights_bytes: int
    """On disk; 0 when it is not here yet."""
    max_positions: int | None
    kv_values_per_token: int | None
    """Numbers that one token leaves in the cache, over all layers."""
    is_fp32: bool = False
    """Its files hold four bytes a weight, of which an engine on a GPU keeps two."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as an engine loads it, under its immutable name."""

    name: str
    path: Path
    rank: int


@dataclass(frozen=True)
class Wanted:
    """What one request wants to be answered by."""

    base: BaseModel
    adapter: Adapter | None = None
    merge_reason: str | None = None
    """Why the engine cannot load the adapter: its merged weights have to be made first."""
    turn_end_ids: tuple[int, ...] = ()
    """Where its answers end, beside where its base's do."""

    @property
    def rank(self) -> int:
        return self.adapter.rank if self.adapter else 0

    @property
    def label(self) -> str:
        return self.adapter.name if self.adapter else self.base.served_name


def locate(model: ResolvedModel, home: Home, kind: Kind) -> Wanted:
    """Hold what the orchestrator resolved against this machine and engine. Raises: ModelNotFoundError."""
    return replace(_located(model, home, kind), turn_end_ids=tuple(model.turn_end_ids))


def _located(model: ResolvedModel, home: Home, kind: Kind) -> Wanted:
    if model.adapter_path is None:
        base = _base(model.base_model, home)
        # A model tuned in full is its own base.
        return Wanted(base if model.id.startswith("base:") else _named(base, model))
    config = _read_json(home.resolve(model.adapter_path) / "adapter_config.json")
    merge_reason = why_not(config, kind)
    if merge_reason and model.merged_path and (home.resolve(model.merged_path) / "config.json").is_file():
        return Wanted(_named(_local_base(home.resolve(model.merged_path)), model))
    rank = largest_rank(config, otherwise=model.max_lora_rank)
    adapter = Adapter(model.id, home.resolve(model.adapter_path), rank)
    return Wanted(_base(model.base_model, home), adapter, merge_reason)


def _named(base: BaseModel, model: ResolvedModel) -> BaseModel:
    """Every version's folder of whole weights has the same name, so the version's own serves."""
    return replace(base, served_name=model.id)


def _base(name: str, home: Home) -> BaseModel:
    folder = home.resolve(name)
    if folder.is_dir():
        return _local_base(folder)
    if Path(name).expanduser().is_absolute() or name.startswith(f"{home.base_models.name}/"):
        raise ModelNotFoundError(
            f"The base model is not at {folder}. Run `sage finetune quickstart` to fetch it again, "
            "or mount the same SAGE_HOME here.",
            param="model",
        )
    return BaseModel(name, f"base:{name}", False, 0, None, None)


def _local_base(folder: Path) -> BaseModel:
    config = _read_json(folder / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    config = config.get("text_config", config)
    weights = sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern))
    return BaseModel(
        location=str(folder),
        served_name=f"base:{folder.name}",
        is_local=True,
        weights_bytes=weights,
        max_positions=config.get("max_position_embeddings"),
        kv_values_per_token=_kv_values(config),
        is_fp32=dtype == "float32",
    )


def _kv_values(config: dict[str, Any]) -> int | None:
    """Keys and values of one token in all layers."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    if not (layers and heads and hidden):
        return None
    head_dim = config.get("head_dim") or hidden // heads
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * head_dim)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"{path} is missing: the model was deleted, or this host does not see the same SAGE_HOME.",
            param="model",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}", param="model") from error
    return content if isinstance(content, dict) else {}
