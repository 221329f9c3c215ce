"""What a preview looks like: colours on a terminal, brackets elsewhere, nothing of the text lost."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from sage.tools.finetune.data import BadRow
from sage.tools.finetune.preview_types import Piece, Preview, PreviewSample
from sage_cli.preview.view import show

PIECES = [
    Piece(kind="special", is_cut=False, tokens=["<s>"]),
    Piece(kind="context", is_cut=False, tokens=["Say", " hi", "\n"]),
    Piece(kind="learned", is_cut=False, tokens=["Hi", "!"]),
    Piece(kind="turn_end", is_cut=False, tokens=["</s>"]),
]


def sample(*pieces: Piece, learned: int = 3) -> PreviewSample:
    cut = sum(len(piece.tokens) for piece in pieces if piece.is_cut)
    tokens = sum(len(piece.tokens) for piece in pieces)
    return PreviewSample(origin="row 1", pieces=list(pieces), tokens=tokens, learned=learned, cut=cut)


def shown(
    *samples: PreviewSample,
    unusable: tuple[BadRow, ...] = (),
    is_terminal: bool = False,
    no_color: bool = False,
    with_tokens: bool = False,
) -> str:
    file = StringIO()
    console = Console(
        file=file, force_terminal=is_terminal, no_color=no_color, width=40, highlight=False, emoji=False,
        color_system="standard", legacy_windows=False,
    )  # fmt: skip
    found = Preview(
        model="tiny", source="rows.jsonl", max_length=8, samples=list(samples), unusable=list(unusable)
    )
    show(found, console, with_tokens=with_tokens)
    return file.getvalue()


def test_what_is_learned_stands_in_brackets_where_there_are_no_colours() -> None:
    for text in (shown(sample(*PIECES)), shown(sample(*PIECES), is_terminal=True, no_color=True)):
        assert "<s>Say hi\n⟦Hi!</s>⟧\n" in text
        assert "7 tokens, 3 learned" in text
        assert "\x1b[3" not in text


def test_on_a_terminal_it_is_coloured() -> None:
    text = shown(sample(*PIECES), is_terminal=True)
    assert "\x1b[1;32mHi!\x1b[0m\x1b[1;30;42m</s>\x1b[0m" in text
    assert "⟦" not in text


def test_tokens_can_be_told_apart() -> None:
    text = shown(sample(*PIECES), with_tokens=True)
    assert "<s>│Say│ hi│↵\n⟦Hi│!│</s>⟧" in text


def test_what_is_cut_is_shown_marked_and_shortened() -> None:
    beyond = Piece(kind="learned", is_cut=True, tokens=[" no"] * 100)
    text = shown(sample(*PIECES[:3], beyond, learned=2))
    assert "⟦Hi!⟧✂ no no" in text
    assert text.count(" no") == 40 + text.count(" nor")
    assert "… 60 more tokens" in text
    assert "never sees the last 100 tokens" in text
    assert "\x1b[2;9;31m no" in shown(sample(*PIECES[:3], beyond), is_terminal=True)


def test_a_row_that_teaches_nothing_says_so() -> None:
    beyond = Piece(kind="learned", is_cut=True, tokens=["Hi"])
    text = shown(sample(*PIECES[:2], beyond, learned=0))
    assert "Nothing of it is learned: its answer begins beyond 8 tokens" in text


def test_rows_that_were_passed_over_are_named() -> None:
    text = shown(sample(*PIECES), unusable=(BadRow(row=4, field="answer", reason="is empty"),))
    assert "Passed over: row 4, field answer: is empty" in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_escape_sequences_in_data_are_not_obeyed(is_terminal: bool) -> None:
    text = shown(
        sample(Piece(kind="learned", is_cut=False, tokens=["a\x1b[31mb\rc"])), is_terminal=is_terminal
    )
    assert "a␛[31mb␍c" in text


def test_markup_in_data_is_text() -> None:
    assert "[red]x[/red]" in shown(
        sample(Piece(kind="learned", is_cut=False, tokens=["[red]x[/red]"])), is_terminal=True
    )
