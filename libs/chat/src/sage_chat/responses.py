"""OpenAI's Responses API on any chat backend: asked as a chat, and its reply told as a Response."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import ValidationError

from sage_chat.backend import Reply, whole_reply
from sage_chat.completions import to_json
from sage_chat.responses_dialect import called_here, opened
from sage_chat.responses_events import ResponseBuilder, StreamTranslator, response_from
from sage_contracts.errors import ErrorBody, UpstreamError
from sage_contracts.responses import ResponseRequest


async def response_reply(reply: Reply, asked: ResponseRequest) -> Reply:
    """A backend's reply as a Response or as events; refusals blame fields by their names here.

    Raises: UpstreamError.
    """
    if reply.is_stream and reply.status < 400:
        translator = StreamTranslator(ResponseBuilder(opened(asked)))
        return Reply(reply.status, _events(reply, translator), reply.headers, reply.aclose)
    async with aclosing(reply):
        content = b"".join([chunk async for chunk in reply.body])
    if reply.status >= 400:
        return whole_reply(reply.status, _refusal(content, asked), reply.headers)
    try:
        response = response_from(json.loads(content), asked)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UpstreamError("The backend answered with something that is no chat completion.") from error
    return whole_reply(reply.status, response, reply.headers)


def _refusal(content: bytes, asked: ResponseRequest) -> bytes:
    try:
        body = ErrorBody.model_validate_json(content)
    except ValidationError:
        return content
    body.error.param, body.error.message = called_here(body.error.param, body.error.message, asked)
    return to_json(body.model_dump())


async def _events(reply: Reply, translator: StreamTranslator) -> AsyncGenerator[bytes, None]:
    async for chunk in reply.body:
        for event in translator.feed(chunk):
            yield event
    for event in translator.close():
        yield event
