"""Training settings from --config and --set, checked against TrainingConfig before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidRequestError
from sage_contracts.jobs import Seed
from sage_contracts.setting_names import no_such_setting

_SUFFIXES = (".json", ".yaml", ".yml", ".toml")


class ListField(NamedTuple):
    """A setting that takes a list of words."""

    example: str
    """As JSON."""
    words: tuple[str, ...] = ()
    """What it takes instead of a list."""
    is_prose: bool = False
    """Its words are sentences, which may have commas."""


LIST_FIELDS = {
    "code_kinds": ListField('["docstring_body","fill_middle"]'),
    "lora.target_modules": ListField('["q_proj","v_proj"]', ("all-linear",)),
    "oom_ladder": ListField('["halve_batch","load_in_8bit"]', ("least_harm", "published", "off")),
    "report_to": ListField('["tensorboard","wandb"]'),
    "wandb_tags": ListField('["first","small"]'),
    "sample_prompts": ListField('["Hello!","Who are you?"]', is_prose=True),
}


def assigned(settings: Sequence[str]) -> dict[str, Any]:
    """What --set says, as nested fields; not checked yet. Raises: InvalidRequestError."""
    said: dict[str, Any] = {}
    for setting in settings:
        _assign(said, setting)
    return said


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
        # A bound of jobs only: the field itself takes what was stored before there was one.
        _WithSeed.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error.errors()) from None


class _WithSeed(BaseModel):
    seed: Seed = 0


def _refusal(problems: Sequence[ErrorDetails]) -> InvalidRequestError:
    """What is wrong with the first wrong field; of one that takes this or that, with what came nearest."""
    about = [problem for problem in problems if _place(problem)[:1] == _place(problems[0])[:1]]
    problem = max(about, key=lambda problem: len(_place(problem)))
    name = ".".join(_place(problem))
    if problem["type"] == "extra_forbidden":
        return InvalidRequestError(no_such_setting(name), param=name)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "list_type":
        message = f"give a list, such as {LIST_FIELDS[name].example}"
    given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
    return InvalidRequestError(f"{f'{name}: ' if name else ''}{message}{given}.", param=name or None)


def _place(problem: ErrorDetails) -> tuple[str, ...]:
    # Without pydantic's names of a union's members, `list[str]` and such.
    return tuple(str(part) for part in problem["loc"] if "[" not in str(part))


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
    target[last] = _listed(name.strip(), value_of(text.strip()))


def _listed(name: str, value: Any) -> Any:
    """A list that is typed as its words, `q_proj,v_proj` or, as a shell leaves JSON, `[q_proj,v_proj]`."""
    field = LIST_FIELDS.get(name)
    if field is None or not isinstance(value, str) or value in field.words:
        return value
    if field.is_prose:
        return value if value.startswith("[") else [value]
    words = value.removeprefix("[").removesuffix("]").split(",")
    return [word.strip() for word in words if word.strip()]


def value_of(text: str) -> Any:
    """A setting's value as it is typed: JSON, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)
