"""Products with frozen matrices in fp32: the kernels in C beside torch's, at a model's sizes.

    python tests/bench/products.py [--base DIR] [--tokens 600] [--threads 2] [--rounds 15]
    OPENBLAS_NUM_THREADS=1 python tests/bench/products.py --threads 1 --numpy

DIR is a base model's folder (`$SAGE_HOME/base_models/smollm2-135m`), of which only the config is read. All
sides take turns, and every product meets another matrix, as in a model's layers. GFLOP/s of the middle round.
`bf16` is ours with weights that stay in bf16 and are widened as they are read. `--numpy` has OpenBLAS take
part, with one thread: several would spin between its turns, where others work. Training uses its own for
weights in bf16, and for others where `is_mkl_slow_here` says so: on chips that are not Intel's. Last, the two
products of a gated layer with weights in bf16 and what lies between them, one by one and at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from sage.tools.finetune.native.kernels import NativeKernels
from sage.tools.finetune.native.library import load_library
from sage.tools.finetune.products import is_mkl_slow_here, mlp, mlp_backward, product

LAYERS = 12  # matrices of a size: together larger than the caches


def sizes_of(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a layer's joined matrices, and of the output layer."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
    return {
        "qkv": (width + 2 * kv, width),
        "out": (width, width),
        "gate, up": (2 * inner, width),
        "down": (width, inner),
        "head": (config["vocab_size"], width),
    }


def rates(
    ours: NativeKernels, tokens: int, outputs: int, inputs: int, rounds: int, *, with_numpy: bool
) -> list[float]:
    """GFLOP/s forward of ours, with weights in bf16, of torch and, `with_numpy`, of numpy; then backward."""
    count = LAYERS if outputs * inputs < 1 << 24 else 1
    whole = [torch.randn(outputs, inputs) for _ in range(count)]
    weights, halves = cycle(whole), cycle([weight.bfloat16() for weight in whole])
    x, of_y = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    works: list[Callable[[], Any]] = [
        lambda: ours.product(x, next(weights)),
        lambda: ours.product(x, next(halves)),
        lambda: product(x, next(weights)),
        lambda: x.numpy() @ next(weights).numpy().T,
        lambda: ours.product(of_y, next(weights).t()),
        lambda: ours.product(of_y, next(halves).t()),
        lambda: product(of_y, next(weights).t()),
        lambda: of_y.numpy() @ next(weights).numpy(),
    ]
    if not with_numpy:
        del works[3::4]
    taken = [[seconds_of(work) for work in works] for _ in range(rounds + 1)][1:]
    return [2e-9 * tokens * outputs * inputs / statistics.median(side) for side in zip(*taken, strict=True)]


def gated(ours: NativeKernels, tokens: int, width: int, inner: int, rounds: int) -> list[float]:
    """Milliseconds of a gated layer one by one and at once, forward; then backward."""
    layers = [
        tuple(torch.randn(*size).mul(0.05).bfloat16() for size in ((2 * inner, width), (width, inner)))
        for _ in range(LAYERS)
    ]
    x, turns = torch.randn(tokens, width), cycle(layers)
    kept = [mlp(ours, x, *layers[0], x)[1], ours.mlp(x, *layers[0], x)[1]]
    works: list[Callable[[], Any]] = [
        lambda: mlp(ours, x, *next(turns), x),
        lambda: ours.mlp(x, *next(turns), x),
        lambda: mlp_backward(ours, x, kept[0], *next(turns)),
        lambda: ours.mlp_backward(x, kept[1], *next(turns)),
    ]
    taken = [[seconds_of(work) for work in works] for _ in range(rounds + 1)][1:]
    return [1e3 * statistics.median(side) for side in zip(*taken, strict=True)]


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=str(Path("~/.sage/base_models/smollm2-135m").expanduser()))
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--head-tokens", type=int, default=192, help="that meet the output layer at once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--numpy", action="store_true", help="beside numpy's OpenBLAS, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours = NativeKernels(load_library(), multiplies=True)
    sides = ["ours", "bf16", "torch", *(["numpy"] if arguments.numpy else [])]
    titles = "".join(
        f"{way:>11}" + "".join(f"{side:>7}" for side in sides) for way in ("forward", "backward")
    )
    print(f"{'':10}{titles}")
    config = json.loads((Path(arguments.base) / "config.json").read_text())
    for name, (outputs, inputs) in sizes_of(config).items():
        tokens = arguments.head_tokens if name == "head" else arguments.tokens
        found = rates(ours, tokens, outputs, inputs, arguments.rounds, with_numpy=arguments.numpy)
        ways = (found[: len(sides)], found[len(sides) :])
        print(f"{name:10}" + "".join(f"{'':11}" + "".join(f"{rate:7.0f}" for rate in way) for way in ways))
    sizes = config["hidden_size"], config["intermediate_size"]
    apart, once, apart_back, once_back = gated(ours, arguments.tokens, *sizes, 4 * arguments.rounds)
    print(f"a gated layer, one by one and at once: forward {apart:.1f} and {once:.1f} ms, ", end="")
    print(f"backward {apart_back:.1f} and {once_back:.1f} ms")
    print(f"for weights in fp32 training here uses {'its own' if is_mkl_slow_here() else 'those of torch'}")


if __name__ == "__main__":
    main()
