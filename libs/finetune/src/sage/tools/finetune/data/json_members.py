"""One JSON object that holds the list of rows beside other fields: a large one is read without holding it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TextIO

from sage.tools.finetune.data.conversation import RowError
from sage.tools.finetune.data.json_rows import Found, Scanner
from sage_contracts.errors import InvalidDataError

_SHOWN_FIELDS = 8

Member = tuple[str, Found | Iterator[Found]]
"""A field's name and value; of a list its elements, which have to be taken before the next member."""


@dataclass
class Outline:
    """What says of an object whether it is a row or holds the rows."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Lists with their first element alone."""
    lists: dict[str, int] = field(default_factory=dict)
    """The fields that are lists of objects, and which member each is, from 0."""
    problem: RowError | None = None
    """Why the object could not be read to its end."""
    is_alone: bool = True
    """Whether nothing follows the object."""


def outline_of(text: TextIO) -> Outline:
    """Reads the whole object, and keeps next to nothing of it."""
    scan, found = Scanner(text), Outline()
    for number, (name, value) in enumerate(_members(scan)):
        found.lists.pop(name, None)  # of two fields with one name the last counts
        if isinstance(value, Iterator):
            first: list[Found] = []
            found.fields[name] = first
            are_objects = True
            for element in value:
                are_objects = are_objects and isinstance(element, dict | RowError)
                found.problem = element if isinstance(element, RowError) and scan.is_lost else None
                if not first:
                    first.append(element)
            if first and are_objects:
                found.lists[name] = number
        elif isinstance(value, RowError):
            found.problem = value if scan.is_lost else None
        else:
            found.fields[name] = value
    found.is_alone = scan.is_lost or not scan.peek()
    return found


def member_rows(text: TextIO, number: int) -> Iterator[Found]:
    """The elements of that member, and why the rest of the object cannot be read."""
    scan = Scanner(text)
    for at, (_, value) in enumerate(_members(scan)):
        for found in value if isinstance(value, Iterator) else (value,):
            if at == number or (scan.is_lost and isinstance(found, RowError)):
                yield found


def _members(scan: Scanner) -> Iterator[Member]:
    scan.take("{")
    is_open = scan.peek() != "}"
    if not is_open:
        scan.take("}")
    while is_open:
        name = scan.value()
        if not isinstance(name, str) or scan.peek() != ":":
            is_told = scan.is_lost and isinstance(name, RowError)
            scan.is_lost = True
            yield (
                "",
                name if is_told else scan.broken("a field's name in quotation marks or its : is missing"),
            )
            return
        scan.take(":")
        yield name, scan.elements() if scan.peek() == "[" else scan.value()
        if scan.is_lost:
            return
        sign = scan.peek()
        if sign not in (",", "}"):
            scan.is_lost = True
            yield "", scan.broken("a comma or the object's } is missing")
            return
        scan.take(sign)
        is_open = sign == ","


def no_rows_in(name: str, lists: list[str], fields: Iterable[str]) -> str:
    """What is said of an object that is no row, and holds none or several lists of objects."""
    keys = ", ".join(islice(fields, _SHOWN_FIELDS)) or "none"
    held = f"{len(lists)} lists of objects ({', '.join(lists)}) are" if lists else "no list of objects is"
    return (
        f"{name} holds one JSON object with the fields {keys}, which is not a list of rows nor a row of a "
        f"known format, and {held} in it. Put the rows in a list, [{{...}}, {{...}}], or write one object "
        "per line."
    )


def require_no_columns(name: str, value: dict[str, Any]) -> None:
    """Raises: InvalidDataError for an object with a list of cells, not turns, in every field, or with an
    object of them by their numbers, as pandas writes it."""
    kinds = {type(column) for column in value.values()}
    if kinds not in ({list}, {dict}):
        return
    if all(_are_cells(column) for column in value.values()):
        raise InvalidDataError(
            f"{name} holds columns ({', '.join(value)}), not rows. Write one object per row; pandas does "
            "with to_json(path, orient='records', lines=True)."
        )


def _are_cells(column: list[Any] | dict[str, Any]) -> bool:
    if isinstance(column, dict):
        return all(number.isdecimal() for number in column)
    return not any(isinstance(cell, dict) for cell in column)
