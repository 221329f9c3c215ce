"""Chat templates in Ollama's language, and the names that llama.cpp has for ways of splitting text."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from sage.tools.finetune.exporting import quantiser
from sage.tools.finetune.exporting.gguf_tokenizer import pre_tokenizer_name
from sage.tools.finetune.exporting.ollama import (
    Message,
    Render,
    go_template,
    has_template,
    modelfile,
    turn_texts,
)
from sage.tools.finetune.exporting.packing import push_to_hub, zip_folder
from sage_contracts.errors import InvalidRequestError, ServiceUnavailableError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA3 = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FOLDS_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<t>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (s if loop.first else '') + m.content + '</t>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<t>model\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise('no system') }}{% endif %}" + CHATML


def renderer(template: str) -> Render:
    compiled = Environment(autoescape=False).from_string(template)

    def render(messages: Sequence[Message], with_answer: bool) -> str:
        rows = [{"role": role, "content": content} for role, content in messages]
        return compiled.render(messages=rows, add_generation_prompt=with_answer)

    return render


conversations = st.builds(
    lambda system, turns: [*([("system", system)] if system is not None else []), *turns],
    st.one_of(st.none(), st.text(min_size=1)),
    st.lists(st.text(min_size=1), min_size=1, max_size=5).map(
        lambda texts: [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    ),
)


@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT, LLAMA3, ZEPHYR])
@given(messages=conversations, with_answer=st.booleans())
def test_the_pieces_of_a_template_write_what_it_writes(
    template: str, messages: list[Message], with_answer: bool
) -> None:
    render = renderer(template)
    turns = turn_texts(render)
    assert turns is not None
    assert turns.render(messages, with_answer) == render(messages, with_answer)


@pytest.mark.parametrize("template", [FOLDS_SYSTEM, NO_SYSTEM, "{{ messages | length }}"])
def test_a_template_that_says_more_is_left_to_ollama(template: str) -> None:
    turns = turn_texts(renderer(template))
    assert turns is None
    text = modelfile("code.gguf", turns, ["<end>"])
    assert text == 'FROM ./code.gguf\nPARAMETER stop "<end>"\n'
    assert not has_template(text)


def test_a_modelfile_says_template_and_stops() -> None:
    turns = turn_texts(renderer(WITH_DEFAULT))
    assert turns is not None
    text = modelfile("code.gguf", turns, ["<|im_end|>", "<|im_end|>"])
    assert text.startswith('FROM ./code.gguf\nTEMPLATE """{{ if not .System }}<|im_start|>system\nBe kind.')
    assert has_template(text)
    assert text.count("PARAMETER stop") == 1
    assert text.count("{{ end }}") == text.count("{{ if ") + text.count("{{ range ")


def test_the_beginning_that_a_tokenizer_writes_itself_is_not_written_twice() -> None:
    turns = turn_texts(renderer(LLAMA3))
    assert turns is not None
    assert "<bos>" in go_template(turns)
    assert "<bos>" not in go_template(turns.without("<bos>"))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(regex: str) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}}, BYTES]}


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (BYTES, "gpt-2"),
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
            "smollm",
        ),
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES]},
            None,
        ),
        (split_by(LLAMA3_SPLIT), "llama-bpe"),
        (split_by(LLAMA3_SPLIT.replace("{1,3}", "")), "qwen2"),
        (split_by(r"\s+"), None),
        ({**BYTES, "add_prefix_space": True}, None),
        ({"type": "Metaspace"}, None),
        (None, None),
    ],
)
def test_a_way_of_splitting_has_llama_cpps_name_or_none(
    pre_tokenizer: dict[str, Any] | None, name: str | None
) -> None:
    assert pre_tokenizer_name({"pre_tokenizer": pre_tokenizer}) == name


def test_four_bits_need_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidRequestError, match=r"llama-quantize.*gguf-q8_0"):
        quantiser.find()
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && /bin/cp "$1" "$2"\n')
    program.chmod(0o755)
    (tmp_path / "f16.gguf").write_bytes(b"weights")
    quantiser.find()(tmp_path / "f16.gguf", tmp_path / "q4.gguf")
    assert (tmp_path / "q4.gguf").read_bytes() == b"weights"


def test_a_zip_holds_the_folder_under_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "code-1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    zip_folder(folder, tmp_path / "code.zip")
    with ZipFile(tmp_path / "code.zip") as archive:
        assert archive.namelist() == ["code-1/config.json", "code-1/model.safetensors"]
        assert archive.testzip() is None


def test_the_hub_needs_a_token_and_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidRequestError, match="HF_TOKEN"):
        push_to_hub(tmp_path, "me/code")
    with pytest.raises(ServiceUnavailableError, match="Connection refused"):
        push_to_hub(tmp_path, "me/code", token="hf_x", endpoint="http://127.0.0.1:9")


class Refusing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(403)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_token_that_may_not_write_is_the_users_to_change(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with pytest.raises(InvalidRequestError, match="me/code"):
                push_to_hub(tmp_path, "me/code", token="hf_x", endpoint=f"http://127.0.0.1:{hub.server_port}")
        finally:
            hub.shutdown()
            thread.join(timeout=10)
