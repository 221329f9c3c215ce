"""Named things that others may add to: with a decorator, or with an entry point in their own distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
A = TypeVar("A")


class Registry(Generic[T]):
    """A name -> thing table that reads its entry points on first use, not at import.

    An entry point names either the thing itself or a module that registers things when imported.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        *,
        keeps_instances: bool = False,
        on_add: Callable[[str], object] = lambda name: None,
    ) -> None:
        """With `keeps_instances` a class that is registered stands for one object made of it; `on_add` is
        told every new name."""
        self._kind = kind
        self._group = group
        self._keeps_instances = keeps_instances
        self._on_add = on_add
        self._things: dict[str, T] = {}
        self._latest_first: tuple[tuple[str, T], ...] | None = None
        self._read_entry_points = False

    def register(self, name: str) -> Callable[[A], A]:
        """Decorator. Raises: ValueError when the name is taken."""

        def add(thing: A) -> A:
            if name in self._things:
                raise ValueError(f"there is already a {self._kind} named {name!r}")
            self._add(name, thing)
            return thing

        return add

    def latest_first(self) -> tuple[tuple[str, T], ...]:
        """Names and things, the one that was registered last first."""
        if self._latest_first is None:
            self._discover()
            self._latest_first = tuple(reversed(self._things.items()))
        return self._latest_first

    def get(self, name: str) -> T:
        """Raises: KeyError, naming what there is."""
        self._discover()
        if name not in self._things:
            raise KeyError(f"no {self._kind} named {name!r}; there are: {', '.join(self._things)}")
        return self._things[name]

    def remove(self, name: str) -> None:
        """Raises: KeyError."""
        del self._things[name]
        self._latest_first = None

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._discover()
        return iter(tuple(self._things.items()))

    def _discover(self) -> None:
        if self._read_entry_points:
            return
        self._read_entry_points = True
        for entry in entry_points(group=self._group):
            loaded = entry.load()
            if not isinstance(loaded, ModuleType) and entry.name not in self._things:
                self._add(entry.name, loaded)

    def _add(self, name: str, thing: Any) -> None:
        self._on_add(name)
        self._things[name] = thing() if self._keeps_instances and isinstance(thing, type) else thing
        self._latest_first = None
