"""What serving a resolved name needs on this machine: folders that exist, sizes, ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sage_contracts.errors import ModelNotFoundError
from sage_contracts.home import Home
from sage_contracts.models import ResolvedModel

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

    @property
    def rank(self) -> int:
        return self.adapter.rank if self.adapter else 0

    @property
    def label(self) -> str:
        return self.adapter.name if self.adapter else self.base.served_name


def locate(model: ResolvedModel, home: Home) -> Wanted:
    """Check what the orchestrator resolved against this machine. Raises: ModelNotFoundError."""
    # A model tuned in full is its own base; every version's folder has the same name, so theirs serves.
    is_own_base = model.adapter_path is None and not model.id.startswith("base:")
    base = _base(model.base_model, home)
    if is_own_base:
        base = replace(base, served_name=model.id)
    return Wanted(base, _adapter(model, home) if model.adapter_path else None)


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
    config = config.get("text_config", config)
    weights = sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern))
    return BaseModel(
        location=str(folder),
        served_name=f"base:{folder.name}",
        is_local=True,
        weights_bytes=weights,
        max_positions=config.get("max_position_embeddings"),
        kv_values_per_token=_kv_values(config),
    )


def _kv_values(config: dict[str, Any]) -> int | None:
    """Keys and values of one token in all layers."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    if not (layers and heads and hidden):
        return None
    head_dim = config.get("head_dim") or hidden // heads
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * head_dim)


def _adapter(model: ResolvedModel, home: Home) -> Adapter:
    assert model.adapter_path is not None
    path = home.resolve(model.adapter_path)
    config = _read_json(path / "adapter_config.json")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    rank = max((value for value in ranks if isinstance(value, int)), default=model.max_lora_rank)
    return Adapter(model.id, path, rank)


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
