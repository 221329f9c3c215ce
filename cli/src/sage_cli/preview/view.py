"""A preview on a screen: coloured on a terminal, with brackets elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text

from sage.tools.finetune.preview_types import Piece, Preview, PreviewSample
from sage_cli import render

SHOWN_CUT_TOKENS = 40
"""Of the part that the model never sees; the rest is counted."""

_STYLES = {
    "context": "",
    "special": "dim cyan",
    "learned": "bold green",
    "turn_end": "bold black on green",
}
_CUT = "dim strike red"
_WORDS = {
    "learned": "learned",
    "turn_end": "learned: end of turn",
    "context": "context",
    "special": "the template's marks",
}
# Escape sequences in somebody's data are shown, never obeyed.
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}


@dataclass(frozen=True)
class _Signs:
    """What stands for colours, and for token limits."""

    opening: str
    closing: str
    limit: str
    line_end: str
    scissors: str
    dot: str
    ellipsis: str

    @classmethod
    def of(cls, console: Console) -> _Signs:
        rich = cls("⟦", "⟧", "│", "↵", "✂", "·", "…")
        plain = cls("[[", "]]", "|", "\\n", "--8<--", "-", "...")
        return rich if render.can_show("⟦⟧│↵✂·…", console) else plain


def show(preview: Preview, console: Console, *, with_tokens: bool) -> None:
    """Print the samples, and what was passed over."""
    page = _Page(console, with_tokens)
    page.head(preview)
    for sample in preview.samples:
        page.sample(sample, preview.max_length)
    page.passed_over(preview)


class _Page:
    def __init__(self, console: Console, with_tokens: bool) -> None:
        self._console = console
        self._with_tokens = with_tokens
        self._is_coloured = console.is_terminal and not console.no_color
        self._signs = _Signs.of(console)

    def head(self, preview: Preview) -> None:
        dot = self._signs.dot
        limit = f"cut at {preview.max_length:,} tokens"
        self._print(Text(f"{preview.source} {dot} {preview.model} {dot} {limit}", style="bold"))
        self._print(self._legend())

    def _legend(self) -> Text:
        if not self._is_coloured:
            signs = self._signs
            return Text(
                f"{signs.opening}learned{signs.closing}, end of turn included {signs.dot} "
                f"{signs.scissors} cut off behind this {signs.dot} all else is context"
            )
        legend = Text("  ")
        for kind, word in _WORDS.items():
            legend.append(word, style=_STYLES[kind]).append("   ")
        return legend.append("cut off", style=_CUT)

    def sample(self, sample: PreviewSample, max_length: int) -> None:
        self._print(Text())
        self._print(self._title(sample))
        shown = [piece for piece in sample.pieces if not piece.is_cut]
        cut = [piece for piece in sample.pieces if piece.is_cut]
        body = Text()
        for part in self._parts(shown):
            body.append_text(part)
        if cut:
            body.append_text(self._cut(cut, sample.cut))
        self._print(body)
        if sample.learned == 0:
            self._note(
                f"Nothing of it is learned: its answer begins beyond {max_length:,} tokens, so a run leaves "
                "it out. Raise max_length, or shorten what comes before the answer."
            )
        elif cut:
            self._note(f"The model never sees the last {sample.cut:,} tokens, nor the end of this answer.")

    def _title(self, sample: PreviewSample) -> Text:
        title = Text(sample.origin, style="bold cyan" if self._is_coloured else "")
        if sample.answer:
            title.append(f" {self._signs.dot} {sample.answer}")
        counts = f"{sample.tokens:,} tokens, {sample.learned:,} learned"
        counts += f", {sample.cut:,} cut off" if sample.cut else ""
        return title.append(f" {self._signs.dot} {counts}", style="not bold")

    def _parts(self, pieces: Iterable[Piece]) -> Iterator[Text]:
        """The pieces in their colours; without colours, what is learned in one pair of brackets."""
        if self._is_coloured:
            for piece in pieces:
                yield self._words(piece, _STYLES[piece.kind])
            return
        for is_learned, run in groupby(pieces, key=lambda piece: piece.kind in ("learned", "turn_end")):
            if is_learned:
                yield Text(self._signs.opening)
            for number, piece in enumerate(run):
                if number and self._with_tokens:
                    yield Text(self._signs.limit)
                yield self._words(piece, "")
            if is_learned:
                yield Text(self._signs.closing)

    def _words(self, piece: Piece, style: str) -> Text:
        words = [word.translate(_CONTROL) for word in piece.tokens]
        if not self._with_tokens:
            return Text("".join(words), style=style)
        text = Text(style=style)
        for number, word in enumerate(words):
            if number or self._is_coloured:
                text.append(self._signs.limit, style="dim not bold" if self._is_coloured else "")
            text.append(word.replace("\n", f"{self._signs.line_end}\n"))
        return text

    def _cut(self, pieces: list[Piece], count: int) -> Text:
        words = [word for piece in pieces for word in piece.tokens]
        text = "".join(words[:SHOWN_CUT_TOKENS]).translate(_CONTROL)
        more = f" {self._signs.ellipsis} {count - SHOWN_CUT_TOKENS:,} more tokens"
        rest = more if count > SHOWN_CUT_TOKENS else ""
        if self._is_coloured:
            return Text(text, style=_CUT).append(rest, style="not strike")
        return Text(f"{self._signs.scissors}{text}{rest}")

    def passed_over(self, preview: Preview) -> None:
        if not preview.unusable:
            return
        self._print(Text())
        for row in preview.unusable:
            self._note(f"Passed over: {row}")

    def _note(self, text: str) -> None:
        self._print(Text(text, style="yellow" if self._is_coloured else ""))

    def _print(self, text: Text) -> None:
        if self._console.is_terminal:
            self._console.print(text, overflow="fold")
        else:
            self._console.print(text, soft_wrap=True)
