"""What to do next, as functions of what is: no clock, no process, no lock. The host carries it out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from sage_contracts.inference import EngineState

CRASH_WINDOW_S = 600.0
CRASHES_ALLOWED = 3
# Before the second and the third try; the first failure may be a passing lack of memory.
_BACK_OFF_S = (0.0, 2.0, 10.0)


class Action(Enum):
    GRANT = auto()
    START = auto()
    LOAD = auto()
    UNLOAD = auto()
    """Of the adapter in `target`, to make room."""
    STOP = auto()
    """Of the idle engine in `target`; the request is looked at again when it is gone."""
    DRAIN = auto()
    """Let `target` finish what it does and give it nothing new."""
    WAIT = auto()


@dataclass(frozen=True)
class Decision:
    action: Action
    target: str = ""


@dataclass(frozen=True)
class Limits:
    max_engines: int
    max_adapters: int
    keep_alive_s: float


@dataclass(frozen=True)
class AdapterView:
    is_loaded: bool
    is_busy: bool
    last_used: float


@dataclass(frozen=True)
class EngineView:
    key: str
    """The base model's location: one engine per base model."""
    state: EngineState
    is_busy: bool
    last_used: float
    max_rank: int
    adapters: Mapping[str, AdapterView] = field(default_factory=dict)
    is_draining: bool = False
    must_yield: bool = False

    @property
    def can_stop(self) -> bool:
        return self.state is EngineState.READY and not self.is_busy


def decide(
    key: str, adapter: str | None, rank: int, engines: Sequence[EngineView], limits: Limits
) -> Decision:
    """The next step for a request that wants `adapter` (None: the plain base) on the engine `key`."""
    engine = next((candidate for candidate in engines if candidate.key == key), None)
    if engine is None:
        return _make_room(engines, limits)
    if engine.state is not EngineState.READY:
        return Decision(Action.WAIT)
    if engine.is_draining or rank > engine.max_rank:
        return Decision(Action.STOP if engine.can_stop else Action.DRAIN, key)
    if adapter is None:
        return Decision(Action.GRANT)
    return _place_adapter(adapter, engine, limits)


def _make_room(engines: Sequence[EngineView], limits: Limits) -> Decision:
    # Starts are serialised, and wait for stops: two engines measuring memory at once both get it wrong.
    if any(engine.state is not EngineState.READY for engine in engines):
        return Decision(Action.WAIT)
    if len(engines) < limits.max_engines:
        return Decision(Action.START)
    victim = least_recently_used(engines)
    return Decision(Action.STOP, victim) if victim else Decision(Action.WAIT)


def least_recently_used(engines: Sequence[EngineView]) -> str | None:
    """The engine to give up: idle ones only, the one used longest ago."""
    idle = [engine for engine in engines if engine.can_stop]
    return min(idle, key=lambda engine: engine.last_used).key if idle else None


def _place_adapter(name: str, engine: EngineView, limits: Limits) -> Decision:
    known = engine.adapters.get(name)
    if known is not None:
        return Decision(Action.GRANT if known.is_loaded else Action.WAIT)
    if len(engine.adapters) < limits.max_adapters:
        return Decision(Action.LOAD)
    idle = {
        name: slot.last_used for name, slot in engine.adapters.items() if slot.is_loaded and not slot.is_busy
    }
    if not idle or any(not slot.is_loaded for slot in engine.adapters.values()):
        # One on its way out makes the room; more would be thrown out for nothing.
        return Decision(Action.WAIT)
    return Decision(Action.UNLOAD, min(idle, key=lambda name: idle[name]))


def to_stop(engines: Sequence[EngineView], wanted: Collection[str], limits: Limits, now: float) -> list[str]:
    """Idle engines whose time is over, or whose device is wanted by others; never one with requests waiting.

    A yield order also ends an engine that requests wait for: they ask the ledger again, and hear who has it.
    """
    return [
        engine.key
        for engine in engines
        if engine.can_stop
        and (
            engine.must_yield or (engine.key not in wanted and now - engine.last_used >= limits.keep_alive_s)
        )
    ]


@dataclass(frozen=True)
class Gate:
    """Whether an engine that failed may be started again."""

    wait_s: float = 0
    is_refused: bool = False
    """Too many failures: requests fail at once for `wait_s`."""


def restart_gate(failures: Sequence[float], now: float) -> Gate:
    """`failures`: the times of the engine's crashes and failed starts, oldest first."""
    recent = [moment for moment in failures if now - moment < CRASH_WINDOW_S]
    if len(recent) >= CRASHES_ALLOWED:
        return Gate(recent[-CRASHES_ALLOWED] + CRASH_WINDOW_S - now, is_refused=True)
    if not recent:
        return Gate()
    return Gate(max(0.0, recent[-1] + _BACK_OFF_S[len(recent)] - now))
