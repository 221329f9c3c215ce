"""Rows of tokens end to end, with what they begin with in common laid down once. Pure; no torch.

A token's hidden state depends on what is before it alone, so that rows with the same beginning (a system
prompt, a document with many questions) have the same states there: they are computed once for all of them.
Gradients of what follows add up in it, as they would over its copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import NamedTuple

SHORTEST_SHARED = 8
"""Tokens. To attend to a shorter piece apart costs as much as it saves."""


class Segment(NamedTuple):
    """Tokens start..stop follow each other; those of stop..end, none at a leaf, go on from the last one."""

    start: int
    stop: int
    end: int


@dataclass(frozen=True)
class PackedRows:
    """Rows in the order of their tokens, as a depth-first walk of the tree of their beginnings."""

    ids: list[int]
    positions: list[int]
    """Of each token within its rows."""
    places: list[list[int]]
    """Of each row as given, where its tokens lie."""
    segments: list[Segment]
    """By their start; together, every token once."""

    @property
    def is_shared(self) -> bool:
        return any(segment.end > segment.stop for segment in self.segments)

    @property
    def unfolded(self) -> list[list[int]]:
        """As `places`, and a row of what was added to fill up, if anything was: no token is left out."""
        filled = list(range(1 + max((row[-1] for row in self.places if row), default=-1), len(self.ids)))
        return [*self.places, *([filled] if filled else [])]


class Beginnings(NamedTuple):
    """How rows begin alike."""

    order: list[int]
    """Indices of the rows by their tokens: those that begin alike are neighbours."""
    shared: list[int]
    """Of each in that order, how many tokens it begins with that the one before it begins with too."""


def beginnings(rows: Sequence[Sequence[int]]) -> Beginnings:
    order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))
    shared = [_common(rows[one], rows[other]) for one, other in pairwise(order)]
    return Beginnings(order, [0, *shared][: len(order)])


def distinct_tokens(rows: Sequence[Sequence[int]]) -> int:
    """Tokens of the rows, where those of a common beginning count once."""
    return tokens_of(range(len(rows)), [len(row) for row in rows], beginnings(rows))


def tokens_of(some: Sequence[int], lengths: Sequence[int], alike: Beginnings) -> int:
    """The same of some of the rows, by their indices."""
    among, total, common = set(some), 0, 0
    for row, shared in zip(*alike, strict=True):
        common = min(common, shared)  # with the last one among them
        if row in among:
            total += lengths[row] - (common if common >= SHORTEST_SHARED else 0)
            common = lengths[row]
    return total


def pack(rows: Sequence[Sequence[int]], granule: int = 1) -> PackedRows:
    """`granule`: the number of tokens is filled up to a multiple of it, by a row of nothing at the end."""
    tree = _Tree()
    places: list[list[int]] = [[] for _ in rows]
    for index, shared in zip(*beginnings(rows), strict=True):
        places[index] = tree.add(rows[index], shared)
    if spare := -len(tree.ids) % granule:
        tree.add([0] * spare, 0)
    return PackedRows(tree.ids, tree.positions, places, tree.finished())


@dataclass
class _Node:
    start: int
    stop: int
    depth: int
    """The position of its first token within its rows."""

    @property
    def deepest(self) -> int:
        return self.depth + self.stop - self.start


@dataclass
class _Tree:
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    path: list[_Node] = field(default_factory=list)
    """From the root to the end of the last row."""
    closed: list[Segment] = field(default_factory=list)

    def add(self, row: Sequence[int], shared: int) -> list[int]:
        """Where the row's tokens lie; `shared` of them are those that the last row begins with too."""
        shared = self._go_back_to(shared)
        start, depth = len(self.ids), shared
        self.ids.extend(row[shared:])
        self.positions.extend(range(shared, len(row)))
        if len(self.ids) > start:
            self.path.append(_Node(start, len(self.ids), depth))
        return [*chain.from_iterable(range(node.start, node.stop) for node in self.path)]

    def _go_back_to(self, shared: int) -> int:
        """Close what the next row does not go through; how much of its beginning is there."""
        while self.path and self.path[-1].depth + SHORTEST_SHARED > shared:
            self._close(self.path.pop())
        if not self.path:
            return 0
        last = self.path[-1]
        if shared < last.deepest:
            cut = last.start + shared - last.depth
            self._close(_Node(cut, last.stop, shared))
            last.stop = cut
        return last.deepest

    def finished(self) -> list[Segment]:
        while self.path:
            self._close(self.path.pop())
        return sorted(self.closed)

    def _close(self, node: _Node) -> None:
        self.closed.append(Segment(node.start, node.stop, len(self.ids)))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs: Iterator[tuple[int, tuple[int, int]]] = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
