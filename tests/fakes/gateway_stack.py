"""A gateway that needs a key, with programs of each backend's dialect behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr
from tests.fakes.asgi_server import serving
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.fake_openai import FakeOpenAI

from sage_gateway.main import build_app
from sage_gateway.settings import GatewaySettings

KEY = "test-key"


@dataclass(frozen=True)
class Stack:
    url: str
    host: FakeOpenAI
    vllm: FakeOpenAI
    cloud: FakeOpenAI
    ollama: FakeOllama

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


@contextmanager
def running(home: Path) -> Iterator[Stack]:
    """A gateway with `code` and `code@1` as tuned models, and `qwen`, `gpt-fake` and `fake-llm` elsewhere."""
    docs = home / "docs"
    docs.mkdir()
    (docs / "memory.md").write_text(
        "# 显存\n\n## Quantisation\n\n" + "8-bit quantisation saves memory. " * 10
    )
    registry, vllm, ollama = FakeOpenAI(("code", "code@1")), FakeOpenAI(("qwen",)), FakeOllama()
    host = FakeOpenAI(("code", "code@1", "base:anything"))
    cloud = FakeOpenAI(("gpt-fake",), api_key="sk-cloud")
    apps = {"r": registry.app, "h": host.app, "v": vllm.app, "c": cloud.app, "o": ollama.app}
    with ExitStack() as servers:
        urls = {name: servers.enter_context(serving(app)) for name, app in apps.items()}
        settings = GatewaySettings(
            home_dir=home,
            docs_dir=docs,
            api_keys=(SecretStr(KEY),),
            orchestrator_url=urls["r"],
            inference_url=urls["h"],
            vllm_base_url=urls["v"],
            openai_base_url=f"{urls['c']}/v1",
            openai_api_key=SecretStr("sk-cloud"),
            ollama_base_url=urls["o"],
        )
        gateway = servers.enter_context(serving(build_app(settings)))
        yield Stack(gateway, host, vllm, cloud, ollama)
