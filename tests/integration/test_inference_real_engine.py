"""The host in front of its own transformers engine: a tiny llama, two adapters, one cold start."""

from __future__ import annotations

from pathlib import Path

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


def in_four_bits(plain: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True)  # type: ignore[no-untyped-call]
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=bits).save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    return folder
