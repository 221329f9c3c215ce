"""Products with frozen matrices in fp32: the kernels in C beside torch's, at a model's sizes.

    python tests/bench/products.py [--base DIR] [--tokens 450] [--threads 2] [--rounds 15]

DIR is a base model's folder (`$SAGE_HOME/base_models/smollm2-135m`), of which only the config is read. Both
sides take turns, and every product meets another matrix, as in a model's layers. GFLOP/s of the middle round.
Training uses its own where `is_mkl_slow_here` says so: on chips that are not Intel's.
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
from sage.tools.finetune.products import is_mkl_slow_here, product

LAYERS = 12  # matrices of a size: together larger than the caches


def sizes_of(base: Path) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a layer's joined matrices, and of the output layer."""
    config = json.loads((base / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
    return {
        "qkv": (width + 2 * kv, width),
        "out": (width, width),
        "gate, up": (2 * inner, width),
        "down": (width, inner),
        "head": (config["vocab_size"], width),
    }


def rates(ours: NativeKernels, tokens: int, outputs: int, inputs: int, rounds: int) -> list[float]:
    """GFLOP/s forward of ours and of torch, then backward."""
    count = LAYERS if outputs * inputs < 1 << 24 else 1
    weights = cycle([torch.randn(outputs, inputs) for _ in range(count)])
    x, of_y = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    works: list[Callable[[], Any]] = [
        lambda: ours.product(x, next(weights)),
        lambda: product(x, next(weights)),
        lambda: ours.product(of_y, next(weights).t()),
        lambda: product(of_y, next(weights).t()),
    ]
    taken = [[seconds_of(work) for work in works] for _ in range(rounds + 1)][1:]
    return [2e-9 * tokens * outputs * inputs / statistics.median(side) for side in zip(*taken, strict=True)]


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=str(Path("~/.sage/base_models/smollm2-135m").expanduser()))
    parser.add_argument("--tokens", type=int, default=450)
    parser.add_argument("--head-tokens", type=int, default=128, help="that meet the output layer at once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours = NativeKernels(load_library(), multiplies=True)
    print(f"{'':10}{'forward: ours':>14}{'torch':>7}{'':7}{'backward: ours':>17}{'torch':>7}")
    for name, (outputs, inputs) in sizes_of(Path(arguments.base)).items():
        tokens = arguments.head_tokens if name == "head" else arguments.tokens
        a, b, c, d = rates(ours, tokens, outputs, inputs, arguments.rounds)
        print(f"{name:10}{a:14.0f}{b:7.0f} x{a / b:5.2f}{c:17.0f}{d:7.0f} x{c / d:5.2f}")
    print(f"training here uses {'its own' if is_mkl_slow_here() else 'those of torch'}")


if __name__ == "__main__":
    main()
