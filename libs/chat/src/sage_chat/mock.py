"""The mock backend: no model and no network; answers with what retrieval found, cited by number."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from sage_chat.backend import BackendName, ChatCall, Reply, whole_reply
from sage_chat.completions import DONE, STREAM_HEADERS, Completion, usage
from sage_chat.grounding import question_of, text_of
from sage_contracts.chat import Passage
from sage_contracts.errors import InvalidRequestError
from sage_contracts.models import ModelCard

_MAX_CITED = 3
_MAX_EXCERPT_CHARS = 320
_HAN = re.compile(r"[㐀-鿿]")
_WORD = re.compile(r"[㐀-鿿]|[^\W_]+")
_PIECE = re.compile(r"\s*\S+")


@dataclass(slots=True)
class MockBackend:
    name: BackendName = BackendName.MOCK

    async def stream(self, call: ChatCall) -> Reply:
        messages = call.body.get("messages") or []
        answer = answer_from(question_of(messages), call.passages, has_index=bool(call.body.get("index")))
        counted = usage(sum(len(text_of(m.get("content")).split()) for m in messages), len(answer.split()))
        completion = Completion(call.model)
        if call.is_stream:
            events = _events(completion, answer, counted if call.wants_usage else None)
            return Reply(200, events, dict(STREAM_HEADERS))
        message = {"role": "assistant", "content": answer, "refusal": None}
        return whole_reply(200, completion.whole(message, "stop", counted))

    async def complete(self, call: ChatCall) -> Reply:
        raise InvalidRequestError(
            "The mock backend goes on from no prompt: it only chats.", param="model", source=self.name
        )

    async def embed(self, call: ChatCall) -> Reply:
        raise InvalidRequestError("The mock backend has no embeddings.", param="model", source=self.name)

    async def models(self) -> list[ModelCard]:
        return [ModelCard(id=str(self.name), created=0, owned_by="sage")]


async def _events(
    completion: Completion, answer: str, counted: dict[str, int] | None
) -> AsyncGenerator[bytes, None]:
    yield completion.chunk({"role": "assistant", "content": ""})
    for piece in _PIECE.findall(answer):
        yield completion.chunk({"content": piece})
    yield completion.chunk({}, "stop")
    if counted is not None:
        yield completion.usage_chunk(counted)
    yield DONE


def answer_from(question: str, passages: Sequence[Passage], *, has_index: bool) -> str:
    """What the mock says, in the language of the question."""
    in_chinese = bool(_HAN.search(question))
    asked = " ".join(question.split())[:120]
    if not has_index:
        return (
            "这是 mock 后端，没有调用任何模型。加上索引（例如 docs-public）即可得到带出处的摘录。"
            f"问题：{asked}"
            if in_chinese
            else "This is the mock backend: no model was asked. Name an index (for example docs-public) to "
            f"get cited passages. You said: {asked}"
        )
    if not passages:
        return (
            f"索引中没有找到与“{asked}”相关的内容。请换一种说法，或检查索引名称。"
            if in_chinese
            else f"Nothing was found in the index for “{asked}”. Try other words, or another index."
        )
    cited = passages[:_MAX_CITED]
    opening = "索引中的相关内容：" if in_chinese else "What the index says:"
    excerpts = "\n\n".join(f"{excerpt(passage.text, question)} [{passage.id}]" for passage in cited)
    sources = "\n".join(f"[{passage.id}] {passage.source}" for passage in cited)
    return f"{opening}\n\n{excerpts}\n\n{'出处：' if in_chinese else 'Sources:'}\n{sources}"


def excerpt(text: str, question: str) -> str:
    """The lines of a passage that share most words with the question, cut to a readable length."""
    lines = [
        line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith(("#", "```"))
    ]
    if not lines:
        return text.strip()[:_MAX_EXCERPT_CHARS]
    wanted = set(_WORD.findall(question.lower()))
    shared = [len(wanted & set(_WORD.findall(line.lower()))) for line in lines]
    start = shared.index(max(shared))
    if sum(map(len, lines)) <= _MAX_EXCERPT_CHARS:
        start = 0
    taken: list[str] = []
    for line in lines[start:]:
        if taken and sum(map(len, taken)) + len(line) > _MAX_EXCERPT_CHARS:
            break
        taken.append(line[:_MAX_EXCERPT_CHARS])
    return "\n".join(taken)
