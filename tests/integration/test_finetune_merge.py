"""Merged weights answer as their adapter did, or are not kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.fakes.tiny_llama import make_adapter, make_model

from sage.tools.finetune.merge import PROBES, merge_adapter
from sage_contracts.errors import ModelNotFoundError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "lora_weights", base)


def test_merged_weights_are_whole_and_answer_alike(base: Path, adapter: Path, tmp_path: Path) -> None:
    phases: list[str] = []
    result = merge_adapter(base, adapter, tmp_path / "merged_model", "fp32", phases.append)
    assert result.parity.same == result.parity.probes == len(PROBES)
    assert phases[0].startswith("loading")
    names = {path.name for path in (tmp_path / "merged_model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["merged_model"]
    assert result.size_bytes > 0

    from safetensors.torch import load_file

    merged = load_file(tmp_path / "merged_model" / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    assert merged.keys() == plain.keys()
    key = "model.layers.0.self_attn.q_proj.weight"
    assert (merged[key] - plain[key]).abs().max() > 1e-3


def test_half_precision_reports_how_much_agrees(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = merge_adapter(base, adapter, tmp_path / "merged", "bf16")
    assert result.parity.dtype == "bfloat16"
    assert 0 <= result.parity.same_tokens <= result.parity.tokens
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "merged" / "sage_merge.json").read_text())["parity"]["probes"] == len(
        PROBES
    )


def test_auto_keeps_the_dtype_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert merge_adapter(base, adapter, tmp_path / "merged").parity.dtype == "float32"


def test_a_folder_without_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no adapter"):
        merge_adapter(base, tmp_path, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
