"""Biases of the base that train beside adapters: in fp32, whatever the base is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.tiny_llama import make_model
from tests.integration.finetune_exactness import adapted, plain_gradients, rows, take_gradients
from tests.integration.finetune_recorder import Recorder, adapter_weights

from sage.tools.finetune import LoRATrainer, TrainingConfig
from sage.tools.finetune.loss_choice import choose_loss
from sage.tools.finetune.merging.merge import merge_adapter
from sage.tools.finetune.modeling import add_adapters, load_base
from sage_contracts.config import LoRAConfig


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases that are not zero, as those of a new model are."""
    import torch
    from transformers import LlamaForCausalLM

    folder = make_model(tmp_path_factory.mktemp("base") / "biased", attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".bias"):
                value.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base_in", [{}, {"load_in_8bit": True}, {"load_in_4bit": True}], ids=json.dumps)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_they_are_in_fp32_and_can_be_unscaled(biased: Path, bias: Any, base_in: dict[str, Any]) -> None:
    import torch

    lora = LoRAConfig(bias=bias, r=4)
    model = add_adapters(load_base(biased, TrainingConfig(lora=lora, **base_in), "cpu", "fp16"), lora).train()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert any(name.endswith("mlp.up_proj.bias") for name in trained) == (bias == "all")
    with torch.no_grad():
        for value in trained.values():
            value += 1e-6  # which half precision has no room for
    before = {name: value.detach().clone() for name, value in trained.items()}

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu")
    ids = torch.tensor([rows()[0].ids])
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    scaler.unscale_(optimizer)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in trained.items())
    biases = [value for name, value in trained.items() if name.endswith(".bias")]
    assert biases and all(value.grad.dtype == torch.float32 and value.grad.any() for value in biases)


def test_the_packed_loss_is_exact_with_them(biased: Path) -> None:
    import torch

    model = adapted(biased, "bf16", lora=LoRAConfig(bias="all", lora_dropout=0.0))
    said: list[str] = []
    loss = choose_loss(model, rows(), said.append)
    assert (loss.name, said) == ("packed", [])
    samples = rows()
    (loss(samples) / sum(row.label_count for row in samples)).backward()
    found = take_gradients(model)
    exact = adapted(biased, "fp32", lora=LoRAConfig(bias="all", lora_dropout=0.0))
    _, expected = plain_gradients(exact, samples)
    assert found.keys() == expected.keys()
    biases = [name for name in found if name.endswith(".bias")]
    difference, size = (
        torch.cat([value(name) for name in biases]).norm()
        for value in (lambda name: found[name] - expected[name], expected.__getitem__)
    )
    assert biases and float(difference / size) < 0.2  # a wrong one is off by more than half


# The base is measured before they have moved.
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
@pytest.mark.parametrize("method", ["sft", "orpo"])
def test_a_run_keeps_them_through_a_checkpoint_and_a_merge(biased: Path, tmp_path: Path, method: str) -> None:
    import torch
    from safetensors.torch import load_file

    rows_ = [{"prompt": f"Number {n}?", "chosen": "Yes please.", "rejected": "no NO"} for n in range(12)]
    if method == "sft":
        rows_ = [{"question": row["prompt"], "answer": row["chosen"]} for row in rows_]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows_))

    def run(name: str, stop_after: int = 0) -> Any:
        config = TrainingConfig(
            model_name=str(biased), data_path=str(data), output_dir=str(tmp_path / name), method=method,
            precision="bf16", max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=1,
            learning_rate=1e-3, save_steps=1, max_length=128,
            lora=LoRAConfig(bias="all", lora_dropout=0.0),
        )  # fmt: skip
        recorder = Recorder(stop_after)
        return LoRATrainer(config, [recorder], run_id="one", resume=True).train()

    whole = run("whole")
    run("halves", stop_after=2)
    resumed = adapter_weights(run("halves"))
    weights = adapter_weights(whole)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    for name, value in weights.items():
        assert torch.allclose(resumed[name], value, atol=1e-6), name

    layer = "model.layers.1.self_attn.o_proj"
    key, trained = f"{layer}.bias", weights[f"base_model.model.{layer}.base_layer.bias"]
    assert whole.adapter_dir is not None
    merge_adapter(biased, whole.adapter_dir, tmp_path / "merged", "fp32")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[key], trained)
    assert not torch.equal(trained, load_file(biased / "model.safetensors")[key])
