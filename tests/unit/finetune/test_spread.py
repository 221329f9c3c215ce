"""Which runs are spread over which devices, and that it is said why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.distributed.choosing import Machine, Spread, choose_spread, held_bytes
from sage.tools.finetune.distributed.shards import require_shardable
from sage_contracts.auto import GIB, WEIGHTS_SHARE
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidRequestError

BILLION = 10**9


def spread(fields: dict[str, object], devices: int, gib: float = 24, billions: float | None = 1.5) -> Spread:
    config = TrainingConfig.model_validate(fields)
    bf16_or_asked = "bf16" if config.precision == "auto" else config.precision
    parameters = None if billions is None else round(billions * BILLION)
    return choose_spread(config, Machine(devices, round(gib * GIB), bf16_or_asked), parameters)


@pytest.mark.parametrize(
    ("fields", "devices", "gib", "billions", "kind", "ranks", "reason"),
    [
        ({}, 0, 0, 1.5, "off", 1, "a CPU is one device"),
        ({"num_devices": 2}, 0, 0, 1.5, "off", 1, "a CPU is one device"),
        ({"distributed": "ddp"}, 0, 0, None, "off", 1, "a CPU is one device"),
        ({"distributed": "ddp", "num_devices": 2}, 0, 0, None, "ddp", 2, "on the CPU"),
        ({"distributed": "fsdp", "num_devices": 2}, 0, 0, None, "fsdp", 2, "on the CPU"),
        ({}, 1, 24, 70, "off", 1, "one device is visible"),
        ({"num_devices": 1}, 4, 24, 70, "off", 1, "num_devices=1"),
        ({"distributed": "off", "num_devices": 2}, 2, 24, 1.5, "off", 1, "distributed=off"),
        ({"method": "dpo"}, 2, 24, 1.5, "off", 1, "dpo uses one device"),
        ({"method": "kto", "distributed": "ddp"}, 2, 24, 1.5, "off", 1, "kto uses one device"),
        ({"distributed": "fsdp"}, 2, 24, 1.5, "fsdp", 2, "in 2 shards the weights take 1.4 GiB each"),
        ({"distributed": "fsdp"}, 2, 24, None, "fsdp", 2, "distributed=fsdp"),
        ({"distributed": "ddp"}, 2, 24, 70, "ddp", 2, "distributed=ddp"),
        ({}, 2, 24, 1.5, "ddp", 2, "(2.8 GiB) fit into 14.4 GiB of a device's 24.0 GiB"),
        ({"num_devices": 3}, 4, 24, 1.5, "ddp", 3, "fit into"),
        ({}, 2, 24, None, "ddp", 2, "not known before it is fetched"),
        ({}, 2, 24, 7, "ddp", 2, "(13.0 GiB) fit into"),
        ({"precision": "fp32"}, 2, 24, 7, "fsdp", 2, "in 2 shards they take 13.0 GiB each"),
        ({}, 2, 24, 13, "fsdp", 2, "in 2 shards they take 12.1 GiB each"),
        ({}, 4, 24, 70, "fsdp", 4, "and 4 shards too: take a smaller model"),
        ({"load_in_8bit": True}, 2, 24, 13, "ddp", 2, "(13.3 GiB) fit into"),
        ({"load_in_4bit": True}, 2, 24, 70, "ddp", 2, "cannot be cut up: distributed=fsdp cuts up plain"),
        ({"precision": "fp16"}, 2, 24, 13, "ddp", 2, "use precision=bf16 or fp32"),
        ({"optim": "paged_adamw_8bit"}, 2, 24, 13, "ddp", 2, "needs optim=adamw_torch"),
        ({"tuning": "full"}, 2, 24, 0.5, "ddp", 2, "weights, gradients and optimiser (7.5 GiB) fit"),
        ({"tuning": "full"}, 2, 24, 1.5, "ddp", 2, "(22.4 GiB) would take more"),
    ],
)
def test_choices(
    fields: dict[str, object],
    devices: int,
    gib: float,
    billions: float | None,
    kind: str,
    ranks: int,
    reason: str,
) -> None:
    chosen = spread(fields, devices, gib, billions)
    assert (chosen.kind, chosen.ranks) == (kind, ranks)
    assert reason in chosen.why


def test_an_old_card_that_has_no_bf16_gets_no_shards_by_itself() -> None:
    chosen = choose_spread(TrainingConfig(), Machine(2, 24 * GIB, "fp16"), 13 * BILLION)
    assert (chosen.kind, chosen.fits) == ("ddp", False)
    assert "fp16" in chosen.why


@pytest.mark.parametrize(
    ("fields", "billions", "fits"),
    [
        ({"distributed": "fsdp"}, 13, True),
        ({"distributed": "fsdp"}, 70, False),
        ({"distributed": "fsdp"}, None, None),
        ({"distributed": "ddp"}, 7, True),
        ({"distributed": "ddp"}, 13, False),
        ({}, 13, True),
        ({}, 70, False),
        ({}, None, None),
    ],
)
def test_whether_a_device_holds_its_part_is_told(
    fields: dict[str, object], billions: float | None, fits: bool | None
) -> None:
    assert spread(fields, 2, 24, billions).fits is fits


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="the trainer sees 2"):
        spread({"num_devices": 3}, 2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"load_in_4bit": True}, "ddp"),
        ({"precision": "fp16"}, "bf16"),
        ({"optim": "paged_adamw_8bit"}, "adamw_torch"),
        ({"tuning": "full"}, "ddp"),
    ],
)
@pytest.mark.parametrize("devices", [0, 2])
def test_what_cannot_be_cut_up_is_refused_with_a_way_out(
    fields: dict[str, object], said: str, devices: int
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        spread({"distributed": "fsdp", "num_devices": 2, **fields}, devices)


@st.composite
def configs(draw: st.DrawFn) -> TrainingConfig:
    tuning = draw(st.sampled_from(["lora", "full"]))
    quantised = draw(st.sampled_from(["", "load_in_8bit", "load_in_4bit"])) if tuning == "lora" else ""
    return TrainingConfig.model_validate(
        {
            "tuning": tuning,
            "optim": draw(st.sampled_from(["adamw_torch", "paged_adamw_8bit"])),
            **({quantised: True} if quantised else {}),
        }
    )


@given(
    configs(),
    st.sampled_from(["fp32", "fp16", "bf16"]),
    st.integers(2, 16),
    st.integers(0, 200 * GIB),
    st.integers(1, 200 * BILLION),
)
def test_shards_are_chosen_for_what_is_too_large_for_one_device_and_can_be_cut_up(
    config: TrainingConfig, precision: str, devices: int, memory: int, parameters: int
) -> None:
    machine = Machine(devices, memory, precision)  # type: ignore[arg-type]
    chosen = choose_spread(config, machine, parameters)
    is_large = held_bytes(config, machine.precision, parameters) > memory * WEIGHTS_SHARE
    assert chosen.ranks == devices
    if chosen.kind == "fsdp":
        assert is_large
        require_shardable(config.model_copy(update={"precision": precision}))
    else:
        assert chosen.fits == (not is_large)
