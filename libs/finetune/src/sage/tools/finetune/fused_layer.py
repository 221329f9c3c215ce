"""One decoder layer of the llama family as a single step of autograd.

Only what the backward pass cannot have again cheaply is kept: the layer's input, queries, keys and values,
what attention gave, the residual between the halves, and gate and up. Norms, activations and adapter inputs
are computed again. Rows lie end to end, shape (tokens, width), each attending to itself alone; what they
begin with in common is there once (see prefix_tree.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from typing import Any

from sage.tools.finetune.gated_mlp import GatedMLP
from sage.tools.finetune.prefix_tree import Segment
from sage.tools.finetune.projections import NotFusableError, Projections
from sage.tools.finetune.step_kernels import kernels_for

FAMILY = {
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
}
"""What config.json calls models, and their layers, which compute exactly this.

Whoever fuses proves it once more on rows of the run.
"""


def fuse_layers(decoder: Any) -> None:
    """Let every layer take the fused way when it is called with `segments`, and its own way otherwise.

    The last one that runs gives only those tokens that `kept` names, where it is called with that.
    `unfuse_layers` takes it back.

    Raises: NotFusableError when some layer is of another kind; nothing has changed then.
    """
    from types import MethodType

    require_fusable(decoder)
    fused = [FusedLayer(layer) for layer in decoder.layers]
    for number, (layer, quick) in enumerate(zip(decoder.layers, fused, strict=True), 1):
        layer.forward = MethodType(_choosing(decoder, number, layer.forward, quick), layer)


def _choosing(decoder: Any, number: int, usual: Callable[..., Any], fused: FusedLayer) -> Callable[..., Any]:
    """The forward pass of layer `number`, from 1."""

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        quick = fused.as_switched() if "segments" in kwargs else None
        kept = kwargs.get("kept") if number == decoder.config.num_hidden_layers else None
        if quick is not None:
            rotation = kwargs["position_embeddings"]
            return quick(hidden_states[0], rotation, kwargs["segments"], self.training, kept)[None]
        hidden_states = usual(hidden_states, *args, **kwargs)
        return hidden_states if kept is None else hidden_states[:, kept]

    return forward


def require_fusable(decoder: Any) -> None:
    """Raises: NotFusableError when its layers do not all look like the same known code."""
    if not hasattr(decoder, "layers"):
        raise NotFusableError(f"{type(decoder).__name__} has no layers of the llama family")
    if decoder.device.type != "cpu":
        raise NotFusableError("GPUs have fused kernels of their own")
    for layer in decoder.layers:
        _require_plain(layer)
        if _kinds(layer) != _kinds(decoder.layers[0]):
            raise NotFusableError("its layers are not all of one kind")


def unfuse_layers(decoder: Any) -> None:
    for layer in decoder.layers:
        layer.__dict__.pop("forward", None)


class FusedLayer:
    """Raises: NotFusableError for a layer that does something else."""

    def __init__(self, layer: Any) -> None:
        _require_plain(layer)
        attention, mlp = layer.self_attn, layer.mlp
        if type(mlp.act_fn).__name__ not in {"SiLU", "SiLUActivation"}:
            raise NotFusableError(f"{type(mlp.act_fn).__name__} is not SiLU")
        if any(norm.weight.requires_grad for norm in _norms(layer)):
            raise NotFusableError("norms that are trained")
        norms = [(norm.weight, norm.variance_epsilon) for norm in _norms(layer)]
        self.first_norm, self.second_norm, *self.head_norms = norms
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        parts = [*qkv, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        self._adapted = [part for part in parts if hasattr(part, "disable_adapters")]
        self.qkv = Projections(qkv)
        self.out = Projections([attention.o_proj])
        self.mlp = GatedMLP(mlp)
        self.head_dim = attention.head_dim
        self.kv_heads = _rows_of(attention.k_proj) // self.head_dim
        self.heads = _rows_of(attention.q_proj) // self.head_dim
        self.scaling = attention.scaling
        # Norms read and write what products do.
        weight = self.mlp.down.weight
        self.kernels = kernels_for(weight.device, weight.dtype, *weight.shape, head_dim=self.head_dim)
        self._bare = self._without_adapters()

    def _without_adapters(self) -> FusedLayer:
        bare = copy(self)
        for name in ("qkv", "out", "mlp"):
            setattr(bare, name, getattr(self, name).without_adapters())
        return bare

    def as_switched(self) -> FusedLayer | None:
        """Itself, or bare while adapters are off (peft's `disable_adapter`); None while only some are."""
        off = {layer.disable_adapters for layer in self._adapted}
        if len(off) > 1:
            return None
        return self._bare if True in off else self

    def __call__(
        self,
        x: Any,
        rotation: tuple[Any, Any],
        segments: Sequence[Segment],
        is_training: bool,
        kept: Any = None,
    ) -> Any:
        """x (tokens, width) -> (tokens, width), or of those tokens that `kept` (n,) names -> (n, width).

        One that is named twice gets the gradients of both.
        """
        parameters = [*self.qkv.parameters, *self.out.parameters, *self.mlp.parameters]
        half = self.head_dim // 2
        cos, sin = (part[0, :, :half].float().contiguous() for part in rotation)
        return _function()(x, self, cos, sin, segments, is_training, kept, *parameters)


def _require_plain(layer: Any) -> None:
    """Raises: NotFusableError."""
    if type(layer).__name__ in FAMILY.values():
        attention = layer.self_attn
        # Where the layer does not say, transformers takes the model's window for every layer.
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        drops = getattr(attention, "attention_dropout", 0.0)
        if window is None and not drops and not any(map(_is_altered, layer.modules())):
            return
    raise NotFusableError(f"{type(layer).__name__} is not a plain layer of the llama family")


def _is_altered(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _kinds(layer: Any) -> list[type]:
    return [type(part) for part in (layer, layer.self_attn, layer.mlp, layer.mlp.act_fn, *_norms(layer))]


def _norms(layer: Any) -> list[Any]:
    """Of both halves; then of queries and keys, head by head, where a family has these."""
    of_heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [layer.input_layernorm, layer.post_attention_layernorm, *filter(None, of_heads)]


def read_together(layer: Any) -> list[list[Any]]:
    """Weights of a layer that `require_fusable` knows, in groups that are multiplied with as one."""
    attention, mlp = layer.self_attn, layer.mlp
    groups = ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj))
    return [[getattr(part, "base_layer", part).weight for part in group] for group in groups]


def _rows_of(layer: Any) -> int:
    return int(getattr(layer, "base_layer", layer).weight.shape[0])


@cache
def _function() -> Callable[..., Any]:
    """The autograd function; made on first use, so that importing this module costs no torch."""
    import torch

    def split(layer: FusedLayer, heads: Any) -> Any:
        """Queries, keys and values: (…, heads, dim) each."""
        return heads.split([layer.heads, layer.kv_heads, layer.kv_heads], dim=-2)

    def normed_heads(layer: FusedLayer, heads: Any) -> list[tuple[Any, Any, float]]:
        """(a copy of the queries or keys, one head a row, the weight of their norm, epsilon)."""
        parts = split(layer, heads)[: len(layer.head_norms)]
        return [
            (part.reshape(-1, layer.head_dim).contiguous(), *norm)
            for part, norm in zip(parts, layer.head_norms, strict=True)
        ]

    def placed(layer: FusedLayer, heads: Any, cos: Any, sin: Any) -> Any:
        """Heads as attention sees them, from what projections gave: in place where nothing is normed."""
        if layer.head_norms:
            given, heads = heads, heads.clone()
            for part, norm in zip(split(layer, heads), normed_heads(layer, given), strict=False):
                part.copy_(layer.kernels.norm(*norm).view_as(part))
        layer.kernels.rotate(heads, cos, sin, layer.heads + layer.kv_heads)
        return heads

    def of(rows: Any, kept: Any) -> Any:
        return rows if kept is None else rows.index_select(0, kept)

    def back(rows: Any, kept: Any, tokens: int) -> Any:
        """Gradients of `of(rows, kept)` -> of the rows."""
        return rows if kept is None else rows.new_zeros(tokens, rows.shape[1]).index_add_(0, kept, rows)

    class Layer(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
        @staticmethod
        def forward(
            ctx: Any,
            x: Any,
            layer: FusedLayer,
            cos: Any,
            sin: Any,
            segments: Sequence[Segment],
            training: bool,
            kept: Any,
            *_: Any,
        ) -> Any:
            kernels, tokens = layer.kernels, len(x)
            qkv, *from_qkv = layer.qkv.forward(kernels, kernels.norm(x, *layer.first_norm), training)
            given = qkv.view(tokens, -1, layer.head_dim)
            heads = placed(layer, given, cos, sin)
            # Attention sees heads as they are kept, rounded: the backward pass must meet the same softmax.
            attended, sums = kernels.attention(heads, layer.kv_heads, segments, layer.scaling)
            attended = attended.view(tokens, -1)
            middle, *from_out = layer.out.forward(kernels, of(attended, kept), training, of(x, kept))
            mlp_input = kernels.norm(middle, *layer.second_norm)
            result, from_mlp = layer.mlp.forward(kernels, mlp_input, training, middle)
            if any(ctx.needs_input_grad):
                own = (x, given, attended, middle, cos, sin, sums, kept)
                ctx.save_for_backward(*own, *from_qkv, *from_out, *from_mlp)
                ctx.layer, ctx.segments = layer, segments
            return result

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            layer, needs_x, gradient = ctx.layer, ctx.needs_input_grad[0], upstream[0].contiguous()
            x, given, attended, middle, cos, sin, sums, kept, *from_parts = ctx.saved_tensors
            from_qkv, from_out, from_mlp = from_parts[:2], from_parts[2:4], from_parts[4:]
            kernels = layer.kernels

            mlp_input = kernels.norm(middle, *layer.second_norm) if layer.mlp.gate_up.adapters else None
            of_input, of_mlp = layer.mlp.backward(kernels, gradient, mlp_input, from_mlp)
            of_middle = kernels.norm_backward(of_input, middle, *layer.second_norm, gradient)

            of_attended, of_out = layer.out.backward(kernels, of_middle, of(attended, kept), *from_out, True)
            of_attended, of_middle = (back(part, kept, len(x)) for part in (of_attended, of_middle))
            heads = placed(layer, given, cos, sin) if layer.head_norms else given
            found, wanted = (part.view(len(x), layer.heads, -1) for part in (attended, of_attended))
            of_heads = kernels.attention_backward(
                wanted, heads, layer.kv_heads, found, sums, ctx.segments, layer.scaling
            )
            of_qkv = kernels.rotate_back(of_heads, cos, sin, layer.heads + layer.kv_heads, x.dtype)
            for part, norm in zip(split(layer, of_qkv), normed_heads(layer, given), strict=False):
                of_part = part.reshape(-1, layer.head_dim).contiguous()
                part.copy_(kernels.norm_backward(of_part, *norm, torch.zeros_like(of_part)).view_as(part))
            qkv_input = kernels.norm(x, *layer.first_norm) if layer.qkv.adapters else None
            of_input, of_adapters = layer.qkv.backward(
                kernels, of_qkv.view(len(x), -1), qkv_input, *from_qkv, needs_x
            )
            of_x = kernels.norm_backward(of_input, x, *layer.first_norm, of_middle) if needs_x else None
            return of_x, *[None] * 6, *of_adapters, *of_out, *of_mlp

    return Layer.apply  # type: ignore[no-any-return]
