"""What the sweeper decides, without a database and without waiting."""

from __future__ import annotations

import threading

import pytest

from sage_contracts.workers import Order
from sage_orchestrator.leases import Sweep, Work, judge, next_ring_s
from sage_orchestrator.sweeper import Periodic

NOW = 1000.0


def running(lease_expires_at: float, lost: int = 0, order: Order = Order.CONTINUE) -> Work:
    return Work(True, False, lease_expires_at, None, lost, order)


def queued(ring_at: float | None) -> Work:
    return Work(False, True, None, ring_at, 0)


@pytest.mark.parametrize(
    ("work", "verdict"),
    [
        (running(NOW + 1), Sweep.LEAVE),
        (running(NOW), Sweep.REQUEUE),
        (running(NOW - 1, lost=3), Sweep.REQUEUE),
        (running(NOW - 1, lost=4), Sweep.FAIL),
        (running(NOW - 1, lost=4, order=Order.CANCEL), Sweep.CANCEL),
        (running(NOW - 1, order=Order.PAUSE), Sweep.PAUSE),
        (running(NOW + 1, order=Order.CANCEL), Sweep.LEAVE),
        (queued(None), Sweep.LEAVE),
        (queued(NOW + 1), Sweep.LEAVE),
        (queued(NOW), Sweep.RING),
        (Work(False, False, NOW - 1, NOW - 1, 0), Sweep.LEAVE),
    ],
)
def test_verdicts(work: Work, verdict: Sweep) -> None:
    assert judge(work, now=NOW, max_attempts=5) is verdict


def test_bells_ring_less_and_less_often() -> None:
    assert [next_ring_s(rings, 30) for rings in range(1, 8)] == [30, 60, 120, 240, 480, 480, 480]


def test_a_periodic_thread_survives_errors_and_stops() -> None:
    calls = 0
    called = threading.Event()

    def work() -> None:
        nonlocal calls
        calls += 1
        called.set()
        if calls == 1:
            raise RuntimeError("once")

    thread = Periodic("test", 3600, work)
    thread.start()
    assert called.wait(10)
    called.clear()
    thread.wake()
    assert called.wait(10)
    thread.stop()
    assert calls == 2
