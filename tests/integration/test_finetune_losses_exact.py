"""The fast path is exact: losses and gradients equal a plain transformers forward and backward."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import pytest

from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.losses import PackedLoss, PlainLoss, choose_loss
from sage.tools.finetune.modeling import add_adapters, load_base
from sage.tools.finetune.rendering import Sample
from sage_contracts.config import LoRAConfig, TrainingConfig


def rows(count: int = 5) -> list[Sample]:
    source = random.Random(3)
    made = []
    for _ in range(count):
        ids = [source.randrange(2, 250) for _ in range(source.randrange(6, 40))]
        quiet = source.randrange(1, len(ids) - 2)
        labels = [IGNORED] * quiet + ids[quiet:]
        labels[-2] = IGNORED  # a gap, as between two turns
        made.append(Sample(ids, labels))
    return made


def adapted(base: Path, precision: Literal["fp32", "bf16"] = "fp32", **changes: Any) -> Any:
    import torch

    config = TrainingConfig(lora=LoRAConfig(lora_dropout=0.0), **changes)
    model = add_adapters(load_base(base, config, "cpu", precision), config.lora)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide a wrong gradient of A
            parameter.data.normal_(std=0.1)
    return model


def plain_gradients(model: Any, samples: list[Sample]) -> tuple[float, dict[str, Any]]:
    """Transformers' own loss, padded batch and all."""
    import torch

    width = max(len(sample.ids) for sample in samples)
    ids = torch.tensor([sample.ids + [1] * (width - len(sample.ids)) for sample in samples])
    labels = torch.tensor([sample.labels + [IGNORED] * (width - len(sample.ids)) for sample in samples])
    mask = torch.tensor([[1] * len(s.ids) + [0] * (width - len(s.ids)) for s in samples])
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.item(), take_gradients(model)


def take_gradients(model: Any) -> dict[str, Any]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_plain_transformers(tiny_base: Path, checkpointing: bool) -> None:
    import torch

    samples = rows()
    model = adapted(tiny_base, gradient_checkpointing=checkpointing)
    model.train()
    expected_loss, expected = plain_gradients(model, samples)

    loss = PackedLoss(model, head_chunk=16)  # several chunks even here
    labels = sum(sample.label_count for sample in samples)
    total = 0.0
    for micro in (samples[:2], samples[2:]):  # cut up, as under a token budget
        part = loss(micro) / labels
        total += part.item()
        part.backward()
    found = take_gradients(model)

    assert total == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found), "the base must not get gradients"
    for name, gradient in found.items():
        noise = 1e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=noise)


def test_an_unfrozen_or_unusual_head_is_exact_too(tiny_base: Path) -> None:
    samples = rows()
    model = adapted(tiny_base)
    model.get_output_embeddings().weight.requires_grad_(True)
    _, expected = plain_gradients(model, samples)
    (PackedLoss(model)(samples) / sum(sample.label_count for sample in samples)).backward()
    found = take_gradients(model)
    assert found.keys() == expected.keys()
    assert any("lm_head" in name for name in found)
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() < 1e-5


def test_half_precision_loses_no_more_than_the_plain_path_does(tiny_base: Path) -> None:
    """There sizes are rounded up with tokens that nobody sees, and attention is in fp32."""
    import torch

    samples = rows()
    labels = sum(sample.label_count for sample in samples)
    expected_loss, expected = plain_gradients(adapted(tiny_base), samples)
    exact = torch.cat([gradient.flatten() for gradient in expected.values()])
    errors = {}
    for make in (PlainLoss, PackedLoss):
        model = adapted(tiny_base, "bf16")
        loss = make(model)(samples) / labels
        loss.backward()
        assert loss.item() == pytest.approx(expected_loss, rel=0.02)
        found = torch.cat([gradient.flatten() for gradient in take_gradients(model).values()])
        errors[make] = float((found - exact).norm() / exact.norm())
    assert errors[PackedLoss] < 1.5 * errors[PlainLoss] + 0.02


def test_the_packed_path_is_chosen_where_it_is_exact(tiny_base: Path) -> None:
    said: list[str] = []
    assert choose_loss(adapted(tiny_base), rows(), said.append).name == "packed"
    assert said == []


def test_a_model_that_does_more_than_its_head_falls_back_to_plain(tiny_base: Path) -> None:
    import torch

    model = adapted(tiny_base)
    causal = model.get_base_model()

    def cap(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    causal.register_forward_hook(cap)
    said: list[str] = []
    loss = choose_loss(model, rows(), said.append)
    assert loss.name == "plain"
    assert "row by row" in said[0]
    samples = rows(2)
    expected, _ = plain_gradients_of_capped(model, samples)
    assert loss(samples).item() == pytest.approx(expected, rel=1e-4)


def plain_gradients_of_capped(model: Any, samples: list[Sample]) -> tuple[float, None]:
    import torch

    total = 0.0
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(sample.labels[1:]), ignore_index=IGNORED, reduction="sum"
        ).item()
    return total, None
