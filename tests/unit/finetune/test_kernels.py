"""Which kernels follow from chip, precision and installed packages."""

from __future__ import annotations

import pytest

from sage.tools.finetune.kernels import Kernels, choose_kernels

BOTH = ("flash_attn", "liger_kernel")
AMPERE, HOPPER, TURING = (8, 6), (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("device", "precision", "capability", "installed", "chosen"),
    [
        ("cpu", "fp32", None, (), Kernels(has_fused_layers=True)),
        ("cpu", "bf16", None, BOTH, Kernels(has_fused_layers=True)),
        ("cuda", "bf16", AMPERE, (), Kernels("torch_varlen")),
        ("cuda:1", "fp16", HOPPER, (), Kernels("torch_varlen")),
        ("cuda", "bf16", HOPPER, BOTH, Kernels("flash_attn", has_liger=True)),
        ("cuda", "bf16", HOPPER, ("liger_kernel",), Kernels("torch_varlen", has_liger=True)),
        # Flash attention knows half precision only, and no chip before Ampere.
        ("cuda", "fp32", HOPPER, BOTH, Kernels("rows", has_liger=True)),
        ("cuda", "fp16", TURING, ("flash_attn",), Kernels("rows")),
    ],
)
def test_kernels_follow_from_chip_precision_and_packages(
    device: str,
    precision: str,
    capability: tuple[int, int] | None,
    installed: tuple[str, ...],
    chosen: Kernels,
) -> None:
    assert choose_kernels(device, precision, capability, installed) == chosen
