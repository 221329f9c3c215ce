"""Streamed text is what decoding the whole would give, in whole characters and without stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_inference.transformers_engine.text import Detokenizer, StopScanner


def decode_bytes(ids: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


def stream(data: bytes) -> list[str]:
    detokenizer = Detokenizer(decode_bytes)
    return [*(detokenizer.push(byte) for byte in data), detokenizer.flush()]


@given(st.text())
def test_any_text_comes_out_whole_and_never_in_halves(text: str) -> None:
    pieces = stream(text.encode())
    assert "".join(pieces) == text
    # A replacement character of the text itself is the only one that may appear.
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_is_sent_when_it_is_complete() -> None:
    assert stream("a🌻b".encode()) == ["a", "", "", "", "🌻", "b", ""]


def test_bytes_that_never_become_a_character_do_not_hold_the_rest_back() -> None:
    pieces = stream(b"\xff\xff\xff\xff\xff\xff ok")
    assert "".join(pieces).endswith(" ok")
    assert any(piece for piece in pieces[:6])


def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    assert "".join(stream("é".encode()[:1])) == "\ufffd"


def test_leading_spaces_that_depend_on_the_neighbour_survive() -> None:
    def decode(ids: list[int]) -> str:
        # As sentencepiece does: the first token of a text loses its space.
        return "".join(f" w{number}" for number in ids)[1:]

    detokenizer = Detokenizer(decode)
    assert "".join(detokenizer.push(number) for number in (1, 2, 3)) == "w1 w2 w3"


@pytest.mark.parametrize(
    ("stops", "pieces", "said"),
    [
        (["END"], ["one EN", "D two"], "one "),
        (["END"], ["one EN", "TER"], "one ENTER"),
        (["b", "ab"], ["xab"], "x"),
        ([], ["as it is"], "as it is"),
        ([""], ["an empty stop is none"], "an empty stop is none"),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], said: str) -> None:
    scanner = StopScanner(stops)
    assert "".join(scanner.push(piece) for piece in pieces) + scanner.flush() == said


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.text("ab", min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_ever_sent(pieces: list[str], stop: str) -> None:
    scanner = StopScanner([stop])
    sent = "".join(scanner.push(piece) for piece in pieces) + scanner.flush()
    whole = "".join(pieces)
    assert sent == (whole[: whole.index(stop)] if stop in whole else whole)
    assert scanner.is_stopped == (stop in whole)
