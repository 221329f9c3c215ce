"""The host in front of its own transformers engine: a tiny llama, two adapters, one cold start."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fakes.asgi_server import serving
from tests.fakes.fake_hub import FakeHub
from tests.fakes.inference_rig import running, said
from tests.fakes.model_registry import Registry
from tests.fakes.tiny_llama import make_adapter, make_model

from sage_contracts.inference import EngineState


def test_from_cold_to_two_adapters(tmp_path: Path) -> None:
    registry = Registry()
    base = make_model(tmp_path / "base_models/tiny")
    registry.add("base:tiny", "base_models/tiny")
    for version in (1, 2):
        make_adapter(tmp_path / f"adapters/{version}", base, seed=version)
        registry.add(f"my.code@{version}", "base_models/tiny", Path(f"adapters/{version}"))
    settings = {"engine": "transformers", "vllm_command": "", "engine_threads": 1, "comment_interval_s": 1}
    with running(tmp_path, registry=registry, **settings) as rig:
        lines = rig.stream("my.code@1", max_tokens=12)
        assert lines[0].startswith(": starting engine (") and lines[-1] == "data: [DONE]"
        answers = {name: said(rig.stream(name, max_tokens=12)) for name in registry.models}
        assert len(set(answers.values())) == 3 and answers["my.code@1"] == said(lines)
        engine = rig.engines()[0]
        assert engine.kind == "transformers" and engine.state == EngineState.READY
        assert engine.adapters == ["my.code@1", "my.code@2"]
        refused = rig.ask("base:tiny", tools=[{"type": "function", "function": {"name": "f"}}])
        assert refused.status_code == 400 and "tools" in refused.json()["error"]["message"]


def test_a_base_in_four_bits_is_served_with_adapters(tmp_path: Path) -> None:
    registry = Registry()
    base = in_four_bits(make_model(tmp_path / "plain"), tmp_path / "base_models/small")
    registry.add("base:small", "base_models/small")
    make_adapter(tmp_path / "adapters/1", tmp_path / "plain", seed=1)
    registry.add("code@1", "base_models/small", Path("adapters/1"))
    settings = {"engine": "transformers", "vllm_command": "", "engine_threads": 1}
    with running(tmp_path, registry=registry, **settings) as rig:
        answers = {said(rig.stream(name, max_tokens=12)) for name in registry.models}
        assert len(answers) == 2 and base.name in rig.engines()[0].base_model


def test_a_base_that_is_only_on_a_hub_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, registry = FakeHub(tmp_path / "hub"), Registry()
    make_model(hub.root / "models" / "org" / "tiny")
    registry.add("base:org/tiny", "org/tiny")
    settings = {"engine": "transformers", "vllm_command": "", "engine_threads": 1}
    with serving(hub.app) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        with running(tmp_path, registry=registry, **settings) as rig:
            assert said(rig.stream("base:org/tiny", max_tokens=4))
            assert rig.engines()[0].state == EngineState.READY


def in_four_bits(plain: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True)  # type: ignore[no-untyped-call]
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=bits).save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    return folder
