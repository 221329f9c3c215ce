"""The out-of-memory ladder as a function of the config: any config, any order, to its end."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.climbing import advice
from sage.tools.finetune.ladder import (
    FOR_ADAPTERS,
    LEAST_HARM,
    PUBLISHED,
    SHORTEST_MAX_LENGTH,
    SMALLEST_RANK,
    Rung,
    climbed,
    next_rung,
    order_of,
    token_budget,
)
from sage.tools.finetune.preferences.methods import batch_shape
from sage_contracts.config import LoRAConfig, Method, OomRung, PresetConfigs, TrainingConfig

RUNGS = get_args(OomRung)
sizes = st.integers(1, 64)


@st.composite
def configs(draw: st.DrawFn) -> TrainingConfig:
    quantised = draw(st.sampled_from(["", "load_in_8bit", "load_in_4bit"]))
    order = draw(
        st.sampled_from(["least_harm", "published", "off"]) | st.lists(st.sampled_from(RUNGS), unique=True)
    )
    return TrainingConfig.model_validate(
        {
            "per_device_train_batch_size": draw(sizes),
            "gradient_accumulation_steps": draw(sizes),
            "max_length": draw(st.integers(1, 8192)),
            "gradient_checkpointing": draw(st.booleans()),
            "lora": LoRAConfig(r=draw(sizes), lora_alpha=draw(sizes)),
            "oom_ladder": order,
            "oom_may_truncate": draw(st.booleans()),
            **({quantised: True} if quantised else {}),
        }
    )


def whole_climb(config: TrainingConfig, device: str, *, can_quantise: bool = True) -> list[Rung]:
    rungs: list[Rung] = []
    while True:
        names = [rung.name for rung in rungs]
        rung = next_rung(config, names, device=device, can_quantise=can_quantise)
        if rung is None:
            return rungs
        rungs.append(rung)
        config = rung.config
        assert len(rungs) < 40, "the ladder does not end"


@given(configs(), st.sampled_from(["cpu", "cuda"]))
def test_a_run_of_every_weight_takes_no_rung_that_needs_a_frozen_base(
    config: TrainingConfig, device: str
) -> None:
    config = config.model_copy()
    config.tuning = "full"
    assert not {rung.name for rung in whole_climb(config, device)} & FOR_ADAPTERS


@given(configs())
def test_shards_are_not_quantised(config: TrainingConfig) -> None:
    config = config.model_copy(update={"distributed": "fsdp"})
    assert not {rung.name for rung in whole_climb(config, "cuda")} & {"load_in_8bit", "load_in_4bit"}


@given(configs())
def test_dora_is_not_put_on_8_bits_where_that_cannot_be_trained(config: TrainingConfig) -> None:
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"use_dora": True})})
    assert "load_in_8bit" not in {rung.name for rung in whole_climb(config, "cpu")}
    config.oom_ladder, config.load_in_4bit, config.load_in_8bit = ["load_in_8bit"], False, False
    assert [rung.name for rung in whole_climb(config, "cuda")] == ["load_in_8bit"]


@pytest.mark.parametrize(
    ("fields", "said", "unsaid"),
    [
        ({}, "load_in_4bit", "tuning"),
        ({"tuning": "full"}, "tuning=lora", "load_in|rank|lora\\.r"),
        ({"distributed": "fsdp"}, "lora\\.r", "load_in|tuning"),
    ],
)
def test_the_last_advice_names_only_what_the_run_can_take(
    fields: dict[str, object], said: str, unsaid: str
) -> None:
    told = advice("There was not enough memory.", (), TrainingConfig.model_validate(fields))
    assert re.search(said, told)
    assert not re.search(unsaid, told)


devices = st.sampled_from(["cpu", "cuda"])


@given(configs(), devices)
def test_every_ladder_ends_and_keeps_what_it_promises(config: TrainingConfig, device: str) -> None:
    rungs = whole_climb(config, device)
    names = [rung.name for rung in rungs]

    assert {*names} <= {*order_of(config)}
    for name in ("gradient_checkpointing", "load_in_8bit", "load_in_4bit", "smaller_rank"):
        assert names.count(name) <= 1
    for before, rung in zip([config, *(rung.config for rung in rungs)], rungs, strict=False):
        after = rung.config
        assert after.effective_batch_size == config.effective_batch_size
        assert (after.seed, after.learning_rate) == (config.seed, config.learning_rate)
        assert after != before or rung.name == "halve_batch"
        assert rung.change
        if not config.oom_may_truncate:
            assert after.max_length == config.max_length
        assert after.max_length >= min(config.max_length, SHORTEST_MAX_LENGTH)
        assert after.lora.r >= min(config.lora.r, SMALLEST_RANK)


@given(configs(), devices)
def test_rungs_come_in_the_order_of_the_ladder(config: TrainingConfig, device: str) -> None:
    order = order_of(config)
    places = [order.index(rung.name) for rung in whole_climb(config, device)]
    assert places == sorted(places)


@given(configs(), devices)
def test_halving_the_batch_halves_what_a_forward_pass_holds(config: TrainingConfig, device: str) -> None:
    taken: list[OomRung] = []
    before = config
    for rung in whole_climb(config, device):
        old, taken = token_budget(before, device, taken), [*taken, rung.name]
        new = token_budget(rung.config, device, taken)
        if rung.name == "halve_batch":
            assert new <= max(1, old // 2)
        assert new <= old
        before = rung.config


@given(configs(), devices)
def test_the_names_of_the_rungs_are_all_there_is_to_remember(config: TrainingConfig, device: str) -> None:
    rungs = whole_climb(config, device)
    again, told = climbed(config, [rung.name for rung in rungs], device=device)
    assert list(told) == rungs
    assert again == (rungs[-1].config if rungs else config)


@given(configs())
def test_nothing_is_quantised_where_that_is_not_possible(config: TrainingConfig) -> None:
    names = {rung.name for rung in whole_climb(config, "cuda", can_quantise=False)}
    assert not names & {"load_in_8bit", "load_in_4bit"}


def test_the_least_harmful_order_is_the_default() -> None:
    rungs = whole_climb(PresetConfigs.rtx_4090(), "cuda")
    assert [rung.change for rung in rungs] == [
        "per_device_train_batch_size 4 → 2, gradient_accumulation_steps 4 → 8",
        "per_device_train_batch_size 2 → 1, gradient_accumulation_steps 8 → 16",
        "gradient_checkpointing False → True",
        "load_in_8bit False → True",
        "load_in_8bit True → False, load_in_4bit False → True",
    ]
    assert order_of(TrainingConfig()) == LEAST_HARM


def test_the_published_order_is_the_product_pages() -> None:
    config = TrainingConfig(oom_ladder="published", oom_may_truncate=True, per_device_train_batch_size=2)
    names = [rung.name for rung in whole_climb(config, "cuda")]
    assert list(dict.fromkeys(names)) == list(PUBLISHED)
    assert whole_climb(config, "cuda")[-1].config.lora == LoRAConfig(r=4, lora_alpha=8)


def test_a_cpu_goes_below_the_budget_that_its_caches_set() -> None:
    config = PresetConfigs.cpu()  # 8 rows of 512, of which one or two at once
    first = whole_climb(config, "cpu")[0]
    assert first.name == "halve_batch"
    assert token_budget(first.config, "cpu", ["halve_batch"]) == 1


@given(configs(), devices, st.sampled_from(["dpo", "orpo", "kto"]))
def test_each_rung_of_a_run_on_preferences_changes_what_it_does(
    config: TrainingConfig, device: str, method: Method
) -> None:
    config = config.model_copy(update={"method": method})
    if method == "kto" and config.effective_batch_size == 1:
        return  # refused before anything is loaded
    rows = batch_shape(config)[0]
    for rung in whole_climb(config, device):
        after = batch_shape(rung.config)[0]
        if rung.name == "halve_batch":
            assert after < rows, "as many rows at once as before: the attempt would be wasted"
        rows = after


def test_the_batch_of_a_run_on_preferences_is_halved_as_far_as_its_method_goes() -> None:
    config = TrainingConfig(per_device_train_batch_size=8, oom_ladder=["halve_batch"])
    sizes = {"dpo": [4, 2, 1], "orpo": [4, 2, 1], "kto": [4, 2]}
    for method, expected in sizes.items():
        climb = whole_climb(config.model_copy(update={"method": method}), "cpu")
        assert [rung.config.per_device_train_batch_size for rung in climb] == expected


@pytest.mark.parametrize(("use_rslora", "alpha"), [(False, 8), (True, 16)])
def test_a_smaller_rank_keeps_the_adapters_scale(use_rslora: bool, alpha: int) -> None:
    lora = LoRAConfig(r=16, lora_alpha=32, use_rslora=use_rslora)
    small, _ = climbed(TrainingConfig(lora=lora), ["smaller_rank"])
    assert (small.lora.r, small.lora.lora_alpha) == (4, alpha)

    def scale(of: LoRAConfig) -> float:
        return of.lora_alpha / (of.r**0.5 if use_rslora else of.r)

    assert scale(small.lora) == scale(lora)


def test_the_ladder_can_be_off() -> None:
    assert whole_climb(TrainingConfig(oom_ladder="off"), "cuda") == []
    assert whole_climb(TrainingConfig(oom_ladder=[]), "cuda") == []


def test_an_unknown_rung_is_refused() -> None:
    with pytest.raises(ValueError, match="oom_ladder"):
        TrainingConfig.model_validate({"oom_ladder": ["pray"]})
