"""Rows, adapters and gradients for tests that hold the fast path against a plain one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.modeling import add_adapters, load_base
from sage.tools.finetune.rendering import Sample
from sage_contracts.config import LoRAConfig, TrainingConfig

ATTENTION_ONLY = ["q_proj", "k_proj", "v_proj", "o_proj"]


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


def rows_that_begin_alike() -> list[Sample]:
    """A prompt of all, one more of some, a row twice, and a row that another goes on from, loss and all."""
    source = random.Random(4)

    def some(count: int) -> list[int]:
        return [source.randrange(2, 250) for _ in range(count)]

    prompt, question = some(20), some(12)
    ids = [prompt + some(10), prompt + question + some(9), prompt + question + some(4), some(15), some(30)]
    ids += [ids[0], ids[4] + some(10)]
    quiet = [20, 14, 32, 3, 9, 17, 1]  # loss within what is shared, of one row and not of another
    return [Sample(row, [IGNORED] * q + row[q:]) for row, q in zip(ids, quiet, strict=True)]


def lora(**changes: Any) -> LoRAConfig:
    return LoRAConfig(**{"lora_dropout": 0.0, **changes})


def adapted(base: Path, precision: Literal["fp32", "bf16"] = "fp32", **changes: Any) -> Any:
    import torch

    config = TrainingConfig(**{"lora": lora(), **changes})
    torch.manual_seed(5)  # whoever asks twice gets the same adapters
    model = add_adapters(load_base(base, config, "cpu", precision), config.lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide a wrong gradient of A
            parameter.data.normal_(std=0.2)
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


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    import torch

    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        noise = 5e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=noise)
