"""Merged weights answer as their adapter did, or are not kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.fakes.tiny_llama import make_adapter, make_model

from sage.tools.finetune.merging.merge import merge_adapter
from sage.tools.finetune.merging.parity import PROBES, compute_in_fp32
from sage.tools.finetune.merging.tensor_files import stored_tensors
from sage_contracts.errors import ModelNotFoundError, TrainingFailedError
from sage_contracts.models import WeightsDtype


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
    assert phases == ["merging", "asking the tuned model", "asking the merged model"]
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
    recorded = json.loads((tmp_path / "merged" / "sage_merge.json").read_text())["parity"]
    assert recorded["probes"] == len(PROBES)
    assert 0 <= recorded["mean_kl"] < 0.05 * recorded["base_kl"]


def test_auto_keeps_the_dtype_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert merge_adapter(base, adapter, tmp_path / "merged").parity.dtype == "float32"


def test_a_folder_without_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no adapter"):
        merge_adapter(base, tmp_path, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_weights_that_went_bad_are_not_kept(
    base: Path, adapter: Path, tmp_path: Path, dtype: WeightsDtype
) -> None:
    def damage(phase: str) -> None:
        if phase == "asking the tuned model":  # the merged weights lie there, not yet in their place
            (unfinished,) = tmp_path.glob(".merged.*")
            tensor = stored_tensors(unfinished)["model.layers.1.self_attn.v_proj.weight"]
            with tensor.path.open("r+b") as file:
                file.seek(tensor.offset)
                file.write(bytes(tensor.size_bytes))

    with pytest.raises(TrainingFailedError, match="not kept"):
        merge_adapter(base, adapter, tmp_path / "merged", dtype, damage)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_at_another_scale_than_the_adapters_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = copy / "adapter_config.json"
    true = json.loads(config.read_text())

    def be_true_again(phase: str) -> None:
        if phase == "asking the tuned model":
            config.write_text(json.dumps(true))

    for factor in (0.5, 2):
        config.write_text(json.dumps(true | {"lora_alpha": true["lora_alpha"] * factor}))
        with pytest.raises(TrainingFailedError, match="nats per token"):
            merge_adapter(base, copy, tmp_path / "merged", "bf16", be_true_again)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_widening_a_module_at_a_time_computes_what_a_copy_in_fp32_computes(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    answers = []
    for copy_up_to_bytes in (0, 1 << 30):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        compute_in_fp32(model, copy_up_to_bytes)
        with torch.no_grad():
            answers.append(model(input_ids=torch.arange(2, 20)[None]).logits)
        assert next(model.parameters()).dtype == (torch.float32 if copy_up_to_bytes else torch.bfloat16)
    assert answers[0].dtype == torch.float32
    assert torch.equal(*answers)
