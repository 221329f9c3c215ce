"""What models there are, asked of everybody and believed for a short while; and where a name goes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from sage_chat.backend import Backend, BackendName
from sage_chat.routing import Route, choose, is_tuned
from sage_contracts.errors import ModelNotFoundError, SageError
from sage_contracts.models import ModelCard

logger = logging.getLogger(__name__)

_OTHERS = (BackendName.VLLM, BackendName.OPENAI, BackendName.OLLAMA)


@dataclass(slots=True)
class _Entry:
    cards: list[ModelCard] | None = None
    """None: the backend did not answer."""
    last_names: set[str] = field(default_factory=set)
    """Of when it last did."""
    asked_at: float = float("-inf")
    """When the question began that `cards` answer: what they say may be as old as that."""
    answered_at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ModelDirectory:
    """One cache entry per backend; concurrent questions for the same list are asked once."""

    def __init__(
        self,
        backends: Mapping[BackendName, Backend],
        *,
        default_model: str,
        tuned_cache_s: float,
        served_cache_s: float,
    ) -> None:
        self._backends = backends
        self._default_model = default_model
        self._ttl_s = dict.fromkeys(_OTHERS, served_cache_s) | {BackendName.FINETUNE: tuned_cache_s}
        self._entries = {name: _Entry() for name in self._ttl_s}

    async def route(self, name: str) -> Route:
        """Where a request for this model goes. Raises: ModelNotFoundError, ServiceUnavailableError."""
        wanted = self._default_model if name in ("", "default") else name
        tuned = await self._names(BackendName.FINETUNE)
        if tuned is None and is_tuned(wanted, self._entries[BackendName.FINETUNE].last_names):
            # Another backend's model of that name would answer in its place.
            return Route(BackendName.FINETUNE, wanted)
        try:
            return choose(wanted, tuned)
        except ModelNotFoundError:
            # Just trained, perhaps; or another backend's.
            tuned, *others = await asyncio.gather(
                self._names(BackendName.FINETUNE, is_fresh=True), *(self._names(name) for name in _OTHERS)
            )
            served = {name: names for name, names in zip(_OTHERS, others, strict=True) if names}
            return choose(wanted, tuned, served)

    async def listing(self) -> list[ModelCard]:
        """What there is to choose from: tuned models as they are called, others with their prefix.

        Bases are left out on purpose: they are what tuned models are made of, and whoever wants to compare
        asks for `base:NAME`. So are checkpoints, which their jobs list.
        """
        # Whoever asks for the list has perhaps just heard that a job is done: ours cost little to ask for.
        tuned, *others = await asyncio.gather(
            self._cards(BackendName.FINETUNE, is_fresh=True), *(self._cards(name) for name in _OTHERS)
        )
        prefixed = [
            card.model_copy(update={"id": f"{name}/{card.id}"})
            for name, cards in zip(_OTHERS, others, strict=True)
            for card in cards or []
        ]
        return [*(tuned or []), *prefixed, *await self._backends[BackendName.MOCK].models()]

    async def forget_tuned(self) -> None:
        """The tuned models have changed: whoever asks next is not answered from before."""
        entry = self._entries[BackendName.FINETUNE]
        async with entry.lock:  # a question that is under way may be answered from before, too
            entry.answered_at = float("-inf")

    async def _names(self, backend: BackendName, *, is_fresh: bool = False) -> set[str] | None:
        cards = await self._cards(backend, is_fresh=is_fresh)
        return None if cards is None else {card.id for card in cards}

    async def _cards(self, backend: BackendName, *, is_fresh: bool = False) -> list[ModelCard] | None:
        entry = self._entries[backend]
        wanted_at = time.monotonic()
        async with entry.lock:
            # While we waited for the lock somebody else may have asked what we would ask now.
            is_new = entry.asked_at >= wanted_at
            is_recent = not is_fresh and entry.answered_at >= wanted_at - self._ttl_s[backend]
            if is_new or is_recent:
                return entry.cards
            asked_at = time.monotonic()
            try:
                entry.cards = await self._backends[backend].models()
                entry.last_names = {card.id for card in entry.cards}
            except SageError as error:
                logger.debug("%s does not list its models: %s", backend, error)
                entry.cards = None
            entry.asked_at, entry.answered_at = asked_at, time.monotonic()
            return entry.cards
