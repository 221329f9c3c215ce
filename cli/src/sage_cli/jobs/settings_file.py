"""Training settings from --config and --set, checked against TrainingConfig before anything is sent."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sage_contracts.config import LoRAConfig, TrainingConfig, overlay
from sage_contracts.errors import InvalidRequestError

_SUFFIXES = (".json", ".yaml", ".yml", ".toml")


def gather(config: Path | None, settings: Sequence[str]) -> dict[str, Any]:
    """The sparse settings, --set over the file. Raises: InvalidRequestError naming the field."""
    said: dict[str, Any] = {}
    for setting in settings:
        _assign(said, setting)
    fields = overlay(read_file(config), said) if config else said
    check(fields)
    return fields


def read_file(path: Path) -> dict[str, Any]:
    """A settings file as nested fields. Raises: InvalidRequestError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"--config {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise InvalidRequestError(f"--config {path} is no UTF-8 text.") from None
    content = _parse(path, text)
    if not isinstance(content, dict):
        raise InvalidRequestError(f"--config {path} has to hold fields with values, such as `max_steps: 40`.")
    return content


def check(fields: dict[str, Any]) -> None:
    """Refuse unknown fields and values, with the nearest right name. Raises: InvalidRequestError."""
    try:
        TrainingConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InvalidRequestError(
                f"There is no training setting {name!r}.{_nearest(name)}", param=name
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        raise InvalidRequestError(
            f"{f'{name}: ' if name else ''}{message}{given}.", param=name or None
        ) from None


def _parse(path: Path, text: str) -> Any:
    try:
        match path.suffix.lower():
            case ".json":
                return json.loads(text)
            case ".toml":
                import tomllib

                return tomllib.loads(text)
            case ".yaml" | ".yml":
                return _yaml(text)
    except ValueError as error:
        raise InvalidRequestError(f"--config {path} is not valid: {error}.") from error
    raise InvalidRequestError(f"--config {path}: its name has to end in {', '.join(_SUFFIXES)}.")


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _assign(fields: dict[str, Any], setting: str) -> None:
    name, equals, text = setting.partition("=")
    if not equals or not name.strip():
        raise InvalidRequestError(
            f"--set {setting!r}: write it as KEY=VALUE, for example --set max_steps=40."
        )
    *folders, last = name.strip().split(".")
    target = fields
    for folder in folders:
        inner = target.setdefault(folder, {})
        if not isinstance(inner, dict):
            raise InvalidRequestError(f"--set {setting!r}: {folder} has no fields of its own.")
        target = inner
    target[last] = value_of(text.strip())


def value_of(text: str) -> Any:
    """A setting's value as it is typed: JSON, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def _nearest(name: str) -> str:
    known = [*TrainingConfig.model_fields, *(f"lora.{field}" for field in LoRAConfig.model_fields)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else f" The settings are: {', '.join(known)}."
