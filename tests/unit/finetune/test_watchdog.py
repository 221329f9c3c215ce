"""The loss watchdog's judgement: what it lets pass, what it never does."""

from __future__ import annotations

from dataclasses import asdict
from math import inf, nan

from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.watchdog import ENOUGH, RATE_CUT, SUSTAINED, WINDOW, Fault, LossWatch

usual = st.floats(0.05, 12)
jitter = st.lists(st.floats(0.6, 1.19), min_size=ENOUGH, max_size=80)


@given(usual, jitter)
def test_ordinary_noise_is_good(level: float, noise: list[float]) -> None:
    watch = LossWatch()
    assert {watch.see(level * factor) for factor in noise} == {"good"}
    assert len(watch.recent) <= WINDOW


@given(st.lists(st.floats(0.01, 100), max_size=60))
def test_no_run_of_numbers_is_a_spike_before_enough_is_known(losses: list[float]) -> None:
    watch = LossWatch()
    assert all(watch.see(loss) == "good" for loss in losses[:ENOUGH])


@given(st.lists(usual, max_size=40), st.sampled_from([nan, inf, -inf]))
def test_what_is_no_number_is_seen_at_once(losses: list[float], bad: float) -> None:
    watch = LossWatch()
    for loss in losses:
        watch.see(loss)
    assert watch.see(bad) == "nan"


@given(usual, jitter, st.floats(2.5, 1000))
def test_a_loss_that_stays_high_is_a_spike_and_one_hard_batch_is_none(
    level: float, noise: list[float], jump: float
) -> None:
    watch = LossWatch()
    for factor in noise:
        watch.see(level * factor)
    high = level * 1.2 * jump + 0.6
    assert watch.see(high) == "suspect"
    assert watch.see(level) == "good"
    assert watch.suspects == 0
    assert [watch.see(high) for _ in range(SUSTAINED)] == ["suspect"] * (SUSTAINED - 1) + ["spike"]
    # The judged-by losses are those from before: staying high does not become usual.
    assert max(watch.recent) <= level * 1.2


@given(st.lists(st.floats(0.01, 50), max_size=60), st.integers(0, 60))
def test_a_resumed_watch_judges_as_the_uninterrupted_one(losses: list[float], cut: int) -> None:
    whole, first = LossWatch(), LossWatch()
    expected = [whole.see(loss) for loss in losses]
    found = [first.see(loss) for loss in losses[:cut]]
    second = LossWatch(**asdict(first))
    assert found + [second.see(loss) for loss in losses[cut:]] == expected
    assert second == whole


@given(usual, st.floats(1.1, 1.4), st.integers(6, 30))
def test_a_run_that_climbs_is_no_place_to_come_back_to(level: float, growth: float, steps: int) -> None:
    watch = LossWatch()
    for step in range(40):
        watch.see(level * (1 + 1 / (step + 1)))
    assert watch.is_calm
    for step in range(steps):
        watch.see(level * growth**step + 0.2)
    assert not watch.is_calm


def test_every_rollback_cuts_the_rate_and_says_so() -> None:
    first = Fault("spike", 12, 9.5).rollback(6, 1.0)
    assert (first.rate_scale, first.loss) == (RATE_CUT, 9.5)
    assert first.text(1e-3) == (
        "The loss was 9.5, far above what it was, in step 12. Going back to the checkpoint of step 6 with "
        "the learning rate cut from 0.001 to 0.0003"
    )
    second = Fault("nan", 3, nan).rollback(0, first.rate_scale)
    assert second.loss is None
    assert "was no number in step 3. Going back to the start" in second.text(1e-3)
    assert "cut from 0.0003 to 9e-05" in second.text(1e-3)
    told = Fault("nan", 3, nan).advice(1e-3, 2)
    assert "also after going back twice" in told
    assert "Lower learning_rate (it was 0.001)" in told
