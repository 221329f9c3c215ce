"""When a start is given up: not while it works, however long that takes."""

from __future__ import annotations

from sage_inference.start_watch import StartWatch, Work


class Start:
    """A start of 180 s per step, and what it has done by then."""

    def __init__(self) -> None:
        self.now, self.work = 1000.0, Work(0, 0)
        self.watch = StartWatch(180, lambda: self.work, lambda: self.now)

    def is_stalled_after(self, *, seconds: float = 180, lines: int = 0, cpu_s: float = 0) -> bool:
        self.now += seconds
        self.work = Work(self.work.lines + lines, self.work.cpu_s + cpu_s)
        return self.watch.is_stalled()


def test_a_slow_start_that_logs_or_computes_is_waited_for() -> None:
    start = Start()
    assert not start.is_stalled_after(lines=1)
    assert not start.is_stalled_after(cpu_s=60)
    assert not start.is_stalled_after(lines=1, cpu_s=60)
    # A process of many on a crowded machine; and one that ended, whose time is counted no more.
    assert not start.is_stalled_after(cpu_s=6)
    assert not start.is_stalled_after(cpu_s=-50)


def test_a_start_that_only_looks_around_is_not() -> None:
    start = Start()
    assert not start.is_stalled_after(lines=1, cpu_s=60)
    assert not start.is_stalled_after(seconds=179)
    assert start.is_stalled_after(seconds=1, cpu_s=2.5)
