"""Layers whose frozen weights stay in bf16 while what goes through them is in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sage.tools.finetune.widening import by_torch, computing_dtype, is_plain_linear, widen_when_used

pytestmark = pytest.mark.compiler


def halves(layer: Any) -> Any:
    torch.manual_seed(2)
    return layer.bfloat16().requires_grad_(False)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_gives_what_it_would_with_wide_weights(has_bias: bool) -> None:
    layer = halves(nn.Linear(64, 160, bias=has_bias))
    wide = nn.Linear(64, 160, bias=has_bias)
    wide.load_state_dict(layer.state_dict())
    assert widen_when_used(layer) == {id(layer.weight)}
    assert is_plain_linear(layer)
    x, same = (torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    x.requires_grad_(), same.requires_grad_()
    found, wanted = layer(x), wide(same)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.square().sum().backward(), wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-5, atol=1e-4)


def test_what_products_in_c_are_compared_with_is_multiplied_by_torch() -> None:
    layer = halves(nn.Linear(64, 160, bias=False))
    widen_when_used(layer)
    x = torch.randn(2, 9, 64, requires_grad=True)
    with by_torch():
        found = layer(x)
    # To the last bit, which sums in another order would not be.
    assert found.equal((x.flatten(0, 1) @ layer.weight.float().t()).view_as(found))
    upstream = torch.randn_like(found)
    found.backward(upstream)
    assert x.grad is not None
    assert x.grad.equal((upstream.flatten(0, 1) @ layer.weight.float()).view_as(x))


def test_embeddings_come_out_in_fp32() -> None:
    embedding = halves(nn.Embedding(96, 32))
    widen_when_used(embedding)
    ids = torch.tensor([[3, 95]])
    assert embedding(ids).equal(embedding.weight[ids].float())


def test_what_is_not_in_bf16_or_of_whole_vectors_is_left_alone() -> None:
    for layer in (nn.Linear(64, 160), halves(nn.Linear(60, 160)), halves(nn.Linear(64, 16)).half()):
        kind = type(layer)
        assert widen_when_used(layer) == set()
        assert type(layer) is kind


def test_a_model_says_what_it_computes_in() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = halves(nn.Embedding(96, 32))

        @property
        def dtype(self) -> torch.dtype:
            return self.embedding.weight.dtype

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

    model = Model()
    assert computing_dtype(model) == torch.bfloat16
    widen_when_used(model)
    assert computing_dtype(model) == torch.float32
