"""From a name to a folder of weights, without a hub."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.fakes.tiny_llama import make_model

from sage.tools.finetune.base_models import base_info, default_model, is_builtin, resolve_base
from sage.tools.finetune.hardware import has_cuda
from sage.tools.finetune.modeling import load_tokenizer, read_ahead
from sage_contracts.config import Task
from sage_contracts.errors import ModelNotFoundError


def test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "base_models" / "mine")
    assert resolve_base(str(folder), tmp_path) == folder
    assert resolve_base("base_models/mine", tmp_path) == folder
    assert resolve_base("mine", tmp_path) == folder
    fetched = make_model(tmp_path / "base_models" / "org--model")
    assert resolve_base("org/model", tmp_path) == fetched
    assert base_info(folder) == {}


def test_wrong_folders_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve_base("/no/such/folder", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        resolve_base(str(tmp_path / "empty"), tmp_path)


def test_the_default_depends_on_the_machine() -> None:
    name = default_model(Task.CODE)
    assert name.startswith("Qwen/") == has_cuda()
    assert is_builtin(name) != has_cuda()


def test_an_unreachable_hub_is_said_soon(tmp_path: Path) -> None:
    # A port that is bound but not listened on refuses connections, and stays ours meanwhile.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code = (
            "from pathlib import Path; from sage.tools.finetune.base_models import resolve_base\n"
            f"resolve_base('some/model', Path({str(tmp_path)!r}))"
        )
        began = time.monotonic()
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert run.returncode != 0
    assert "no model hub could be reached" in run.stderr
    assert "--model smollm2-135m" in run.stderr
    assert time.monotonic() - began < 60
    assert not list((tmp_path / "base_models").glob("some*"))


@pytest.mark.weights
def test_the_builtin_model_is_converted_once_and_answers(tmp_path: Path) -> None:
    said: list[str] = []
    folder = resolve_base("smollm2-135m", tmp_path, said.append)
    assert len(said) == 2
    assert base_info(folder)["license"] == "apache-2.0"
    # A chat that names no temperature gets what suits so small a model.
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.2
    assert resolve_base("smollm2-135m", tmp_path, said.append) == folder
    assert len(said) == 2

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**asked, max_new_tokens=12, do_sample=False, pad_token_id=2)
    answer = tokenizer.decode(ids[0, asked["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_a_tokenizer_read_ahead_is_handed_out_once_and_only_while_its_folder_is_the_same(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    read_ahead(base)
    first, second = load_tokenizer(base), load_tokenizer(base)
    assert first is not second
    assert first.get_vocab() == second.get_vocab()

    read_ahead(base)
    (base / "chat_template.jinja").write_text("another one")
    assert load_tokenizer(base).chat_template == "another one"

    read_ahead(base)
    other = shutil.copytree(tiny_base, tmp_path / "other")
    assert load_tokenizer(other).chat_template != "another one"
    with pytest.raises(ModelNotFoundError):
        read_ahead(tmp_path / "none")


def test_reading_ahead_brings_the_code_of_the_base_without_its_weights(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"")  # not even looked at
    code = "import sys; from pathlib import Path; from sage.tools.finetune.modeling import read_ahead; "
    code += "read_ahead(Path(sys.argv[1])); print('transformers.models.llama.modeling_llama' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_base)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "True\n", done.stderr
