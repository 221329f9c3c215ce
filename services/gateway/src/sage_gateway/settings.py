"""Settings of the gateway, from the environment (prefix SAGE_). Times in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from sage_chat.build import Addresses
from sage_chat.dialect import Endpoint
from sage_chat.upstream import Deadlines
from sage_servicekit.settings import ServiceSettings

OPENAI_URL = "https://api.openai.com/v1"


class GatewaySettings(ServiceSettings):
    gateway_port: int = 8080
    chat_finetune_port: int = 8000
    """The inference host's port on this machine, where SAGE_INFERENCE_URL does not say where it is."""
    tensorboard_url: str = ""
    """Empty: the stack has none, and `status` does not miss it."""

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Comma-separated; empty leaves the gateway open."""
    default_model: str = "mock"
    """Answers requests that name no model, or `default`."""
    default_passages: int = Field(4, ge=1, le=20)
    """Passages put in front of a question when the request names an index."""
    passages_max_bytes: int = Field(3200, ge=1)
    """Of their text together; the CPU engines' context is 2048 tokens."""
    docs_dir: Path | None = None
    """Where docs-public is read from; empty finds the project's own documentation."""

    openai_base_url: str = ""
    openai_api_key: SecretStr | None = Field(
        None, validation_alias=AliasChoices("OPENAI_API_KEY", "openai_api_key")
    )
    vllm_base_url: str = ""
    vllm_api_key: SecretStr | None = None
    ollama_base_url: str = ""

    first_byte_timeout_s: float = 600.0
    """A cold engine has to start within it."""
    stream_silence_s: float = 300.0
    """An answer that pauses for longer has failed; comments count as signs of life."""
    tuned_cache_s: float = 2.0
    served_cache_s: float = 30.0
    """How long the model lists of other backends are believed."""

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [key.strip() for key in value.split(",") if key.strip()] if isinstance(value, str) else value

    @field_validator("openai_api_key", "vllm_api_key", "docs_dir", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        # Compose hands on variables that nobody set as empty ones.
        return None if value == "" else value

    @property
    def is_local(self) -> bool:
        # With keys no page gets anywhere, and proxies like to send the name that the world knows.
        return super().is_local and not self.api_keys

    @property
    def own_url(self) -> str:
        """Where the gateway is reached: as said, else as it listens."""
        is_named = "gateway_url" in self.model_fields_set
        return self.gateway_url if is_named else f"http://{self.host}:{self.gateway_port}"

    @property
    def addresses(self) -> Addresses:
        """Where the backends are."""
        local = f"http://127.0.0.1:{self.chat_finetune_port}"
        is_named = "inference_url" in self.model_fields_set
        key = self.openai_api_key.get_secret_value() if self.openai_api_key else None
        vllm_key = self.vllm_api_key.get_secret_value() if self.vllm_api_key else None
        has_openai = bool(key or self.openai_base_url)
        return Addresses(
            inference_url=self.inference_url.rstrip("/") if is_named else local,
            orchestrator_url=self.orchestrator_url.rstrip("/"),
            openai=Endpoint(self.openai_base_url or OPENAI_URL, key) if has_openai else None,
            vllm=Endpoint(self.vllm_base_url, vllm_key) if self.vllm_base_url else None,
            ollama_url=self.ollama_base_url or "http://127.0.0.1:11434",
            deadlines=Deadlines(
                first_byte_s=self.first_byte_timeout_s, between_bytes_s=self.stream_silence_s
            ),
        )
