"""Rows as the model will see them: rendered by its own template, cut, and told apart by what carries loss.

`python -m sage.tools.finetune.preview REQUEST` (JSON) prints a Preview, or an ErrorBody, as JSON on standard
output, so that a program without torch can show one. No torch is imported before that asks for a tokenizer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sage.tools.finetune.answering import answer
from sage.tools.finetune.base_models import default_model, is_hub_id, local_base, resolve_base
from sage.tools.finetune.data import BadRow, Conversation, Message, Row, RowError, load_rows
from sage.tools.finetune.data.formats import match, to_conversation
from sage.tools.finetune.data.preferences import (
    Preference,
    PreferenceFormat,
    RatedAnswer,
    rated,
    to_pair,
    to_preference,
)
from sage.tools.finetune.data.reading import Rows
from sage.tools.finetune.data.report import bad_row, with_notes
from sage.tools.finetune.hardware import has_cuda
from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.modeling import load_tokenizer, load_tokenizer_from_hub
from sage.tools.finetune.preferences.splits import prepare_preferences
from sage.tools.finetune.preview_types import Piece, PieceKind, Preview, PreviewRequest, PreviewSample
from sage.tools.finetune.rendering import ChatRenderer, TokenisedText
from sage.tools.finetune.task_data import is_source_tree, prepare
from sage_contracts.config import Method, PresetConfigs, TrainingConfig
from sage_contracts.errors import InvalidDataError

MAX_UNUSABLE = 20
"""Rows that cannot be used are passed over; after this many the rest is left to validation."""

ShownRow = tuple[int, list[tuple[Conversation, str]]]
"""A row's number, and its conversations with what each is of a preference."""


def preview(request: PreviewRequest, before_loading: Callable[[], None] = lambda: None) -> Preview:
    """Render the first usable rows. `before_loading` is called when only the tokenizer is still to be loaded.

    Raises: InvalidDataError when no row can be shown, ModelNotFoundError.
    """
    model = default_model(request.task) if request.model == "auto" else request.model
    here = TrainingConfig() if has_cuda() else PresetConfigs.cpu()
    shown = Preview(model=model, source="", max_length=request.max_length or here.max_length)
    source, rows, notes = _rows(request, shown.unusable)
    found = next(rows, None)  # data that cannot be read are cheaper to find than a tokenizer
    shown.source = with_notes(source, notes)
    renderer = (
        ChatRenderer(_tokenizer(model, request.home, before_loading), shown.max_length) if found else None
    )
    taken = 0
    while found and renderer and len(shown.unusable) < MAX_UNUSABLE:
        number, conversations = found
        try:
            shown.samples += [
                _sample(renderer, text, answer, shown.max_length)
                for conversation, answer in conversations
                for text in renderer.tokenised([conversation])
            ]
            taken += 1
        except InvalidDataError as error:
            shown.unusable.append(BadRow(row=number, field="row", reason=error.message))
        found = next(rows, None) if taken < request.rows else None
    if not shown.samples:
        reasons = "; ".join(map(str, shown.unusable[:3])) or "it is empty"
        raise InvalidDataError(f"No row of {shown.source} can be shown: {reasons}")
    return shown


def _rows(request: PreviewRequest, unusable: list[BadRow]) -> tuple[str, Iterator[ShownRow], Sequence[str]]:
    """(where the rows come from, their numbers and conversations, and once the first was taken what to know
    of the reading); rows that are none are noted."""
    path = request.data
    is_supervised = request.method in (None, "sft")
    if path is None and request.method and not is_supervised:
        preferences = prepare_preferences(TrainingConfig(task=request.task, method=request.method))
        pairs: Sequence[Preference] = preferences.train
        return preferences.description, ((n, _answers(row)) for n, row in enumerate(pairs, 1)), ()
    # Source code says no preference: beside rows for the other methods it is only that.
    if path is None or (is_supervised and is_source_tree(request.task, path)):
        splits = prepare(TrainingConfig(task=request.task, data_path=str(path) if path else None))
        return splits.description, ((n, [(row, "")]) for n, row in enumerate(splits.train, 1)), ()
    rows = load_rows(path)
    return path.name, _rows_of_file(rows, request.method, unusable), rows.notes


def _rows_of_file(rows: Rows, method: Method | None, unusable: list[BadRow]) -> Iterator[ShownRow]:
    for row in rows:
        try:
            yield row.number, _conversations(row, method)
        except RowError as error:
            unusable.append(bad_row(row, error, rows.name))
            if len(unusable) >= MAX_UNUSABLE:
                return


def _conversations(row: Row, method: Method | None) -> list[tuple[Conversation, str]]:
    content = row.content()
    if method in ("dpo", "orpo"):
        return _answers(to_pair(content, row.origin))
    if method == "kto":
        return [answer for one in rated(to_preference(content, row.origin)) for answer in _answers(one)]
    if method is None and isinstance(match(content)[1], PreferenceFormat):
        return _answers(to_preference(content, row.origin))
    return [(to_conversation(content, row.origin), "")]


def _answers(preference: Preference) -> list[tuple[Conversation, str]]:
    p = preference
    context: list[Message] = [_as_context(message) for message in p.prompt_messages]
    if isinstance(p, RatedAnswer):
        word = "wanted" if p.is_desirable else "unwanted"
        return [(Conversation([*context, *p.answer], p.origin, p.tools), word)]
    return [
        (Conversation([*context, *answer], p.origin, p.tools), word)
        for answer, word in ((p.chosen, "chosen"), (p.rejected, "rejected"))
    ]


def _as_context(message: Message) -> Message:
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def _sample(renderer: ChatRenderer, text: TokenisedText, answer: str, max_length: int) -> PreviewSample:
    kinds = [
        (_kind(renderer, text, index), index >= max_length, word) for index, word in enumerate(_words(text))
    ]
    pieces = [
        Piece(kind=kind, is_cut=is_cut, tokens=[word for _, _, word in group])
        for (kind, is_cut), group in groupby(kinds, key=lambda token: token[:2])
    ]
    return PreviewSample(
        origin=text.rendered.origin,
        answer=answer,
        pieces=pieces,
        tokens=len(text.ids),
        learned=sum(label != IGNORED for label in text.labels[1:max_length]),
        cut=max(0, len(text.ids) - max_length),
    )


def _words(text: TokenisedText) -> Iterator[str]:
    """Each token's part of the text; together they are the whole of it, also where offsets leave gaps."""
    written = text.rendered.text
    at = 0
    for index, (_, right) in enumerate(text.offsets):
        end = len(written) if index == len(text.offsets) - 1 else max(at, right)
        yield written[at:end]
        at = end


def _kind(renderer: ChatRenderer, text: TokenisedText, index: int) -> PieceKind:
    start = text.offsets[index][0]
    is_learned = text.labels[index] != IGNORED
    if renderer.is_added(text.ids[index]):
        if is_learned and any(start == end[0] for end in text.rendered.turn_ends):
            return "turn_end"
        return "learned" if is_learned else "special"
    return "learned" if is_learned else "context"


def _tokenizer(model: str, home: Path, before_loading: Callable[[], None]) -> Any:
    """That of a model which is here or built in; otherwise the hub's, without the weights."""
    if is_hub_id(model) and local_base(model, home) is None:
        before_loading()
        return load_tokenizer_from_hub(model)
    folder = resolve_base(model, home, lambda message: print(message, file=sys.stderr, flush=True))
    before_loading()
    return load_tokenizer(folder)


def _hide_torch() -> None:
    """For a process that only renders: transformers does not miss torch, and starts three times as fast."""
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say: not here
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would complain about that


def main(arguments: list[str]) -> int:
    """The process: one request in, one document out."""
    return answer(lambda: preview(PreviewRequest.model_validate_json(arguments[0]), _hide_torch), "preview")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
