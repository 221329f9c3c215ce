"""What is said of a model when its job has ended."""

from __future__ import annotations

import pytest

from sage_cli.jobs.outcome import has_become_worse
from sage_contracts.jobs import JobMetrics


@pytest.mark.parametrize(
    ("base", "tuned", "is_worse"),
    [(2.0, 1.7, False), (2.9, 10.5, True), (2.0, 2.0, False), (None, 1.0, False), (2.0, None, False)],
)
def test_a_model_that_learned_by_heart_is_told_from_one_that_learned(
    base: float | None, tuned: float | None, is_worse: bool
) -> None:
    assert has_become_worse(JobMetrics(base_eval_loss=base, eval_loss=tuned)) is is_worse
