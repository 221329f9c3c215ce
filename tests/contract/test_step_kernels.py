"""Kernels of a step on a CPU, in C and by torch, against what autograd gives in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.low_rank import Adapter, Dropped
from sage.tools.finetune.native.build import LEVELS
from sage.tools.finetune.native.kernels import NativeKernels
from sage.tools.finetune.native.library import level_of_this_chip, open_library
from sage.tools.finetune.prefix_tree import Segment, pack
from sage.tools.finetune.products import WIDENED_AT_ONCE
from sage.tools.finetune.step_kernels import StepKernels, TorchKernels, kernels_for

EPSILON = 1e-5
FORMATS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
ATTENTION = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
formats = st.sampled_from(list(FORMATS))
seeds = st.integers(0, 1 << 30)
tokens = st.integers(1, 70)
some = settings(max_examples=40, deadline=None)


@pytest.fixture(
    scope="module",
    params=["torch", *(pytest.param(level, marks=pytest.mark.compiler) for level in LEVELS)],
)
def kernels(request: pytest.FixtureRequest) -> StepKernels:
    if request.param == "torch":
        return TorchKernels()
    levels = list(LEVELS)
    if levels.index(request.param) < levels.index(level_of_this_chip()):
        pytest.skip(f"this chip is not of {request.param}")
    return NativeKernels(open_library(request.param), multiplies=True)


def random(seed: int, *shape: int, dtype: Any = torch.float32, large: float = 1.0) -> Any:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * large).to(dtype)


def exact(x: Any) -> Any:
    return x.double().requires_grad_()


def same(found: Any, wanted: Any, tolerance: float) -> None:
    assert found.isfinite().all()
    scale = wanted.abs().max().clamp(min=1e-3)
    assert float((found.double() - wanted).abs().max() / scale) < tolerance


@some
@given(
    seeds,
    st.one_of(tokens, st.sampled_from([200, 300, 600])),
    st.sampled_from([16, 80, 288, 4112]),
    st.sampled_from([16, 80, 208]),
    st.sampled_from([*((dtype, dtype) for dtype in FORMATS), (torch.float32, torch.bfloat16)]),
    st.booleans(),
    st.sampled_from(["nothing", "a bias", "a residual"]),
    st.booleans(),
)
def test_products(
    kernels: StepKernels,
    seed: int,
    count: int,
    width: int,
    outs: int,
    dtypes: tuple[Any, Any],
    is_turned: bool,
    added: str,
    has_room: bool,
) -> None:
    dtype, stored = dtypes  # weights may be held in less than what they are multiplied in
    x = random(seed, count, width, dtype=dtype)
    weight = random(seed + 1, *((width, outs) if is_turned else (outs, width)), dtype=stored)
    weight = weight.t() if is_turned else weight
    shape = {"nothing": None, "a bias": (outs,), "a residual": (count, outs)}[added]
    more = random(seed + 2, *shape, dtype=dtype) if shape else None
    room = torch.full((count, outs), math.nan, dtype=dtype) if has_room else None
    found = kernels.product(x, weight, more, room)
    same(found, x.double() @ weight.double().t() + (0 if more is None else more.double()), FORMATS[dtype])
    assert room is None or found.data_ptr() == room.data_ptr()


@pytest.mark.parametrize("is_turned", [False, True])
def test_products_with_a_matrix_that_is_not_widened_at_once(kernels: StepKernels, is_turned: bool) -> None:
    weight = random(1, *((4112, 1104) if is_turned else (1104, 4112)), dtype=torch.bfloat16)
    weight = weight.t() if is_turned else weight
    assert weight.numel() > WIDENED_AT_ONCE
    x, more = random(2, 7, 4112), random(3, 7, 1104)
    wanted = x.double() @ weight.double().t() + more.double()
    same(kernels.product(x, weight, more, more), wanted, FORMATS[torch.float32])


def test_products_of_nothing(kernels: StepKernels) -> None:
    assert kernels.product(torch.ones(0, 16), torch.ones(32, 16)).shape == (0, 32)


@some
@given(
    seeds,
    st.one_of(tokens, st.just(200)),
    st.sampled_from([16, 80, 208]),
    st.lists(st.tuples(st.sampled_from([16, 64, 208]), st.integers(0, 20)), min_size=1, max_size=3),
    formats,
    st.booleans(),
    st.booleans(),
)
def test_adapters(
    kernels: StepKernels,
    seed: int,
    count: int,
    width: int,
    layers: list[tuple[int, int]],
    dtype: Any,
    drops: bool,
    wants_input: bool,
) -> None:
    """Of layers (outputs, rank) side by side; those of rank 0 have none."""
    adapters = adapters_of(seed, width, layers)
    assume(adapters)
    outs = sum(size for size, _ in layers)
    x, of_y = (random(seed + n, count, size, dtype=dtype) for n, size in enumerate((width, outs)))
    seen = random(seed + 3, count, width) > 0 if drops else None
    dropped = Dropped(seen, 2.0 if drops else 1.0)

    plain, weights = exact(x), [(exact(one.a), exact(one.b)) for one in adapters]
    left = plain if seen is None else plain.where(seen, 0.0)
    wanted = torch.zeros(count, outs, dtype=torch.float64)
    for one, (a, b) in zip(adapters, weights, strict=True):
        more = torch.zeros_like(wanted)
        more[:, one.outputs] = left @ a.t() @ b.t() * (one.scaling * dropped.scale)
        wanted = wanted + more
    y, narrow = kernels.adapt(x, outs, adapters, dropped)
    same(y, wanted.detach(), FORMATS[dtype])

    (of_plain, *of_weights) = torch.autograd.grad(
        wanted, [plain, *(weight for pair in weights for weight in pair)], of_y.double()
    )
    before = random(seed + 4, count, width, dtype=dtype)
    of_x = before.clone() if wants_input else None
    found = kernels.adapt_backward(of_y, x, narrow, adapters, dropped, of_x)
    for gradient, one in zip(found, of_weights, strict=True):
        assert gradient.dtype == torch.float32
        same(gradient, one, FORMATS[dtype])
    if wants_input:
        same(of_x, before.double() + of_plain, FORMATS[dtype])


def adapters_of(seed: int, width: int, layers: Sequence[tuple[int, int]]) -> list[Adapter]:
    made, first, ranks = [], 0, 0
    for number, (outs, rank) in enumerate(layers):
        a, b = random(seed + 10 + number, rank, width), random(seed + 20 + number, outs, rank)
        if rank:
            made.append(Adapter(a, b, 0.5 + number, slice(first, first + outs), slice(ranks, ranks + rank)))
        first, ranks = first + outs, ranks + rank
    return made


@some
@given(seeds, st.integers(1, 9), st.sampled_from([16, 576]), st.sampled_from([0, 3277, 32768, 60000]))
def test_draws(kernels: StepKernels, seed: int, count: int, width: int, dropped: int) -> None:
    def drawn() -> Any:
        torch.manual_seed(seed)
        return kernels.draw(x, dropped), kernels.draw(x, dropped)

    x, threads = torch.zeros(count, width), torch.get_num_threads()
    first, second = drawn()
    assert first.shape == x.shape
    assert first.dtype == torch.bool
    share = dropped / 65536
    usual, deviation = 2 * x.numel() * share, math.sqrt(2 * x.numel() * share * (1 - share))
    assert abs(float((~first).sum() + (~second).sum()) - usual) <= 7 * deviation
    if 0 < share < 1 and x.numel() > 1000:
        assert not first.equal(second)
    torch.set_num_threads(threads + 1)
    try:
        assert all(map(torch.equal, drawn(), (first, second))), "whoever begins alike draws alike"
    finally:
        torch.set_num_threads(threads)


@some
@given(seeds, tokens, st.sampled_from([16, 48, 576]), formats, st.sampled_from([1e-3, 1.0, 300.0]))
def test_norms(kernels: StepKernels, seed: int, count: int, width: int, dtype: Any, large: float) -> None:
    x, weight = random(seed, count, width, dtype=dtype, large=large), random(seed + 1, width, dtype=dtype)
    of_out, added = (random(seed + n, count, width, dtype=dtype) for n in (2, 3))
    plain = exact(x)
    wanted = plain * (plain.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()
    same(kernels.norm(x, weight, EPSILON), wanted.detach(), FORMATS[dtype])
    (of_x,) = torch.autograd.grad(wanted, plain, of_out.double())
    found = kernels.norm_backward(of_out.clone(), x, weight, EPSILON, added)
    same(found, added.double() + of_x, FORMATS[dtype])


@some
@given(seeds, tokens, st.sampled_from([16, 80, 1536]), formats, st.sampled_from([1.0, 40.0, 1000.0]))
def test_gates(kernels: StepKernels, seed: int, count: int, width: int, dtype: Any, large: float) -> None:
    gate_up = random(seed, count, 2 * width, dtype=dtype, large=large)
    of_out = random(seed + 1, count, width, dtype=dtype)
    plain = exact(gate_up)
    gate, up = plain.chunk(2, dim=1)
    wanted = torch.nn.functional.silu(gate) * up
    same(kernels.gate(gate_up), wanted.detach(), FORMATS[dtype])
    (of_gate_up,) = torch.autograd.grad(wanted, plain, of_out.double())
    same(kernels.gate_backward(of_out.clone(), gate_up), of_gate_up, FORMATS[dtype])


@some
@given(
    seeds,
    st.one_of(tokens, st.sampled_from([0, 200, 600])),
    st.sampled_from([16, 80, 288]),
    st.sampled_from([16, 80, 208, 400]),
    st.sampled_from([*((dtype, dtype) for dtype in FORMATS), (torch.float32, torch.bfloat16)]),
    st.sampled_from([1.0, 40.0]),
)
def test_gated_mlps(
    kernels: StepKernels,
    seed: int,
    count: int,
    width: int,
    inner: int,
    dtypes: tuple[Any, Any],
    large: float,
) -> None:
    dtype, stored = dtypes
    x, added, of_y = (random(seed + n, count, width, dtype=dtype) for n in range(3))
    gate_up = random(seed + 3, 2 * inner, width, dtype=stored, large=large * width**-0.5)
    down = random(seed + 4, width, inner, dtype=stored, large=inner**-0.5)
    plain = exact(x)
    gate, up = (plain @ gate_up.double().t()).chunk(2, dim=1)
    wanted = (torch.nn.functional.silu(gate) * up) @ down.double().t() + added.double()
    y, kept = kernels.mlp(x, gate_up, down, added)
    kernels.mlp(of_y, gate_up, down, added)  # what is kept stays
    assert y.dtype == dtype
    found = kernels.mlp_backward(of_y.clone(), kept, gate_up, down)
    assert found.dtype == dtype
    if count:
        (of_x,) = torch.autograd.grad(wanted, plain, of_y.double())
        same(y, wanted.detach(), 2 * FORMATS[dtype])
        same(found, of_x, 2 * FORMATS[dtype])
    assert y.shape == found.shape == x.shape


@some
@given(seeds, tokens, st.integers(1, 3), st.integers(1, 3), st.sampled_from([32, 64, 96, 256]), formats)
def test_rotations(
    kernels: StepKernels, seed: int, count: int, turning: int, resting: int, dim: int, dtype: Any
) -> None:
    heads = random(seed, count, turning + resting, dim, dtype=dtype)
    angles = random(seed + 1, count, dim // 2, large=10)
    cos, sin = angles.cos(), angles.sin()
    number = torch.view_as_complex(torch.stack(heads.double().chunk(2, dim=-1), -1))
    turned = torch.view_as_real(number * torch.complex(cos.double(), sin.double())[:, None])
    wanted = heads.double()
    wanted[:, :turning] = torch.cat(turned.unbind(-1), -1)[:, :turning]
    found = heads.clone()
    kernels.rotate(found, cos, sin, turning)
    same(found, wanted, FORMATS[dtype])
    back = kernels.rotate_back(found.float(), cos, sin, turning, dtype)
    assert back.dtype == dtype
    same(back, heads.double(), 2 * FORMATS[dtype])


@st.composite
def trees(draw: st.DrawFn) -> list[Segment]:
    """Segments of rows of which some begin alike."""
    stems = draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    rows = []
    for index in range(draw(st.integers(1, 5))):
        stem = draw(st.integers(0, len(stems)))
        beginning = [token for number, size in enumerate(stems[:stem]) for token in [number] * size]
        rows.append([*beginning, *[100 + index] * draw(st.integers(1, 70))])
    return pack(rows).segments


@some
@given(seeds, trees(), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([32, 64, 96, 256]), formats)
def test_attention(
    kernels: StepKernels, seed: int, tree: list[Segment], counts: tuple[int, int], dim: int, dtype: Any
) -> None:
    heads, kv_heads = counts
    count, scaling = max(segment.end for segment in tree), dim**-0.5
    joined = random(seed, count, heads + 2 * kv_heads, dim, dtype=dtype, large=2)
    plain = exact(joined)
    wanted = plain_attention(plain.split([heads, kv_heads, kv_heads], 1), tree, scaling)
    found, sums = kernels.attention(joined, kv_heads, tree, scaling)
    assert found.dtype == dtype
    same(found, wanted.detach(), ATTENTION[dtype])
    of_out = random(seed + 1, count, heads, dim, dtype=dtype)
    (of_plain,) = torch.autograd.grad(wanted, plain, of_out.double())
    of_joined = kernels.attention_backward(of_out, joined, kv_heads, found, sums, tree, scaling)
    assert of_joined.dtype == torch.float32
    same(of_joined, of_plain, ATTENTION[dtype])


def plain_attention(qkv: Sequence[Any], tree: Sequence[Segment], scaling: float) -> Any:
    query, key, value = qkv
    seen = torch.zeros(len(query), len(query), dtype=torch.bool)
    for start, stop, end in tree:
        seen[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril() > 0
        seen[stop:end, start:stop] = True
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    shares = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, value)


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_what_is_no_number_stays_so(kernels: StepKernels, dtype: Any) -> None:
    x = torch.ones(2, 32, dtype=dtype)
    x[1, 3] = math.nan
    weight, heads = torch.ones(32, dtype=dtype), x.view(2, 1, 32).repeat(1, 3, 1)
    adapted, _ = kernels.adapt(x, 32, adapters_of(0, 32, [(32, 4)]), Dropped(None, 1.0))
    found = [
        adapted,
        kernels.product(x, torch.ones(32, 32, dtype=dtype)),
        kernels.norm(x, weight, EPSILON),
        kernels.norm_backward(x.clone(), x, weight, EPSILON, x),
        kernels.gate(x),
        kernels.gate_backward(torch.ones(2, 16, dtype=dtype), x),
        kernels.mlp(x, torch.ones(32, 32, dtype=dtype), torch.ones(32, 16, dtype=dtype), x)[0],
        kernels.attention(heads, 1, [Segment(0, 1, 1), Segment(1, 2, 2)], 1.0)[0],
    ]
    for out in found:
        assert out[0].isfinite().all()
        assert out[1].isnan().any()
    for wrong in (math.nan, math.inf):
        x[1, 3] = wrong
        logits = x.clone()
        losses, _ = kernels.cross_entropy(logits, torch.tensor([0, 0]), True)
        assert losses.isnan().tolist() == [False, True]
        assert logits.isnan().any(1).tolist() == [False, True]


@some
@given(seeds, st.integers(1, 9), st.sampled_from([16, 128, 144, 1024]), formats, st.booleans(), st.data())
def test_cross_entropy(
    kernels: StepKernels, seed: int, count: int, vocabulary: int, dtype: Any, wants: bool, data: st.DataObject
) -> None:
    # Few different values: many are as large as the largest.
    levels = data.draw(st.sampled_from([2, 50]))
    logits = (random(seed, count, vocabulary) * levels).round().to(dtype)
    ids = st.one_of(st.just(IGNORED), st.integers(0, vocabulary - 1))
    choices = logits.argmax(1).tolist()
    labels = torch.tensor([data.draw(st.one_of(ids, st.just(choice))) for choice in choices])
    plain = exact(logits)
    wanted = torch.nn.functional.cross_entropy(plain, labels, ignore_index=IGNORED, reduction="none")
    (of_logits,) = torch.autograd.grad(wanted.sum(), plain)
    # No less than what logits themselves can say.
    least = 1e-6 * (1 + float(logits.abs().max()))
    losses, hits = kernels.cross_entropy(logits, labels, wants)
    assert float((losses - wanted.detach()).abs().max()) < least
    assert hits.tolist() == [label == choice for label, choice in zip(labels.tolist(), choices, strict=True)]
    if wants:
        same(logits, of_logits, max(least, FORMATS[dtype]))


@pytest.mark.compiler
def test_what_one_thread_is_given_another_one_does_not_write_over() -> None:
    kernels = kernels_for(torch.device("cpu"), torch.float32, 32)
    x, other = torch.ones(3, 32), torch.full((3, 32), -5.0)
    weight = torch.ones(32)
    with ThreadPoolExecutor(1) as beside:
        mine = kernels.norm(x, weight, EPSILON), kernels.gate(x)
        kept = [part.clone() for part in mine]
        beside.submit(lambda: (kernels.norm(other, weight, EPSILON), kernels.gate(other))).result(60)
    for part, before in zip(mine, kept, strict=True):
        assert torch.equal(part, before)


@pytest.mark.compiler
def test_sizes_that_do_not_fill_vectors_are_computed_by_torch() -> None:
    here = torch.device("cpu")
    assert isinstance(kernels_for(here, torch.float32, 576, 1536, head_dim=64), NativeKernels)
    for dtype, dim, width in [(torch.float32, 24, 576), (torch.float32, 64, 100), (torch.float16, 64, 576)]:
        assert isinstance(kernels_for(here, dtype, width, head_dim=dim), TorchKernels)
    assert isinstance(kernels_for(torch.device("cuda"), torch.float32, 576), TorchKernels)
