"""Which starts of an adapter leave its base as it is."""

from __future__ import annotations

import pytest

from sage_contracts.adapter_starts import start_in_the_base


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_these_belong_on_the_plain_base(start: object) -> None:
    assert start_in_the_base({"init_lora_weights": start}) is None
    assert start_in_the_base({}) is None


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "LoftQ"])
def test_these_took_a_part_of_the_base_away(start: str) -> None:
    assert start_in_the_base({"init_lora_weights": start}) == start
