"""From tokens to text that may be sent: whole characters only, and nothing of a stop string. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and a token at least one: more than this is no character in the making.
_MAX_PENDING = 4
# White space, a rare character and one of four bytes: what tokenizers that lose text lose.
_PROBE = "a  b\n\n\tc 龘 é 🌻"


def longest_token(tokenizer: Any) -> int | None:
    """The most characters that a token stands for; None where any text may become a single token.

    As the vocabulary spells them, byte by byte for some, tokens are never shorter than what they stand for.
    """
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != _PROBE:
        return None
    return max(len(token) for token in tokenizer.get_vocab())


class Detokenizer:
    """Decodes token by token what decoding the whole would give.

    A token's text depends on its neighbours (leading spaces, characters of several tokens), so each step
    decodes a small window twice and sends the difference.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context_at = 0
        self._sent_to = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        known, whole = self._window()
        if whole.endswith(_UNFINISHED) and len(self._ids) - self._sent_to <= _MAX_PENDING:
            return ""
        self._context_at, self._sent_to = self._sent_to, len(self._ids)
        return whole[len(known) :]

    def flush(self) -> str:
        """What is left at the end, unfinished characters included."""
        known, whole = self._window()
        self._context_at = self._sent_to = len(self._ids)
        return whole[len(known) :]

    def _window(self) -> tuple[str, str]:
        known = self._decode(self._ids[self._context_at : self._sent_to])
        return known, self._decode(self._ids[self._context_at :])


class StopScanner:
    """Holds back text that may be the beginning of a stop string, and ends before one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to send now."""
        if self.is_stopped:
            return ""
        self._held += text
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            safe, self._held = self._held[: min(found)], ""
            return safe
        keep = self._possible_start()
        safe, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return safe

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        left, self._held = self._held, ""
        return left

    def _possible_start(self) -> int:
        """The length of the longest tail that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
