"""Adapters on a base in 8 or 4 bits: what they learn from, and what becomes of a lack of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from tests.integration.test_finetune_losses_exact import adapted, plain_gradients, rows

from sage.tools.finetune.modeling import add_adapters, load_base
from sage.tools.finetune.quantisation import keep_differentiable
from sage_contracts.config import TrainingConfig


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
