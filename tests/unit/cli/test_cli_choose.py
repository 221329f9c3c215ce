"""Which model name the command line sends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sage_cli.chat.choose import choose_model, tuned_names
from sage_contracts.errors import InvalidRequestError
from sage_contracts.models import ModelCard, ModelInfo


def tuned(name: str, created: int) -> ModelCard:
    info = ModelInfo(name=name, version=1, alias_of=f"{name}@1", base_model="m", adapter_path="p")
    return ModelCard(id=name, created=created, sage=info)


NONE: list[ModelCard] = [ModelCard(id="mock", created=0)]
ONE = [tuned("code", 1), *NONE]
TWO = [tuned("code", 1), tuned("qa", 2), ModelCard(id="ollama/qwen", created=0), *NONE]


@pytest.mark.parametrize(
    ("backend", "finetune_model", "model", "models", "sent"),
    [
        ("finetune", "code", None, NONE, "finetune/code"),
        ("finetune", "finetune/code@3", None, NONE, "finetune/code@3"),
        ("finetune", None, "code", NONE, "finetune/code"),
        ("finetune", None, None, ONE, "finetune/code"),
        (None, None, None, ONE, "finetune/code"),
        (None, "qa", None, TWO, "finetune/qa"),
        (None, None, "base:smollm2-135m", NONE, "base:smollm2-135m"),
        ("mock", "code", None, NONE, "mock"),
        ("openai", None, "gpt-x", NONE, "openai/gpt-x"),
        ("vllm", None, "vllm/m", NONE, "vllm/m"),
        ("ollama", None, None, TWO, "ollama/qwen"),
        # The environment's finetune model is no wish for another backend's.
        ("ollama", "code", None, TWO, "ollama/qwen"),
    ],
)
def test_the_name_that_is_sent(
    backend: str | None, finetune_model: str | None, model: str | None, models: Sequence[ModelCard], sent: str
) -> None:
    assert choose_model(backend, finetune_model, model, lambda: models) == sent


@pytest.mark.parametrize(
    ("backend", "models", "told"),
    [
        (None, NONE, "quickstart code"),
        ("finetune", TWO, "qa, code"),
        ("vllm", NONE, "SAGE_VLLM_BASE_URL"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(
    backend: str | None, models: Sequence[ModelCard], told: str
) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        choose_model(backend, None, None, lambda: models)


def test_tuned_names_are_listed_once_newest_first() -> None:
    assert tuned_names([*TWO, tuned("code", 3)]) == ["code", "qa"]
