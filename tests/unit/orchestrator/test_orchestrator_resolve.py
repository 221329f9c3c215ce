"""From a sparse request to the one stored configuration."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sage_contracts.config import PresetName, Task, TrainingConfig
from sage_contracts.errors import InvalidRequestError
from sage_contracts.jobs import CreateJobRequest, Hyperparameters
from sage_orchestrator.jobs.resolve import method_of, name_of, resolve_config, task_of

PRESETS = [preset for preset in PresetName if preset is not PresetName.AUTO]


def resolve(preset: PresetName = PresetName.CPU, **fields: Any) -> TrainingConfig:
    request = CreateJobRequest.model_validate({"model": "m", "training_file": "file-1", **fields})
    return resolve_config(request, task=Task.CUSTOM, preset=preset, model="m", output_dir="out")


@pytest.mark.parametrize("preset", PRESETS)
def test_without_wishes_the_preset_decides(preset: PresetName) -> None:
    from sage_contracts.config import PresetConfigs

    config = resolve(preset)
    wanted = PresetConfigs.named(preset, task=Task.CUSTOM, model_name="m", output_dir="out")
    assert config == wanted


def test_the_multiplier_scales_the_presets_learning_rate() -> None:
    config = resolve(hyperparameters={"learning_rate_multiplier": 5})
    assert config.learning_rate == pytest.approx(resolve().learning_rate * 5)


@given(st.sampled_from(PRESETS), st.integers(1, 256))
def test_a_batch_size_is_met_exactly_and_never_needs_more_memory(preset: PresetName, size: int) -> None:
    config = resolve(preset, hyperparameters={"batch_size": size})
    assert config.effective_batch_size == size
    assert config.per_device_train_batch_size <= resolve(preset).per_device_train_batch_size


def test_later_words_win() -> None:
    config = resolve(
        hyperparameters={"n_epochs": 2, "learning_rate_multiplier": 3},
        seed=7,
        sage={"config": {"num_train_epochs": 4, "lora": {"r": 4}}},
    )
    assert (config.num_train_epochs, config.seed, config.lora.r) == (4, 7, 4)
    assert config.learning_rate == pytest.approx(6e-4)


def test_one_word_about_lora_keeps_the_presets_other_words() -> None:
    config = resolve(PresetName.MINIMAL, sage={"config": {"lora": {"lora_dropout": 0.0}}})
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (4, 8, 0.0)


def test_method_wins_over_the_deprecated_field_where_it_says_something() -> None:
    config = resolve(
        hyperparameters={"n_epochs": 2, "batch_size": 4},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 5}}},
    )
    assert (config.num_train_epochs, config.effective_batch_size) == (5, 4)


def test_asking_for_4_bit_switches_a_presets_8_bit_off() -> None:
    config = resolve(preset=PresetName.RTX_3060, sage={"config": {"load_in_4bit": True}})
    assert (config.load_in_8bit, config.load_in_4bit) == (False, True)


@pytest.mark.parametrize(
    ("sparse", "said"),
    [
        ({"learning_rat": 1}, "no training setting 'learning_rat'. Did you mean 'learning_rate'"),
        ({"lora": {"rank": 4}}, "Did you mean 'lora.r'"),
        ({"lr": 1}, "Did you mean 'learning_rate'"),
        ({"epochs": 1}, "Did you mean 'num_train_epochs'"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"lora": {"r": 0}}, "lora.r"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other"),
        ({"model_name": "x"}, "`model`"),
        ({"data_path": "x"}, "`training_file`"),
    ],
)
def test_a_wrong_field_is_named(sparse: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        resolve(sage={"config": sparse})


def request_for(**fields: Any) -> CreateJobRequest:
    return CreateJobRequest.model_validate({"model": "m", **fields})


def test_a_file_alone_is_a_custom_task_and_no_file_needs_a_task() -> None:
    assert task_of(request_for(training_file="file-1")) is Task.CUSTOM
    assert task_of(request_for(sage={"task": "qa"})) is Task.QA
    with pytest.raises(InvalidRequestError, match="code, qa, chat or instruction"):
        task_of(request_for())
    with pytest.raises(InvalidRequestError, match="custom"):
        task_of(request_for(sage={"task": "custom"}))


def test_names_come_from_suffix_then_task_then_the_job() -> None:
    assert name_of(request_for(suffix="mine", sage={"task": "code"}), "ftjob-0123456789ab") == "mine"
    assert name_of(request_for(sage={"task": "code"}), "ftjob-0123456789ab") == "code"
    assert name_of(request_for(training_file="f"), "ftjob-0123456789ab") == "ft-456789ab"
    with pytest.raises(InvalidRequestError, match="suffix"):
        name_of(request_for(suffix="a", sage={"name": "b"}), "ftjob-0123456789ab")


def test_openais_dpo_object_becomes_the_method_and_its_beta() -> None:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 2}}}
    config = resolve(method=method)
    assert (config.method, config.preference_beta, config.num_train_epochs) == ("dpo", 0.3, 2)
    assert resolve(method={"type": "dpo"}).preference_beta == 0.1
    assert resolve(method=method, sage={"config": {"preference_beta": 0.5}}).preference_beta == 0.5


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_a_preference_method_is_shown_as_it_was_asked_for(name: str) -> None:
    config = resolve(sage={"config": {"method": name}})
    shown = method_of(config, Hyperparameters(n_epochs=2)).model_dump(exclude_none=True)
    assert shown["type"] == name
    assert shown[name]["hyperparameters"]["beta"] == 0.1
    assert shown[name]["hyperparameters"]["n_epochs"] == 2
    assert set(shown) == {"type", name}


def test_two_different_methods_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="give one of them"):
        resolve(method={"type": "supervised"}, sage={"config": {"method": "dpo"}})
    with pytest.raises(ValidationError, match="its type is 'supervised'"):
        resolve(method={"type": "supervised", "dpo": {}})


def test_preference_methods_bring_their_own_data() -> None:
    request = CreateJobRequest.model_validate({"model": "m", "method": {"type": "kto"}})
    assert task_of(request) is Task.CUSTOM
