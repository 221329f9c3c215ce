"""What `auto` chooses for which device and model, and that it says why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_contracts.auto import GIB, WEIGHTS_SHARE, choose_preset, weight_bytes
from sage_contracts.config import PresetName

BILLION = 10**9


@pytest.mark.parametrize(
    ("device", "gib", "billions", "preset", "reason"),
    [
        ("cpu", 512, 0.135, "cpu", "no NVIDIA GPU"),
        ("cpu", 8, 1.7, "cpu", "take 3.2 GiB of it in bf16 and 6.3 GiB in fp32"),
        ("cpu", 8, 7, "cpu", "take a smaller model"),
        ("cuda:0", 6, None, "minimal", "cuda:0 has 6.0 GiB"),
        ("cuda:0", 6, 1.5, "minimal", "0.8 GiB in 4-bit"),
        ("cuda:0", 12, None, "rtx_3060", "not known"),
        ("cuda:0", 12, 1.5, "rtx_3060", "1.5 GiB in 8-bit"),
        ("cuda:0", 12, 7, "rtx_3060", "7.2 GiB in 8-bit"),
        ("cuda:0", 12, 8, "minimal", "in 8-bit would leave too little room"),
        ("cuda:0", 12, 14, "minimal", "take a smaller model"),
        ("cuda:1", 23.99, 1.5, "rtx_4090", "cuda:1 has 24.0 GiB"),
        ("cuda:0", 24, 7, "rtx_4090", "13.0 GiB in 16-bit"),
        ("cuda:0", 24, 13, "rtx_3060", "24.2 GiB in 16-bit would leave too little room"),
        ("cuda:0", 80, 7, "a100", "80.0 GiB"),
        ("cuda:0", 80, 32, "rtx_3060", "32.8 GiB in 8-bit"),
        ("cuda:0", 80, 72, "minimal", "40.2 GiB in 4-bit"),
        ("cuda:0", 79.1, None, "a100", "79.1 GiB"),
    ],
)
def test_choices(device: str, gib: float, billions: float | None, preset: str, reason: str) -> None:
    parameters = None if billions is None else round(billions * BILLION)
    choice = choose_preset(device, round(gib * GIB), parameters)
    assert choice.preset == preset
    assert reason in choice.why


@given(st.sampled_from(["cpu", "cuda:0"]), st.integers(0, 200 * GIB), st.integers(1, 200 * BILLION))
def test_a_chosen_preset_leaves_room_or_says_that_it_does_not(
    device: str, memory: int, parameters: int
) -> None:
    choice = choose_preset(device, memory, parameters)
    fits = weight_bytes(choice.preset, parameters) <= memory * WEIGHTS_SHARE
    assert fits == ("take a smaller model" not in choice.why)
    assert fits or choice.preset in (PresetName.MINIMAL, PresetName.CPU)
