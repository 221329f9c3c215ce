"""What a step on a CPU computes between its products: in C where that can be had, else by torch's operations.

Both compute the same, with halves of bf16 rounded once. Rows lie end to end: x (tokens, width), gate_up
(tokens, 2 * width) with the gates first, heads (tokens, heads, dim), cos and sin (tokens, dim / 2) in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

from sage.tools.finetune import low_rank, products, tree_attention
from sage.tools.finetune.low_rank import Adapter, Dropped
from sage.tools.finetune.native.build import CompilerError
from sage.tools.finetune.native.kernels import NativeKernels
from sage.tools.finetune.native.library import is_for_this_chip, is_switched_off, load_library
from sage.tools.finetune.prefix_tree import Segment
from sage.tools.finetune.products import is_mkl_slow_here


class StepKernels(Protocol):
    """What `norm`, `gate` and `gate_backward` give is good until the next call of the same."""

    def product(self, x: Any, weight: Any, added: Any = None, out: Any = None) -> Any:
        """x (tokens, in) @ weight.T + added, which is (tokens, out) or (out,). weight may be a turned one.

        It may be in bf16 where x is in fp32, and is widened then. `out` may be `added`.
        """
        ...

    def draw(self, x: Any, dropped: int) -> Any:
        """As `low_rank.draw`, decided by torch's generator."""
        ...

    def adapt(self, x: Any, outs: int, adapters: Sequence[Adapter], dropped: Dropped) -> tuple[Any, Any]:
        """As `low_rank.adapt`."""
        ...

    def adapt_backward(
        self, of_y: Any, x: Any, narrow: Any, adapters: Sequence[Adapter], dropped: Dropped, of_x: Any
    ) -> list[Any]:
        """As `low_rank.adapt_backward`."""
        ...

    def norm(self, x: Any, weight: Any, epsilon: float) -> Any:
        """x over the root of its mean square, times the weight."""
        ...

    def norm_backward(self, of_out: Any, x: Any, weight: Any, epsilon: float, added: Any) -> Any:
        """`added` plus the gradient of x. May write into `of_out`."""
        ...

    def rotate(self, heads: Any, cos: Any, sin: Any, turning: int) -> None:
        """Turn the first `turning` heads by the angles, in place: halves of dim are a number's two parts."""
        ...

    def rotate_back(self, of_heads: Any, cos: Any, sin: Any, turning: int, dtype: Any) -> Any:
        """Gradients of heads in fp32, which it may write into -> of what `rotate` was given, as `dtype`."""
        ...

    def gate(self, gate_up: Any) -> Any:
        """silu(gate) * up."""
        ...

    def gate_backward(self, of_out: Any, gate_up: Any) -> Any:
        """The gradient of gate_up. May write into `of_out`."""
        ...

    def mlp(self, x: Any, gate_up: Any, down: Any, added: Any) -> tuple[Any, Any]:
        """((silu(gate) * up) @ down.T + added, what `mlp_backward` wants); gate and up are x @ gate_up.T.

        x and added (tokens, width), gate_up (2 * inner, width), down (width, inner).
        """
        ...

    def mlp_backward(self, of_y: Any, kept: Any, gate_up: Any, down: Any) -> Any:
        """The gradient of x."""
        ...

    def cross_entropy(self, logits: Any, labels: Any, wants_gradient: bool) -> tuple[Any, Any]:
        """(losses in fp32, whether each label (tokens,) is the first choice); 0 and False for labels below 0.

        Changes logits (tokens, vocabulary): into the gradients of the sum of losses where they are wanted.
        """
        ...

    def attention(
        self, qkv: Any, kv_heads: int, segments: Sequence[Segment], scaling: float
    ) -> tuple[Any, Any]:
        """As `tree_attention.attention`."""
        ...

    def attention_backward(
        self,
        upstream: Any,
        qkv: Any,
        kv_heads: int,
        attended: Any,
        sums: Any,
        segments: Sequence[Segment],
        scaling: float,
    ) -> Any:
        """As `tree_attention.attention_backward`."""
        ...


CHOICE_BLOCK = 128
"""torch finds a largest value many times faster than its place: first its block of this size is found."""


def kernels_for(device: Any, dtype: Any, *widths: int, **sizes: int) -> StepKernels:
    """The fastest for tensors of these sizes (see `NativeKernels.fit`)."""
    if device.type == "cpu" and NativeKernels.fit(dtype, *widths, **sizes):
        try:
            return _native()
        except CompilerError:
            pass
    return TorchKernels()


@cache
def _native() -> NativeKernels:
    """Raises: CompilerError."""
    return NativeKernels(load_library(), multiplies=is_mkl_slow_here())


def multiplies_halves(*widths: int, **sizes: int) -> bool:
    """Whether products of these sizes read weights in bf16 as they are while all else is in fp32."""
    import torch

    return isinstance(kernels_for(torch.device("cpu"), torch.float32, *widths, **sizes), NativeKernels)


def why_slower() -> str:
    """For people; empty where kernels in C are there, cannot be on this chip, or are not wanted."""
    if is_switched_off() or not is_for_this_chip():
        return ""
    try:
        load_library()
    except CompilerError as error:
        return f"Steps on this CPU take up to twice as long as with kernels in C: {error}."
    return ""


class TorchKernels(StepKernels):
    product = staticmethod(products.product)
    mlp, mlp_backward = products.mlp, products.mlp_backward
    draw = staticmethod(low_rank.draw)
    adapt = staticmethod(low_rank.adapt)
    adapt_backward = staticmethod(low_rank.adapt_backward)

    def norm(self, x: Any, weight: Any, epsilon: float) -> Any:
        # Rounded once: twice, as transformers does, takes a third more off the gradients in half precision.
        return (x.float() * _norm_scale(x, epsilon)).mul_(weight).to(x.dtype)

    def norm_backward(self, of_out: Any, x: Any, weight: Any, epsilon: float, added: Any) -> Any:
        scale, gradient, exact = _norm_scale(x, epsilon), of_out.mul_(weight).float(), x.float()
        along = (gradient * exact).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        return added.float().addcmul(gradient, scale).addcmul_(exact, along).to(added.dtype)

    def rotate(self, heads: Any, cos: Any, sin: Any, turning: int) -> None:
        exact = heads[:, :turning].float()
        _turn(exact, cos, sin, 1)
        heads[:, :turning] = exact

    def rotate_back(self, of_heads: Any, cos: Any, sin: Any, turning: int, dtype: Any) -> Any:
        _turn(of_heads[:, :turning], cos, sin, -1)
        return of_heads.to(dtype)

    def gate(self, gate_up: Any) -> Any:
        from torch.nn.functional import silu

        gate, up = gate_up.chunk(2, dim=1)
        return silu(gate).mul_(up)

    def gate_backward(self, of_out: Any, gate_up: Any) -> Any:
        import torch
        from torch.nn.functional import silu

        gate, up = gate_up.chunk(2, dim=1)
        acted = silu(gate)
        of_gate_up = torch.empty_like(gate_up)
        of_gate, of_up = of_gate_up.chunk(2, dim=1)
        torch.mul(of_out, acted, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_out.mul_(up), gate, grad_input=of_gate)
        return of_gate_up

    def cross_entropy(self, logits: Any, labels: Any, wants_gradient: bool) -> tuple[Any, Any]:
        import torch

        has_label, wanted = labels >= 0, labels.clamp(min=0)[:, None]
        hits = first_choices(logits, labels)
        precise = logits.float()
        # In place, and few passes over what is far larger than any cache.
        torch.log_softmax(precise, 1, out=precise)
        losses = -precise.gather(1, wanted)[:, 0] * has_label
        if wants_gradient:
            # softmax - one_hot, and nothing where there is no label.
            precise.exp_().scatter_add_(1, wanted, precise.new_full(wanted.shape, -1.0))
            torch.mul(precise, has_label[:, None], out=logits)
        return losses, hits

    attention = staticmethod(tree_attention.attention)
    attention_backward = staticmethod(tree_attention.attention_backward)


def first_choices(logits: Any, labels: Any) -> Any:
    """(n,) True where a label is the first of the largest logits (n, vocabulary)."""
    from torch import arange

    if logits.shape[1] % CHOICE_BLOCK:
        return logits.argmax(1) == labels
    blocks = logits.unflatten(1, (-1, CHOICE_BLOCK))
    block = blocks.amax(2).argmax(1)
    place = blocks[arange(len(block), device=block.device), block].argmax(1)
    return block * CHOICE_BLOCK + place == labels


def _norm_scale(x: Any, epsilon: float) -> Any:
    """(tokens, 1): one over the root of the mean square."""
    import torch

    norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _turn(heads: Any, cos: Any, sin: Any, sign: int) -> None:
    """In place."""
    cos, sin, half = cos[:, None], sin[:, None], heads.shape[-1] // 2
    left, right = heads[..., :half], heads[..., half:]
    turned = (left * sin).mul_(sign)
    left.mul_(cos).addcmul_(right, sin, value=-sign)
    right.mul_(cos).add_(turned)
