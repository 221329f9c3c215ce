"""OpenAI's penalties for tokens that an answer has said before, which the library does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_inference.transformers_engine.protocol import GenerationRequest


def penalties(request: GenerationRequest, prompt_tokens: int) -> list[Callable[[Any, Any], Any]]:
    """In the form that `generate` calls before every token, with ids of shape (1, seq); [] for none."""
    presence, frequency = request.presence_penalty or 0.0, request.frequency_penalty or 0.0
    if not presence and not frequency:
        return []

    def lowered(input_ids: Any, scores: Any) -> Any:
        counts = input_ids[0, prompt_tokens:].bincount(minlength=scores.shape[-1])
        return scores - frequency * counts - presence * (counts > 0)

    return [lowered]
