"""Decisions are functions of views: what is asked for, what there is, what may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_contracts.inference import EngineState
from sage_inference.policy import (
    CRASH_WINDOW_S,
    Action,
    AdapterView,
    EngineView,
    Gate,
    Limits,
    decide,
    least_recently_used,
    restart_gate,
    to_stop,
)

LIMITS = Limits(max_engines=2, max_adapters=2, keep_alive_s=300)


def engine(key: str = "a", **fields: object) -> EngineView:
    known = {"state": EngineState.READY, "is_busy": False, "last_used": 0.0, "max_rank": 16}
    return EngineView(key=key, **(known | fields))  # type: ignore[arg-type]


def adapter(*, is_loaded: bool = True, is_busy: bool = False, last_used: float = 0) -> AdapterView:
    return AdapterView(is_loaded, is_busy, last_used)


def test_the_first_request_starts_an_engine_and_a_ready_one_answers() -> None:
    assert decide("a", None, 0, [], LIMITS).action is Action.START
    assert decide("a", None, 0, [engine("a")], LIMITS).action is Action.GRANT


@pytest.mark.parametrize("state", [EngineState.STARTING, EngineState.STOPPING])
def test_nothing_is_started_while_another_engine_starts_or_stops(state: EngineState) -> None:
    assert decide("b", None, 0, [engine("a", state=state)], LIMITS).action is Action.WAIT
    assert decide("a", None, 0, [engine("a", state=state)], LIMITS).action is Action.WAIT


def test_room_is_made_by_the_idle_engine_used_longest_ago() -> None:
    engines = [engine("a", last_used=5), engine("b", last_used=1)]
    decision = decide("c", None, 0, engines, LIMITS)
    assert (decision.action, decision.target) == (Action.STOP, "b")
    engines = [engine("a", last_used=5), engine("b", last_used=1, is_busy=True)]
    assert decide("c", None, 0, engines, LIMITS).target == "a"
    assert decide("c", None, 0, [engine(key, is_busy=True) for key in "ab"], LIMITS).action is Action.WAIT


def test_adapters_are_loaded_joined_and_replaced() -> None:
    one = engine("a", adapters={"x": adapter()})
    assert decide("a", "x", 8, [one], LIMITS).action is Action.GRANT
    assert decide("a", "y", 8, [one], LIMITS).action is Action.LOAD
    loading = engine("a", adapters={"y": adapter(is_loaded=False)}, is_busy=True)
    assert decide("a", "y", 8, [loading], LIMITS).action is Action.WAIT
    full = engine("a", adapters={"x": adapter(last_used=9), "y": adapter(last_used=2)})
    assert decide("a", "z", 8, [full], LIMITS).target == "y"
    held = engine("a", adapters={"x": adapter(last_used=9), "y": adapter(last_used=2, is_busy=True)})
    assert decide("a", "z", 8, [held], LIMITS).target == "x"
    leaving = engine("a", adapters={"x": adapter(is_loaded=False), "y": adapter()})
    assert decide("a", "z", 8, [leaving], LIMITS).action is Action.WAIT


def test_a_larger_rank_restarts_an_idle_engine_and_drains_a_busy_one() -> None:
    assert decide("a", "x", 64, [engine("a")], LIMITS).action is Action.STOP
    assert decide("a", "x", 64, [engine("a", is_busy=True)], LIMITS).action is Action.DRAIN
    draining = engine("a", is_busy=True, is_draining=True, adapters={"y": adapter()})
    assert decide("a", "y", 8, [draining], LIMITS).action is Action.DRAIN


def test_idle_time_and_yield_orders_stop_engines_but_requests_keep_them() -> None:
    idle = engine("a", last_used=0)
    assert to_stop([idle], [], LIMITS, now=299) == []
    assert to_stop([idle], [], LIMITS, now=300) == ["a"]
    assert to_stop([idle], ["a"], LIMITS, now=300) == []
    assert to_stop([engine("a", is_busy=True)], [], LIMITS, now=9999) == []
    assert to_stop([engine("a", must_yield=True)], ["a"], LIMITS, now=1) == ["a"]
    assert to_stop([engine("a", must_yield=True, is_busy=True)], [], LIMITS, now=1) == []


def test_failures_back_off_and_the_third_within_the_window_refuses() -> None:
    assert restart_gate([], 100) == Gate()
    assert restart_gate([100], 100) == Gate(2)
    assert restart_gate([100], 103) == Gate(0)
    assert restart_gate([100, 110], 112) == Gate(8)
    refused = restart_gate([100, 110, 120], 130)
    assert refused == Gate(100 + CRASH_WINDOW_S - 130, is_refused=True)
    assert not restart_gate([100, 110, 120], 100 + CRASH_WINDOW_S).is_refused


views = st.lists(
    st.builds(
        EngineView,
        key=st.sampled_from("abcd"),
        state=st.sampled_from([EngineState.STARTING, EngineState.READY, EngineState.STOPPING]),
        is_busy=st.booleans(),
        last_used=st.floats(0, 1000),
        max_rank=st.sampled_from([16, 64]),
        is_draining=st.booleans(),
        must_yield=st.booleans(),
    ),
    max_size=4,
    unique_by=lambda view: view.key,
)


@given(views, st.sampled_from("abcd"), st.sampled_from([0, 8, 32]))
def test_a_busy_engine_is_never_stopped_and_the_limit_never_exceeded(
    engines: list[EngineView], key: str, rank: int
) -> None:
    by_key = {view.key: view for view in engines}
    decision = decide(key, None, rank, engines, LIMITS)
    if decision.action is Action.STOP:
        assert by_key[decision.target].can_stop
    if decision.action is Action.START:
        assert key not in by_key and len(engines) < LIMITS.max_engines
    if decision.action is Action.GRANT:
        assert by_key[key].state is EngineState.READY
    assert all(by_key[stopped].can_stop for stopped in to_stop(engines, [], LIMITS, now=500))
    victim = least_recently_used(engines)
    assert victim is None or by_key[victim].can_stop
