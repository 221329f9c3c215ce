"""Who may allocate on a device. Functions of data; the ledger's rows and locks are elsewhere.

Three rules: granted bytes never exceed the device; an idle engine makes room for a training that waits; what
a training waits for is not given to a new engine meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from sage_contracts.devices import Purpose

GIB = 2**30
_CPU_TRAINING_BYTES = 4 * GIB
_CPU_TRAINING_FRACTION = 0.4


@dataclass(frozen=True)
class Holding:
    """A live lease."""

    holder: str
    purpose: Purpose
    bytes: int
    label: str = ""
    is_idle: bool = False


@dataclass(frozen=True)
class Want:
    """A training that was refused and waits for room."""

    holder: str
    bytes: int
    label: str = ""


@dataclass(frozen=True)
class Ledger:
    total_bytes: int
    holdings: tuple[Holding, ...] = ()
    want: Want | None = None

    def used_bytes(self, *, without: str = "") -> int:
        return sum(held.bytes for held in self.holdings if held.holder != without)


@dataclass(frozen=True)
class Verdict:
    is_granted: bool
    blockers: tuple[Holding | Want, ...] = ()
    """When refused: who is in the way, the largest first."""


def training_bytes(device: str, total_bytes: int) -> int:
    """What a training run leases. On a GPU all of it; on a CPU an estimate that leaves room for an engine."""
    if device != "cpu":
        return total_bytes
    return min(_CPU_TRAINING_BYTES, int(total_bytes * _CPU_TRAINING_FRACTION))


def judge(ledger: Ledger, ask: Holding) -> Verdict:
    """Whether `ask` may have its bytes. Asking again with the same holder resizes what it holds."""
    others = tuple(held for held in ledger.holdings if held.holder != ask.holder)
    held_bytes = ledger.used_bytes() - ledger.used_bytes(without=ask.holder)
    used_bytes = ledger.used_bytes(without=ask.holder)
    if used_bytes + ask.bytes > ledger.total_bytes:
        return Verdict(False, tuple(sorted(others, key=lambda held: -held.bytes)))
    want = ledger.want
    is_growing_engine = ask.purpose == "inference" and ask.bytes > held_bytes
    if want is not None and is_growing_engine and used_bytes + ask.bytes + want.bytes > ledger.total_bytes:
        return Verdict(False, (want,))
    return Verdict(True)


def must_yield(ledger: Ledger) -> frozenset[str]:
    """The idle engines that have to stop for the training that waits: the largest first, no more than needed.

    They are asked even when their room alone is not enough: engines that are idle in turns would otherwise
    keep a training out for ever.
    """
    if ledger.want is None:
        return frozenset()
    missing_bytes = ledger.used_bytes(without=ledger.want.holder) + ledger.want.bytes - ledger.total_bytes
    asked: set[str] = set()
    idle = [held for held in ledger.holdings if held.purpose == "inference" and held.is_idle]
    for held in sorted(idle, key=lambda held: (-held.bytes, held.holder)):
        if missing_bytes <= 0:
            break
        asked.add(held.holder)
        missing_bytes -= held.bytes
    return frozenset(asked)
