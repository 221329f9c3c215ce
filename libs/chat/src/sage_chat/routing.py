"""Which backend a model name means. Pure: the names that exist are handed in."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sage_chat.backend import BackendName
from sage_contracts.errors import ModelNotFoundError, ServiceUnavailableError
from sage_contracts.models import split_checkpoint

BASE_PREFIX = "base:"
_MAX_LISTED = 30
_PREFIXES = frozenset(str(name) for name in BackendName)


@dataclass(frozen=True, slots=True)
class Route:
    backend: BackendName
    model: str
    """The name as the backend knows it."""


def explicit_route(name: str) -> Route | None:
    """The route of a name that says its backend: `mock`, `vllm/…`, `base:…`; None for a bare name."""
    prefix, slash, rest = name.partition("/")
    if prefix == BackendName.MOCK:
        return Route(BackendName.MOCK, BackendName.MOCK)
    if name.startswith(BASE_PREFIX):
        # Checked before the slash: `base:org/model` is one name.
        return Route(BackendName.FINETUNE, name)
    if slash and rest and prefix in _PREFIXES:
        return Route(BackendName(prefix), rest)
    return None


def choose(
    name: str, tuned: Collection[str] | None, served: Mapping[BackendName, Collection[str]] | None = None
) -> Route:
    """Where a request for `name` goes.

    `tuned` are the names of tuned models (None: nobody could be asked); `served` what other backends offer.
    Raises: ModelNotFoundError, listing the names there are; ServiceUnavailableError when nobody knows them.
    """
    route = explicit_route(name)
    if route is not None and (
        route.backend is not BackendName.FINETUNE or route.model.startswith(BASE_PREFIX)
    ):
        return route
    if route is not None:
        # Where the registry cannot be asked, the inference host will say what it thinks of the name.
        if tuned is None or is_tuned(route.model, tuned):
            return route
        raise not_found(name, tuned, served)
    if tuned is not None and is_tuned(name, tuned):
        return Route(BackendName.FINETUNE, name)
    for backend, names in (served or {}).items():
        # Ollama's own default: a name without a tag means `:latest`.
        if name in names or (backend is BackendName.OLLAMA and f"{name}:latest" in names):
            return Route(backend, name)
    if tuned is None and served is not None:
        raise ServiceUnavailableError(
            f"No other backend has a model {name!r}, and the orchestrator, who knows the tuned ones, "
            "does not answer. See `sage status`, or name a backend: openai/…, vllm/…, ollama/… or mock.",
            source="orchestrator",
            retry_after_s=2,
        )
    raise not_found(name, tuned or (), served)


def is_tuned(name: str, tuned: Collection[str]) -> bool:
    """Whether it is a tuned model's, or a checkpoint's of the job that made one."""
    checkpoint = split_checkpoint(name)
    return (checkpoint[0] if checkpoint else name) in tuned


def not_found(
    name: str, tuned: Collection[str], served: Mapping[BackendName, Collection[str]] | None
) -> ModelNotFoundError:
    """The error for a wrong name: the nearest right one first, then all of them, and how a base is named."""
    offered = [f"{backend}/{model}" for backend, names in (served or {}).items() for model in sorted(names)]
    right = [*sorted(tuned), *offered, str(BackendName.MOCK)]
    near = difflib.get_close_matches(name.rpartition("/")[2], right, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    more = f", … ({len(right)} in all)" if len(right) > _MAX_LISTED else ""
    shown = ", ".join(right[:_MAX_LISTED]) + more
    none_yet = "" if tuned else " None is tuned yet: `sage finetune quickstart code` makes one."
    message = f"There is no model {name!r}.{hint} Models: {shown}.{none_yet}{_base_hint(name)}"
    return ModelNotFoundError(message, param="model")


def _base_hint(name: str) -> str:
    """A job's `model` is its base by the bare name, and looks as if it could be asked."""
    route = explicit_route(name)
    bare = route.model if route and route.backend is BackendName.FINETUNE else name
    if not bare or "@" in bare or (route and route.backend is not BackendName.FINETUNE):
        return ""
    return f" For a base model of that name ask {BASE_PREFIX + bare!r}."
