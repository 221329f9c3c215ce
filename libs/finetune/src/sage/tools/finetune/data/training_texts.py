"""The texts that training makes of a conversation: by the engine's own reading of the chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sage.tools.finetune.chat_template import ChatTemplate, UnlearnableRowError
from sage.tools.finetune.data.conversation import Conversation, RowError
from sage.tools.finetune.data.frames import LearnedText, Rendering

Apply = Callable[..., str]
"""(messages, tools, **options) -> text. May raise."""


def training_texts(source: str, apply: Apply, added: dict[str, int], name: str) -> Rendering:
    """The rendering for the model `name`. Raises: InvalidDataError when it has no chat template."""
    template = ChatTemplate(_TemplateAlone(source, apply, added))

    def rendering(row: Conversation) -> list[LearnedText]:
        try:
            return [LearnedText(found.text, found.learned) for found in template.rendered(row)]
        except UnlearnableRowError as error:
            raise RowError("row", f"cannot be learned by {name}: {error.reason}") from error

    return rendering


class _TemplateAlone:
    """As much of a tokenizer of transformers as rendering asks for, without the seconds of its import."""

    def __init__(self, source: str, apply: Apply, added: dict[str, int]) -> None:
        self.chat_template = source
        self._apply = apply
        self._added = added

    def get_added_vocab(self) -> dict[str, int]:
        return self._added

    def get_chat_template(self, tools: Any) -> str:
        return ""  # markers only narrow what is learned: where they do it wrongly, every row shows it

    def apply_chat_template(
        self, turns: Sequence[Any], *, tools: Any, tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        return self._apply(turns, tools, add_generation_prompt=add_generation_prompt)
