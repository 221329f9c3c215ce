"""What this engine reads of OpenAI's requests, and the bodies that it answers with."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sage_contracts.chat import ChatMessage
from sage_contracts.errors import InvalidRequestError
from sage_inference.transformers_engine.fields import ASKING_FOR_NOTHING, WITHOUT_EFFECT


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = False


class GenerationRequest(BaseModel):
    """What chat and plain completions share."""

    model_config = ConfigDict(extra="allow")

    prompt_field: ClassVar[str]
    """What an error about the prompt is about."""
    default_token_limit: ClassVar[int]
    """Of an answer, without one in the request."""
    asking_for_nothing: ClassVar[Mapping[str, Any]]
    """Of fields that it does not act on, the values that it takes all the same."""

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
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    """vLLM's extension: tokens that end the answer beside the model's own."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def require_supported(self) -> None:
        """Raises: InvalidRequestError, rather than an answer that ignored what was asked for."""
        asked = [name for name, value in (self.model_extra or {}).items() if self._asks_for(name, value)]
        if not asked:
            return
        if "tools" in asked:
            instead = "or install vLLM and set SAGE_TOOL_CALL_PARSER: it takes tools only then"
        else:
            instead = "or look in docs/serving.md, Fields of a request, whether vLLM has it"
        raise InvalidRequestError(
            f"The transformers engine has no {', '.join(asked)}: leave it out, {instead}.", param=asked[0]
        )

    def _asks_for(self, name: str, value: Any) -> bool:
        """Whether this field is more than the engine does."""
        if value is None or name in WITHOUT_EFFECT:
            return False
        if name == "tools" and (self.model_extra or {}).get("tool_choice") == "none":
            return False
        return name not in self.asking_for_nothing or bool(value != self.asking_for_nothing[name])


class ChatCompletionRequest(GenerationRequest):
    prompt_field = "messages"
    # A model that does not stop must not hold the queue for a whole context.
    default_token_limit = 1024
    # A template writes its special tokens itself.
    asking_for_nothing = ASKING_FOR_NOTHING | {"logprobs": False, "add_special_tokens": False}

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    prompt_field = "prompt"
    default_token_limit = 16  # OpenAI's
    # No number of logprobs is none: 0 asks for that of the chosen token.
    asking_for_nothing = ASKING_FOR_NOTHING | {"add_special_tokens": True}

    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each of them gets its choice in the answer."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids or not self.prompt else [p for p in self.prompt if not isinstance(p, int)]


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


def usage(outcomes: Sequence[Outcome]) -> dict[str, int]:
    prompt = sum(outcome.prompt_tokens for outcome in outcomes)
    completion = sum(outcome.completion_tokens for outcome in outcomes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


@dataclass(frozen=True)
class Shape:
    """The two shapes of an answer; `model` is the name that was asked for."""

    model: str
    is_chat: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(8)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """One choice for each prompt."""
        choices = [
            self._choice(index, outcome.finish_reason) | self._said(text)
            for index, (text, outcome) in enumerate(zip(texts, outcomes, strict=True))
        ]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._body(kind, choices) | {"usage": usage(outcomes)}

    def opening(self) -> bytes:
        """The first event of a chat stream: who speaks."""
        return (
            self._event([self._piece({"role": "assistant", "content": ""}, "", 0)]) if self.is_chat else b""
        )

    def piece(self, text: str, index: int) -> bytes:
        return self._event([self._piece({"content": text}, text, index)])

    def ending(self, outcome: Outcome, index: int) -> bytes:
        """The last event of a choice: why it ended."""
        return self._event([self._piece({}, "", index) | {"finish_reason": outcome.finish_reason}])

    def closing(self, outcomes: Sequence[Outcome], *, with_usage: bool) -> bytes:
        """What it cost when that was asked for, and the end mark."""
        return (self._event([], usage(outcomes)) if with_usage else b"") + b"data: [DONE]\n\n"

    def _said(self, text: str) -> dict[str, Any]:
        if self.is_chat:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"text": text}

    def _piece(self, delta: dict[str, str], text: str, index: int) -> dict[str, Any]:
        return self._choice(index, None) | ({"delta": delta} if self.is_chat else {"text": text})

    def _choice(self, index: int, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "finish_reason": finish_reason, "logprobs": None}

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
