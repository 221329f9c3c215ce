"""The grid of a sweep, as --grid says it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sage_cli.jobs.settings_file import LIST_FIELDS, assigned, value_of
from sage_cli.jobs.wish import OPTION_OF
from sage_contracts.errors import InvalidRequestError
from sage_contracts.sweeps import Grid, GridWords, grid_points, sweep_name_fault

_WORDS = GridWords(field="--grid ", said_once=OPTION_OF, settings="with --set", max_jobs="--max-jobs")


def parse_grid(given: Sequence[str]) -> Grid:
    """`learning_rate=1e-4,2e-4` and so on. Raises: InvalidRequestError."""
    grid: Grid = {}
    for entry in given:
        name, equals, text = (part.strip() for part in entry.partition("="))
        if not equals or not name or not text:
            raise InvalidRequestError(
                f"--grid {entry!r}: write it as KEY=V1,V2, for example --grid learning_rate=1e-4,2e-4."
            )
        if name in grid:
            raise InvalidRequestError(f"--grid {name} is given twice: put all its values into one.")
        grid[name] = _values(text)
        _require_lists(name, grid[name])
    if not grid:
        raise InvalidRequestError(
            "A sweep needs a grid: --grid learning_rate=1e-4,2e-4 --grid lora.r=4,8. "
            "To train once: sage finetune start."
        )
    return grid


def check_grid(grid: Grid, settings: Sequence[str], name: str | None, *, max_jobs: int) -> None:
    """Refuse what no sweep could be made of, before anything runs. Raises: InvalidRequestError."""
    points = grid_points(grid, max_jobs=max_jobs, words=_WORDS)
    for field in _set_fields(settings):
        if field in grid:
            raise InvalidRequestError(f"{field} is in --set and in --grid: give it to one of them.")
    if name is not None and (fault := sweep_name_fault(name, len(points))):
        raise InvalidRequestError(f"--name: {fault}")


def without_grid(config: Mapping[str, Any], grid: Grid, settings: Sequence[str]) -> dict[str, Any]:
    """Settings without the grid's: what a file or a quick start says gives way to it."""
    dropped = set(grid)
    if "num_train_epochs" in grid and "max_steps" not in _set_fields(settings):
        dropped.add("max_steps")  # they would win over the epochs that are to be compared
    kept = {name: value for name, value in config.items() if name not in dropped}
    if isinstance(kept.get("lora"), dict):
        kept["lora"] = {name: value for name, value in kept["lora"].items() if f"lora.{name}" not in dropped}
    return kept


def _require_lists(name: str, values: Sequence[Any]) -> None:
    field = LIST_FIELDS.get(name)
    if field and any(isinstance(value, str) and value not in field.words for value in values):
        raise InvalidRequestError(
            f"--grid {name}: commas stand between the values, and each value is a list, written as JSON: "
            f"--grid '{name}={field.example},{json.dumps(json.loads(field.example)[:1])}'"
        )


def _set_fields(settings: Sequence[str]) -> set[str]:
    """The fields that --set names, dotted."""
    said = assigned(settings)
    lora = said.get("lora")
    return {*said, *(f"lora.{name}" for name in (lora if isinstance(lora, dict) else ()))}


def _values(text: str) -> list[Any]:
    try:
        # Values that are lists themselves have commas of their own.
        found = json.loads(f"[{text}]")
    except ValueError:
        return [value_of(part.strip()) for part in text.split(",")]
    return list(found)
