"""Named things that others may add to: with a decorator, or with an entry point in their own distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A name -> thing table that reads its entry points on first use, not at import.

    An entry point names either the thing itself or a module that registers things when imported.
    """

    def __init__(self, kind: str, group: str) -> None:
        self._kind = kind
        self._group = group
        self._things: dict[str, T] = {}
        self._read_entry_points = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator. Raises: ValueError when the name is taken."""

        def add(thing: T) -> T:
            if name in self._things:
                raise ValueError(f"there is already a {self._kind} named {name!r}")
            self._things[name] = thing
            return thing

        return add

    def get(self, name: str) -> T:
        """Raises: KeyError, naming what there is."""
        self._discover()
        if name not in self._things:
            raise KeyError(f"no {self._kind} named {name!r}; there are: {', '.join(self._things)}")
        return self._things[name]

    def remove(self, name: str) -> None:
        """Raises: KeyError."""
        del self._things[name]

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._discover()
        return iter(tuple(self._things.items()))

    def _discover(self) -> None:
        if self._read_entry_points:
            return
        self._read_entry_points = True
        for entry in entry_points(group=self._group):
            loaded = entry.load()
            if callable(loaded) and entry.name not in self._things:
                self._things[entry.name] = loaded
