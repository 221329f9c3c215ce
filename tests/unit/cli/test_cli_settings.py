"""--config and --set: sparse settings, checked by name and value before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_cli.jobs.settings_file import gather
from sage_contracts.errors import InvalidRequestError


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
