"""What pydantic found wrong, as one sentence about one field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from sage_contracts import errors

_SOURCES = ("body", "query", "path", "header")
# How pydantic names the members of a union inside a place: no field of ours, and nothing that a client wrote.
_MEMBER = re.compile(r"literal\[.*\]|constrained-\w+|function-[\w-]+\[.*\]|(list|dict|tuple|set)\[.*\]")
# These are members only beside one of those: a client may have a key of such a name.
_PLAIN_MEMBERS = frozenset({"str", "int", "float", "bool"})

# Their messages speak of dictionaries and name classes of ours.
_OBJECT_TYPES = frozenset({"model_type", "model_attributes_type", "dataclass_type", "dict_type"})


@contextmanager
def of_the_request() -> Iterator[None]:
    """What pydantic refuses in here came with the request. Raises: InvalidRequestError."""
    try:
        yield
    except ValidationError as error:
        raise describe_validation(error.errors()) from error


def describe_validation(problems: Sequence[Mapping[str, Any]]) -> errors.InvalidRequestError:
    """The first field that is wrong as a sentence, and how many more there are."""
    first = problems[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", first["msg"])
        return errors.InvalidRequestError(f"The body is not JSON: {why}.")
    where, sentence = first_problem(problems)
    places = _places(problems)
    others = len({place for place in places if place[: len(places[0])] != places[0]})
    more = f" ({others} more)" if others else ""
    return errors.InvalidRequestError(f"{where or 'body'}: {sentence}{more}", param=where or None)


def first_problem(problems: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(the first field that is wrong or "", what is wrong with it)."""
    places = _places(problems)
    place = places[0]
    about = [problem for problem, its in zip(problems, places, strict=True) if its == place]
    literals = [problem for problem in about if problem["type"] == "literal_error"]
    # Of a field that takes a word or a number, what is wrong with the number says more.
    told = next((problem for problem in about if problem not in literals), about[0])
    is_object = told["type"] in _OBJECT_TYPES
    sentence = "Input should be an object" if is_object else str(told["msg"]).removeprefix("Value error, ")
    if literals and told not in literals:
        words = " or ".join(str(problem["ctx"]["expected"]) for problem in literals).replace("'", '"')
        given = json.dumps(told["input"], ensure_ascii=False, default=str)
        sentence += f", or {words} (given: {given if len(given) <= 60 else given[:59] + '…'})"
    return ".".join(place), sentence


def _places(problems: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    unions = {
        problem["loc"][:at]
        for problem in problems
        for at, part in enumerate(problem["loc"])
        if isinstance(part, str) and _MEMBER.fullmatch(part)
    }
    return [_place(problem["loc"], unions) for problem in problems]


def _place(loc: tuple[str | int, ...], unions: Set[tuple[str | int, ...]]) -> tuple[str, ...]:
    def is_field(at: int, part: str | int) -> bool:
        is_member = isinstance(part, str) and (part in _PLAIN_MEMBERS or _MEMBER.fullmatch(part))
        return not (is_member and loc[:at] in unions) and not (at == 0 and part in _SOURCES)

    return tuple(str(part) for at, part in enumerate(loc) if is_field(at, part))
