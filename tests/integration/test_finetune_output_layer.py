"""Behind the last layer: states of labels alone, logits a chunk at a time, an output layer that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.integration.finetune_exactness import (
    adapted,
    assert_same_gradients,
    lora,
    plain_gradients,
    rows,
    rows_that_begin_alike,
    take_gradients,
)

from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.head_loss import hits_of as count_hits
from sage.tools.finetune.losses import AutocastLoss, FusedLoss, PackedLoss, PlainLoss
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.step_kernels import CHOICE_BLOCK


def few_labels(make_rows: Any) -> list[Sample]:
    return [Sample(row.ids, [*[IGNORED] * (len(row.ids) - 4), *row.labels[-4:]]) for row in make_rows()]


@pytest.mark.parametrize("make_rows", [rows, rows_that_begin_alike])
def test_the_last_layer_is_computed_for_labels_alone(tiny_base: Path, make_rows: Any) -> None:
    samples = few_labels(make_rows)
    model = adapted(tiny_base)
    given: list[int] = []
    decoder = model.get_base_model().model
    decoder.norm.register_forward_hook(lambda *call: given.append(call[1][0].shape[1]))
    expected_loss, expected = plain_gradients(model, samples)
    loss = FusedLoss(model)
    value = loss(samples) / sum(sample.label_count for sample in samples)
    value.backward()
    assert given[-1] <= 4 * len(samples) < loss.computed_tokens(samples)
    assert value.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(take_gradients(model), expected)


def test_a_last_layer_that_goes_its_own_way_gives_labels_alone_too(tiny_base: Path) -> None:
    samples = few_labels(rows)
    model = adapted(tiny_base)
    loss = FusedLoss(model)
    model.get_base_model().model.layers[-1].self_attn.q_proj.enable_adapters(False)
    expected = PlainLoss(model)(samples).item()
    assert loss(samples).item() == pytest.approx(expected, rel=1e-5)


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
