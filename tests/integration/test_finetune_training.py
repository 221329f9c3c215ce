"""Whole runs on a tiny random model: what they write, how they stop, how they go on."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.integration.finetune_recorder import Recorder, adapter_weights
from tests.integration.preference_runs import write_pairs

from sage.tools.finetune import (
    LoRATrainer,
    PresetConfigs,
    StepMetrics,
    TrainingConfig,
)
from sage.tools.finetune.data import Conversation, PreferencePair
from sage.tools.finetune.preferences.splits import prepare_preferences
from sage.tools.finetune.task_data import prepare
from sage_contracts.errors import (
    InvalidDataError,
    InvalidRequestError,
    ModelNotFoundError,
    TrainingFailedError,
)

SEED_LAYOUT = {"lora_weights", "checkpoints", "logs", "training_config.json", "finetune_meta.json"}


@pytest.fixture
def base(tiny_base: Path) -> Path:
    return tiny_base


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    rows = [{"question": f"Number {n}?", "answer": "The answer is always the same."} for n in range(40)]
    path.write_text(json.dumps(rows))
    return path


def settings(base: Path, data: Path, output: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(data),
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-2,
        "precision": "fp32",
        "save_steps": 2,
        "max_length": 128,
    }
    return TrainingConfig.model_validate({**fields, **changes})


class RowWatcher(Recorder):
    """Counts at each step the rows of a file that memory still holds as text."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self._file = file
        self.texts_at_steps: list[int] = []

    def on_step(self, metrics: StepMetrics) -> None:
        super().on_step(metrics)
        # By type: other objects mind being asked for their class.
        rows = (one for one in gc.get_objects() if type(one) in (Conversation, PreferencePair))
        self.texts_at_steps.append(sum(row.origin.endswith(self._file) for row in rows))


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_texts_of_the_rows_are_let_go_before_training(method: Any, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "let-go.json"
    row = {"chosen": "Yes please.", "rejected": "no"} if method == "dpo" else {"completion": "Yes."}
    path.write_text(json.dumps([{"prompt": f"Number {n}?", **row} for n in range(12)]))
    config = settings(base, path, tmp_path / "output", method=method, max_steps=2)
    splits = prepare(config) if method == "sft" else prepare_preferences(config)
    data = (splits.description, splits.fingerprint())
    del splits

    watcher = RowWatcher("let-go.json")
    result = LoRATrainer(config, [watcher], home=tmp_path / "home").train()
    assert watcher.texts_at_steps == [0, 0]
    assert (result.meta["data"], result.meta["data_sha256"]) == data


def test_a_run_learns_and_leaves_the_published_layout(base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Recorder()
    config = settings(base, data, tmp_path / "output")
    result = LoRATrainer(config, [watcher], home=tmp_path / "home").train()

    assert result.stopped is None
    assert result.eval_loss is not None
    assert result.base_eval_loss is not None
    assert result.eval_loss < result.base_eval_loss - 0.5
    assert watcher.evals == {"base": result.base_eval_loss, "tuned": result.eval_loss}
    assert watcher.phases == [
        "data", "base_model", "loading", "training", "base_eval", "training", "eval", "saving",
    ]  # fmt: skip
    assert [metrics.step for metrics in watcher.steps] == [1, 2, 3, 4, 5, 6]
    assert watcher.steps[-1].eta_s == 0
    assert watcher.steps[0].tokens_per_second > 0
    assert watcher.steps[0].peak_memory_bytes > 1e6
    assert [checkpoint.step for checkpoint in watcher.checkpoints] == [2, 4, 6]

    output = tmp_path / "output"
    assert {path.name for path in output.iterdir()} == SEED_LAYOUT
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in (output / "lora_weights").iterdir()
    }
    assert TrainingConfig.model_validate_json((output / "training_config.json").read_text()) == config
    meta = json.loads((output / "finetune_meta.json").read_text())
    # The adapter's folder is complete by itself.
    assert json.loads((output / "lora_weights" / "finetune_meta.json").read_text()) == meta
    assert (output / "lora_weights" / "training_config.json").read_bytes() == (
        output / "training_config.json"
    ).read_bytes()
    card = (output / "lora_weights" / "README.md").read_text()
    assert f"on top of `{base}`" in card
    assert f"| loss | {result.base_eval_loss:.4f} | {result.eval_loss:.4f} |" in card
    assert meta["data_sha256"] in card and meta["chat_template_sha256"] in card
    assert "sage chat --backend finetune --finetune-model output" in card
    assert meta["base_model"] == str(base)
    assert (meta["train_rows"], meta["held_out_rows"], meta["loss_path"]) == (24, 4, "fused")
    assert meta["metrics"]["eval_loss"] == result.eval_loss
    assert len(meta["data_sha256"]) == len(meta["chat_template_sha256"]) == 64
    (run,) = (output / "logs").iterdir()
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [1, 0, 2, 3, 4, 5, 6, 6], "the base is measured after a step"
    accuracy = {point["step"]: point["train/token_accuracy"] for point in curve if "train/loss" in point}
    assert list(accuracy) == [1, 2, 3, 4, 5, 6]
    assert 0 <= accuracy[1] < accuracy[6] <= 1
    assert [accuracy[metrics.step] for metrics in watcher.steps] == [m.token_accuracy for m in watcher.steps]
    assert list(run.glob("events.out.tfevents.*"))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(base: Path, data: Path, tmp_path: Path) -> None:
    whole = LoRATrainer(settings(base, data, tmp_path / "a"), ()).train()

    config = settings(base, data, tmp_path / "b", save_steps=50)
    first = LoRATrainer(config, [Recorder(stop_after=3)], run_id="job").train()
    assert (first.stopped, first.adapter_dir) == ("save_and_stop", None)
    assert not (tmp_path / "b" / "lora_weights").exists()

    watcher = Recorder()
    second = LoRATrainer(config, [watcher], run_id="job", resume=True).train()
    assert [metrics.step for metrics in watcher.steps] == [4, 5, 6]
    assert watcher.phases.count("base_eval") == 0
    assert second.base_eval_loss == whole.base_eval_loss
    assert second.eval_loss == pytest.approx(whole.eval_loss, rel=1e-4)
    expected = adapter_weights(whole)
    for name, weight in adapter_weights(second).items():
        assert (weight - expected[name]).abs().max() < 1e-5
    assert len(list((tmp_path / "b" / "logs").iterdir())) == 1


def test_a_damaged_checkpoint_is_passed_over(base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(base, data, tmp_path)
    LoRATrainer(config, [Recorder(stop_after=4)]).train()
    newest = tmp_path / "checkpoints" / "checkpoint-4"
    with (newest / "optimizer.pt").open("r+b") as stream:
        stream.truncate(100)
    watcher = Recorder()
    LoRATrainer(config, [watcher], resume=True).train()
    assert watcher.steps[0].step == 3
    assert any(
        level == "warn" and "checkpoint-4 is not used: optimizer.pt is damaged" in text
        for level, text in watcher.logs
    )


def test_checkpoints_of_another_run_are_not_continued(base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(base, data, tmp_path)
    LoRATrainer(config, [Recorder(stop_after=4)], run_id="first").train()
    watcher = Recorder()
    LoRATrainer(config, [watcher], run_id="second", resume=True).train()
    assert watcher.steps[0].step == 1
    watcher = Recorder()
    LoRATrainer(config, [watcher]).train()
    assert watcher.steps[0].step == 1
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("checkpoint-*"))] == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6",
    ]  # fmt: skip


def test_a_finished_run_that_lost_its_end_only_redoes_that(base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(base, data, tmp_path)
    first = LoRATrainer(config, ()).train()
    watcher = Recorder()
    again = LoRATrainer(config, [watcher], resume=True).train()
    assert watcher.steps == []
    assert again.eval_loss == pytest.approx(first.eval_loss, rel=1e-4)


def test_stop_means_now(base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Recorder(stop_after=1, mode="stop")
    result = LoRATrainer(settings(base, data, tmp_path), [watcher]).train()
    assert result.stopped == "stop"
    assert len(watcher.steps) == 1
    assert watcher.checkpoints == []


@pytest.mark.parametrize("preset", ["rtx_3060", "minimal", "rtx_4090", "a100", "cpu"])
def test_every_preset_trains_on_a_cpu_too(base: Path, data: Path, tmp_path: Path, preset: str) -> None:
    config = PresetConfigs.named(
        preset, model_name=str(base), data_path=str(data), output_dir=str(tmp_path), max_steps=1
    )
    watcher = Recorder()
    result = LoRATrainer(config, [watcher]).train()
    assert result.adapter_dir is not None
    assert result.meta["preset"] == preset
    warned = [text for level, text in watcher.logs if level == "warn"]
    assert any("fp16" in text for text in warned) == (config.precision == "fp16")
    assert any("adamw_torch" in text for text in warned) == (config.optim != "adamw_torch")


def test_the_published_example_works_with_a_relative_folder(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = PresetConfigs.cpu()
    config.model_name = str(base)
    config.data_path = "./data.json"
    config.output_dir = "./output"
    config.num_train_epochs = 1
    LoRATrainer(config).train()
    assert {path.name for path in (tmp_path / "output").iterdir()} == SEED_LAYOUT
    shown = capsys.readouterr().err
    assert "step 5/5" in shown
    assert "held-out loss of the tuned model" in shown


def test_what_is_wrong_is_said_before_anything_is_written(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(InvalidRequestError, match="output_dir is not set"):
        LoRATrainer(TrainingConfig(model_name=str(base), data_path=str(data)), ()).train()
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        LoRATrainer(settings(tmp_path / "gone", data, output), ()).train()
    with pytest.raises(InvalidRequestError, match="all-linear"):
        LoRATrainer(settings(base, data, output, lora={"target_modules": ["nope"]}), ()).train()
    assert not output.exists()


def test_a_diverging_run_fails_with_advice(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailedError, match="Lower learning_rate"):
        LoRATrainer(settings(base, data, tmp_path, learning_rate=1e30, max_grad_norm=0), ()).train()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_epochs_are_of_all_rows_though_few_steps_need_few(
    method: str, base: Path, data: Path, tmp_path: Path
) -> None:
    if method == "dpo":
        write_pairs(data, 40)
    watcher = Recorder()
    config = settings(base, data, tmp_path / "out", method=method, max_steps=3, validation_fraction=0)
    assert LoRATrainer(config, [watcher]).train().metrics["epochs"] == 0.3
    assert [round(step.epoch, 4) for step in watcher.steps] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_last_step_that_ruins_the_model_is_no_success(
    method: str, base: Path, data: Path, tmp_path: Path
) -> None:
    if method == "dpo":
        write_pairs(data, 40)
    config = settings(base, data, tmp_path / "out", method=method, max_steps=1, learning_rate=1e25)
    with pytest.raises(TrainingFailedError, match="became no number in step 1"):
        LoRATrainer(config, ()).train()
    assert not (tmp_path / "out" / "lora_weights").exists()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_tokenizer_of_another_model_is_said_so(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["Number"])
    tokenizer.save_pretrained(other)
    if method == "dpo":
        write_pairs(data, 40)
    with pytest.raises(
        InvalidDataError, match=r"row \d+ of data\.json: its tokenizer writes 'Number' as token \d+"
    ):
        LoRATrainer(settings(other, data, tmp_path / "out", method=method), ()).train()


def test_what_a_killed_run_had_begun_to_save_goes(base: Path, data: Path, tmp_path: Path) -> None:
    begun = tmp_path / "out" / "checkpoints" / ".checkpoint-3.abc"
    for resume, stop_after in ((False, 3), (True, 0)):
        begun.mkdir(parents=True)
        config = settings(base, data, tmp_path / "out")
        LoRATrainer(config, [Recorder(stop_after)], resume=resume).train()
        assert not begun.exists()


@pytest.mark.parametrize(
    "odd",
    [{"do_sample": False, "temperature": 0.6}, {"num_beams": 1, "length_penalty": 2.0}, {"pad_token_id": -1}],
)
def test_a_base_that_transformers_would_not_save_can_be_tuned_in_full(
    odd: dict[str, object], base: Path, data: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    from transformers import GenerationConfig

    stored = json.loads((other / "generation_config.json").read_text())
    stored |= odd
    (other / "generation_config.json").write_text(json.dumps(stored))
    result = LoRATrainer(settings(other, data, tmp_path / "out", tuning="full", max_steps=1), ()).train()
    assert result.model_dir is not None
    saved = GenerationConfig.from_pretrained(result.model_dir)
    assert saved.to_dict() == GenerationConfig.from_pretrained(other).to_dict()
