"""Presets and the training configuration."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sage_contracts.bounds import BoundedConfig, BoundedLoRA
from sage_contracts.config import LoRAConfig, PresetConfigs, PresetName, Task, TrainingConfig, preset_fields
from sage_contracts.errors import UnknownPresetError


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        (
            PresetConfigs.rtx_3060,
            {
                "load_in_8bit": True,
                "load_in_4bit": False,
                "precision": "fp16",
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 16,
                "max_length": 1024,
                "optim": "paged_adamw_8bit",
            },
        ),
        (
            PresetConfigs.rtx_4090,
            {
                "load_in_8bit": False,
                "load_in_4bit": False,
                "precision": "fp16",
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 4,
                "max_length": 2048,
                "optim": "adamw_torch",
            },
        ),
        (
            PresetConfigs.a100,
            {
                "precision": "bf16",
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "max_length": 4096,
                "optim": "adamw_torch",
            },
        ),
        (
            PresetConfigs.minimal,
            {
                "load_in_4bit": True,
                "load_in_8bit": False,
                "precision": "fp16",
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 32,
                "max_length": 512,
                "optim": "paged_adamw_8bit",
            },
        ),
    ],
)
def test_presets_are_as_published(preset: Any, wanted: dict[str, Any]) -> None:
    config = preset()
    assert {field: getattr(config, field) for field in wanted} == wanted


def test_published_ranks() -> None:
    assert (PresetConfigs.rtx_3060().lora.r, PresetConfigs.rtx_3060().lora.lora_alpha) == (8, 16)
    assert (PresetConfigs.minimal().lora.r, PresetConfigs.minimal().lora.lora_alpha) == (4, 8)


def test_published_defaults() -> None:
    config = TrainingConfig()
    assert (config.num_train_epochs, config.learning_rate, config.lr_scheduler_type) == (3, 5e-5, "cosine")
    assert (config.warmup_ratio, config.max_length, config.seed) == (0.1, 1024, 42)
    assert config.lora.lora_dropout == 0.05
    assert config.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_the_published_example_constructs() -> None:
    config = TrainingConfig(
        model_name="Qwen/Qwen2.5-Coder-7B-Instruct",
        data_path="./data.json",
        output_dir="./output",
        num_train_epochs=3,
        learning_rate=1e-4,
        load_in_8bit=True,
        lora=LoRAConfig(r=16, lora_alpha=32),
    )
    assert config.effective_batch_size == 16


def test_presets_are_not_shared_between_callers() -> None:
    first = PresetConfigs.minimal()
    first.lora.r = 99
    first.report_to.append("wandb")
    assert PresetConfigs.minimal().lora.r == 4
    assert PresetConfigs.minimal().report_to == ["tensorboard"]
    preset_fields("minimal")["max_length"] = 1
    assert PresetConfigs.minimal().max_length == 512


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UnknownPresetError, match="rtx_3060, rtx_4090, a100, minimal, cpu, auto"):
        preset_fields("rtx_9090")


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", -1), ("learning_rat", 1e-4), ("max_length", 0), ("precision", "fp8"), ("task", "x")],
)
def test_wrong_fields_are_refused_at_once_and_later(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        TrainingConfig.model_validate({field: value})
    with pytest.raises((ValidationError, ValueError), match=field):
        setattr(TrainingConfig(), field, value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**30, 1e30])
def test_no_number_is_without_bounds(value: float) -> None:
    """Each number that a person can set, whatever it stands for: only rates may be any finite number."""
    for model in (TrainingConfig, LoRAConfig):
        for name, field in model.model_json_schema()["properties"].items():
            kinds = {kind.get("type") for kind in field.get("anyOf", [field])}
            if not kinds & {"integer", "number"} or name == "seed":
                continue
            if kinds & {"number"} and math.isfinite(value):
                continue
            with pytest.raises(ValidationError, match=name):
                model.model_validate({name: value})


@pytest.mark.parametrize(
    ("start", "field", "value"),
    [
        (PresetConfigs.cpu, "early_stopping_patience", 3),
        (lambda: TrainingConfig(tuning="full"), "load_in_8bit", True),
        (lambda: TrainingConfig(method="dpo", load_in_4bit=True), "tuning", "full"),
        (PresetConfigs.cpu, "learning_rate", -1),
    ],
)
def test_an_assignment_that_is_refused_changes_nothing(start: Any, field: str, value: Any) -> None:
    config, untouched = start(), start()
    with pytest.raises(ValidationError):
        setattr(config, field, value)
    assert config == untouched
    assert config.model_dump(exclude_unset=True) == untouched.model_dump(exclude_unset=True)


def test_paths_are_taken_as_they_are_and_kept_as_text() -> None:
    config = TrainingConfig.model_validate(
        {"data_path": Path("rows.json"), "output_dir": Path("/out"), "model_name": Path("/models/mine")}
    )
    config.data_path = Path("other.json")  # type: ignore[assignment]
    assert (config.data_path, config.output_dir, config.model_name) == ("other.json", "/out", "/models/mine")
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config
    named = TrainingConfig.model_json_schema()["properties"]
    assert named["model_name"]["type"] == "string"
    assert named["data_path"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    with pytest.raises(ValidationError):
        TrainingConfig.model_validate({"data_path": 3})


def test_two_quantisations_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        TrainingConfig(load_in_8bit=True, load_in_4bit=True)


@pytest.mark.parametrize(
    ("chosen", "other"), [("load_in_8bit", "load_in_4bit"), ("load_in_4bit", "load_in_8bit")]
)
def test_the_quantisation_asked_for_last_replaces_a_presets(chosen: str, other: str) -> None:
    for preset in (PresetName.RTX_3060, PresetName.MINIMAL):
        config = PresetConfigs.named(preset)
        setattr(config, chosen, True)
        assert (getattr(config, chosen), getattr(config, other)) == (True, False)
        config = PresetConfigs.named(preset, **{chosen: True})
        assert (getattr(config, chosen), getattr(config, other)) == (True, False)
        with pytest.raises(ValidationError, match="exclude each other"):
            PresetConfigs.named(preset, **{chosen: True, other: True})
    assert getattr(TrainingConfig.model_validate({chosen: True}), chosen)


def test_full_tuning_switches_a_presets_quantisation_off_and_never_goes_with_one() -> None:
    for preset in (PresetName.RTX_3060, PresetName.MINIMAL):
        config = PresetConfigs.named(preset)
        config.tuning = "full"
        assert (config.load_in_8bit, config.load_in_4bit) == (False, False)
        assert PresetConfigs.named(preset, tuning="full") == config
        with pytest.raises(ValidationError, match="none can be quantised"):
            config.load_in_8bit = True


def test_naming_one_field_of_lora_keeps_the_presets_others() -> None:
    lora = PresetConfigs.named("minimal", lora={"use_rslora": True}).lora
    assert (lora.r, lora.lora_alpha, lora.use_rslora) == (4, 8, True)


def test_a_missing_output_folder_is_named() -> None:
    with pytest.raises(ValueError, match="output_dir"):
        TrainingConfig().require_output_dir()


@given(
    st.sampled_from([preset for preset in PresetName if preset is not PresetName.AUTO]),
    st.sampled_from(Task),
    st.floats(1e-7, 1.0),
    st.integers(1, 64),
)
def test_a_resolved_configuration_survives_json(
    preset: PresetName, task: Task, learning_rate: float, rank: int
) -> None:
    config = PresetConfigs.named(preset, task=task, learning_rate=learning_rate)
    config.lora.r = rank
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config


def test_every_setting_that_holds_any_amount_of_text_is_bounded_in_a_job() -> None:
    said_elsewhere = {"model_name", "data_path", "output_dir"}
    for model, bounded in ((TrainingConfig, BoundedConfig), (LoRAConfig, BoundedLoRA)):
        texts = {
            name
            for name, field in model.model_fields.items()
            if re.search(r"\bstr\b|\blist\b|PathText", str(field.annotation))
        }
        assert texts - said_elsewhere == set(bounded.model_fields) - {"lora"}
