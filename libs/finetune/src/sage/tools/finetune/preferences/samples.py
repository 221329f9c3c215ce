"""Preferences as token ids, through the same renderer as supervised rows: the prompt, then what is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sage.tools.finetune.data import Conversation, Message
from sage.tools.finetune.data.preferences import PreferencePair, RatedAnswer
from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.rendering import ChatRenderer, Sample


@dataclass(frozen=True, slots=True)
class PairSample:
    """Token ids; both answers go on from the same prompt and end with the end of the turn."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


@dataclass(frozen=True, slots=True)
class RatedSample:
    prompt: Sequence[int]
    answer: Sequence[int]
    is_desirable: bool


def pair_samples(renderer: ChatRenderer, pairs: Sequence[PreferencePair]) -> list[PairSample]:
    """Pairs of which both answers begin within max_length. Raises: InvalidDataError naming the row."""
    samples = []
    for pair in pairs:
        before = replace(renderer.stats)
        chosen = _rendered(renderer, pair, pair.chosen)
        rejected = _rendered(renderer, pair, pair.rejected)
        renderer.stats.count_as_one(before)
        if chosen is None or rejected is None:
            continue
        # Tokens may merge over the border, with one answer and not with the other.
        border = min(_answer_start(chosen), _answer_start(rejected))
        samples.append(PairSample(chosen.ids[:border], chosen.ids[border:], rejected.ids[border:]))
    return samples


def rated_samples(renderer: ChatRenderer, answers: Sequence[RatedAnswer]) -> list[RatedSample]:
    """Answers that begin within max_length. Raises: InvalidDataError naming the row."""
    samples = []
    for row in answers:
        rendered = _rendered(renderer, row, row.answer)
        if rendered is not None:
            border = _answer_start(rendered)
            samples.append(RatedSample(rendered.ids[:border], rendered.ids[border:], row.is_desirable))
    return samples


def answer_sample(prompt: Sequence[int], answer: Sequence[int]) -> Sample:
    """A supervised sample whose loss is the answer's negative log-likelihood."""
    return Sample([*prompt, *answer], [*[IGNORED] * len(prompt), *answer])


def mixed(samples: Sequence[RatedSample]) -> list[RatedSample]:
    """Wanted and unwanted in turn as far as they go, no answer beside the other one to its prompt.

    KTO judges a batch against the batch's own answers put to each other's prompts: a batch of one kind, or of
    one prompt, would tell it nothing.
    """
    wanted = [sample for sample in samples if sample.is_desirable]
    unwanted = [sample for sample in samples if not sample.is_desirable]
    half = len(unwanted) // 2
    unwanted = unwanted[half:] + unwanted[:half]
    shorter, longer = sorted((wanted, unwanted), key=len)
    # The fewer are spread evenly among the more.
    keyed = [((i + 0.5) / len(longer), 0, s) for i, s in enumerate(longer)]
    keyed += [((i + 0.5) / len(shorter), 1, s) for i, s in enumerate(shorter)]
    return [sample for _, _, sample in sorted(keyed, key=lambda item: item[:2])]


def swapped_answers(samples: Sequence[RatedSample], batch_rows: int) -> list[Sequence[int]]:
    """For each sample the answer of its neighbour in the same batch: KTO's estimate of the drift."""
    found: list[Sequence[int]] = []
    for start in range(0, len(samples), batch_rows):
        batch = [sample.answer for sample in samples[start : start + batch_rows]]
        found += [batch[-1], *batch[:-1]]
    return found


def mismatched_answers(samples: Sequence[RatedSample]) -> list[Sequence[int]]:
    """For each sample the answer of the one before it that has another prompt: the drift of all of them.

    The other answer to its own prompt, which often is beside it, was learned for that prompt. It is taken
    where there is no other.
    """
    found: list[Sequence[int]] = []
    for index, sample in enumerate(samples):
        before = (samples[index - back] for back in range(1, len(samples)))
        others = (other.answer for other in before if [*other.prompt] != [*sample.prompt])
        found.append(next(others, samples[index - 1].answer))
    return found


def _rendered(
    renderer: ChatRenderer, row: PreferencePair | RatedAnswer, answer: Sequence[Message]
) -> Sample | None:
    """The conversation with loss on the answer alone; None when nothing of that is within max_length."""
    prompt: list[Message] = [
        {**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in row.prompt_messages
    ]
    return next(iter(renderer.samples([Conversation([*prompt, *answer], row.origin, row.tools)])), None)


def _answer_start(sample: Sample) -> int:
    return next(index for index, label in enumerate(sample.labels) if label != IGNORED)
