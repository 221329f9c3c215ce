"""How far merged weights may stray from their adapter."""

from __future__ import annotations

import pytest

from sage.tools.finetune.merging.parity import ParityReport, require_parity
from sage_contracts.errors import TrainingFailedError


def report(dtype: str, mean_kl: float, same: int = 2) -> ParityReport:
    return ParityReport(
        dtype=dtype, probes=3, same=same, same_tokens=60, tokens=72, top1=0.9, max_logit_diff=0.1,
        mean_kl=mean_kl, base_kl=0.0, answers=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "allowed"), [("float16", 2e-4), ("bfloat16", 2e-3), ("q8_0", 0.02), ("q4_k_m", 0.3)]
)
def test_each_rounding_has_its_limit(dtype: str, allowed: float) -> None:
    require_parity(report(dtype, allowed * 0.99), "It")
    with pytest.raises(TrainingFailedError, match=f"rounding to {dtype}"):
        require_parity(report(dtype, allowed * 1.01), "It")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_rounded_answers_alike(dtype: str) -> None:
    require_parity(report(dtype, 0.0, same=3), "It")
    with pytest.raises(TrainingFailedError, match="1 of 3 probes"):
        require_parity(report(dtype, 0.0), "It")


def test_numbers_without_a_limit_are_never_let_through() -> None:
    with pytest.raises(KeyError):
        require_parity(report("q2_k", 0.25), "It")
