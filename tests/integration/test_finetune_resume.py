"""Killed and resumed, or gone wrong and rolled back: what comes out is what should have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.fakes.tiny_llama import make_model

from sage.tools.finetune import LoRATrainer, StepMetrics, TrainingCallback, TrainingConfig
from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.outputs import OutputLayout
from sage.tools.finetune.task_data import prepare
from sage_contracts.errors import TrainingFailedError

CHILD = """
import sys
from pathlib import Path
from sage.tools.finetune import LoRATrainer, TrainingCallback, TrainingConfig

class Pausing(TrainingCallback):
    def on_step(self, metrics):
        if metrics.step == int(sys.argv[2]):
            print("reached", flush=True)
            sys.stdin.readline()  # until killed

config = TrainingConfig.model_validate_json(Path(sys.argv[1]).read_text())
LoRATrainer(config, [Pausing()], run_id="job", resume=True).train()
"""


class Watcher(TrainingCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.warnings: list[str] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics.step)
        self.rates.append(metrics.lr)

    def on_log(self, level: str, message: str) -> None:
        if level == "warn":
            self.warnings.append(message)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "rows.json"
    rows = [{"question": f"Number {n}?", "answer": f"It is number {n}, of course."} for n in range(40)]
    path.write_text(json.dumps(rows))
    return path


def settings(base: Path, rows_file: Path, output: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(rows_file),
        "output_dir": str(output),
        "max_steps": 14,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "save_steps": 3,
        "max_length": 96,
        "lora": {"lora_dropout": 0.2, "loraplus_lr_ratio": 2},
    }
    return TrainingConfig.model_validate({**fields, **changes})


def kill_at(config: TrainingConfig, step: int, folder: Path) -> None:
    """Run in a process that is killed, as the kernel kills, right after this step."""
    spec = folder / "spec.json"
    spec.write_text(config.model_dump_json())
    command = [sys.executable, "-c", CHILD, str(spec), str(step)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"reached\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait(timeout=30) == -signal.SIGKILL


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def test_a_run_killed_twice_ends_with_the_weights_of_the_uninterrupted_one(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Same rows, same dropout, same rate at every step; the second life begins at a two-digit step."""
    whole = LoRATrainer(settings(tiny_base, rows_file, tmp_path / "whole"), ()).train()

    config = settings(tiny_base, rows_file, tmp_path / "killed")
    kill_at(config, 5, tmp_path)
    kill_at(config, 13, tmp_path)
    checkpoints = OutputLayout(tmp_path / "killed").checkpoints
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {
        "checkpoint-3", "checkpoint-6", "checkpoint-9", "checkpoint-12",
    }, "the newest three, and one that is known to be good"  # fmt: skip
    watcher = Watcher()
    resumed = LoRATrainer(config, [watcher], run_id="job", resume=True).train()

    assert watcher.steps == [13, 14], "12 comes after 9, by number"
    assert whole.adapter_dir and resumed.adapter_dir
    expected, found = weights(whole.adapter_dir), weights(resumed.adapter_dir)
    assert expected.keys() == found.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    assert resumed.eval_loss == pytest.approx(whole.eval_loss, rel=1e-6)
    assert resumed.base_eval_loss == whole.base_eval_loss


class Pausing(Watcher):
    """Wants to save and stop once it has been asked for the fourth time since this step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step
        self._asked = 0

    def on_step(self, metrics: StepMetrics) -> None:
        super().on_step(metrics)
        self._asked = 0

    def should_stop(self) -> Literal["save_and_stop"] | None:
        self._asked += 1
        done = self.steps[-1] if self.steps else 0
        return "save_and_stop" if done == self._step and self._asked >= 4 else None


@pytest.mark.parametrize("step", [0, 2])
def test_a_pause_in_the_middle_of_a_step_is_obeyed_then_and_costs_no_step(
    tiny_base: Path, rows_file: Path, tmp_path: Path, step: int
) -> None:
    """What the step had begun is forgotten, dropout's random numbers too: it is taken again as it was."""
    many_passes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 4}
    config = settings(tiny_base, rows_file, tmp_path / "whole", save_steps=50, **many_passes)
    whole = LoRATrainer(config, ()).train()

    config = settings(tiny_base, rows_file, tmp_path / "paused", save_steps=50, **many_passes)
    paused = Pausing(step)
    assert LoRATrainer(config, [paused], run_id="job").train().stopped == "save_and_stop"
    assert paused.steps == [*range(1, step + 1)]
    watcher = Watcher()
    resumed = LoRATrainer(config, [watcher], run_id="job", resume=True).train()

    assert watcher.steps == [*range(step + 1, 5)]
    assert whole.adapter_dir and resumed.adapter_dir
    expected, found = weights(whole.adapter_dir), weights(resumed.adapter_dir)
    assert all(bool((found[name] == expected[name]).all()) for name in expected)
    assert resumed.metrics["trained_tokens"] == whole.metrics["trained_tokens"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "state.json", "manifest.json"])
def test_a_truncated_newest_checkpoint_is_skipped_with_a_warning(
    tiny_base: Path, rows_file: Path, tmp_path: Path, file: str
) -> None:
    config = settings(tiny_base, rows_file, tmp_path, max_steps=6)
    whole = LoRATrainer(config, ()).train()
    assert whole.adapter_dir
    expected = weights(whole.adapter_dir)
    damaged = OutputLayout(tmp_path).checkpoints / "checkpoint-6" / file
    os.truncate(damaged, damaged.stat().st_size // 2)
    watcher = Watcher()
    again = LoRATrainer(config, [watcher], resume=True).train()
    assert watcher.steps == [4, 5, 6]
    assert any("Checkpoint checkpoint-6 is not used" in text for text in watcher.warnings)
    assert again.adapter_dir
    found = weights(again.adapter_dir)
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-6


def test_a_run_that_diverges_goes_back_and_recovers(rows_file: Path, tmp_path: Path) -> None:
    """At 8 this model's loss is soon no number, whatever the seed; at a tenth of that it learns.

    Its heads are too small for the kernels in C: those meet the very softmax of the forward pass again, and
    get through with numbers of any size.
    """
    base = make_model(tmp_path / "base", num_attention_heads=8, num_key_value_heads=4)
    config = settings(
        base, rows_file, tmp_path, max_steps=12, learning_rate=8, lr_scheduler_type="constant",
        save_steps=1, save_total_limit=2, lora={},
    )  # fmt: skip
    watcher = Watcher()
    result = LoRATrainer(config, [watcher]).train()
    assert result.eval_loss is not None and result.base_eval_loss is not None
    assert result.eval_loss < result.base_eval_loss - 1
    rollbacks = result.meta["rollbacks"]
    assert 1 <= len(rollbacks) <= 2
    assert rollbacks[0]["to_step"] == 0, "nothing was proven good by then"
    assert "Going back to the start" in watcher.warnings[0]
    assert len(watcher.warnings) == len(rollbacks)
    assert set(watcher.rates) == {8 * 0.3**cut for cut in range(len(rollbacks) + 1)}
    assert watcher.steps[-1] == 12
    assert json.loads((tmp_path / "finetune_meta.json").read_text())["rollbacks"] == rollbacks


def poisoned(base: Path, folder: Path) -> Path:
    """The base with one token whose embedding is no number: a row that has it poisons its step."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(base)("~", add_special_tokens=False)["input_ids"]
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("rollbacks", [0, 2])
def test_a_poisoned_row_ends_the_run_with_advice_and_leaves_the_weights_alone(
    tiny_base: Path, rows_file: Path, tmp_path: Path, rollbacks: int
) -> None:
    config = settings(
        poisoned(tiny_base, tmp_path / "base"), rows_file, tmp_path / "out", save_steps=3, save_total_limit=1,
        validation_fraction=0, max_rollbacks=rollbacks, num_train_epochs=2, max_steps=-1,
    )  # fmt: skip
    rows = prepare(config).train
    schedule = Schedule(len(rows), 4, 2, -1, config.seed)
    assert schedule.total_steps == 20
    # A row of the tenth step, so that the checkpoint of step 3 was proven by then and that of step 9 was not.
    asked = rows[schedule.rows_of(9)[0]].messages[0]["content"]
    text = rows_file.read_text()
    data = tmp_path / "poisoned.json"
    data.write_text(text.replace(json.dumps(asked), json.dumps(asked.replace("?", "~"))))
    watcher = Watcher()
    with pytest.raises(TrainingFailedError, match="Lower learning_rate") as failure:
        LoRATrainer(config.model_copy(update={"data_path": str(data)}), [watcher]).train()

    assert ("also after going back twice" in str(failure.value)) == bool(rollbacks)
    assert len(watcher.warnings) == rollbacks
    for told in watcher.warnings:
        assert "no number in step 10. Going back to the checkpoint of step 3" in told
    assert watcher.steps == [*range(1, 10), *[4, 5, 6, 7, 8, 9] * rollbacks]
    checkpoints = sorted(OutputLayout(tmp_path / "out").checkpoints.glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-3", "checkpoint-9"][-1 - bool(rollbacks) :]
    for path in checkpoints:
        assert all(bool(tensor.isfinite().all()) for tensor in weights(path).values())
    # Whoever resumes it knows of the rollbacks.
    for path in checkpoints:
        state = json.loads((path / "state.json").read_text())
        assert state["rate_scale"] == pytest.approx(0.3**rollbacks)
        assert len(state["rollbacks"]) == rollbacks
