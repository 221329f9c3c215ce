"""The fast path is exact: losses and gradients equal a plain transformers forward and backward."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import AutoModelForCausalLM

from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.head_loss import hits_of as count_hits
from sage.tools.finetune.loss_choice import choose_loss
from sage.tools.finetune.losses import AutocastLoss, FusedLoss, PackedLoss, PlainLoss
from sage.tools.finetune.low_rank import Adapter
from sage.tools.finetune.modeling import add_adapters, load_base
from sage.tools.finetune.projections import NotFusableError, Projections
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.step_kernels import CHOICE_BLOCK, TorchKernels, kernels_for
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


ATTENTION_ONLY = ["q_proj", "k_proj", "v_proj", "o_proj"]


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
    assert computed == [loss.computed_tokens(samples)] == [20 + 10 + 12 + 9 + 4 + 15 + 30 + 10]
    assert loss.computed_by(samples, [1, 2]) == 20 + 12 + 9 + 4


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    import torch

    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        noise = 5e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=noise)


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


def with_trained_head(base: Path, how: str) -> Any:
    """The output layer trains whole, or adapters on it do."""
    if how == "adapters":
        return adapted(base, lora=lora(target_modules=["q_proj", "lm_head"]))
    model = adapted(base)
    model.get_output_embeddings().weight.requires_grad_(True)
    return model


TRAINED_HEADS = ["whole", "adapters"]


@pytest.mark.parametrize("way", [PackedLoss, FusedLoss])
@pytest.mark.parametrize("how", TRAINED_HEADS)
def test_a_trained_output_layer_is_exact_too(tiny_base: Path, how: str, way: type[PackedLoss]) -> None:
    samples = rows()
    model = with_trained_head(tiny_base, how)
    _, expected = plain_gradients(model, samples)
    loss = way(model, head_chunk=16)
    labels = sum(sample.label_count for sample in samples)
    for micro in (samples[:2], samples[2:]):
        (loss(micro) / labels).backward()
    found = take_gradients(model)
    assert any("lm_head" in name for name in found)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("how", TRAINED_HEADS)
def test_a_trained_output_layer_loses_no_more_in_half_precision_than_the_plain_path_does(
    tiny_base: Path, how: str
) -> None:
    import torch

    samples = rows()
    labels = sum(sample.label_count for sample in samples)
    _, gradients = plain_gradients(with_trained_head(tiny_base, how), samples)
    exact = torch.cat([gradient.flatten() for gradient in gradients.values()])
    errors = {}
    for make in (PlainLoss, PackedLoss):
        model = with_trained_head(tiny_base, how)
        with torch.autocast("cpu", torch.bfloat16):
            loss = make(model)
        (AutocastLoss(loss, "cpu", torch.bfloat16)(samples) / labels).backward()
        found = take_gradients(model)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        errors[make] = float(
            (torch.cat([gradient.flatten() for gradient in found.values()]) - exact).norm() / exact.norm()
        )
    assert errors[PackedLoss] < 1.5 * errors[PlainLoss] + 0.02


@pytest.mark.parametrize("how", TRAINED_HEADS)
def test_logits_of_one_chunk_at_a_time_are_held_even_where_the_output_layer_trains(
    tiny_base: Path, how: str
) -> None:
    import torch

    def place(tensor: Any) -> int:
        return int(tensor.untyped_storage().data_ptr())

    class Held:
        rows = most_rows = 0

        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor
            is_logits = tensor.dim() == 2 and tensor.shape[1] == vocabulary and place(tensor) not in weights
            self.count = len(tensor) if is_logits else 0
            Held.rows += self.count
            Held.most_rows = max(Held.most_rows, Held.rows)

        def __del__(self) -> None:
            Held.rows -= self.count

    model = with_trained_head(tiny_base, how)
    vocabulary, weights = model.config.vocab_size, {place(weight) for weight in model.parameters()}
    loss = PackedLoss(model, head_chunk=16)  # of 12 in fp32
    samples = rows(12)
    assert sum(sample.label_count for sample in samples) > 100
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        loss(samples).backward()
    assert 12 <= Held.most_rows <= 2 * 12, "logits, and what the softmax keeps of them"


def hits_of(model: Any, samples: list[Sample]) -> int:
    """Labels that are the first choice of transformers' own logits."""
    import torch

    hits = 0
    with torch.no_grad():
        for sample in samples:
            choices = model(input_ids=torch.tensor([list(sample.ids)])).logits[0, :-1].argmax(1).tolist()
            hits += sum(c == label for c, label in zip(choices, list(sample.labels)[1:], strict=True))
    return hits


@pytest.mark.parametrize("way", [PlainLoss, PackedLoss, FusedLoss, "unfrozen head"])
def test_hits_are_the_labels_that_are_the_models_first_choice(tiny_base: Path, way: Any) -> None:
    import torch

    samples = rows(8)
    model = adapted(tiny_base)
    for sample in samples:  # random labels would hardly ever be a choice
        with torch.no_grad():
            choices = model(input_ids=torch.tensor([list(sample.ids)])).logits[0, :-1].argmax(1).tolist()
        for place in range(1, len(sample.ids), 2):
            if sample.labels[place] != IGNORED:
                sample.labels[place] = choices[place - 1]
    expected = hits_of(model, samples)
    assert 0 < expected < sum(sample.label_count for sample in samples)
    if way == "unfrozen head":
        model.get_output_embeddings().weight.requires_grad_(True)
        way = PackedLoss
    loss = way(model) if way is PlainLoss else way(model, head_chunk=16)
    value, hits = loss.with_hits(samples)
    assert int(hits) == expected
    assert not hits.requires_grad
    value.backward()
    with torch.no_grad():
        assert loss.scores(samples) == (pytest.approx(value.item(), rel=1e-5), expected)


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


@pytest.mark.parametrize("vocabulary", [CHOICE_BLOCK, 3 * CHOICE_BLOCK, 3 * CHOICE_BLOCK + 1])
def test_of_equal_logits_the_first_is_the_choice(vocabulary: int) -> None:
    import torch

    torch.manual_seed(2)
    logits = torch.randint(5, (60, vocabulary)).float()
    choices = logits.argmax(1)
    labels = torch.where(torch.arange(60) % 2 == 0, choices, torch.randint(vocabulary, (60,)))
    labels[:5] = IGNORED
    assert int(count_hits(logits, labels)) == int((choices == labels).sum()) >= 27
    assert int(count_hits(logits[:0], labels[:0])) == 0


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
