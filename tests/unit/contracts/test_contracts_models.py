"""Names of checkpoints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_contracts.models import checkpoint_name, split_checkpoint


@given(st.from_regex(r"[a-z][a-z0-9-]{0,9}@[1-9][0-9]{0,3}", fullmatch=True), st.integers(0, 10**9 - 1))
def test_a_checkpoint_s_name_says_whose_it_is_and_of_which_step(version: str, step: int) -> None:
    assert split_checkpoint(checkpoint_name(version, step)) == (version, step)


@pytest.mark.parametrize(
    "name",
    ["code@1", "base:smollm2-135m", "code@1:ckpt-step-", ":ckpt-step-2", "code@1:ckpt-step-1234567890"],
)
def test_other_names_are_no_checkpoint_s(name: str) -> None:
    assert split_checkpoint(name) is None
