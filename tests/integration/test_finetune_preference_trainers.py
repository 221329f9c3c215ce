"""TRL's trainers get a model to train, and leave its numbers and its device as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.integration.finetune_recorder import adapter_weights
from tests.integration.preference_runs import METHODS, settings, write_pairs

from sage.tools.finetune import LoRATrainer, PresetConfigs, TrainingCallback, TrainingConfig
from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.preferences.methods import make_trainer
from sage.tools.finetune.preferences.progress import Progress
from sage.tools.finetune.preferences.samples import PairSample, RatedSample
from sage.tools.finetune.run_parts import RunParts


def trainer_of(parts: RunParts, config: TrainingConfig, folder: Path) -> Any:
    schedule = Schedule(4, config.effective_batch_size, 1, max_steps=1, seed=1)
    progress: Progress[RunState] = Progress(
        config, schedule, RunState(), Checkpoints(folder, {}), TrainingCallback(), "cpu"
    )
    rated = [RatedSample([5, 6, 7], [8, 9 + n], is_desirable=bool(n % 2)) for n in range(4)]
    pairs = [PairSample([5, 6, 7], [8, 9], [10, 11])] * 4
    return make_trainer(config, parts, rated if config.method == "kto" else pairs, schedule, folder, progress)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_a_quantised_base_train_in_fp32_and_begin_as_they_were(
    tiny_base: Path, tmp_path: Path, method: str, bits: str
) -> None:
    import torch

    config = settings(tiny_base, tmp_path, tmp_path, method=method, precision="auto", **{bits: True})
    parts = RunParts(config, tiny_base, TrainingCallback())
    with torch.no_grad():
        for value in parts.model.parameters():
            if value.requires_grad:
                value.normal_()
    before = {name: value.clone() for name, value in parts.model.named_parameters() if value.requires_grad}
    trainer = trainer_of(parts, config, tmp_path)
    after = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert after.keys() == before.keys()
    assert all(value.dtype == torch.float32 for value in after.values())
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    optimised = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
    assert optimised == {id(value) for value in after.values()}


@pytest.mark.parametrize(("method", "preset"), [("dpo", "minimal"), ("kto", "rtx_3060"), ("orpo", "minimal")])
def test_presets_that_quantise_leave_adapters_in_fp32(
    tiny_base: Path, tmp_path: Path, method: str, preset: str
) -> None:
    import torch

    data = write_pairs(tmp_path / "data.jsonl")
    config = PresetConfigs.named(
        preset, method=method, model_name=str(tiny_base), data_path=str(data), max_steps=2,
        output_dir=str(tmp_path / "out"), gradient_accumulation_steps=2, save_steps=1,
    )  # fmt: skip
    weights = adapter_weights(LoRATrainer(config, ()).train())
    assert {value.dtype for value in weights.values()} == {torch.float32}
    # What fp32 tells apart, as bf16 would not.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())


@pytest.mark.parametrize("method", METHODS)
def test_one_device_trains_where_several_are_visible(
    tiny_base: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    config = settings(tiny_base, tmp_path, tmp_path, method=method)
    parts = RunParts(config, tiny_base, TrainingCallback())
    # What transformers asks on a machine with two GPUs, where this run would be on the first.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    parts.device = "cuda"
    arguments = trainer_of(parts, config, tmp_path).args
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, config.per_device_train_batch_size)
