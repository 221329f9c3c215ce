"""On an NVIDIA GPU: short runs through what a CPU has not, fp16 and its scaler, paged and 8-bit states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.tiny_llama import make_model
from tests.integration.finetune_recorder import Recorder, adapter_weights
from tests.integration.preference_runs import write_pairs

from sage.tools.finetune import LoRATrainer, PresetConfigs, TrainingConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that the optimiser pages its state, which it does from 100,000 numbers of a tensor on.

    Its weights are small: the scaler would pass over steps whose gradients are too large for fp16.
    """
    folder = tmp_path_factory.mktemp("base") / "wide"
    return make_model(
        folder, hidden_size=1024, num_attention_heads=8, attention_bias=True, initializer_range=0.02
    )


def config(preset: str, method: str, base: Path, folder: Path, **changes: Any) -> TrainingConfig:
    data = folder / "rows.jsonl"
    if method == "sft":
        rows = ({"question": f"Number {n}?", "answer": f"It is {n}, of course."} for n in range(24))
        data.write_text("\n".join(map(json.dumps, rows)))
    else:
        write_pairs(data, count=24)
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(data),
        "output_dir": str(folder / "out"),
        "method": method,
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "validation_fraction": 0.2,
        "learning_rate": 1e-3,
        "lora": {"r": 128, "lora_dropout": 0.0},
    }
    return PresetConfigs.named(preset, **{**fields, **changes})


def trained(config: TrainingConfig, **options: Any) -> dict[str, Any]:
    """The adapter of a run that went well, its numbers all of fp32."""
    import torch

    recorder = Recorder()
    result = LoRATrainer(config, [recorder], **options).train()
    assert [metrics.step for metrics in recorder.steps][-1] == config.max_steps
    weights = adapter_weights(result)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in weights.values())
    assert any(value.any() for name, value in weights.items() if "lora_B" in name), "no step was taken"
    return weights


@pytest.mark.parametrize(
    ("preset", "method"),
    [("minimal", "sft"), ("minimal", "dpo"), ("minimal", "kto"), ("minimal", "orpo"), ("rtx_3060", "sft")],
)
def test_presets_that_quantise_train_in_fp16(base: Path, tmp_path: Path, preset: str, method: str) -> None:
    trained(config(preset, method, base, tmp_path))


@pytest.mark.parametrize("preset", ["rtx_4090", "rtx_3060", "minimal"])
def test_biases_of_an_fp16_base_train(base: Path, tmp_path: Path, preset: str) -> None:
    lora = {"r": 8, "lora_dropout": 0.0, "bias": "all"}
    weights = trained(config(preset, "sft", base, tmp_path, lora=lora))
    assert any(value.any() for name, value in weights.items() if name.endswith(".bias"))


def test_a_paged_optimiser_is_saved_and_resumed(base: Path, tmp_path: Path) -> None:
    import torch

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    expected = trained(config("minimal", "sft", base, whole, max_steps=6))
    interrupted = config("minimal", "sft", base, halves, max_steps=6, save_steps=1)
    first = LoRATrainer(interrupted, [Recorder(stop_after=3)], run_id="one").train()
    assert first.stopped == "save_and_stop"
    found = trained(interrupted, run_id="one", resume=True)
    assert found.keys() == expected.keys()
    names = [name for name in found if "lora_B" in name]
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in names]).norm()
    assert difference < 0.1 * torch.cat([expected[name].flatten() for name in names]).norm()
