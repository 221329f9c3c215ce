"""What a run keeps of its rows: token ids and labels, exactly, in few bytes."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.rendering import Sample, Samples

tokens = st.tuples(st.integers(0, 2**31 - 1), st.booleans())
slices = st.slices(8)


def plain(sample: Sample) -> tuple[list[int], list[int]]:
    return list(sample.ids), list(sample.labels)


@given(st.lists(st.lists(tokens), max_size=8), slices)
def test_samples_come_out_as_they_went_in(rows: list[list[tuple[int, bool]]], part: slice) -> None:
    given_ = [
        ([token for token, _ in row], [token if is_learned else IGNORED for token, is_learned in row])
        for row in rows
    ]
    samples = Samples(Sample(*row) for row in given_)
    assert [plain(sample) for sample in samples] == given_
    assert [plain(sample) for sample in samples[part]] == given_[part]
    assert [plain(samples[at]) for at in range(-len(given_), 0)] == given_
    for sample, (_, labels) in zip(samples, given_, strict=True):
        assert list(sample.labels[1:]) == labels[1:]
        assert sample.label_count == sum(label != IGNORED for label in labels[1:])
    for beyond in (len(given_), -len(given_) - 1):
        with pytest.raises(IndexError):
            samples[beyond]


@given(st.lists(tokens, min_size=1))
def test_inputs_end_where_the_last_label_is_predicted(row: list[tuple[int, bool]]) -> None:
    ids = [token for token, _ in row]
    sample = Sample(ids, [token if is_learned else IGNORED for token, is_learned in row])
    learned = [at for at, (_, is_learned) in enumerate(row) if is_learned and at]
    assert sample.inputs == ids[: max(learned, default=1)]


def test_a_token_takes_eight_bytes() -> None:
    rows, length = 500, 200
    tracemalloc.start()
    try:
        kept = Samples(Sample([7000 + n for n in range(length)], [IGNORED] * length) for _ in range(rows))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / sum(len(sample.ids) for sample in kept) < 9.5  # arrays grow a little ahead
