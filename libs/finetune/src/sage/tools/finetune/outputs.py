"""The folder of a tuned model, as published: where everything lies and what is written with the weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sage.tools.finetune.model_card import model_card
from sage.tools.finetune.modeling import is_whole, save_weights
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
    def full_model(self) -> Path:
        """The result of `tuning="full"`: a plain model folder, in place of an adapter."""
        return self.root / "full_model"

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

    def write_result(self, model: Any, tokenizer: Any, config: TrainingConfig, meta: dict[str, Any]) -> Path:
        """The folder of weights, with all that serving and judging them takes, in place of an older one.

        Beside the weights: the tokenizer and template they were trained with, the resolved configuration,
        what was measured, and a model card. The folder can be copied anywhere and is complete.
        """
        target, other = self.adapter, self.full_model
        if is_whole(model):
            target, other = other, target
        with folder_written_whole(target) as unfinished:
            save_weights(model, unfinished)
            tokenizer.save_pretrained(str(unfinished))
            write_json(unfinished / self.config.name, config.model_dump(mode="json"))
            write_json(unfinished / self.meta.name, meta)
            # In place of peft's own, which is a form to fill in.
            (unfinished / "README.md").write_text(model_card(config, meta), encoding="utf-8")
        # An earlier result of the other kind: whoever looks here wants the newest.
        shutil.rmtree(other, ignore_errors=True)
        write_json(self.meta, meta)
        return target

    def write_config(self, config: TrainingConfig) -> None:
        write_json(self.config, config.model_dump(mode="json"))


def package_versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
