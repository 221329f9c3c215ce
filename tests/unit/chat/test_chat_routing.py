from __future__ import annotations

import pytest

from sage_chat.backend import BackendName
from sage_chat.routing import Route, choose, explicit_route, not_found
from sage_contracts.errors import ModelNotFoundError, ServiceUnavailableError

TUNED = {"code", "code@1", "code@3", "qa"}
SERVED = {
    BackendName.VLLM: {"Qwen/Qwen2.5-0.5B"},
    BackendName.OPENAI: {"gpt-4o-mini"},
    BackendName.OLLAMA: {"qwen3:latest", "llama3.2:1b"},
}


@pytest.mark.parametrize("wrong", ["code@2:ckpt-step-2", "code@1:ckpt-step-", "code@1:ckpt-step-x"])
def test_a_checkpoint_of_a_version_that_is_not_there_is_refused(wrong: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"There is no model '{wrong}'.*code@1"):
        choose(wrong, TUNED, SERVED)


@pytest.mark.parametrize(
    ("name", "backend", "model"),
    [
        ("mock", BackendName.MOCK, "mock"),
        ("mock/anything", BackendName.MOCK, "mock"),
        ("openai/gpt-4o-mini", BackendName.OPENAI, "gpt-4o-mini"),
        ("vllm/Qwen/Qwen2.5-0.5B", BackendName.VLLM, "Qwen/Qwen2.5-0.5B"),
        ("ollama/llama3.2:1b", BackendName.OLLAMA, "llama3.2:1b"),
        ("finetune/code", BackendName.FINETUNE, "code"),
        ("finetune/code@3", BackendName.FINETUNE, "code@3"),
        ("base:smollm2-135m", BackendName.FINETUNE, "base:smollm2-135m"),
        ("base:Qwen/Qwen2.5-0.5B", BackendName.FINETUNE, "base:Qwen/Qwen2.5-0.5B"),
        ("finetune/base:smollm2-135m", BackendName.FINETUNE, "base:smollm2-135m"),
        ("code", BackendName.FINETUNE, "code"),
        ("code@1", BackendName.FINETUNE, "code@1"),
        ("code@1:ckpt-step-2", BackendName.FINETUNE, "code@1:ckpt-step-2"),
        ("finetune/code:ckpt-step-2", BackendName.FINETUNE, "code:ckpt-step-2"),
        ("Qwen/Qwen2.5-0.5B", BackendName.VLLM, "Qwen/Qwen2.5-0.5B"),
        ("gpt-4o-mini", BackendName.OPENAI, "gpt-4o-mini"),
        ("llama3.2:1b", BackendName.OLLAMA, "llama3.2:1b"),
        ("qwen3", BackendName.OLLAMA, "qwen3"),
    ],
)
def test_a_name_picks_its_backend(name: str, backend: BackendName, model: str) -> None:
    assert choose(name, TUNED, SERVED) == Route(backend, model)


@pytest.mark.parametrize("name", ["code", "org/model", "vllm/", "", "openai"])
def test_names_without_a_backend_are_not_explicit(name: str) -> None:
    assert explicit_route(name) is None


def test_a_tuned_model_wins_over_a_served_one_of_the_same_name() -> None:
    assert choose("code", {"code"}, {BackendName.VLLM: {"code"}}).backend is BackendName.FINETUNE


@pytest.mark.parametrize("name", ["cod", "finetune/cod", "code@9"])
def test_a_wrong_name_lists_the_right_ones_and_the_nearest_first(name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        choose(name, TUNED, SERVED)
    message = caught.value.message
    assert "Did you mean 'code" in message
    for right in ("qa", "code@3", "vllm/Qwen/Qwen2.5-0.5B", "ollama/qwen3:latest", "mock"):
        assert right in message


@pytest.mark.parametrize("name", ["smollm2-135m", "finetune/smollm2-135m"])
def test_a_jobs_base_by_its_bare_name_is_told_what_to_ask_for(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"For a base model of that name ask 'base:smollm2-135m'\."):
        choose(name, TUNED, SERVED)


@pytest.mark.parametrize("name", ["vllm/nothing", "code@9", ""])
def test_what_names_no_base_is_not_told_of_one(name: str) -> None:
    assert "base:" not in not_found(name, TUNED, SERVED).message


def test_a_long_list_is_cut_and_counted() -> None:
    with pytest.raises(ModelNotFoundError, match=r"\(501 in all\)"):
        choose("zzz", {f"model-{number}" for number in range(500)}, {})


def test_without_the_registry_a_bare_name_is_not_called_wrong() -> None:
    with pytest.raises(ServiceUnavailableError, match="orchestrator"):
        choose("code", None, SERVED)
    # With the prefix the inference host decides; it may have the model loaded.
    assert choose("finetune/code", None) == Route(BackendName.FINETUNE, "code")
    assert choose("gpt-4o-mini", None, SERVED).backend is BackendName.OPENAI
