"""`sage chat` with one question, as people and scripts type it, against a gateway that answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

Sage = Callable[..., Any]
Requests = Callable[[str], list[dict[str, Any]]]


def test_one_question_is_answered_on_standard_output_alone(online: Sage, requests: Requests) -> None:
    ran = online("chat", "--model", "base:m", "-m", "hello", "--system", "be brief", "--temperature", "0")
    assert ran.exit_code == 0
    assert ran.stdout == "base:m says: you asked 'hello' \n"
    assert "starting the engine" in ran.stderr
    body = requests("chat body")[0]["body"]
    assert body == {
        "model": "base:m",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "temperature": 0,
        "stream": True,
    }


def test_an_answer_may_hold_every_line_end_that_unicode_has(online: Sage) -> None:
    ran = online("chat", "--model", "base:a\u2028b\u2029c\x85d", "-m", "hello")
    assert (ran.exit_code, ran.stdout) == (0, "base:a\u2028b\u2029c\x85d says: you asked 'hello' \n")


def test_a_question_through_a_pipe_and_the_environment(
    online: Sage, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_CHAT_BACKEND", "finetune")
    monkeypatch.setenv("SAGE_CHAT_FINETUNE_MODEL", "base:m")
    monkeypatch.setenv("SAGE_API_KEY", "secret")
    ran = online("chat", "--index", "docs-public", "--keep-alive", "0", stdin="what?\n")
    assert ran.exit_code == 0, ran.output
    body = requests("chat body")[0]["body"]
    assert (body["model"], body["index"]) == ("finetune/base:m", "docs-public")
    assert "[1] presets.md#cpu" in ran.stderr
    released = requests("release body")[0]["body"]
    assert (released["model"], released["keep_alive_s"]) == ("finetune/base:m", 0)
    assert {entry["key"] for entry in requests("/v1/chat/completions")} == {"Bearer secret"}


GBK_QUESTION = "什么是LoRA？".encode("gbk")


@pytest.mark.parametrize("ending", [b"", b"\r\n"])
def test_a_question_in_another_encoding_is_read_as_rows_are(
    online: Sage, requests: Requests, ending: bytes
) -> None:
    ran = online("chat", "--model", "base:m", stdin=GBK_QUESTION + ending)
    assert ran.exit_code == 0, ran.output
    assert requests("chat body")[-1]["body"]["messages"][-1]["content"].strip() == "什么是LoRA？"
    assert "The message is read as GB18030." in ran.stderr
    # As Python gives an argument that is not in the terminal's encoding.
    words = [os.fsdecode(text) for text in (GBK_QUESTION, "你是助手。请简短回答。".encode("gbk"))]
    ran = online("chat", "--model", "base:m", "-m", words[0], "--system", words[1])
    assert ran.exit_code == 0, ran.output
    sent = [message["content"] for message in requests("chat body")[-1]["body"]["messages"]]
    assert sent == ["你是助手。请简短回答。", "什么是LoRA？"]


@pytest.mark.parametrize("option", ["-m", "--system", "pipe"])
def test_text_that_makes_sense_in_no_encoding_is_refused_with_what_to_do(online: Sage, option: str) -> None:
    noise = b"x \x80\xff\x81 \x01\xfe"
    if option == "pipe":
        ran = online("chat", "--model", "base:m", stdin=noise)
    else:
        message = () if option == "-m" else ("-m", "hello")
        ran = online("chat", "--model", "base:m", option, os.fsdecode(noise), *message)
    assert ran.exit_code == 2
    what = "system prompt" if option == "--system" else "message"
    assert f"The {what} is not UTF-8: set the terminal to UTF-8" in ran.stderr
    assert "codec" not in ran.stderr


@pytest.mark.parametrize("model", ["mock", "openai/gpt-4o", "vllm/org/m", "ollama/qwen3:8b", "qwen3"])
def test_another_backend_has_no_engine_to_release(online: Sage, requests: Requests, model: str) -> None:
    ran = online("chat", "--model", model, "--keep-alive", "0", "-m", "hello")
    assert (ran.exit_code, ran.stdout) == (0, f"{model} says: you asked 'hello' \n")
    assert "Error" not in ran.stderr
    # A bare name may be a tuned model's: the host is asked.
    assert len(requests("release body")) == (1 if model == "qwen3" else 0)


@pytest.mark.parametrize(
    ("backend", "tuned", "words", "sent"),
    [
        ("finetune", "code", ["--model", "base:m"], "base:m"),
        ("finetune", "code", ["--backend", "finetune", "--model", "base:m"], "finetune/base:m"),
        ("mock", "", ["--finetune-model", "base:m"], "finetune/base:m"),
        ("openai", "code", ["--finetune-model", "base:m"], "finetune/base:m"),
        ("finetune", "base:m", ["--backend", "mock"], "mock"),
        ("mock", "", ["--backend", "finetune", "--finetune-model", "base:m"], "finetune/base:m"),
        ("mock", "base:m", [], "mock"),
    ],
)
def test_a_model_named_on_the_command_line_is_the_one_whatever_the_environment_says(
    online: Sage,
    requests: Requests,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    tuned: str,
    words: list[str],
    sent: str,
) -> None:
    monkeypatch.setenv("SAGE_CHAT_BACKEND", backend)
    monkeypatch.setenv("SAGE_CHAT_FINETUNE_MODEL", tuned)
    ran = online("chat", *words, "-m", "hello")
    assert ran.exit_code == 0, ran.output
    assert requests("chat body")[0]["body"]["model"] == sent


def test_a_wrong_model_name_lists_the_right_ones(online: Sage) -> None:
    ran = online("finetune", "chat", "nope", "-m", "hello")
    assert ran.exit_code == 2
    assert "Models: mock" in ran.stderr


@pytest.mark.parametrize(("question", "told"), [("error", "out of memory"), ("break", "broke off")])
def test_an_answer_that_fails_ends_with_4(online: Sage, question: str, told: str) -> None:
    ran = online("chat", "--model", "base:m", "-m", question)
    assert ran.exit_code == 4
    assert told in ran.stderr
    assert "Traceback" not in ran.output


def test_an_empty_question_is_refused(online: Sage) -> None:
    assert online("chat", "--model", "mock", stdin="").exit_code == 2
