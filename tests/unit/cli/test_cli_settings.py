"""--config and --set: sparse settings, checked by name and value before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_cli.jobs.settings_file import LIST_FIELDS, assigned, check
from sage_cli.jobs.wish import JobWish
from sage_contracts.config import LoRAConfig, PresetConfigs, Task, TrainingConfig
from sage_contracts.errors import InvalidRequestError


def gather(config: Path | None, settings: Sequence[str]) -> dict[str, Any]:
    """The settings of a command that says nothing else."""
    return JobWish(config=config, settings=list(settings)).with_settings()[1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", '{"max_steps": 40, "lora": {"r": 4}}'),
        ("run.yaml", "max_steps: 40\nlora:\n  r: 4\n"),
        ("run.toml", "max_steps = 40\n[lora]\nr = 4\n"),
    ],
)
def test_three_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert gather(path, []) == {"max_steps": 40, "lora": {"r": 4}}


def test_set_wins_over_the_file_and_reaches_nested_fields(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"max_steps": 40, "lora": {"r": 4, "lora_alpha": 8}}')
    settings = ["max_steps=2", "lora.r=16", "load_in_8bit=true", "precision=bf16", "learning_rate=1e-4"]
    assert gather(path, settings) == {
        "max_steps": 2,
        "lora": {"r": 16, "lora_alpha": 8},
        "load_in_8bit": True,
        "precision": "bf16",
        "learning_rate": 1e-4,
    }


def test_set_switches_the_files_quantisation(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"load_in_8bit": true}')
    assert gather(path, ["load_in_4bit=true"]) == {"load_in_8bit": False, "load_in_4bit": True}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["max_step=4"], "Did you mean 'max_steps'"),
        (["lora.rank=4"], "no training setting 'lora.rank'"),
        (["max_steps"], "KEY=VALUE"),
        (["learning_rate=fast"], "learning_rate"),
        (["max_steps=1", "max_steps.x=1"], "max_steps has no fields"),
        (["load_in_8bit=true", "load_in_4bit=true"], "exclude each other"),
        (["per_device_train_batch_size=0"], "per_device_train_batch_size"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: list[str], told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        gather(None, settings)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("run.json", "{", "not valid"),
        ("run.yaml", "a: [", "not valid"),
        ("run.toml", "=", "not valid"),
        ("run.json", "[1]", "fields with values"),
        ("run.ini", "a=1", "has to end in"),
    ],
)
def test_wrong_files_say_why(tmp_path: Path, name: str, text: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=told):
        gather(path, [])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"nothing\.json cannot be read"):
        gather(tmp_path / "nothing.json", [])


def file_of_a_run(folder: Path, **fields: Any) -> Path:
    """The training_config.json of a job called `rec`, as it lies beside the tuned model."""
    path = folder / "training_config.json"
    output_dir = str(folder / "finetune_output" / "rec")
    config = PresetConfigs.cpu().model_copy(update={"output_dir": output_dir, **fields})
    path.write_text(config.model_dump_json())
    return path


def test_a_runs_own_file_says_what_the_options_do_not(tmp_path: Path) -> None:
    path = file_of_a_run(tmp_path, model_name="smollm2-135m", task=Task.QA, max_steps=3)
    wish, fields = JobWish(config=path, data=Path("a.jsonl")).with_settings()
    assert (wish.task, wish.model, wish.name, wish.preset) == ("qa", "smollm2-135m", "rec", "cpu")
    assert wish.data == Path("a.jsonl")
    assert fields["max_steps"] == 3
    elsewhere = {"task", "model_name", "data_path", "output_dir", "preset"}
    assert set(fields) == set(TrainingConfig.model_fields) - elsewhere


def test_options_win_over_a_runs_own_file(tmp_path: Path) -> None:
    path = file_of_a_run(tmp_path, task=Task.QA, data_path="b.jsonl")
    asked = JobWish("code", model="m", data=Path("a.jsonl"), name="new", preset="minimal", config=path)
    wish, _ = asked.with_settings()
    assert wish == asked
    assert JobWish(config=path).with_settings()[0].data == Path("b.jsonl")


def test_settings_that_have_an_option_are_told_by_its_name(tmp_path: Path) -> None:
    assert JobWish(settings=["task=qa"]).with_settings()[0].task == "qa"
    with pytest.raises(InvalidRequestError, match="give --task alone"):
        JobWish("code", settings=["task=qa"]).with_settings()
    with pytest.raises(InvalidRequestError, match="give --name NAME"):
        JobWish(settings=["output_dir=there"]).with_settings()
    path = file_of_a_run(tmp_path, output_dir="./output")
    with pytest.raises(InvalidRequestError, match=r"training_config\.json: output_dir .* give --name NAME"):
        JobWish(config=path).with_settings()
    assert JobWish(config=path, name="new").with_settings()[0].name == "new"
    planned, _ = JobWish(config=path).with_settings(is_trained=False)
    assert (planned.preset, planned.name) == ("cpu", None)


def test_a_seed_that_no_job_takes_is_refused_here() -> None:
    with pytest.raises(InvalidRequestError, match=r"^seed: .*greater than or equal to 0"):
        gather(None, ["seed=-1"])


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ("lora.target_modules=q_proj,v_proj", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
        ("lora.target_modules=[q_proj, v_proj]", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
        ('lora.target_modules=["q_proj"]', {"lora": {"target_modules": ["q_proj"]}}),
        ("lora.target_modules=all-linear", {"lora": {"target_modules": "all-linear"}}),
        ("code_kinds=fill_middle", {"code_kinds": ["fill_middle"]}),
        ("oom_ladder=off", {"oom_ladder": "off"}),
        ("oom_ladder=halve_batch,load_in_8bit", {"oom_ladder": ["halve_batch", "load_in_8bit"]}),
        ("report_to=", {"report_to": []}),
        ("sample_prompts=Hello, who are you?", {"sample_prompts": ["Hello, who are you?"]}),
    ],
)
def test_lists_may_be_typed_as_their_words(setting: str, fields: dict[str, Any]) -> None:
    assert gather(None, [setting]) == fields


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("lora.target_modules=5", 'lora.target_modules: give a list, such as ["q_proj","v_proj"] (given: 5)'),
        ("sample_prompts=[hello]", "sample_prompts: give a list, such as ["),
        ("oom_ladder=halve", "oom_ladder.0: Input should be 'halve_batch'"),
        ("report_to=mlflow", "report_to.0: Input should be 'tensorboard' or 'wandb'"),
    ],
)
def test_a_wrong_list_says_what_to_write(setting: str, told: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        gather(None, [setting])
    assert told in caught.value.message


def fields_that_take_lists() -> Iterator[str]:
    for prefix, model in (("", TrainingConfig), ("lora.", LoRAConfig)):
        for name, field in model.model_fields.items():
            if "list[" in str(field.annotation):
                yield prefix + name


def test_every_list_among_the_settings_may_be_typed_so() -> None:
    assert set(fields_that_take_lists()) == set(LIST_FIELDS)
    for name, field in LIST_FIELDS.items():
        check(assigned([f"{name}={field.example}"]))
        for word in field.words:
            check(assigned([f"{name}={word}"]))


@given(st.lists(st.from_regex(r"[A-Za-z_][A-Za-z0-9_.*-]*", fullmatch=True), max_size=5))
def test_names_of_modules_arrive_as_typed(names: list[str]) -> None:
    """JSON and words say the same, but for words that mean something else by themselves."""
    as_json = assigned([f"lora.target_modules={json.dumps(names)}"])
    assert as_json == {"lora": {"target_modules": names}}
    if len(names) > 1:
        assert assigned([f"lora.target_modules={','.join(names)}"]) == as_json
