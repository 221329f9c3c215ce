"""Which loss and attention kernel a run takes, and what it does when one of them is broken or inexact."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.integration.finetune_exactness import adapted, lora, rows, rows_that_begin_alike

from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.kernels import varlen_attentions
from sage.tools.finetune.loss_choice import choose_loss
from sage.tools.finetune.losses import PlainLoss
from sage.tools.finetune.modeling import load_base
from sage.tools.finetune.rendering import Sample
from sage_contracts.config import TrainingConfig


def test_the_fastest_path_that_is_exact_is_chosen(tiny_base: Path) -> None:
    said: list[str] = []
    assert choose_loss(adapted(tiny_base), rows(), said.append).name == "fused"
    trained_norms = adapted(tiny_base)
    trained_norms.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)
    assert choose_loss(trained_norms, rows(), said.append).name == "packed"
    assert said == []


def hook(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda module, inputs, output: 1.5 * output)


def replace_forward(layer: Any) -> None:
    usual = layer.mlp.forward
    layer.mlp.forward = lambda x: 1.5 * usual(x)


def change_class(layer: Any) -> None:
    """As remote code does: another class, whose name says nothing."""
    usual = type(layer.mlp)
    louder = {"forward": lambda self, x: 1.5 * usual.forward(self, x)}
    layer.mlp.__class__ = type(usual.__name__, (usual,), louder)


@pytest.mark.parametrize("alter", [hook, replace_forward, change_class])
def test_one_altered_layer_is_seen_however_deep_it_lies(tmp_path: Path, alter: Any) -> None:
    model = deep(tmp_path)
    alter(model.get_base_model().model.layers[-1])
    expected = PlainLoss(model)(rows()).item()
    loss = choose_loss(model, rows(), print)
    assert loss.name == "packed"
    assert loss(rows()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("adapted_layers", [range(6), [5]])
def test_layers_that_only_look_like_the_family_are_found_out(
    tmp_path: Path, adapted_layers: Sequence[int]
) -> None:
    model = deep(tmp_path, adapted_layers)
    layers = model.get_base_model().model.layers
    change_class(layers[0])
    for layer in layers[1:]:
        layer.mlp.__class__ = type(layers[0].mlp)
    expected = PlainLoss(model)(rows()).item()
    said: list[str] = []
    loss = choose_loss(model, rows(), said.append)
    assert loss.name == "packed"
    assert re.search(r"The fused path does not fit this model \(it gave", said[0])
    assert loss(rows()).item() == pytest.approx(expected, rel=1e-5)


def test_the_proof_leaves_every_layer_in_place(tmp_path: Path) -> None:
    model = deep(tmp_path)
    expected = PlainLoss(model)(rows()).item()
    loss = choose_loss(model, rows(), print)
    assert loss.name == "fused"
    assert model.config.num_hidden_layers == len(model.get_base_model().model.layers) == 6
    assert loss(rows()).item() == pytest.approx(expected, rel=1e-5)


def deep(folder: Path, adapted_layers: Sequence[int] = range(6)) -> Any:
    """More layers than the proof of the fused path goes through."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    names = [f"layers.{index}.self_attn.{name}_proj" for index in adapted_layers for name in "qkvo"]
    return adapted(folder, lora=lora(target_modules=names))


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), RuntimeError("no kernel image")])
def test_a_broken_kernel_falls_back_to_plain(tiny_base: Path, error: Exception) -> None:
    model = failing_when_packed(adapted(tiny_base), error)
    expected = PlainLoss(model)(rows()).item()
    said: list[str] = []
    loss = choose_loss(model, rows(), said.append)
    assert loss.name == "plain"
    assert str(error) in said[0]
    assert loss(rows()).item() == pytest.approx(expected, rel=1e-5)


def each_row_by_itself(
    query: Any, key: Any, value: Any, lengths: list[int], scaling: float | None, window: int | None
) -> Any:
    """A kernel with variable lengths, as GPUs have them."""
    from torch import cat
    from torch.nn.functional import scaled_dot_product_attention

    assert window is None
    heads_first = (part.transpose(0, 1).split(lengths, 1) for part in (query, key, value))
    attended = [
        scaled_dot_product_attention(*row, is_causal=True, scale=scaling, enable_gqa=True)
        for row in zip(*heads_first, strict=True)
    ]
    return cat(attended, dim=1).transpose(0, 1)


def all_rows_as_one(query: Any, key: Any, value: Any, lengths: list[int], *rest: Any) -> Any:
    return each_row_by_itself(query, key, value, [sum(lengths)], *rest)


def no_number(*arguments: Any) -> Any:
    return each_row_by_itself(*arguments) * float("nan")


def forward_only(*arguments: Any) -> Any:
    """As flash attention is for large heads on some chips."""
    import torch

    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, attended: Any) -> Any:
            return attended.clone()

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            raise RuntimeError("head dimension > 192 has no backward pass here")

    return ForwardOnly.apply(each_row_by_itself(*arguments))


NEITHER_RUNS_HERE = varlen_attentions(("flash_attn", "torch_varlen"))


@pytest.mark.parametrize(
    ("kernels", "used", "words"),
    [
        ({"good": each_row_by_itself}, "good", ""),
        (NEITHER_RUNS_HERE, "", r"flash_attn \(.+\), torch_varlen \(.+\); each row is attended to by itself"),
        ({**NEITHER_RUNS_HERE, "good": each_row_by_itself}, "good", r"flash_attn .*; good is used instead"),
        ({"half": forward_only, "good": each_row_by_itself}, "good", r"half \(head dimension > 192"),
        ({"mixing": all_rows_as_one, "good": each_row_by_itself}, "good", r"mixing \(it gave"),
        ({"nan": no_number}, "", r"nan \(it gave nan"),
    ],
)
def test_a_broken_kernel_gives_way_to_the_next(
    tiny_base: Path, kernels: dict[str, Any], used: str, words: str
) -> None:
    model = adapted(tiny_base, "bf16")
    model.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)  # not to be fused
    expected = PlainLoss(model)(rows()).item()
    calls: list[str] = []
    said: list[str] = []
    loss = choose_loss(model, rows(), said.append, {n: counted(n, k, calls) for n, k in kernels.items()})
    assert loss.name == "packed"
    assert len(said) == bool(words)
    assert re.search(words, "".join(said))
    calls.clear()
    value = loss(rows())
    value.backward()
    assert value.item() == pytest.approx(expected, rel=0.02)
    alike = rows_that_begin_alike()
    assert loss(alike).item() == pytest.approx(PlainLoss(model)(alike).item(), rel=0.02)
    assert set(calls) == ({used} if used else set())


def test_a_whole_model_takes_no_kernel_since_its_gradients_are_not_compared(tiny_base: Path) -> None:
    import torch

    model = load_base(tiny_base, TrainingConfig(tuning="full"), "cpu", "fp32").to(torch.bfloat16)
    calls: list[str] = []
    said: list[str] = []
    loss = choose_loss(model, rows(), said.append, {"half": counted("half", forward_only, calls)})
    assert (loss.name, said) == ("packed", [])
    loss(rows()).backward()
    assert calls == []


def counted(name: str, kernel: Any, calls: list[str]) -> Any:
    def attend(*arguments: Any) -> Any:
        calls.append(name)
        return kernel(*arguments)

    return attend


def test_a_model_that_no_kernel_fits_is_trained_the_plain_way(tiny_base: Path) -> None:
    model = failing_when_packed(adapted(tiny_base, "bf16"), NotImplementedError("softcap"))
    said: list[str] = []
    assert choose_loss(model, rows(), said.append, {"good": each_row_by_itself}).name == "plain"
    assert len(said) == 1
    assert "softcap" in said[0]


def test_a_lack_of_memory_is_no_broken_kernel(tiny_base: Path) -> None:
    import torch

    model = failing_when_packed(adapted(tiny_base), torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError):
        choose_loss(model, rows(), print)
    with pytest.raises(torch.OutOfMemoryError):
        choose_loss(model, rows(), print, {"good": each_row_by_itself})


def failing_when_packed(model: Any, error: Exception) -> Any:
    def fail(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        if "row_lengths" in options:
            raise error

    model.get_base_model().get_decoder().register_forward_pre_hook(fail, with_kwargs=True)
    return model


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "granitemoehybrid"])
def test_rows_that_hand_on_a_state_to_their_neighbours_are_trained_row_by_row(
    tmp_path: Path, family: str, precision: Literal["fp32", "bf16"]
) -> None:
    kinds = {
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "qwen3_5_text": {
            "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
            "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "granitemoehybrid": {
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2,
            "mamba_d_state": 16, "mamba_n_groups": 1, "num_local_experts": 0, "shared_intermediate_size": 64,
        },
    }  # fmt: skip
    said: list[str] = []
    model = adapted(
        tiny(tmp_path, family, **kinds[family]), precision, lora=lora(target_modules="all-linear")
    )
    assert choose_loss(model, rows_that_begin_alike(), said.append).name == "plain"
    assert "what precedes a row changes it by" in said[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmo3", "gemma3_text"])
def test_families_whose_rows_stay_apart_are_packed(
    tmp_path: Path, family: str, precision: Literal["fp32", "bf16"]
) -> None:
    kinds = {
        "qwen3_moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 16,
        },
        "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
        "gemma3_text": {"head_dim": 16, "sliding_window": 16},
    }
    said: list[str] = []
    model = adapted(tiny(tmp_path, family, **kinds[family]), precision)
    assert choose_loss(model, rows_that_begin_alike(), said.append).name == "packed"
    assert said == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cap_on_logits_is_seen_however_small_they_are(
    tmp_path: Path, precision: Literal["fp32", "bf16"]
) -> None:
    model = adapted(tiny(tmp_path, "nanochat"), precision)
    said: list[str] = []
    assert choose_loss(model, rows(), said.append).name == "plain"
    assert "its logits are more than its output layer gives" in said[0]


def test_layers_that_do_not_say_where_rows_end_never_see_what_follows(tmp_path: Path) -> None:
    model = adapted(tiny(tmp_path, "stablelm"))
    said: list[str] = []
    assert choose_loss(model, rows(), said.append).name == "plain"
    assert "do not hand on to attention where rows end" in said[0]


@pytest.mark.parametrize("length", [64, 65])
def test_rows_beyond_which_rotations_change_are_trained_by_themselves(tmp_path: Path, length: int) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = adapted(tiny(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=64))
    said: list[str] = []
    long = [2 + place % 200 for place in range(length)]
    chosen = choose_loss(model, [*rows(), Sample(long, [IGNORED, *long[1:]])], said.append)
    assert (chosen.name, len(said)) == (("fused", 0) if length == 64 else ("plain", 1))
    assert all("its rotations change beyond 64 tokens, and a row has 65" in line for line in said)


def test_attention_that_drops_out_is_not_left_out(tmp_path: Path) -> None:
    model = adapted(tiny(tmp_path, "llama", attention_dropout=0.5))
    model.train()
    loss = choose_loss(model, rows(), print)
    assert len({loss(rows()).item() for _ in range(4)}) == 4


def tiny(folder: Path, family: str, **settings: Any) -> Path:
    """A random model of that family."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(2)
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
        "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **{**sizes, **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def plain_gradients_of_capped(model: Any, samples: list[Sample]) -> tuple[float, None]:
    import torch

    total = 0.0
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(sample.labels[1:]), ignore_index=IGNORED, reduction="sum"
        ).item()
    return total, None
