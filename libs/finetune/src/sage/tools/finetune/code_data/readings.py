"""How the files of a source tree were read: which are left out, and which were in no encoding they name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sage.tools.finetune.code_data.python_source import parse_python
from sage.tools.finetune.code_data.source_files import LANGUAGES, UnreadableSourceError, read_source

_NAMED_FILES = 3


@dataclass
class Readings:
    left_out: dict[Path, str] = field(default_factory=dict)
    """Why nothing is learned of a file, in few words."""
    guessed: dict[Path, str] = field(default_factory=dict)
    """The encodings of files in neither UTF-8 nor one that they name."""

    def text(self, path: Path) -> str | None:
        """What `read_source` makes of it; a guess is noted. Raises: UnreadableSourceError."""
        source = read_source(path)
        if source is None:
            return None
        if source.guessed:
            self.guessed[path] = source.guessed
        return source.text

    def notes(self, tree: Path, among: Collection[Path] | None = None) -> list[str]:
        """For people, of the files `among` those that count, by default of all."""
        notes = []
        for encoding in sorted({*self.guessed.values()}):
            files = [path for path, guess in self.guessed.items() if guess == encoding]
            if names := [_inside(path, tree) for path in files if among is None or path in among]:
                notes.append(f"{_listed(names)} {'is' if len(names) == 1 else 'are'} read as {encoding}")
        left_out = [
            f"{_inside(path, tree)} ({reason})"
            for path, reason in self.left_out.items()
            if among is None or path in among
        ]
        if left_out:
            what = "1 source file is" if len(left_out) == 1 else f"{len(left_out)} source files are"
            notes.append(f"{what} left out: {_listed(left_out)}")
        return notes


def look_at(files: Iterable[Path]) -> Readings:
    """As far as a machine can tell that has no grammar but Python's."""
    readings = Readings()
    for path in files:
        try:
            text = readings.text(path)
            if text is not None and LANGUAGES[path.suffix] == "Python":
                parse_python(text)
        except UnreadableSourceError as error:
            readings.left_out[path] = str(error)
    return readings


def _inside(path: Path, tree: Path) -> str:
    return path.name if path == tree else path.relative_to(tree).as_posix()


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _NAMED_FILES} more"] if len(names) > _NAMED_FILES else []
    return ", ".join([*names[:_NAMED_FILES], *more])
