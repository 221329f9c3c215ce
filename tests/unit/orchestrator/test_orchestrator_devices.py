"""The lease ledger: training and serving never hold more than the device has, and training gets its turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.orchestrator_rig import GIB, Rig

from sage_orchestrator.devices.policy import Holding, Ledger, Want, judge, must_yield, training_bytes

JOBS = "/v1/fine_tuning/jobs"


def test_an_engine_that_fits_is_granted_renewed_and_released(rig: Rig) -> None:
    assert rig.lease("engine:a", 3 * GIB) == {"ttl_s": 30.0, "must_yield": False}
    rig.clock.advance(20)
    rig.lease("engine:a", 4 * GIB)
    rig.clock.advance(20)
    (device,) = rig.get("/v1/sage/devices")["data"]
    assert (device["device"], device["total_bytes"], device["leased_bytes"]) == ("cpu", 8 * GIB, 4 * GIB)
    assert device["leases"][0]["label"] == "serving code@1"
    rig.http.post("/internal/devices/release", json={"holder": "engine:a"})
    assert rig.get("/v1/sage/devices")["data"][0]["leased_bytes"] == 0


def test_a_lease_that_is_not_renewed_ends(rig: Rig) -> None:
    rig.lease("engine:a", 8 * GIB)
    rig.clock.advance(31)
    assert rig.get("/v1/sage/devices")["data"][0]["leases"] == []
    rig.lease("engine:b", 8 * GIB)
    # Its room is taken; renewing does not bring it back.
    rig.lease("engine:a", 8 * GIB, status=503)


def test_what_never_fits_is_said_at_once(rig: Rig) -> None:
    error = rig.lease("engine:a", 9 * GIB, status=400)["error"]
    assert "smaller model" in error["message"]


def test_a_refused_growth_keeps_what_is_held(rig: Rig) -> None:
    rig.lease("engine:a", 4 * GIB)
    rig.lease("engine:b", 3 * GIB)
    rig.clock.advance(20)
    rig.lease("engine:b", 6 * GIB, status=503)
    rig.clock.advance(20)
    leases = rig.get("/v1/sage/devices")["data"][0]["leases"]
    assert [(lease["holder"], lease["bytes"]) for lease in leases] == [("engine:b", 3 * GIB)]


def test_chat_is_told_what_trains_and_for_how_long(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.report(job_id, metrics={"eta_s": 720})
    response = rig.http.post(
        "/internal/devices/lease",
        json={
            "holder": "engine:a",
            "purpose": "inference",
            "device": "cpu",
            "bytes": 6 * GIB,
            "total_bytes": 8 * GIB,
            "label": "serving code@1",
        },
    )
    assert response.status_code == 503
    assert response.json()["error"] == {
        "message": "device busy: training code, about 12 min",
        "type": "server_error",
        "param": None,
        "code": "device_busy",
    }
    assert response.headers["retry-after"] == "120"


def test_training_waits_for_an_idle_engine_to_stop(rig: Rig) -> None:
    rig.lease("engine:a", 6 * GIB, is_idle=True)
    job_id = rig.create_job()["id"]
    rig.sweep()
    busy = rig.claim(job_id, status=503)["error"]
    assert busy["code"] == "device_busy"
    rig.claim(job_id, status=503)
    assert rig.job(job_id)["status"] == "queued"
    # Asked twice, said once.
    assert rig.messages(job_id).count("device busy: serving code@1, waiting") == 1
    assert rig.lease("engine:a", 6 * GIB, is_idle=True)["must_yield"] is True
    # Nobody takes the room meanwhile.
    refused = rig.lease("engine:b", 2 * GIB, status=503)["error"]["message"]
    assert "serving code@1" in refused or "training code" in refused
    rig.http.post("/internal/devices/release", json={"holder": "engine:a"})
    assert rig.lease("engine:b", 6 * GIB, status=503)["error"]["message"] == "device busy: training code"
    # The worker may have left: it is called as soon as there is room.
    assert rig.sweep() == [job_id]
    rig.claim(job_id)
    rig.lease("engine:b", 4 * GIB)


def test_a_refused_training_keeps_its_turn_while_it_asks_again_and_no_longer(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    yields = {}
    for passed_s in range(0, 140, 20):  # engines renew more often than a want runs out
        yields[passed_s] = rig.lease("engine:a", 6 * GIB, is_idle=True)["must_yield"]
        if passed_s in (0, 40):
            rig.claim(job_id, status=503)
        rig.clock.advance(20)
    assert [passed_s for passed_s, must_yield in yields.items() if must_yield] == [20, 40, 60, 80]


def test_a_busy_engine_is_left_alone_until_it_is_idle(rig: Rig) -> None:
    rig.lease("engine:a", 6 * GIB)
    job_id = rig.create_job()["id"]
    rig.claim(job_id, status=503)
    assert rig.lease("engine:a", 6 * GIB)["must_yield"] is False
    assert rig.lease("engine:a", 6 * GIB, is_idle=True)["must_yield"] is True


@pytest.mark.parametrize("way", ["finish", "lost", "cancelled while waiting"])
def test_room_comes_back_however_training_ends(rig: Rig, way: str) -> None:
    job_id = rig.create_job()["id"]
    if way == "cancelled while waiting":
        rig.lease("engine:a", 6 * GIB, is_idle=True)
        rig.claim(job_id, status=503)
        rig.post(f"{JOBS}/{job_id}/cancel")
        assert rig.lease("engine:a", 6 * GIB, is_idle=True)["must_yield"] is False
        return
    rig.claim(job_id)
    rig.lease("engine:a", 8 * GIB, status=503)
    if way == "finish":
        rig.finish(job_id)
    else:
        rig.clock.advance(31)
        # Until the sweeper has decided, the worker may still be computing.
        rig.lease("engine:a", 8 * GIB, status=503)
        rig.sweep()
    rig.lease("engine:a", 8 * GIB)


def test_a_gpu_is_trained_on_alone(rig: Rig) -> None:
    first, second = rig.create_job(suffix="a")["id"], rig.create_job(suffix="b")["id"]
    gpu = {"device": "cuda:0", "device_total_bytes": 24 * GIB}
    rig.claim(first, **gpu)
    rig.claim(second, "w2", status=503, **gpu)
    rig.claim(second, "w2", device="cuda:1", device_total_bytes=24 * GIB)


def test_a_worker_that_cannot_tell_its_memory_may_train(rig: Rig) -> None:
    rig.claim(rig.create_job()["id"], device_total_bytes=0)


def test_workers_are_seen_while_they_beat(rig: Rig) -> None:
    beat = {"worker_id": "w1", "kind": "trainer", "detail": {"job_id": None}}
    rig.http.post("/internal/workers/beat", json=beat)
    rig.clock.advance(10)
    rig.http.post("/internal/workers/beat", json=beat | {"device_free_bytes": 5})
    (worker,) = rig.get("/internal/workers")["data"]
    assert (worker["last_seen"], worker["is_up"], worker["device_free_bytes"]) == (rig.clock.now, True, 5)
    rig.clock.advance(60)
    assert rig.get("/internal/workers")["data"][0]["is_up"] is False
    rig.clock.advance(3600)
    rig.parts.keep_house()
    assert rig.get("/internal/workers")["data"] == []


def test_a_worker_that_leaves_in_order_is_not_waited_for(rig: Rig) -> None:
    beat = {"worker_id": "w1", "kind": "trainer"}
    rig.http.post("/internal/workers/beat", json=beat | {"is_leaving": True})  # nobody knew it
    rig.http.post("/internal/workers/beat", json=beat)
    rig.http.post("/internal/workers/beat", json=beat | {"worker_id": "w2"})
    rig.http.post("/internal/workers/beat", json=beat | {"is_leaving": True})
    assert [worker["worker_id"] for worker in rig.get("/internal/workers")["data"]] == ["w2"]


# The policy alone, over everything that can happen on one device.

TOTAL = 100
ENGINES = [f"engine:{number}" for number in range(4)]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("lease"), st.sampled_from(ENGINES), st.integers(0, TOTAL), st.booleans()),
        st.tuples(st.just("drop"), st.sampled_from([*ENGINES, "train:j"])),
        st.tuples(st.just("train"), st.integers(1, TOTAL)),
    ),
    max_size=40,
)


def ask(ledger: Ledger, holding: Holding) -> Ledger:
    """What the ledger does with a verdict: grant it, or remember a training that waits."""
    if not judge(ledger, holding).is_granted:
        if holding.purpose == "training" and ledger.want is None:
            return replace(ledger, want=Want(holding.holder, holding.bytes))
        return ledger
    others = tuple(held for held in ledger.holdings if held.holder != holding.holder)
    is_wanted = ledger.want is not None and ledger.want.holder == holding.holder
    return replace(ledger, holdings=(*others, holding), want=None if is_wanted else ledger.want)


def drop(ledger: Ledger, holder: str) -> Ledger:
    return replace(ledger, holdings=tuple(held for held in ledger.holdings if held.holder != holder))


def play(moves: list[tuple[object, ...]]) -> Ledger:
    ledger = Ledger(TOTAL)
    for move in moves:
        match move:
            case ("lease", str(holder), int(size), bool(is_idle)):
                ledger = ask(ledger, Holding(holder, "inference", size, is_idle=is_idle))
            case ("drop", str(holder)):
                ledger = drop(ledger, holder)
            case ("train", int(size)):
                ledger = ask(ledger, Holding("train:j", "training", size))
        assert ledger.used_bytes() <= TOTAL
    return ledger


@given(steps)
def test_a_device_is_never_promised_twice(moves: list[tuple[object, ...]]) -> None:
    play(moves)


@given(steps, st.integers(1, TOTAL))
def test_idle_engines_never_keep_a_training_out(moves: list[tuple[object, ...]], size: int) -> None:
    ledger = drop(replace(play(moves), want=None), "train:j")
    # Every engine falls idle, yields when told to, and tries to come back at once.
    idle = tuple(replace(held, is_idle=True) for held in ledger.holdings)
    ledger = ask(replace(ledger, holdings=idle), Holding("train:j", "training", size))
    told = must_yield(ledger)
    for holder in told:
        held = next(held for held in ledger.holdings if held.holder == holder)
        ledger = ask(drop(ledger, holder), held)
    for holder in must_yield(ledger):
        ledger = drop(ledger, holder)
    ledger = ask(ledger, Holding("train:j", "training", size))
    assert "train:j" in {held.holder for held in ledger.holdings}


@given(steps)
def test_no_more_engines_are_told_to_yield_than_needed(moves: list[tuple[object, ...]]) -> None:
    ledger = play(moves)
    told = must_yield(ledger)
    assert all(held.is_idle for held in ledger.holdings if held.holder in told)
    if told and ledger.want is not None:
        smallest = min((held for held in ledger.holdings if held.holder in told), key=lambda held: held.bytes)
        kept = tuple(held for held in ledger.holdings if held.holder not in told - {smallest.holder})
        without = Ledger(TOTAL, kept)
        assert not judge(without, Holding(ledger.want.holder, "training", ledger.want.bytes)).is_granted


@given(st.integers(0, 2**45))
def test_a_cpu_training_leaves_most_of_the_machine(total: int) -> None:
    assert training_bytes("cpu", total) <= min(4 * GIB, 0.4 * total)
    assert training_bytes("cuda:0", total) == total
