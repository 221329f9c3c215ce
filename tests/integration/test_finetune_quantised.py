"""Adapters on a base in 8 or 4 bits: what they learn from, and what becomes of a lack of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.integration.finetune_exactness import adapted, plain_gradients, rows
from tests.integration.finetune_recorder import Recorder

from sage.tools.finetune import LoRATrainer
from sage.tools.finetune.ladder import Rung
from sage.tools.finetune.modeling import add_adapters, load_base
from sage.tools.finetune.quantisation import keep_differentiable
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import OutOfMemoryError


def dequantised(quantised: Any, base: Path) -> Any:
    """The same model with the same adapters, its weights as plain numbers."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    config = TrainingConfig(lora={"lora_dropout": 0.0})  # type: ignore[arg-type]
    model = load_base(base, config, "cpu", "fp32")
    for name, module in quantised.get_base_model().named_modules():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, Linear4bit):
            plain = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, Linear8bitLt):
            plain = layer.weight.data.float() * layer.weight.SCB.float()[:, None] / 127
        else:
            continue
        model.get_submodule(name.removesuffix(".base_layer")).weight.data = plain.float()
    model = add_adapters(model, config.lora)
    trained = {name: value for name, value in quantised.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(trained[name])
    return model


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_after_an_evaluation_gradients_are_those_of_the_dequantised_model(
    tiny_base: Path, bits: Literal["load_in_8bit", "load_in_4bit"]
) -> None:
    import torch

    model, samples = adapted(tiny_base, **{bits: True}), rows()
    _, expected = plain_gradients(dequantised(model, tiny_base), samples)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([samples[0].ids]))
    model.train()
    _, found = plain_gradients(model, samples)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-3, name


def test_4_bit_weights_stay_as_they_are_on_a_chip_that_would_have_them_packed() -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = True  # whatever chip this is
    before = layer.weight.data.clone()
    keep_differentiable(torch.nn.ModuleList([layer]))
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    assert torch.equal(layer.weight.data, before)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


@contextmanager
def full_device(kind: str) -> Iterator[None]:
    """No weight of this kind gets the memory that it is quantised into."""
    import bitsandbytes
    import torch

    def to(self: Any, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130.00 MiB. GPU 0 is full.")

    weights = getattr(bitsandbytes.nn, kind)
    real, weights.to = weights.to, to
    try:
        yield
    finally:
        weights.to = real


class Climbing(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.rungs: list[str] = []

    def on_rung(self, rung: Rung) -> None:
        self.rungs.append(rung.name)


@pytest.mark.parametrize(("kind", "bits"), [("Int8Params", "load_in_8bit"), ("Params4bit", "load_in_4bit")])
def test_a_lack_of_memory_while_a_base_is_quantised_is_told_as_one(
    tiny_base: Path, kind: str, bits: str
) -> None:
    config = TrainingConfig.model_validate({bits: True})
    with full_device(kind), pytest.raises(OutOfMemoryError, match=r"\(CUDA out of memory\. Tried"):
        load_base(tiny_base, config, "cpu", "fp32")


def test_the_ladder_is_climbed_then(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(f'{{"question": "Number {n}?", "answer": "The same."}}' for n in range(6)))
    config = TrainingConfig(
        model_name=str(tiny_base), data_path=str(data), output_dir=str(tmp_path / "out"), max_steps=1,
        load_in_8bit=True, oom_ladder=["load_in_4bit"],
    )  # fmt: skip
    watcher = Climbing()
    with full_device("Int8Params"):
        result = LoRATrainer(config, [watcher]).train()
    assert watcher.rungs == ["load_in_4bit"]
    assert result.meta["measured_base_bits"] == 4
