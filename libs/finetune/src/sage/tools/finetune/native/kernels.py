"""Kernels in C, called with torch's tensors. What each computes: see `StepKernels`."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any

from sage.tools.finetune.low_rank import Adapter, Dropped
from sage.tools.finetune.prefix_tree import Segment
from sage.tools.finetune.products import mlp, mlp_backward, product

GRANULE = 16
"""Floats in the widest vector; widths, and halves of heads, are multiples."""
MAX_DIM = 256


class NativeKernels:
    """Tensors are contiguous, in fp32 or bf16.

    What only lives until the next call of its kind has its room for good (a thread's own): made anew for ever
    other numbers of tokens, it would leave holes between what a pass keeps, 50 MB of them in a run.
    """

    def __init__(self, library: Any, *, multiplies: bool = False) -> None:
        """`multiplies`: with weights in fp32 too."""
        self._library = library
        self._multiplies = multiplies
        self._attends_half = hasattr(library, "sage_attention_half")
        self._rooms = threading.local()

    @staticmethod
    def fit(dtype: Any, *widths: int, head_dim: int = 2 * GRANULE) -> bool:
        import torch

        is_known = dtype in (torch.float32, torch.bfloat16) and head_dim <= MAX_DIM
        return is_known and head_dim % (2 * GRANULE) == 0 and not any(width % GRANULE for width in widths)

    def product(self, x: Any, weight: Any, added: Any = None, out: Any = None) -> Any:
        if not self._multiplies_by(x, weight):
            return product(x, weight, added, out)
        (rows, width), outs = x.shape, len(weight)
        out = x.new_empty(rows, outs) if out is None else out
        turned = self._room("turned", x, self._library.sage_product_scratch(rows, width))
        place, apart = (None, 0) if added is None else (added.data_ptr(), outs if added.dim() == 2 else 0)
        matrix = (weight.data_ptr(), _is_half(weight), *weight.stride())
        sizes = (rows, width, outs, _threads())
        self._library.sage_product(*_places(x), *matrix, place, apart, *_places(out, turned), *sizes)
        return out

    def draw(self, x: Any, dropped: int) -> Any:
        import torch

        # In the generator's order, so that a run that is resumed draws what it would have drawn.
        seed = int(torch.empty((), dtype=torch.int64).random_())
        seen = x.new_empty(x.shape, dtype=torch.bool)
        self._library.sage_draw(seed, dropped, *_places(seen), seen.numel(), _threads())
        return seen

    def adapt(self, x: Any, outs: int, adapters: Sequence[Adapter], dropped: Dropped) -> tuple[Any, Any]:
        import torch

        group, (rows, width) = _Group(adapters, dropped), x.shape
        y = x.new_empty(rows, outs)
        # In fp32, a row for each rank.
        narrow = x.new_empty(adapters[-1].ranks.stop, -(-rows // GRANULE) * GRANULE, dtype=torch.float32)
        places = *_places(x), group.seen, *_places(y, narrow)
        room = self._room_for(group, narrow, width)
        self._library.sage_adapt(
            *group.call, *places, narrow.stride(0), *_places(room), rows, width, outs, *_manner(x)
        )
        return y, narrow

    def adapt_backward(
        self, of_y: Any, x: Any, narrow: Any, adapters: Sequence[Adapter], dropped: Dropped, of_x: Any
    ) -> list[Any]:
        group, (rows, width) = _Group(adapters, dropped), x.shape
        places = *_places(of_y, x), group.seen, *_places(narrow)
        room = self._room_for(group, narrow, width)
        of_input = None if of_x is None else of_x.data_ptr()
        sizes = rows, width, of_y.shape[1], *_manner(x)
        self._library.sage_adapt_backward(
            *group.call, *places, narrow.stride(0), of_input, *_places(room), *sizes
        )
        return group.gradients

    def _room_for(self, group: _Group, like: Any, width: int) -> Any:
        return self._room("adapted", like, self._library.sage_adapt_room(*group.call, width, _threads()))

    def norm(self, x: Any, weight: Any, epsilon: float) -> Any:
        out = self._room("norm", x, *x.shape)
        self._library.sage_norm(*_places(x, weight, out), *x.shape, epsilon, *_manner(x))
        return out

    def norm_backward(self, of_out: Any, x: Any, weight: Any, epsilon: float, added: Any) -> Any:
        places = _places(of_out, x, weight, added, of_out)
        self._library.sage_norm_backward(*places, *x.shape, epsilon, *_manner(x))
        return of_out

    def rotate(self, heads: Any, cos: Any, sin: Any, turning: int) -> None:
        self._rotate(heads, heads, cos, sin, 1, turning)

    def rotate_back(self, of_heads: Any, cos: Any, sin: Any, turning: int, dtype: Any) -> Any:
        found = of_heads if of_heads.dtype == dtype else of_heads.new_empty(of_heads.shape, dtype=dtype)
        self._rotate(of_heads, found, cos, sin, -1, turning)
        return found

    def _rotate(self, heads: Any, to: Any, cos: Any, sin: Any, sign: int, turning: int) -> None:
        tokens, count, dim = heads.shape
        sizes = (tokens, count, turning, dim)
        self._library.sage_rotate(*_places(heads, to, cos, sin), sign, *sizes, _is_half(heads), *_manner(to))

    def gate(self, gate_up: Any) -> Any:
        tokens, width = len(gate_up), gate_up.shape[1] // 2
        out = self._room("gate", gate_up, tokens, width)
        self._library.sage_gate(*_places(gate_up, out), tokens, width, *_manner(out))
        return out

    def gate_backward(self, of_out: Any, gate_up: Any) -> Any:
        of_gate_up = self._room("of_gate_up", gate_up, *gate_up.shape)
        places = _places(of_out, gate_up, of_gate_up)
        self._library.sage_gate_backward(*places, *of_out.shape, *_manner(gate_up))
        return of_gate_up

    def mlp(self, x: Any, gate_up: Any, down: Any, added: Any) -> tuple[Any, Any]:
        if not self._multiplies_by(x, gate_up, down):
            return mlp(self, x, gate_up, down, added)
        y, kept = x.new_empty(x.shape), x.new_empty(self._library.sage_mlp_kept(len(x), down.shape[1]))
        given, room, sizes = self._of_mlp(x, gate_up, down)
        self._library.sage_mlp(*given, *_places(added, y, kept, room), *sizes)
        return y, kept

    def mlp_backward(self, of_y: Any, kept: Any, gate_up: Any, down: Any) -> Any:
        if not self._multiplies_by(of_y, gate_up, down):
            return mlp_backward(self, of_y, kept, gate_up, down)
        of_x = of_y.new_empty(of_y.shape)
        given, room, sizes = self._of_mlp(of_y, gate_up, down)
        self._library.sage_mlp_backward(*given, *_places(kept, of_x, room), *sizes)
        return of_x

    def _of_mlp(self, x: Any, gate_up: Any, down: Any) -> tuple[tuple[int, ...], Any, tuple[int, ...]]:
        """What both ways are given first; their room; their sizes."""
        sizes = (*x.shape, down.shape[1])
        room = self._room("mlp", x, self._library.sage_mlp_room(*sizes))
        return (*_places(x, gate_up, down), _is_half(down)), room, (*sizes, _threads())

    def _multiplies_by(self, x: Any, *weights: Any) -> bool:
        """Whether in C: else torch's products are faster."""
        is_half, *others = {_is_half(weight) for weight in weights}
        return not (_is_half(x) or others) and bool(is_half or self._multiplies)

    def cross_entropy(self, logits: Any, labels: Any, wants_gradient: bool) -> tuple[Any, Any]:
        import torch

        losses = logits.new_empty(len(logits), dtype=torch.float32)
        hits = logits.new_empty(len(logits), dtype=torch.bool)
        places = _places(logits, labels, losses, hits)
        self._library.sage_cross_entropy(*places, *logits.shape, wants_gradient, *_manner(logits))
        return losses, hits

    def attention(
        self, qkv: Any, kv_heads: int, segments: Sequence[Segment], scaling: float
    ) -> tuple[Any, Any]:
        import torch

        seen, suffix = self._as_attended(qkv)
        tokens, heads, dim = seen.shape
        found = seen.new_empty(tokens, heads - 2 * kv_heads, dim)
        sums = found.new_empty(found.shape[:2], dtype=torch.float32)
        attend = getattr(self._library, f"sage_attention{suffix}")
        attend(*_layer(seen, kv_heads, segments, scaling), *_places(found, sums), _threads())
        return found.to(qkv.dtype), sums

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
        (upstream, suffix), (qkv, _), (attended, _) = map(self._as_attended, (upstream, qkv, attended))
        tokens, heads, dim = attended.shape
        scratch, of_qkv = sums.new_empty(tokens * heads * (2 * dim + 1)), sums.new_empty(qkv.shape)
        seen = _places(upstream, attended, sums)
        places = _places(scratch, *of_qkv.split([heads, kv_heads, kv_heads], 1))
        attend_backward = getattr(self._library, f"sage_attention_backward{suffix}")
        attend_backward(
            *_layer(qkv, kv_heads, segments, scaling), *seen, tokens, *places, of_qkv.stride(0), _threads()
        )
        return of_qkv

    def _as_attended(self, tensor: Any) -> tuple[Any, str]:
        """(the tensor, in fp32 where this chip multiplies no halves; how functions for its numbers end)."""
        is_half = _is_half(tensor) and self._attends_half
        return (tensor, "_half") if is_half else (tensor.float(), "")

    def _room(self, kind: str, like: Any, *shape: int) -> Any:
        size, rooms = prod(shape), vars(self._rooms)
        room = rooms.get(kind)
        if room is None or room.dtype != like.dtype or len(room) < size:
            rooms.pop(kind, None)  # the old one goes before the new one comes
            del room
            room = rooms[kind] = like.new_empty(size)
        return room[:size].view(shape)


class _Adapter(ctypes.Structure):
    """See adapters.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "of_a", "of_b")),
        *((name, ctypes.c_long) for name in ("rank", "first", "outs")),
        ("scale", ctypes.c_float),
    )


class _Group:
    """Adapters as C is told of them, with room for their gradients."""

    def __init__(self, adapters: Sequence[Adapter], dropped: Dropped) -> None:
        import torch

        self._trained = [w.detach().float().contiguous() for each in adapters for w in (each.a, each.b)]
        self._found = [torch.empty_like(weight) for weight in self._trained]
        self._dtype = adapters[0].a.dtype
        told = (_Adapter * len(adapters))()
        for index, adapter in enumerate(adapters):
            weights = slice(2 * index, 2 * index + 2)
            first, stop = adapter.outputs.start, adapter.outputs.stop
            told[index] = _Adapter(
                *_places(*self._trained[weights], *self._found[weights]),
                len(adapter.a), first, stop - first, adapter.scaling * dropped.scale,
            )  # fmt: skip
        self.call = told, len(told)
        self.seen = None if dropped.seen is None else dropped.seen.data_ptr()

    @property
    def gradients(self) -> list[Any]:
        return [gradient.to(self._dtype) for gradient in self._found]


def _places(*tensors: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _layer(qkv: Any, kv_heads: int, segments: Sequence[Segment], scaling: float) -> tuple[Any, ...]:
    _, heads, dim = qkv.shape
    sizes = [heads - 2 * kv_heads, kv_heads, kv_heads]
    tree = (ctypes.c_int * (3 * len(segments)))(*chain.from_iterable(segments))
    places = _places(*qkv.split(sizes, 1))
    return (*places, qkv.stride(0), *sizes[:2], dim, scaling, tree, len(segments))


def _manner(x: Any) -> tuple[int, int]:
    """(is it in half precision, threads)."""
    return _is_half(x), _threads()


def _is_half(x: Any) -> int:
    return int(x.dtype.itemsize == 2)


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())
