"""How things look: consoles, tables, numbers for people. Plain lines where the output is no terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import datetime

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

# C0 and C1 but for tab and newline.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# Of tables, in cells: between columns; what is no long cell; the least of the cut column and of a header.
_GAP = 2
_LONG_CELL = 13
_LEAST_FLEXIBLE = 8
_LEAST_HEADER = 5
# Below this width in cells, a table that would lose text is shown as blocks.
_NARROW = 60


def output() -> Console:
    """Standard output. Rich reads NO_COLOR, TERM and COLUMNS."""
    return Console(highlight=False, emoji=False)


def error_console() -> Console:
    """Standard error: errors and progress of commands whose output is data."""
    return Console(stderr=True, highlight=False, emoji=False)


def can_show(signs: str, console: Console) -> bool:
    """True where the terminal's encoding has all of these signs."""
    try:
        signs.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def without_controls(text: str) -> str:
    """What a terminal only shows: escapes in what others wrote would set its title, clipboard or keys."""
    return _CONTROLS.sub("", text)


def mark(state: str, console: Console) -> Text:
    """A sign for `ok`, `bad`, `warn` or `wait`, as a word where the terminal has no such sign."""
    signs = {"ok": ("✓", "green"), "bad": ("✗", "red"), "warn": ("!", "yellow"), "wait": ("·", "cyan")}
    sign, colour = signs[state]
    words = {"ok": "ok", "bad": "failed", "warn": "!", "wait": "-"}
    return Text(sign if can_show(sign, console) else words[state], style=colour)


def line(console: Console, state: str, text: str | Text) -> None:
    """One marked line. Brackets in it, as file names may have them, are no markup."""
    shown = Text(text) if isinstance(text, str) else text
    console.print(mark(state, console), shown, soft_wrap=not console.is_terminal)


def table(
    console: Console, headers: Sequence[str], rows: Sequence[Sequence[str]], flexible: int = -1
) -> None:
    """Rows under headers. `flexible` is the column that is shortened first on narrow terminals.

    In a pipe nothing is ever shortened: columns are padded, and the last one is left open.
    """
    if not console.is_terminal:
        _plain_table(headers, rows)
        return
    styled = [[Text(cell) for cell in row] for row in rows]
    console.print(grid(headers, styled, console.width, flexible))


def pairs(rows: Sequence[tuple[str, Text]]) -> Table:
    """Names and values for a terminal, one a line; long values continue under themselves."""
    shown = Table.grid(padding=(0, _GAP, 0, 0))
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows:
        shown.add_row(Text(f"  {name}"), value)
    return shown


def grid(
    headers: Sequence[str], rows: Sequence[Sequence[Text]], width: int, flexible: int = -1
) -> RenderableType:
    """The same for a terminal of `width` cells, which misses no column however narrow it is.

    Where cutting the flexible column is not enough, headers are cut to their cells, and then the widest cells
    go over several lines, the first column's last: names are there to be typed again. On a narrow one, where
    that would break the names too, a row that does not fit is a block of lines.
    """
    flexible %= len(headers)
    cells = [max((row[column].cell_len for row in rows), default=0) for column in range(len(headers))]
    room = width - _GAP * len(headers)
    if width < _NARROW and sum(cells) > room:
        return Group(*(part for row in rows for part in _block(headers, row)))
    widths = _fitting(cells, [cell_len(header) for header in headers], flexible, room)
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for number, header in enumerate(headers):
        title = Text(header, no_wrap=True, overflow="ellipsis")
        is_cut = number == flexible
        shown.add_column(
            title, width=widths[number], no_wrap=is_cut, overflow="ellipsis" if is_cut else "fold"
        )
    for row in rows:
        shown.add_row(*row)
    return shown


def _block(headers: Sequence[str], row: Sequence[Text]) -> tuple[Text, Table]:
    """What names the row, and the rest of it below."""
    named = zip(headers[1:], row[1:], strict=True)
    return row[0], pairs([(header.lower(), cell) for header, cell in named if cell.plain])


def _fitting(cells: Sequence[int], headers: Sequence[int], flexible: int, room: int) -> list[int]:
    """Widths that sum to `room` at most (1 at least each)."""
    widths = [max(pair) for pair in zip(cells, headers, strict=True)]
    excess = max(0, sum(widths) - room)
    widths[flexible] = max(min(widths[flexible], _LEAST_FLEXIBLE), widths[flexible] - excess)
    least = [max(cell, min(header, _LEAST_HEADER)) for cell, header in zip(cells, headers, strict=True)]
    while sum(widths) > max(room, len(widths)):
        widths[max(range(len(widths)), key=lambda column: _can_give(column, widths, least))] -= 1
    return widths


def _can_give(column: int, widths: Sequence[int], least: Sequence[int]) -> tuple[bool, bool, int]:
    """The largest gives first: what only its header needs, then long cells except those that name the row."""
    return widths[column] > least[column], column > 0 and widths[column] > _LONG_CELL, widths[column]


def _plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [headers, *rows]) for column in range(len(headers))]
    for row in [headers, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def bytes_text(count: int) -> str:
    """1536 → `1.5 KiB`."""
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def seconds_text(seconds: float) -> str:
    """75 → `1:15`, 4000 → `1:06:40`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clock_text(timestamp: float) -> str:
    """A moment in local time, `2030-01-31 12:00:05`."""
    return datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d %H:%M:%S")


def age_text(timestamp: float, now: float) -> str:
    """How long ago, in the largest whole unit."""
    seconds = max(0, now - timestamp)
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (129600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
