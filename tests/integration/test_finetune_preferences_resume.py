"""Runs on preferences that stop, and go on as if they had not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from tests.integration.finetune_recorder import Recorder, adapter_weights
from tests.integration.preference_runs import METHODS, Watcher, settings, write_pairs

from sage.tools.finetune import LoRATrainer, StepMetrics


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "data.jsonl")


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    method: str, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    whole = LoRATrainer(settings(tiny_base, data, tmp_path / "a", method=method), ()).train()

    config = settings(tiny_base, data, tmp_path / "b", method=method, save_steps=50)
    first = LoRATrainer(config, [Recorder(stop_after=3)], run_id="job").train()
    assert (first.stopped, first.adapter_dir) == ("save_and_stop", None)
    assert not (tmp_path / "b" / "lora_weights").exists()

    watcher = Recorder()
    second = LoRATrainer(config, [watcher], run_id="job", resume=True).train()
    assert [metrics.step for metrics in watcher.steps] == [4, 5, 6]
    assert watcher.phases.count("base_eval") == 0
    assert second.base_eval_loss == whole.base_eval_loss
    assert second.metrics["trained_tokens"] == whole.metrics["trained_tokens"]
    assert second.eval_loss == pytest.approx(whole.eval_loss, rel=1e-4)
    expected = adapter_weights(whole)
    for name, weight in adapter_weights(second).items():
        assert (weight - expected[name]).abs().max() < 1e-5


def test_a_checkpoint_holds_adapters_and_no_whole_output_layer(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    changes: dict[str, Any] = {"lora": {"target_modules": ["q_proj", "lm_head"]}, "max_steps": 4}
    config = settings(tiny_base, data, tmp_path, method="orpo", **changes)
    result = LoRATrainer(config, ()).train()
    found = load_file(tmp_path / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    assert found.keys() == adapter_weights(result).keys()


class Pausing(Recorder):
    """Wants to save and stop in the middle of the fourth step, which has two passes."""

    asked = 0

    def on_step(self, metrics: StepMetrics) -> None:
        super().on_step(metrics)
        self.asked = 0

    def should_stop(self) -> Literal["save_and_stop"] | None:
        self.asked += 1
        return "save_and_stop" if len(self.steps) == 3 and self.asked >= 3 else None


@pytest.mark.parametrize(("method", "rows"), [("dpo", 24), ("orpo", 24), ("kto", 24), ("dpo", 12)])
def test_a_pause_in_the_middle_of_a_step_costs_no_step_before_it(
    method: str, rows: int, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """With 12 rows, the step that is given up is the first of an epoch."""
    changes = {"method": method, "save_steps": 50, "max_train_rows": rows, "validation_fraction": 0}
    whole = LoRATrainer(settings(tiny_base, data, tmp_path / "a", **changes), ()).train()
    config = settings(tiny_base, data, tmp_path / "b", **changes)
    pausing, rest = Pausing(), Recorder()
    assert LoRATrainer(config, [pausing], run_id="job").train().stopped == "save_and_stop"
    resumed = LoRATrainer(config, [rest], run_id="job", resume=True).train()
    assert [metrics.step for metrics in (*pausing.steps, *rest.steps)] == [1, 2, 3, 4, 5, 6]
    assert [checkpoint.step for checkpoint in pausing.checkpoints] == [3]
    assert resumed.metrics["trained_tokens"] == whole.metrics["trained_tokens"]
    expected = adapter_weights(whole)
    assert all((expected[name] == weight).all() for name, weight in adapter_weights(resumed).items())


@pytest.mark.parametrize("stop_after", [3, 4])
def test_evaluations_of_a_resumed_run_are_those_of_an_uninterrupted_one(
    tiny_base: Path, data: Path, tmp_path: Path, stop_after: int
) -> None:
    """Stopped between two evaluations, and at the very step that one is due."""

    def run(name: str, *watchers: Watcher) -> Watcher:
        config = settings(tiny_base, data, tmp_path / name, method="dpo", eval_steps=2)
        for watcher in watchers:
            LoRATrainer(config, [watcher], run_id="job", resume=True).train()
        return watchers[-1]

    whole = run("a", Watcher())
    first = Watcher(stop_after)
    rest = run("b", first, Watcher())
    assert [step for step, _, _ in first.between + rest.between] == [2, 4, 6]
    for one, other in zip(whole.between, first.between + rest.between, strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-4)


def test_a_checkpoint_that_is_not_whole_or_of_other_settings_is_passed_over(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, data, tmp_path, method="dpo", max_steps=5)
    LoRATrainer(config, [Recorder(stop_after=4)]).train()
    (tmp_path / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()  # killed while it was written
    watcher = Recorder()
    LoRATrainer(config, [watcher], resume=True).train()
    assert watcher.steps[0].step == 3

    again = Recorder()
    LoRATrainer(config, [again], resume=True).train()  # finished, but its end was lost
    assert again.steps == []

    other = Recorder()
    LoRATrainer(config.model_copy(update={"preference_beta": 0.3}), [other], resume=True).train()
    assert other.steps[0].step == 1
    assert any("preference_beta differ" in text for _, text in other.logs)


def test_stop_means_now(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Recorder(stop_after=1, mode="stop")
    result = LoRATrainer(settings(tiny_base, data, tmp_path, method="kto"), [watcher]).train()
    assert (result.stopped, len(watcher.steps), watcher.checkpoints) == ("stop", 1, [])
