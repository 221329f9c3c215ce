"""One streamed answer on the screen: what is waited for as a status line, then the text as it comes."""

from __future__ import annotations

import re
import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

from sage_cli import render
from sage_cli.client import Client
from sage_cli.sse import Finished, Piece, Waiting

# "loading weights 16s"
_SECONDS = re.compile(r"\s+\d+(\.\d+)?\s?s$")


class Printer:
    """Writes an answer to standard output, and the wait before it to a status line (or lines in a pipe)."""

    def __init__(self, console: Console | None = None) -> None:
        self._status_console = console or render.error_console()
        self._status: Status | None = None
        self._last_wait = ""
        self._ends_line = True

    def __enter__(self) -> Self:
        if self._status_console.is_terminal:
            self._status = self._status_console.status("waiting for the first word")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_status()
        if not self._ends_line:
            sys.stdout.write("\n")
            self._ends_line = True
        sys.stdout.flush()

    def waiting(self, text: str) -> None:
        text = render.without_controls(text)
        if self._status is not None:
            self._status.update(text)
            return
        # Lines stay: one for each phase, not one for each second of it.
        phase = _SECONDS.sub("", text)
        if phase != self._last_wait:
            self._last_wait = phase
            render.line(render.error_console(), "wait", phase)

    def piece(self, text: str) -> None:
        self._end_status()
        # Whoever reads a pipe or a file is given the answer as it is.
        if sys.stdout.isatty():
            text = render.without_controls(text)
        sys.stdout.write(text)
        sys.stdout.flush()
        self._ends_line = text.endswith("\n")

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def stream_answer(client: Client, body: dict[str, Any], printer: Printer) -> str:
    """Print the answer as it comes and return it.

    Raises: SageError; AnswerInterruptedError after Ctrl-C, with what came so far.
    """
    pieces: list[str] = []
    reason: str | None = None
    with printer:
        try:
            with client.chat(body) as answering:
                for item in answering.items:
                    match item:
                        case Waiting(text):
                            printer.waiting(text)
                        case Piece(text):
                            pieces.append(text)
                            printer.piece(text)
                        case Finished(why):
                            reason = why
        except KeyboardInterrupt:
            raise AnswerInterruptedError("".join(pieces)) from None
    _show_notes(reason, answering.citations, "".join(pieces))
    return "".join(pieces)


class AnswerInterruptedError(Exception):
    """Ctrl-C during an answer; `partial` is what had come."""

    def __init__(self, partial: str) -> None:
        super().__init__("interrupted")
        self.partial = partial


def _show_notes(reason: str | None, citations: list[dict[str, Any]], answer: str) -> None:
    console = render.error_console()
    if reason == "length":
        console.print("(cut off at the longest allowed answer)", style="dim")
    missing = [item for item in citations if str(item.get("source", "")) not in answer]
    for item in missing:
        # As Text: brackets in the name of a file are no markup.
        note = render.without_controls(f"[{item.get('id')}] {item.get('source')}")
        console.print(Text(note, "dim"), soft_wrap=True)
