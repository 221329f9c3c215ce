"""Conversations as token ids with labels, through the model's own chat template."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from sage.tools.finetune.chat_template import ChatTemplate, RenderedText, Span, refused
from sage.tools.finetune.data import Conversation
from sage.tools.finetune.data.text_batch import TextBatch
from sage.tools.finetune.data.turn_marks import MarkedRows, turn_marks
from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.learned_tokens import learned_tokens
from sage_contracts.errors import InvalidDataError


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and labels of equal length; labels are ids, or IGNORED."""

    ids: Sequence[int]
    labels: Sequence[int]

    @property
    def label_count(self) -> int:
        # The first token is nobody's successor, so it can carry no loss.
        return len(self.labels) - 1 - self.labels[1:].count(IGNORED) if self.labels else 0

    @property
    def inputs(self) -> Sequence[int]:
        """The ids that some label is predicted from; one at least where there are any.

        The last label is no input, and neither is what stands behind it.
        """
        stop = len(self.labels) - 1
        while stop > 1 and self.labels[stop] == IGNORED:
            stop -= 1
        return self.ids[: max(1, stop)]


class Samples(Sequence[Sample]):
    """All samples of a run in eight bytes a token; an object for each would take six times as much.

    They come out with arrays as ids and labels.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._ids, self._labels = array("i"), array("i")
        self._bounds = array("q", [0])
        self.extend(samples)

    def extend(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._ids.extend(sample.ids)
            self._labels.extend(sample.labels)
            self._bounds.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        tokens = slice(self._bounds[places], self._bounds[places + 1])
        return Sample(self._ids[tokens], self._labels[tokens])


@dataclass(frozen=True, slots=True)
class TokenisedText:
    """A rendered text before it is cut at max_length. Token i stands at text[offsets[i][0]:offsets[i][1]]."""

    rendered: RenderedText
    ids: list[int]
    labels: list[int]
    offsets: list[Span]


@dataclass
class RenderStats:
    truncated: int = 0
    """Rows cut at max_length, of which something is left to learn: their ends carry no loss."""
    dropped: int = 0
    """Rows whose answer began beyond max_length."""
    longest: int = 0
    """Tokens of a row after the cut."""

    def count_as_one(self, before: RenderStats) -> None:
        """Take what was rendered since the copy `before` for one row, of which no part may be missing."""
        is_dropped = self.dropped > before.dropped
        is_cut = self.truncated > before.truncated and not is_dropped
        self.dropped, self.truncated = before.dropped + is_dropped, before.truncated + is_cut


class ChatRenderer:
    """Renders conversations for one tokenizer. Raises InvalidDataError when that has no chat template."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._template = ChatTemplate(tokenizer)
        if not tokenizer.is_fast:
            raise InvalidDataError(
                "The base model's tokenizer cannot say where in a text its tokens stand, so that the loss "
                "cannot be laid on the answers. Choose a base model that has a tokenizer.json."
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._added_ids: dict[str, int] = tokenizer.get_added_vocab()
        self._added = frozenset(self._added_ids.values())
        self._known_ids: int | None = None
        self.marked = MarkedRows(turn_marks(self._applied, self._added_ids))
        """Rows whose contents hold the template's own marks."""
        self.stats = RenderStats()

    def _applied(self, turns: list[dict[str, Any]]) -> str:
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False))

    def require_known(self, ids: int) -> None:
        """From now on refuse rows with a token that a model with embeddings for so many ids does not know."""
        self._known_ids = ids

    @property
    def template_hash(self) -> str:
        return self._template.sha256

    @property
    def turn_end_ids(self) -> list[int]:
        """The tokens that end an assistant's turn, as far as rows were rendered."""
        return [self._added_ids[token] for token in self._template.end_tokens]

    def is_added(self, token: int) -> bool:
        """Whether the token is one of the template's marks rather than a piece of somebody's words."""
        return token in self._added

    def samples(self, conversations: Sequence[Conversation]) -> Samples:
        """One sample per conversation; one per assistant turn where the template rewrites earlier turns.

        Rows longer than max_length are cut and counted; those without an answer left are dropped.
        Raises: InvalidDataError naming the row that cannot be rendered, or whose end carries no loss.
        """
        found = (self._cut(text) for text in self.tokenised(conversations))
        return Samples(sample for sample in found if sample is not None)

    def tokenised(self, conversations: Sequence[Conversation]) -> Iterator[TokenisedText]:
        """The texts of the conversations in their order, whole. Raises: InvalidDataError."""
        batch = TextBatch[RenderedText]()
        for conversation in conversations:
            self.marked.add(conversation.messages, conversation.origin)
            for rendered in self._template.rendered(conversation):
                batch.add(rendered, rendered.text)
                if batch.is_full:
                    yield from self._encoded(batch.take())
        yield from self._encoded(batch.take())

    def _encoded(self, batch: Sequence[RenderedText]) -> Iterator[TokenisedText]:
        if not batch:
            return
        encoded = self._tokenizer(
            [rendered.text for rendered in batch],
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # that a text is longer than the model's limit is ours to say
        )
        for row in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield self._labelled(*row)

    def _labelled(self, rendered: RenderedText, ids: list[int], offsets: list[Span]) -> TokenisedText:
        highest = max(ids, default=0)
        if self._known_ids is not None and highest >= self._known_ids:
            token = self._tokenizer.convert_ids_to_tokens(highest)
            raise refused(
                rendered.origin,
                f"its tokenizer writes {token!r} as token {highest}, and the model knows only those below "
                f"{self._known_ids}: they do not belong together",
            )
        labels = [IGNORED] * len(ids)
        decode = self._tokenizer.decode
        for tokens in learned_tokens(rendered.text, rendered.learned, ids, offsets, decode):
            labels[tokens.start : tokens.stop] = ids[tokens.start : tokens.stop]
        for turn_end in rendered.turn_ends:
            if not self._carries_loss(turn_end, rendered.text, labels, offsets):
                raise refused(
                    rendered.origin,
                    "the token that ends the assistant's turn carries no loss, so that the model would never "
                    "learn to stop; choose a base model whose tokenizer keeps that token whole",
                )
        return TokenisedText(rendered, ids, labels, offsets)

    def _carries_loss(self, turn_end: Span, text: str, labels: list[int], offsets: list[Span]) -> bool:
        wanted = self._added_ids[text[slice(*turn_end)]]
        token = bisect_left(offsets, turn_end[:1])
        while token < len(labels) and offsets[token][0] == turn_end[0]:
            if labels[token] == wanted:
                return True
            token += 1
        return False

    def _cut(self, text: TokenisedText) -> Sample | None:
        sample = Sample(text.ids, text.labels)
        self.stats.longest = max(self.stats.longest, min(len(text.ids), self._max_length))
        is_cut = len(text.ids) > self._max_length
        if is_cut:
            sample = Sample(text.ids[: self._max_length], text.labels[: self._max_length])
        if sample.label_count == 0:
            self.stats.dropped += 1
            return None
        self.stats.truncated += is_cut
        return sample
