"""Preferences without a model: what is held out, how rows are mixed, what scores mean, the sample set."""

from __future__ import annotations

import json
import math
import re
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.data.preferences import PreferencePair, RatedAnswer, load_preferences
from sage.tools.finetune.preferences.methods import batch_shape, require_trainable
from sage.tools.finetune.preferences.planned import sampled_judged
from sage.tools.finetune.preferences.samples import (
    PairSample,
    RatedSample,
    mismatched_answers,
    mixed,
    swapped_answers,
)
from sage.tools.finetune.preferences.scoring import Answer, dpo_scores, kto_scores, orpo_scores
from sage.tools.finetune.preferences.splits import SAMPLE_SET, prepare_preferences
from sage.tools.finetune.quickstart import quickstart_overrides
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidDataError, InvalidRequestError

logps = st.floats(-500, -1e-3)
betas = st.floats(0.01, 2)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n // 2}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(count)]


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_no_prompt_is_both_trained_on_and_held_out(method: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*pairs(40), *pairs(3)])
    splits = prepare_preferences(TrainingConfig(method=method, data_path=str(path)))
    train = {row.prompt_messages[0]["content"] for row in splits.train}
    held = {row.prompt_messages[0]["content"] for row in splits.validation}
    assert (len(train), len(held), train & held) == (18, 2, set())
    assert ("duplicates removed" in splits.description) is True
    kind = RatedAnswer if method == "kto" else PreferencePair
    assert all(isinstance(row, kind) for row in splits.train)


def test_the_split_depends_on_the_seed_and_the_fingerprint_on_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(40))
    config = TrainingConfig(method="dpo", data_path=str(path))
    one, again = prepare_preferences(config), prepare_preferences(config)
    other = prepare_preferences(config.model_copy(update={"seed": 1}))
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_values_that_only_parquet_has_are_counted_by_their_text(method: Any, tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    def row(number: int, day: int) -> dict[str, Any]:
        due = {"day": date(2024, 1, day), "sum": Decimal("1.50"), "to": b"x"}
        call = {"type": "function", "function": {"name": "pay", "arguments": due}}
        chosen = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        refusal = [{"role": "assistant", "content": "No."}]
        return {"prompt": f"Pay {number}?", "chosen": chosen, "rejected": refusal}

    path = tmp_path / "rows.parquet"
    rows = [row(n, 1) for n in range(4)]
    config = TrainingConfig(method=method, data_path=str(path))
    parquet.write_table(Table.from_pylist([*rows, rows[0]]), path)
    splits = prepare_preferences(config)
    answers = 2 if method == "kto" else 1
    assert len(splits.train) + len(splits.validation) == 4 * answers
    assert f"{answers} duplicates removed" in splits.description
    parquet.write_table(Table.from_pylist([row(0, 2), *rows[1:]]), path)
    assert prepare_preferences(config).fingerprint() != splits.fingerprint()


def test_a_validation_file_of_ones_own_takes_its_prompts_out_of_training(tmp_path: Path) -> None:
    train, held = write(tmp_path / "a.jsonl", pairs(10)), write(tmp_path / "b.jsonl", pairs(2))
    splits = prepare_preferences(TrainingConfig(method="dpo"), training_path=train, validation_path=held)
    assert (len(splits.train), len(splits.validation)) == (8, 2)
    seen = [
        prepare_preferences(
            TrainingConfig(method="dpo", seed=seed, max_train_rows=4),
            training_path=train,
            validation_path=held,
        ).train
        for seed in (0, 0, 1)
    ]
    assert seen[0] == seen[1] != seen[2], "which rows a limit leaves is the seed's choice"
    with pytest.raises(InvalidDataError, match=r"Every prompt of b\.jsonl"):
        prepare_preferences(TrainingConfig(method="dpo"), training_path=held, validation_path=held)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_single_prompt_is_trained_on_whatever_share_is_held_out(method: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(2))
    splits = prepare_preferences(TrainingConfig(method=method, data_path=str(path), validation_fraction=0.9))
    assert (len(splits.train), len(splits.validation)) == (4 if method == "kto" else 2, 0)


def rated_rows(count: int, unwanted: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}?", "completion": "A", "label": n != unwanted} for n in range(count)]


@pytest.mark.parametrize("unwanted", range(12))
def test_the_only_unwanted_answer_is_trained_on_whichever_it_is(unwanted: int, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rated_rows(12, unwanted))
    splits = prepare_preferences(TrainingConfig(method="kto", data_path=str(path), validation_fraction=0.25))
    assert (len(splits.train), len(splits.validation)) == (9, 3)
    assert f"{unwanted}?" in {row.prompt_messages[0]["content"] for row in splits.train}


def test_of_a_missing_kind_of_answer_it_is_said_where_it_went(tmp_path: Path) -> None:
    config = TrainingConfig(method="kto")
    rows, held = rated_rows(12, 5), write(tmp_path / "held.jsonl", rated_rows(6, 5)[5:])
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InvalidDataError, match=r"no unwanted answer whose prompt is not also in held\.jsonl"):
        prepare_preferences(config, training_path=path, validation_path=held)
    with pytest.raises(InvalidDataError, match=r"no unwanted answer among the 2 rows that max_train_rows"):
        for seed in range(12):
            prepare_preferences(
                config.model_copy(update={"max_train_rows": 2, "seed": seed}), training_path=path
            )
    with pytest.raises(InvalidDataError, match="There is no unwanted answer among the rows"):
        prepare_preferences(config, training_path=write(path, rated_rows(12, 99)))


def test_limits_are_kept() -> None:
    config = TrainingConfig(method="dpo", max_train_rows=5, max_eval_rows=2)
    splits = prepare_preferences(config)
    assert (len(splits.train), len(splits.validation)) == (5, 2)


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_mixing_keeps_every_answer_and_spreads_the_rarer_kind(kinds: list[bool]) -> None:
    samples = [RatedSample([n], [n], wanted) for n, wanted in enumerate(kinds)]
    order = mixed(samples)
    assert sorted(s.answer[0] for s in order) == list(range(len(kinds)))
    wanted = sum(kinds)
    if 0 < wanted < len(kinds):
        often = max(wanted, len(kinds) - wanted)
        kinds_in_order = "".join("+" if sample.is_desirable else "-" for sample in order)
        longest = max(len(run) for run in re.findall(r"\++|-+", kinds_in_order))
        assert longest <= math.ceil(often / min(wanted, len(kinds) - wanted)) + 1


@given(st.integers(2, 20))
def test_a_prompt_does_not_meet_its_own_other_answer(count: int) -> None:
    samples = [RatedSample([n], [n, int(wanted)], wanted) for n in range(count) for wanted in (True, False)]
    order = mixed(samples)
    for row, other in zip(order, swapped_answers(order, 2), strict=True):
        assert row.prompt[0] != other[0]


@given(st.integers(2, 20))
def test_held_out_answers_are_put_to_prompts_that_they_do_not_answer(count: int) -> None:
    samples = [RatedSample([n], [n, int(wanted)], wanted) for n in range(count) for wanted in (True, False)]
    for row, other in zip(samples, mismatched_answers(samples), strict=True):
        assert row.prompt[0] != other[0]


def test_answers_to_one_prompt_have_no_others_to_be_swapped_with() -> None:
    samples = [RatedSample([7], [n], n == 0) for n in range(2)]
    assert mismatched_answers(samples) == [[1], [0]]
    assert mismatched_answers(samples[:1]) == [[0]]


def test_answers_are_swapped_within_a_batch_only() -> None:
    samples = [RatedSample([n], [n], True) for n in range(5)]
    assert swapped_answers(samples, 2) == [[1], [0], [3], [2], [4]]


@given(st.lists(st.tuples(logps, logps), min_size=1, max_size=5), betas)
def test_a_model_that_is_its_reference_prefers_nothing(rows: list[tuple[float, float]], beta: float) -> None:
    said = [(Answer(good, 3), Answer(bad, 3)) for good, bad in rows]
    scores = dpo_scores(said, said, beta)
    assert scores.loss == pytest.approx(math.log(2))
    assert (scores.reward_accuracy, scores.reward_margin) == (0.5, 0)
    flat = [answer for pair in said for answer in pair]
    kto = kto_scores(flat, flat, [True, False] * len(rows), 0, beta)
    assert (kto.loss, kto.reward_accuracy, kto.reward_margin) == (0.5, 0.5, 0)


@given(logps, logps, st.floats(0.1, 50), betas)
def test_moving_towards_the_chosen_answer_lowers_every_loss(
    good: float, bad: float, step: float, beta: float
) -> None:
    before = (Answer(good, 7, good - 1, 9), Answer(bad, 7))
    raised = good + min(step, -good - 1e-4)
    after = (Answer(raised, 7, raised - 1, 9), Answer(bad - step, 7))
    dpo = dpo_scores([after], [before], beta)
    assert dpo.loss <= math.log(2)
    assert dpo.reward_accuracy == 1
    assert orpo_scores([after], beta).loss < orpo_scores([before], beta).loss
    kto = kto_scores(after, before, [True, False], 0, beta)
    assert kto.loss <= 0.5
    assert kto.reward_margin > 0


def test_drift_makes_wanted_answers_harder_and_never_helps_unwanted_ones() -> None:
    answers = [Answer(-10, 5), Answer(-12, 5)]
    still, drifted, below = (kto_scores(answers, answers, [True, False], d, 1) for d in (0, 2, -2))
    assert below == still
    assert drifted.loss == pytest.approx(0.5)  # what one side loses the other wins
    assert kto_scores(answers, answers, [True, True], 2, 1).loss > 0.5


def test_answers_of_one_kind_tell_nothing_apart() -> None:
    scores = kto_scores([Answer(-1, 1)], [Answer(-2, 1)], [True], 0, 0.1)
    assert (scores.reward_accuracy, scores.reward_margin) == (0.5, 0)


@given(st.integers(1, 16), st.integers(1, 64))
def test_kto_gets_batches_of_two_or_more_and_the_effective_batch_is_kept(at_once: int, times: int) -> None:
    config = TrainingConfig(
        method="kto", per_device_train_batch_size=at_once, gradient_accumulation_steps=times
    )
    if config.effective_batch_size == 1:
        with pytest.raises(InvalidRequestError, match="two rows or more"):
            batch_shape(config)
        return
    rows, accumulation = batch_shape(config)
    assert rows >= 2
    assert rows * accumulation == config.effective_batch_size
    assert batch_shape(config.model_copy(update={"method": "dpo"})) == (at_once, times)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_reference_that_trains_along_is_refused(bias: str) -> None:
    for method in ("dpo", "kto"):
        config = TrainingConfig.model_validate({"method": method, "lora": {"bias": bias}})
        with pytest.raises(InvalidRequestError, match=r"Set lora\.bias=none") as refused:
            require_trainable(config)
        assert refused.value.param == "lora.bias"
        require_trainable(TrainingConfig.model_validate({"method": method}))
    # It compares with nothing.
    require_trainable(TrainingConfig.model_validate({"method": "orpo", "lora": {"bias": bias}}))


@pytest.mark.parametrize("target", ["lm_head", "model.lm_head", "embed_out"])
def test_an_adapter_on_the_output_layer_is_refused_where_it_would_not_train(target: str) -> None:
    lora = {"target_modules": ["q_proj", target]}
    for method in ("dpo", "kto"):
        with pytest.raises(InvalidRequestError, match=f"an adapter on {target} would never train") as refused:
            require_trainable(TrainingConfig.model_validate({"method": method, "lora": lora}))
        assert refused.value.param == "lora.target_modules"
    require_trainable(TrainingConfig.model_validate({"method": "orpo", "lora": lora}))
    every = {"target_modules": "all-linear"}
    require_trainable(TrainingConfig.model_validate({"method": "dpo", "lora": every}))


def test_quick_sizes_leave_the_learning_rate_of_preferences_alone() -> None:
    assert "learning_rate" in quickstart_overrides("qa", "cpu", has_gpu=False)
    assert "learning_rate" not in quickstart_overrides("qa", "cpu", "dpo", has_gpu=False)


def test_the_sample_set_is_distinct_and_partly_chinese() -> None:
    rows = load_preferences(SAMPLE_SET)
    prompts = [re.sub(r"\W+", "", row.prompt_messages[0]["content"]).casefold() for row in rows]
    answers = [turn["content"] for row in rows for turn in (*row.chosen, *row.rejected)]
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", prompt)) for prompt in prompts)
    assert len(rows) >= 60
    assert len(set(prompts)) == len(prompts)
    assert len(set(answers)) == len(answers)
    assert 0.15 <= chinese / len(rows) <= 0.4


def test_a_plan_tries_the_pair_whose_padding_is_the_widest() -> None:
    """Both answers of a pair are padded to the longer one."""
    even = PairSample([1] * 4, [2] * 60, [3] * 60)
    lopsided = PairSample([1] * 4, [2], [3] * 100)
    assert sampled_judged([even, lopsided], 1, 2)["longest_judged"] == [lopsided]
    rated = [RatedSample([1], [2] * length, True) for length in (3, 9, 5)]
    assert sampled_judged(rated, 2, 3)["longest_judged"] == [rated[1], rated[2]]
