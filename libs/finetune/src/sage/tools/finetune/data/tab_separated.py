"""Tab-separated rows, whose quotation marks some programs write around cells and others leave as they are."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

TAB = "\t"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


class Reader(Protocol):
    """What `csv.reader` gives."""

    line_num: int

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


class Lines:
    """Lines that remember those of the last record, so that they can be read once more."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._again: deque[str] = deque()
        self.taken: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.taken.append(line)
        return line

    def take_again(self) -> None:
        """All that were taken come once more."""
        self._again.extendleft(reversed(self.taken))
        self.taken.clear()

    def keep_first(self) -> str:
        """The first of the lines that were taken; the others come again."""
        first, *others = self.taken
        self._again.extendleft(reversed(others))
        return first


def tab_records(lines: Lines, reader: Reader, columns: int) -> Iterator[list[str]]:
    """The cells of each row. `reader` reads `lines`.

    Where quotation marks do not hold up as such the row is its line, and they are part of their cells; so too
    where they make something else of lines that are all rows without them.
    """
    while True:
        lines.taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            cells = _cells(lines.keep_first())
        else:
            is_odd = len(lines.taken) > 1 or len(cells) != columns
            if is_odd and all(line.count(TAB) == columns - 1 for line in lines.taken):
                cells = _cells(lines.keep_first())
        yield cells


def _cells(line: str) -> list[str]:
    cells = line.rstrip("\r\n").split(TAB)
    return [cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell for cell in cells]
