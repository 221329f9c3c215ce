"""Texts to tokenise together: enough to keep every core at work, and no more than fits into memory."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")

MOST_TEXTS = 1000
MOST_CHARACTERS = 2_000_000
"""For rows of books and logs: the tokens of so many take some 350 MB while their places are at hand."""


class TextBatch(Generic[T]):
    """What was added since the last `take`. A single text may be longer than a batch should be."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._characters = 0

    def add(self, item: T, text: str) -> None:
        """`item` is what is kept of the text."""
        self._items.append(item)
        self._characters += len(text)

    @property
    def is_full(self) -> bool:
        return len(self._items) >= MOST_TEXTS or self._characters >= MOST_CHARACTERS

    def take(self) -> list[T]:
        items, self._items, self._characters = self._items, [], 0
        return items
