"""A model for our engine's server that says its answers one piece at a time, when it is let."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sage_inference.transformers_engine.generation import Generator, Prompt
from sage_inference.transformers_engine.protocol import ChatCompletionRequest, GenerationRequest, Outcome


class HeldGenerator(Generator):
    """Says `first`, waits until `go_on` is set, and says ` last`."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    @property
    def adapters(self) -> list[str]:
        return []

    def encode_chat(self, request: ChatCompletionRequest) -> list[Prompt]:
        return [Prompt([1, 2])]

    def require_room(self, prompt: Prompt, request: GenerationRequest) -> None:
        pass

    def generate(
        self,
        prompt: Prompt,
        request: GenerationRequest,
        send: Callable[[str], None],
        cancelled: threading.Event,
    ) -> Outcome:
        send("first")
        self.go_on.wait()
        send(" last")
        return Outcome("stop", len(prompt.ids), 2)
