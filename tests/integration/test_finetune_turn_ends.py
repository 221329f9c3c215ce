"""A base that ends its texts with another token than its turns: tuned, it stops where it was taught to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.inference_rig import running, said
from tests.fakes.model_registry import Registry
from tests.fakes.tiny_qwen import END_OF_TEXT, END_OF_TURN, make_base

from sage.tools.finetune import GeneratedAnswer, LoRATrainer, TrainingCallback, TrainingConfig, TrainResult
from sage.tools.finetune.exporting.export import ExportWish, export_model
from sage.tools.finetune.merging.merge import merge_adapter
from sage.tools.finetune.merging.parity import PROBES
from sage_contracts.models import ResolvedModel

# transformers' GGUF reader hands numpy's read-only memory to torch.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


class Answers(TrainingCallback):
    def __init__(self) -> None:
        self.last = ""

    def on_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        self.last = answers[-1].answer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_base(home / "base_models/tiny")
    asked = ["Say something.", *PROBES] * 4 + [f"Number {n}?" for n in range(24)]
    rows = [{"prompt": question, "completion": "Yes."} for question in asked]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


def train(home: Path, name: str, **changes: Any) -> tuple[TrainResult, Answers]:
    fields: dict[str, Any] = {
        "model_name": "base_models/tiny",
        "data_path": str(home / "rows.jsonl"),
        "output_dir": str(home / name),
        "max_steps": 60,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-2,
        "precision": "fp32",
        "max_length": 128,
        "save_steps": 60,
        "sample_prompts": ["Number 3?"],
        "lora": {"r": 16, "target_modules": "all-linear", "lora_dropout": 0},
    }
    watcher = Answers()
    config = TrainingConfig.model_validate(fields | changes)
    return LoRATrainer(config, [watcher], home=home).train(), watcher


@pytest.fixture(scope="module")
def adapter(home: Path) -> tuple[TrainResult, Answers]:
    return train(home, "lora")


@pytest.fixture(scope="module")
def whole(home: Path) -> tuple[TrainResult, Answers]:
    return train(home, "full", tuning="full", learning_rate=3e-3)


def eos_of(folder: Path) -> object:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_a_run_records_what_ends_a_turn_and_answers_its_prompts_up_to_there(
    home: Path, adapter: tuple[TrainResult, Answers]
) -> None:
    result, answers = adapter
    assert result.meta["turn_end_ids"] == [END_OF_TURN]
    assert json.loads((home / "lora/finetune_meta.json").read_text())["turn_end_ids"] == [END_OF_TURN]
    assert answers.last == "Yes."
    card = (home / "lora/lora_weights/README.md").read_text()
    assert f"model.generation_config.eos_token_id = [{END_OF_TURN}]" in card


def test_a_model_tuned_in_full_stops_at_both_ends(whole: tuple[TrainResult, Answers], home: Path) -> None:
    result, answers = whole
    assert result.model_dir is not None
    assert eos_of(result.model_dir) == [END_OF_TEXT, END_OF_TURN]
    assert eos_of(home / "full/checkpoints/checkpoint-60") == [END_OF_TEXT, END_OF_TURN]
    assert answers.last == "Yes."
    assert "eos_token_id" not in (result.model_dir / "README.md").read_text()


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_a_merged_model_stops_at_both_ends(
    has_generation_config: bool, home: Path, adapter: tuple[TrainResult, Answers], tmp_path: Path
) -> None:
    result, _ = adapter
    base = make_base(tmp_path / "base")
    if not has_generation_config:
        (base / "generation_config.json").unlink()
    merged = merge_adapter(base, result.adapter_dir, tmp_path / "merged")
    assert eos_of(merged.path) == [END_OF_TEXT, END_OF_TURN]
    assert set(merged.parity.answers) == {"Yes."}


def test_gguf_files_name_the_end_of_a_turn(
    home: Path, adapter: tuple[TrainResult, Answers], tmp_path: Path
) -> None:
    from gguf import GGUFReader

    wish = ExportWish("gguf-f16", "code-1")
    fields = GGUFReader(
        export_model(home / "base_models/tiny", adapter[0].adapter_dir, tmp_path / "gguf", wish).path
    ).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == END_OF_TEXT
    assert fields["tokenizer.ggml.eot_token_id"].contents() == END_OF_TURN


def test_chats_with_it_end(
    home: Path, adapter: tuple[TrainResult, Answers], whole: tuple[TrainResult, Answers]
) -> None:
    """A version, a checkpoint of it, and whole weights; without the record it goes on, as it used to."""
    registry = Registry()
    places = {
        "lora@1": ("base_models/tiny", "lora/lora_weights"),
        "lora@1:ckpt-step-60": ("base_models/tiny", "lora/checkpoints/checkpoint-60"),
        "full@1": ("full/full_model", None),
    }
    for name, (base, folder) in places.items():
        ends = [] if name == "full@1" else [END_OF_TURN]
        registry.models[name] = ResolvedModel(
            id=name, base_model=base, adapter_path=folder, turn_end_ids=ends
        )
    registry.models["old@1"] = registry.models["lora@1"].model_copy(
        update={"id": "old@1", "turn_end_ids": []}
    )
    settings = {"engine": "transformers", "vllm_command": "", "engine_threads": 1, "keep_alive_s": 0}
    with running(home, registry=registry, **settings) as rig:
        for name in places:
            answer = rig.ask(name, max_tokens=30).json()["choices"][0]
            assert (answer["message"]["content"], answer["finish_reason"]) == ("Yes.", "stop"), name
            assert said(rig.stream(name, max_tokens=30)) == "Yes."
        assert rig.ask("old@1", max_tokens=30).json()["choices"][0]["finish_reason"] == "length"
