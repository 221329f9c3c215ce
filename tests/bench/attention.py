"""Attention of one layer, the kernels in C for each level of chip that this one has, side by side.

    python tests/bench/attention.py [--heads 9] [--kv-heads 3] [--dim 64] [--threads 2] [--rounds 30]

Rows as train_speed.py has them, end to end, each attending to itself. Milliseconds of the middle round,
forward and backward; all take turns. In bf16 products are in fp32 where there are no units for it, by the
vector with AVX-512's, and by the tile with AMX.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import accumulate, pairwise
from typing import Any

import torch

from sage.tools.finetune.native.build import LEVELS
from sage.tools.finetune.native.kernels import NativeKernels
from sage.tools.finetune.native.library import level_of_this_chip, open_library
from sage.tools.finetune.prefix_tree import Segment

ROWS = (88, 120, 150, 185, 200, 240, 300, 413)


def seconds_of(kernels: NativeKernels, qkv: Any, of_out: Any, kv_heads: int) -> tuple[float, float]:
    segments = [Segment(start, stop, stop) for start, stop in pairwise(accumulate(ROWS, initial=0))]
    scaling = qkv.shape[-1] ** -0.5
    began = time.perf_counter()
    out, sums = kernels.attention(qkv, kv_heads, segments, scaling)
    between = time.perf_counter()
    kernels.attention_backward(of_out, qkv, kv_heads, out, sums, segments, scaling)
    return between - began, time.perf_counter() - between


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    levels = list(LEVELS)[list(LEVELS).index(level_of_this_chip()) :]
    sides = {level: NativeKernels(open_library(level)) for level in levels}
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(sum(ROWS), arguments.heads + 2 * arguments.kv_heads, arguments.dim).to(dtype)
        of_out = torch.randn(sum(ROWS), arguments.heads, arguments.dim).to(dtype)
        rounds = [
            {level: seconds_of(kernels, qkv, of_out, arguments.kv_heads) for level, kernels in sides.items()}
            for _ in range(arguments.rounds + 1)
        ][1:]
        for level in levels:
            forward, backward = (
                1e3 * statistics.median(each[level][way] for each in rounds) for way in range(2)
            )
            name = str(dtype).removeprefix("torch.")
            print(f"{name:9} {level:20} forward {forward:6.2f} ms   backward {backward:6.2f} ms")


if __name__ == "__main__":
    main()
