"""An inference host in front of fake engines, with the registry that it asks in the test's hand."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tests.fakes import model_registry
from tests.fakes.asgi_server import serving
from tests.fakes.model_registry import Registry

from sage_contracts.inference import EngineStatus, HostStatus
from sage_inference.main import build_app
from sage_inference.settings import InferenceSettings

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
CONFIG = {
    "max_position_embeddings": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 64,
}


def fake_command(*misbehaviour: str | Path | float) -> str:
    """What SAGE_VLLM_COMMAND is set to."""
    return shlex.join([sys.executable, str(FAKE_ENGINE), *map(str, misbehaviour)])


def make_base_folder(folder: Path) -> Path:
    """As much of a base model as a fake engine needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def make_adapter_folder(folder: Path, *, rank: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return folder


@dataclass
class Rig:
    http: httpx.Client
    registry: Registry
    home: Path

    def status(self) -> HostStatus:
        return HostStatus.model_validate_json(self.http.get("/v1/sage/engines").content)

    def engines(self) -> list[EngineStatus]:
        return self.status().engines

    def ask(self, model: str, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=question(model, **fields))

    def stream(self, model: str, **fields: Any) -> list[str]:
        """The lines of the stream that are not empty."""
        body = question(model, stream=True, **fields)
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            return [line for line in response.iter_lines() if line]

    def wait_for(self, what: Callable[[], Any], timeout_s: float = 20) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (found := what()):
            assert time.monotonic() < deadline, f"did not happen within {timeout_s} s: {self.engines()}"
            time.sleep(0.02)
        return found

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.home / "logs").glob("engine-*.log"))


def question(model: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say something."}]
    return {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0} | fields


def said(lines: list[str]) -> str:
    """The text of a stream."""
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(
        event["choices"][0]["delta"].get("content", "") for event in events if event.get("choices")
    )


@contextmanager
def running(
    home: Path, *misbehaviour: str | Path | float, registry: Registry | None = None, **settings: Any
) -> Iterator[Rig]:
    """A host with the models `code`, `code@2`, `base:tiny` on one base and `other` on another."""
    registry = registry or make_registry(home)
    fields: dict[str, Any] = {"comment_interval_s": 0.2, "beat_interval_s": 0.1, "engine_stop_grace_s": 1}
    with serving(model_registry.build_app(registry, home)) as registry_url:
        fields |= {"vllm_command": fake_command(*misbehaviour), "engine": "vllm", "device": "cpu"}
        app = build_app(
            InferenceSettings(home_dir=home, orchestrator_url=registry_url, **(fields | settings))
        )
        with serving(app) as url, httpx.Client(base_url=url, timeout=30) as http:
            yield Rig(http, registry, home)


def make_registry(home: Path) -> Registry:
    registry = Registry()
    base, other = make_base_folder(home / "base_models/tiny"), make_base_folder(home / "base_models/other")
    registry.add("base:tiny", base.relative_to(home))
    for name in ("code@1", "code@2"):
        folder = make_adapter_folder(home / "finetune_output" / name.replace("@", "/versions/"))
        registry.add(name, base.relative_to(home), folder.relative_to(home))
    registry.add("big@1", base.relative_to(home), make_adapter_folder(home / "adapters/big", rank=48))
    registry.models["code"] = registry.models["code@1"]
    registry.add("base:other", other)
    return registry
