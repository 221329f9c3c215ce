"""Our own engine's model: what one request or adapter leaves behind for the next."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.fakes.tiny_llama import make_adapter, make_model

from sage_inference.transformers_engine.generation import Generator
from sage_inference.transformers_engine.protocol import CompletionRequest, Outcome


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def generator(base: Path) -> Generator:
    return Generator(str(base), device="cpu", dtype="auto", max_model_len=512)


def answer(generator: Generator, model: str = "base", **fields: object) -> tuple[str, Outcome]:
    asked = {"model": model, "prompt": "hello", "max_tokens": 16, "temperature": 0, **fields}
    request = CompletionRequest.model_validate(asked)
    [prompt] = generator.encode_text(request)
    pieces: list[str] = []
    outcome = generator.generate(prompt, request, pieces.append, threading.Event())
    return "".join(pieces), outcome


def say(generator: Generator, model: str = "base", **fields: object) -> str:
    text, _ = answer(generator, model, **fields)
    return text


def test_a_seed_is_for_its_own_answer_only(generator: Generator) -> None:
    seeded, free = [], []
    for _ in range(2):
        seeded.append(say(generator, temperature=1, max_tokens=64, seed=7))
        free.append(say(generator, temperature=1, max_tokens=64))
    assert seeded[0] == seeded[1]
    assert free[0] != free[1]


@pytest.mark.parametrize(("prompt_tokens", "tokens"), [(3, 16), (510, 2)], ids=["room", "less room"])
def test_a_plain_completion_without_a_limit_has_16_tokens(
    generator: Generator, prompt_tokens: int, tokens: int
) -> None:
    _, outcome = answer(generator, prompt=[40] * prompt_tokens, max_tokens=None)
    assert (outcome.completion_tokens, outcome.finish_reason) == (tokens, "length")


def said_by_hand(base: Path, *, presence: float, frequency: float) -> str:
    """What is likeliest token by token, less what OpenAI's reference takes off for those said before."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    prompt = tokenizer("hello")["input_ids"]
    said: list[int] = []
    with torch.inference_mode():
        for _ in range(48):
            logits = model(torch.tensor([prompt + said])).logits[0, -1]
            for token in set(said):
                logits[token] -= frequency * said.count(token) + presence
            said.append(int(logits.argmax()))
    return str(tokenizer.decode(said, skip_special_tokens=True))


@pytest.mark.parametrize(("presence", "frequency"), [(0.0, 0.0), (1.5, 0.0), (0.0, 0.7), (-2.0, 2.0)])
def test_penalties_are_those_of_openai(
    generator: Generator, base: Path, presence: float, frequency: float
) -> None:
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency}
    text = say(generator, max_tokens=48, **penalties)
    assert text == said_by_hand(base, presence=presence, frequency=frequency)
    assert (text == say(generator, max_tokens=48)) is not any(penalties.values())


@pytest.mark.parametrize("trained_whole", [[], ["lm_head"]], ids=["lora", "lora and lm_head"])
def test_the_base_is_itself_again_without_its_last_adapter(
    generator: Generator, base: Path, tmp_path: Path, trained_whole: list[str]
) -> None:
    adapter = make_adapter(tmp_path / "a", base, modules_to_save=trained_whole)
    before = say(generator)
    generator.load_adapter("a@1", adapter)
    assert say(generator, "a@1") != before
    assert say(generator) == before
    generator.unload_adapter("a@1")
    assert say(generator) == before
    assert generator.adapters == []
