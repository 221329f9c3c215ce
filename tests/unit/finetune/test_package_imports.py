"""Importing the package and its light parts loads no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sage.tools.finetune as finetune


def test_the_published_import_line_works() -> None:
    from sage.tools.finetune import LoRAConfig, LoRATrainer, PresetConfigs, TrainingConfig

    config = PresetConfigs.rtx_3060()
    config.model_name = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    config.output_dir = "./output"
    assert isinstance(config, TrainingConfig)
    assert isinstance(config.lora, LoRAConfig)
    assert callable(LoRATrainer(config).train)
    assert set(dir(finetune)) >= {"LoRATrainer", "TrainResult", "TrainingCallback"}
    with pytest.raises(AttributeError, match="Nothing"):
        finetune.Nothing  # noqa: B018


def test_nothing_heavy_is_imported() -> None:
    code = """
import sys
from sage.tools.finetune import LoRATrainer, TrainingConfig, PresetConfigs, LoRAConfig
import sage.tools.finetune.data, sage.tools.finetune.code_data, sage.tools.finetune.task_data
from sage.tools.finetune.merging.merge import merge_adapter
from sage.tools.finetune.quickstart import quickstart_overrides
from sage.tools.finetune.base_models import default_model, resolve_base
quickstart_overrides("code", "cpu", has_gpu=False)
default_model("code")
print([name for name in ("torch", "transformers", "peft", "numpy", "huggingface_hub") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
