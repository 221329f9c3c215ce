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


@pytest.mark.parametrize(
    "statement",
    [
        "from sage.tools.finetune import LoRATrainer, TrainingConfig, PresetConfigs, LoRAConfig",
        "import sage.tools.finetune.data, sage.tools.finetune.code_data, sage.tools.finetune.task_data",
        "from sage.tools.finetune.quickstart import quickstart_overrides; quickstart_overrides('code', 'cpu')",
        "from sage.tools.finetune.base_models import default_model, resolve_base; default_model('code')",
        "from sage.tools.finetune.merge import merge_adapter",
    ],
)
def test_nothing_heavy_is_imported(statement: str) -> None:
    heavy = "[m for m in ('torch', 'transformers', 'peft', 'numpy', 'huggingface_hub') if m in sys.modules]"
    code = f"import sys; {statement}; print({heavy})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
