"""An answer while it is made: its text goes out token by token, until one of its ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from sage_inference.transformers_engine.protocol import Outcome
from sage_inference.transformers_engine.text import Detokenizer, StopScanner


class Progress:
    """Sees each token as it is made, sends its text, and says when to stop."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        scanner: StopScanner,
        ends: frozenset[int],
        send: Callable[[str], None],
        cancelled: threading.Event,
    ) -> None:
        self._detokenizer = detokenizer
        self._scanner = scanner
        self._ends = ends
        self._send = send
        self._cancelled = cancelled
        self._count = 0
        self._saw_end = False

    def criterion(self, torch: Any) -> Callable[..., Any]:
        """In the form that `generate` calls after every token, with ids of shape (1, seq)."""

        def check(input_ids: Any, scores: Any, **_: Any) -> Any:
            is_over = self._see(int(input_ids[0, -1]))
            return torch.full((1,), is_over, dtype=torch.bool, device=input_ids.device)

        return check

    def _see(self, token: int) -> bool:
        self._count += 1
        if token in self._ends:
            self._saw_end = True
            return True
        self._say(self._scanner.push(self._detokenizer.push(token)))
        return self._scanner.is_stopped or self._cancelled.is_set()

    def finish(self, prompt_tokens: int) -> Outcome:
        self._say(self._scanner.push(self._detokenizer.flush()))
        self._say(self._scanner.flush())
        is_stop = self._saw_end or self._scanner.is_stopped
        return Outcome("stop" if is_stop else "length", prompt_tokens, self._count)

    def _say(self, text: str) -> None:
        if text:
            self._send(text)
