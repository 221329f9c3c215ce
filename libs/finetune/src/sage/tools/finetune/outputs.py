"""The folder of a tuned model, as published: where everything lies and what is written with the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sage.tools.finetune.modeling import save_adapter
from sage.tools.finetune.storage import folder_written_whole, write_json
from sage_contracts.config import TrainingConfig

_PACKAGES = ("sage-finetune", "torch", "transformers", "peft", "bitsandbytes", "tokenizers")


@dataclass(frozen=True)
class OutputLayout:
    """Paths below one output folder."""

    root: Path

    @property
    def adapter(self) -> Path:
        return self.root / "lora_weights"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def merged(self) -> Path:
        return self.root / "merged_model"

    @property
    def config(self) -> Path:
        return self.root / "training_config.json"

    @property
    def meta(self) -> Path:
        return self.root / "finetune_meta.json"

    def write_adapter(self, model: Any, tokenizer: Any) -> None:
        """The adapter with the tokenizer and template it was trained with, in place of an older one."""
        with folder_written_whole(self.adapter) as unfinished:
            save_adapter(model, unfinished)
            tokenizer.save_pretrained(str(unfinished))

    def write_config(self, config: TrainingConfig) -> None:
        write_json(self.config, config.model_dump(mode="json"))

    def write_meta(self, meta: dict[str, Any]) -> None:
        write_json(self.meta, meta)


def package_versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
