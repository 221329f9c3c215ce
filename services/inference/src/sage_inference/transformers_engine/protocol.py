"""What this engine reads of OpenAI's requests, and the bodies that it answers with."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sage_contracts.chat import ChatMessage
from sage_contracts.errors import InvalidRequestError

# Fields that would change the answer and that this engine does not have; vLLM has them.
_UNSUPPORTED = (
    "logprobs",
    "top_logprobs",
    "tools",
    "functions",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "suffix",
    "echo",
)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What chat and plain completions share."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    """vLLM's extension, like the next one; 0 and -1 take all tokens."""
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    """vLLM's extension: tokens that end the answer beside the model's own."""
    seed: int | None = None
    n: Literal[1] | None = None
    response_format: dict[str, Any] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def require_supported(self) -> None:
        """Raises: InvalidRequestError, rather than an answer that ignored what was asked for."""
        extra = self.model_extra or {}
        asked = [name for name in _UNSUPPORTED if extra.get(name)]
        if extra.get("tool_choice") == "none" and "tools" in asked:
            asked.remove("tools")
        if self.response_format and self.response_format.get("type") != "text":
            asked.append("response_format")
        if asked:
            parser = " and set SAGE_TOOL_CALL_PARSER: it takes tools only then" if "tools" in asked else ""
            raise InvalidRequestError(
                f"The transformers engine has no {', '.join(asked)}: leave it out, or install vLLM{parser}.",
                param=asked[0],
            )


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    prompt: str | list[int]


class LoadAdapterRequest(BaseModel):
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterRequest(BaseModel):
    lora_name: str


@dataclass(frozen=True)
class Outcome:
    """How a generation ended."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Shape:
    """The two shapes of an answer; `model` is the name that was asked for."""

    model: str
    is_chat: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(8)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, outcome: Outcome) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": outcome.finish_reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._body(kind, [choice]) | {"usage": outcome.usage}

    def opening(self) -> bytes:
        """The first event of a chat stream: who speaks."""
        return self._event([self._piece({"role": "assistant", "content": ""}, "")]) if self.is_chat else b""

    def piece(self, text: str) -> bytes:
        return self._event([self._piece({"content": text}, text)])

    def closing(self, outcome: Outcome, *, with_usage: bool) -> bytes:
        """The last events: why it ended, what it cost when that was asked for, and the end mark."""
        last = self._event([self._piece({}, "") | {"finish_reason": outcome.finish_reason}])
        usage = self._event([], outcome.usage) if with_usage else b""
        return last + usage + b"data: [DONE]\n\n"

    def _piece(self, delta: dict[str, str], text: str) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self.is_chat else {"text": text}
        return {"index": 0, **said, "finish_reason": None, "logprobs": None}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        body = self._body("chat.completion.chunk" if self.is_chat else "text_completion", choices)
        if usage is not None:
            body["usage"] = usage
        return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
