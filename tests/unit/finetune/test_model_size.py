"""How large a model is, from its files or its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sage.tools.finetune.model_size import parameters_of


def write_weights(path: Path, *shapes: list[int]) -> None:
    tensors = {
        f"t{index}": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        for index, shape in enumerate(shapes)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_a_folder_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "base_models" / "org--model-7b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert parameters_of("org/model-7b", tmp_path) == 7_000_000_000
    write_weights(folder / "model-00001.safetensors", [3, 4], [5])
    write_weights(folder / "model-00002.safetensors", [2], [])
    assert parameters_of("org/model-7b", tmp_path) == 20
    assert parameters_of(str(folder), tmp_path) == 20
    (folder / "model-00003.safetensors").write_bytes(b"broken")
    assert parameters_of("org/model-7b", tmp_path) == 7_000_000_000


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", 1_500_000_000),
        ("smollm2-135m", 135_000_000),
        ("meta-llama/Llama-3.1-8B", 8_000_000_000),
        ("org-7b/chat", None),
        ("my-model", None),
        ("phi-4", None),
    ],
)
def test_a_name_may_say_it(name: str, parameters: int | None, tmp_path: Path) -> None:
    assert parameters_of(name, tmp_path) == parameters
