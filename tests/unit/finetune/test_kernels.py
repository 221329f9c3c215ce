"""Which kernels follow from chip, precision and installed packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage.tools.finetune.kernels import Kernels, apply_liger, broken_packages, choose_kernels

BOTH = ("flash_attn", "liger_kernel")
AMPERE, HOPPER, TURING = (8, 6), (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("device", "precision", "capability", "installed", "chosen"),
    [
        ("cpu", "fp32", None, (), Kernels()),
        ("cpu", "bf16", None, BOTH, Kernels()),
        ("cuda", "bf16", AMPERE, (), Kernels(("torch_varlen",))),
        ("cuda:1", "fp16", HOPPER, (), Kernels(("torch_varlen",))),
        ("cuda", "bf16", HOPPER, BOTH, Kernels(("flash_attn", "torch_varlen"), has_liger=True)),
        ("cuda", "bf16", HOPPER, ("liger_kernel",), Kernels(("torch_varlen",), has_liger=True)),
        # Flash attention knows half precision only, and no chip before Ampere.
        ("cuda", "fp32", HOPPER, BOTH, Kernels(has_liger=True)),
        ("cuda", "fp16", TURING, ("flash_attn",), Kernels()),
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


def package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


def test_a_package_that_cannot_be_imported_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "broken_kernel", 'raise ImportError("undefined symbol")')
    package(tmp_path, "good_kernel", "")
    monkeypatch.syspath_prepend(tmp_path)
    assert broken_packages(["broken_kernel", "good_kernel"]) == {"broken_kernel": "undefined symbol"}


def test_a_broken_liger_is_said_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "liger_kernel", 'raise ImportError("undefined symbol")')
    monkeypatch.syspath_prepend(tmp_path)
    said: list[str] = []
    apply_liger(object(), said.append)
    assert said == ["Liger kernels are not used: undefined symbol"]
