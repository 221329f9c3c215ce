"""On an NVIDIA GPU: packed rows give the model's own loss and gradients, whatever kernel is chosen."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.tiny_llama import make_model

from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.kernels import kernels_of, varlen_attentions
from sage.tools.finetune.loss_choice import choose_loss
from sage.tools.finetune.losses import PackedLoss, PlainLoss
from sage.tools.finetune.modeling import add_adapters, load_base, make_optimizer
from sage.tools.finetune.rendering import Sample
from sage_contracts.config import LoRAConfig, TrainingConfig

pytestmark = pytest.mark.gpu
CONFIG = TrainingConfig(lora=LoRAConfig(lora_dropout=0.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny")


def rows() -> list[Sample]:
    source = random.Random(3)
    made = []
    for _ in range(5):
        ids = [source.randrange(2, 250) for _ in range(source.randrange(20, 120))]
        made.append(Sample(ids, [IGNORED] * 5 + ids[5:]))
    return made


def adapted(base: Path, precision: Any) -> Any:
    import torch

    torch.manual_seed(5)
    model = add_adapters(load_base(base, CONFIG, "cuda", precision), CONFIG.lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def measured(loss: Any, model: Any) -> tuple[float, Any]:
    import torch

    samples = rows()
    value = loss(samples) / sum(row.label_count for row in samples)
    value.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([p.grad.flatten().float() for p in trained])
    model.zero_grad(set_to_none=True)
    return value.item(), gradient


@pytest.mark.parametrize(("precision", "noise"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_packed_rows_give_the_plain_loss_and_gradients(base: Path, precision: Any, noise: float) -> None:
    plain = adapted(base, precision)
    expected, expected_gradient = measured(PlainLoss(plain), plain)
    packed = adapted(base, precision)
    kernels = varlen_attentions(kernels_of("cuda", precision).attention)
    for way in (None, *kernels.values()):
        found, gradient = measured(PackedLoss(packed, varlen=way), packed)
        assert found == pytest.approx(expected, rel=noise)
        assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 2 * noise


def test_half_precision_uses_a_kernel_with_variable_lengths_where_the_chip_has_one(base: Path) -> None:
    import torch

    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this chip is older than flash attention")
    kernels = varlen_attentions(kernels_of("cuda", "bf16").attention)
    assert kernels
    said: list[str] = []
    assert choose_loss(adapted(base, "bf16"), rows(), said.append, kernels).name == "packed"
    assert said == []


def test_the_optimizer_is_one_kernel(base: Path) -> None:
    optimizer, note = make_optimizer(adapted(base, "bf16"), CONFIG, "cuda")
    assert note == ""
    assert optimizer.defaults["fused"] is True
