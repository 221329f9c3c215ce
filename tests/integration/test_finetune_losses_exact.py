"""The fast path is exact: losses and gradients equal a plain transformers forward and backward."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.integration.finetune_exactness import (
    ATTENTION_ONLY,
    adapted,
    assert_same_gradients,
    lora,
    plain_gradients,
    rows,
    rows_that_begin_alike,
    take_gradients,
)
from transformers import AutoModelForCausalLM

from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.loss_choice import choose_loss
from sage.tools.finetune.losses import FusedLoss, PackedLoss, PlainLoss
from sage.tools.finetune.low_rank import Adapter
from sage.tools.finetune.projections import NotFusableError, Projections
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.step_kernels import TorchKernels, kernels_for


@pytest.mark.parametrize("make_rows", [rows, rows_that_begin_alike])
@pytest.mark.parametrize("way", [PackedLoss, FusedLoss])
@pytest.mark.parametrize(
    ("targets", "checkpointing"),
    [
        (ATTENTION_ONLY, False),
        (ATTENTION_ONLY, True),
        ("all-linear", False),
        (["v_proj", "down_proj"], False),
    ],
)
def test_gradients_equal_those_of_plain_transformers(
    tiny_base: Path, make_rows: Any, way: type[PackedLoss], targets: Any, checkpointing: bool
) -> None:
    samples = make_rows()
    model = adapted(tiny_base, gradient_checkpointing=checkpointing, lora=lora(target_modules=targets))
    model.train()
    expected_loss, expected = plain_gradients(model, samples)

    loss = way(model, head_chunk=16)  # several chunks even here
    labels = sum(sample.label_count for sample in samples)
    total = 0.0
    for micro in (samples[:2], samples[2:]):  # cut up, as under a token budget
        part = loss(micro) / labels
        total += part.item()
        part.backward()
    found = take_gradients(model)

    assert total == pytest.approx(expected_loss, rel=1e-5)
    assert all("lora_" in name for name in found), "the base must not get gradients"
    assert_same_gradients(found, expected)


@pytest.mark.compiler
@pytest.mark.parametrize("vocabulary", [258, 272])
@pytest.mark.parametrize("way", [PlainLoss, PackedLoss, FusedLoss])
def test_weights_that_stay_as_they_are_stored_give_the_gradients_of_widened_ones(
    tiny_base: Path, tmp_path: Path, way: type[PackedLoss], vocabulary: int
) -> None:
    import torch

    stored = shutil.copytree(tiny_base, tmp_path / "stored")
    halves = AutoModelForCausalLM.from_pretrained(str(tiny_base), dtype=torch.bfloat16)
    halves.resize_token_embeddings(vocabulary)
    halves.save_pretrained(str(stored))
    widened = shutil.copytree(tiny_base, tmp_path / "widened")
    AutoModelForCausalLM.from_pretrained(str(stored), dtype=torch.float32).save_pretrained(str(widened))
    model, reference = adapted(stored), adapted(widened)
    causal = model.get_base_model()
    assert causal.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    for ends in (causal.lm_head, causal.model.embed_tokens):  # products in C are for whole vectors
        assert ends.weight.dtype == (torch.float32 if vocabulary % 16 else torch.bfloat16)
    assert {weight.dtype for weight in reference.parameters()} == {torch.float32}
    reference.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})

    samples = rows_that_begin_alike()
    expected_loss, expected = plain_gradients(reference, samples)
    loss = way(model)(samples) / sum(sample.label_count for sample in samples)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(take_gradients(model), expected)


def test_what_rows_begin_with_in_common_is_computed_once(tiny_base: Path) -> None:
    samples = rows_that_begin_alike()
    model = adapted(tiny_base)
    computed: list[int] = []
    layer = model.get_base_model().model.layers[0].mlp
    layer.register_forward_hook(lambda *call: computed.append(call[1][0].shape[1]))
    loss = PackedLoss(model)
    loss(samples)
    # A row's last label is no input.
    assert computed == [loss.computed_tokens(samples)] == [20 + 9 + 12 + 8 + 3 + 14 + 30 + 9]
    assert loss.computed_by(samples, [1, 2]) == 20 + 12 + 8 + 3


@pytest.mark.parametrize("way", [PackedLoss, FusedLoss])
def test_what_stands_behind_the_last_label_is_not_computed(tiny_base: Path, way: type[PackedLoss]) -> None:
    samples, inputs = [], 0
    for row in rows_that_begin_alike()[:5]:  # none of which is another's beginning
        stop = row.labels.count(IGNORED) + 3
        samples.append(Sample(row.ids, [*row.labels[:stop], *[IGNORED] * (len(row.ids) - stop)]))
        inputs += stop - 1
    model = adapted(tiny_base)
    expected_loss, expected = plain_gradients(model, samples)
    loss = way(model)
    assert loss.computed_tokens(samples) <= inputs < sum(len(row.ids) for row in samples) * 2 / 3
    value = loss(samples) / sum(sample.label_count for sample in samples)
    value.backward()
    assert value.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(take_gradients(model), expected)


def test_fused_layers_with_biases_and_one_layer_without_adapters_are_exact(tmp_path: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=256, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    base = Qwen2ForCausalLM(config)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    base.save_pretrained(tmp_path)
    model = adapted(tmp_path)
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            parameter.requires_grad_(False)  # what layers_to_transform leaves out
    model.get_base_model().model.layers[1].self_attn = plain_copy(model.get_base_model().model.layers[1])
    samples = rows()
    _, expected = plain_gradients(model, samples)
    (FusedLoss(model)(samples) / sum(sample.label_count for sample in samples)).backward()
    assert_same_gradients(take_gradients(model), expected)


@pytest.mark.parametrize("head_dim", [8, 32])
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("make_rows", [rows, rows_that_begin_alike])
def test_fused_layers_that_norm_their_heads_are_exact(
    tmp_path: Path, make_rows: Any, heads: tuple[int, int], head_dim: int
) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=256, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    base = Qwen3ForCausalLM(config)
    for name, parameter in base.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 2)
    base.save_pretrained(tmp_path)
    model, samples = adapted(tmp_path), make_rows()
    _, expected = plain_gradients(model, samples)
    (FusedLoss(model)(samples) / sum(sample.label_count for sample in samples)).backward()
    assert_same_gradients(take_gradients(model), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_longer_than_the_window_is_exact(tmp_path: Path, precision: Literal["fp32", "bf16"]) -> None:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.4, sliding_window=64,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    ids = [2 + (7 * n * n + 3 * n) % 250 for n in range(150)]
    alike = [*ids[:100], *ids[50:90]]
    samples = [*rows(2), *(Sample(row, [IGNORED] * 70 + row[70:]) for row in (ids, alike))]
    model = adapted(tmp_path, precision)
    value = PlainLoss(model)(samples)
    value.backward()
    expected = take_gradients(model)
    with pytest.raises(NotFusableError):
        FusedLoss(model)
    found = PackedLoss(model)(samples)
    assert found.item() == pytest.approx(value.item(), rel=1e-5 if precision == "fp32" else 0.01)
    if precision == "fp32":
        found.backward()
        assert_same_gradients(take_gradients(model), expected)
    said: list[str] = []
    assert choose_loss(adapted(tmp_path, precision), samples, said.append).name == "packed"
    assert said == []


def windowed_mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.4, sliding_window=32,
        )
    )  # fmt: skip


def partly_windowed_gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=512, initializer_range=0.4,
            sliding_window=32, layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [windowed_mistral, partly_windowed_gemma])
def test_whoever_generates_beyond_the_window_meanwhile_gets_transformers_answer(
    tmp_path: Path, make: Any
) -> None:
    import torch

    torch.manual_seed(1)
    make().save_pretrained(tmp_path)
    model = adapted(tmp_path).eval()
    ids = torch.tensor([[2 + (7 * n * n + 3 * n) % 250 for n in range(80)]])
    shorter = torch.cat([torch.zeros_like(ids[:, :20]), ids[:, :60]], 1)
    ids = torch.cat([ids, shorter])
    mask = torch.ones_like(ids)
    mask[1, :20] = 0  # padding of a batch whose prompts are not equally long

    def answers() -> list[list[int]]:
        given = {"input_ids": ids, "attention_mask": mask}
        made = model.generate(**given, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=1)
        found: list[list[int]] = made.tolist()
        return found

    samples = rows()
    expected, expected_loss = answers(), PlainLoss(model)(samples).item()
    loss = PackedLoss(model)
    assert answers() == expected
    assert loss(samples).item() == pytest.approx(expected_loss, rel=1e-5)


def plain_copy(layer: Any) -> Any:
    """The layer's attention without its adapters."""
    for name in ATTENTION_ONLY:
        setattr(layer.self_attn, name, getattr(layer.self_attn, name).base_layer)
    return layer.self_attn


def test_dropout_of_joined_projections_is_exact_for_its_mask_and_drops_the_asked_share(
    tiny_base: Path,
) -> None:
    import torch
    from torch.nn.functional import linear

    attention = adapted(tiny_base, lora=lora(lora_dropout=0.2)).get_base_model().model.layers[0].self_attn
    joined, kernels = Projections([attention.q_proj, attention.k_proj, attention.v_proj]), TorchKernels()
    x, upstream = torch.randn(300, 64, requires_grad=True), torch.randn(300, 128)
    with torch.no_grad():
        y, seen, narrow = joined.forward(kernels, x.detach(), True)
        other = joined.forward(kernels, x.detach(), True)[1]
    assert float(seen.float().mean()) == pytest.approx(0.8, abs=0.01)
    assert not torch.equal(seen, other), "every draw has its own mask"

    dropped = x * seen / 0.8
    parts = [
        linear(x, layer.base_layer.weight) + linear(linear(dropped, adapter.a), adapter.b) * adapter.scaling
        for layer, adapter in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), joined.adapters, strict=True
        )
    ]
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad(expected, [x, *joined.parameters], upstream)
    of_x, of_weights = joined.backward(kernels, upstream, x.detach(), seen, narrow, True)
    for found, right in zip((of_x, *of_weights), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


def test_dropout_of_almost_everything_is_no_division_by_zero(tiny_base: Path) -> None:
    import torch

    model = adapted(tiny_base, lora=lora(lora_dropout=0.999999))
    joined = Projections([model.get_base_model().model.layers[0].self_attn.o_proj])
    with torch.no_grad():
        y, *_ = joined.forward(TorchKernels(), torch.randn(5, 64), True)
    assert y.isfinite().all()


@pytest.mark.parametrize("in_c", [False, True])
@pytest.mark.parametrize("residual", [None, 100.0])
def test_what_adapters_add_is_not_lost_in_the_roundings_of_halves(in_c: bool, residual: float | None) -> None:
    """Each part is far below the last bit of what it is added to: rounded apart it would always be lost."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_()
    joined = Projections([layer])
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    joined.adapters.append(Adapter(a, b, 2**-11, slice(0, 64), slice(0, 4)))
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    added = None if residual is None else torch.full((512, 64), residual, dtype=torch.bfloat16)
    kernels = kernels_for(x.device, x.dtype, 64) if in_c else TorchKernels()

    y, *_ = joined.forward(kernels, x, False, added)

    part = x.float() @ a.t() @ b.t() * 2**-11
    came = y.float() - x.float() @ layer.weight.float().t() - (residual or 0.0)
    assert float((came * part).sum() / part.square().sum()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("targets", [ATTENTION_ONLY, ["gate_proj", "up_proj"], ["down_proj"]])
def test_fused_layers_go_their_own_way_when_somebody_generates(tiny_base: Path, targets: list[str]) -> None:
    import torch

    model = adapted(tiny_base, lora=lora(target_modules=targets))
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(**prompt, **settings)
    with model.disable_adapter():
        base_answer = model.generate(**prompt, **settings)
        base_loss = PackedLoss(model)(rows()).item()
    loss = FusedLoss(model)
    assert model.generate(**prompt, **settings).tolist() == expected.tolist()
    assert expected.tolist() != base_answer.tolist()
    slow_ways: list[Any] = []
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *call: slow_ways.append(call))
    with model.disable_adapter():
        assert loss(rows()).item() == pytest.approx(base_loss, rel=1e-5)
        assert not slow_ways, "the base is measured the fused way too"


def test_rows_of_one_length_may_go_through_the_model_together(tiny_base: Path) -> None:
    model = adapted(tiny_base)
    samples = rows(6)
    shortest = min(len(sample.ids) for sample in samples)
    samples += [Sample(sample.ids[-shortest:], sample.labels[-shortest:]) for sample in samples]
    expected_loss, expected = plain_gradients(model, samples)
    labels = sum(sample.label_count for sample in samples)
    loss = PlainLoss(model, is_batched=True)(samples) / labels
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(take_gradients(model), expected)


@pytest.mark.parametrize("make_rows", [rows, rows_that_begin_alike])
def test_half_precision_loses_no_more_than_the_plain_path_does(tiny_base: Path, make_rows: Any) -> None:
    """There sizes are rounded up with tokens that nobody sees, and attention is in fp32."""
    import torch

    samples = make_rows()
    labels = sum(sample.label_count for sample in samples)
    expected_loss, expected = plain_gradients(adapted(tiny_base), samples)
    exact = torch.cat([gradient.flatten() for gradient in expected.values()])
    errors = {}
    for make in (PlainLoss, PackedLoss, FusedLoss):
        model = adapted(tiny_base, "bf16")
        loss = make(model)(samples) / labels
        loss.backward()
        assert loss.item() == pytest.approx(expected_loss, rel=0.02)
        found = torch.cat([gradient.flatten() for gradient in take_gradients(model).values()])
        errors[make] = float((found - exact).norm() / exact.norm())
    assert errors[PackedLoss] < 1.5 * errors[PlainLoss] + 0.02
    assert errors[FusedLoss] < 1.5 * errors[PlainLoss] + 0.02


@pytest.mark.parametrize("way", [PackedLoss, FusedLoss])
def test_gradients_of_hundreds_of_rows_add_up_in_what_they_share(
    tiny_base: Path, way: type[PackedLoss]
) -> None:
    """In half precision, where a sum that is rounded at every row would stand still at some 256."""
    import torch

    source = random.Random(5)
    common = [source.randrange(2, 250) for _ in range(12)]
    samples = [Sample([*common, 2 + n % 240], [IGNORED, *common[1:], IGNORED]) for n in range(700)]
    few = [Sample(common, [IGNORED, *common[1:]])]
    found = []
    for rows_of, times in ((few, 700), (samples, 1)):
        model = adapted(tiny_base, "bf16")
        (way(model)(rows_of) * times).backward()
        found.append(torch.cat([gradient.flatten() for gradient in take_gradients(model).values()]))
    one, all_of_them = found
    assert float((all_of_them - one).norm() / one.norm()) < 0.02
