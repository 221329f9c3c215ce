"""Which model name is sent for what the command line and the environment said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sage_contracts.errors import InvalidRequestError
from sage_contracts.models import ModelCard

_OWN_MODEL_BACKENDS = ("openai", "vllm", "ollama")

# What is asked where somebody chooses the openai backend and no model.
_DEFAULT_OPENAI_MODEL = "gpt-4o-mini"


def choose_model(
    backend: str | None,
    finetune_model: str | None,
    model: str | None,
    list_models: Callable[[], Sequence[ModelCard]],
) -> str:
    """The name for the gateway. Asks for the list of models only where it has to guess.

    Raises: InvalidRequestError that names the choices.
    """
    if backend == "mock":
        return "mock"
    if backend in _OWN_MODEL_BACKENDS:
        return f"{backend}/{_strip(model, backend) or _only_model(backend, list_models)}"
    if backend == "finetune":
        name = _strip(finetune_model or model, "finetune")
        return f"finetune/{name or _only_tuned(list_models)}"
    if model:
        return model
    if finetune_model:
        return f"finetune/{_strip(finetune_model, 'finetune')}"
    return f"finetune/{_only_tuned(list_models)}"


def is_elsewhere(model: str) -> bool:
    """Whether the name says a backend that has no engine of ours; a bare name does not say."""
    return model.partition("/")[0] in ("mock", *_OWN_MODEL_BACKENDS)


def tuned_names(models: Sequence[ModelCard]) -> list[str]:
    """Aliases of tuned models, newest first."""
    found = [card for card in models if card.sage is not None]
    names = [card.sage.name for card in sorted(found, key=lambda card: -card.created) if card.sage]
    return list(dict.fromkeys(names))


def _strip(name: str | None, backend: str) -> str | None:
    return name.removeprefix(f"{backend}/") if name else None


def _only_tuned(list_models: Callable[[], Sequence[ModelCard]]) -> str:
    names = tuned_names(list_models())
    if len(names) == 1:
        return names[0]
    if not names:
        raise InvalidRequestError(
            "There is no tuned model yet. Make one with `sage finetune quickstart code`,"
            " or chat without one: sage chat --backend mock --index docs-public"
        )
    raise InvalidRequestError(
        f"Which model? Tuned models here: {', '.join(names)}. Try: sage chat --finetune-model {names[0]}"
    )


def _only_model(backend: str, list_models: Callable[[], Sequence[ModelCard]]) -> str:
    if backend == "openai":
        return _DEFAULT_OPENAI_MODEL
    names = [
        card.id.removeprefix(f"{backend}/") for card in list_models() if card.id.startswith(f"{backend}/")
    ]
    if len(names) == 1:
        return names[0]
    if not names:
        raise InvalidRequestError(
            f"The {backend} backend offers no model here. Is its server running and configured"
            f" (SAGE_{backend.upper()}_BASE_URL)? Otherwise name one with --model."
        )
    raise InvalidRequestError(f"Which model? {backend} offers: {', '.join(names)}. Name one with --model.")
