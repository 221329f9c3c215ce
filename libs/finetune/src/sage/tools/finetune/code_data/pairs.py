"""What functions are asked for: their body, a gap, or themselves; without duplicates, split by module."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sage.tools.finetune.code_data.functions import SourceFunction, Wanted
from sage.tools.finetune.code_data.python_source import python_functions
from sage.tools.finetune.code_data.readings import Readings
from sage.tools.finetune.code_data.source_files import LANGUAGES, UnreadableSourceError, source_files
from sage.tools.finetune.code_data.tree_source import has_grammar, tree_functions
from sage.tools.finetune.data import Conversation, Message
from sage_contracts.config import CodeKind
from sage_contracts.errors import InvalidDataError

MISSING = "<missing lines>"
MIN_BODY_CHARS = 40
MIN_DOC_CHARS = 15
MAX_PAIR_CHARS = 1600  # about 500 tokens of code


@dataclass(frozen=True, slots=True)
class CodePair:
    """A question about one function, and its answer. `module` is what the held-out split goes by."""

    module: str
    name: str
    prompt: str
    answer: str
    kind: CodeKind
    language: str

    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]

    def conversation(self) -> Conversation:
        return Conversation(self.messages(), f"{self.name} in {self.module}")


def build_code_pairs(
    root: Path | None = None, kinds: Sequence[CodeKind] = (), *, readings: Readings | None = None
) -> list[CodePair]:
    """All usable functions below `root` (a folder or one source file), in a fixed order.

    Without `kinds` every function is asked for its body: of the standard library (no `root`) those with a
    docstring, of a tree all. A body that was seen before counts once, whatever is asked about it. How the
    files were read is noted in `readings`.
    Raises: InvalidDataError when there is no such folder or nothing usable in it.
    """
    source = root.expanduser() if root is not None else Path(sysconfig.get_paths()["stdlib"])
    if not source.exists():
        raise InvalidDataError(f"There is no folder {source}. Give a folder with source code in it.")
    wanted = kinds or (["docstring_body"] if root is None else ["docstring_body", "signature_body"])
    looked_for = Wanted("fill_middle" in wanted, bool({"signature_body", "fill_middle"} & set(wanted)))
    files = sorted(source_files(source))
    pairs: list[CodePair] = []
    seen: set[str] = set()
    readings = Readings() if readings is None else readings
    for path in files:
        module = _module_of(path, source, by_package=root is None)
        try:
            functions = list(_functions_of(path, module, looked_for, readings))
        except UnreadableSourceError as error:
            readings.left_out[path] = str(error)
            continue
        for function in functions:
            if function.body not in seen and len(function.body.strip()) >= MIN_BODY_CHARS:
                found = [pair for kind in wanted if (pair := _MAKERS[kind](function, wanted)) is not None]
                if found:
                    seen.add(function.body)
                    pairs += found
    if not pairs:
        raise InvalidDataError(_nothing_usable(source, files, wanted, readings))
    return pairs


def _functions_of(path: Path, module: str, wanted: Wanted, readings: Readings) -> Iterator[SourceFunction]:
    """Raises: UnreadableSourceError."""
    text = readings.text(path)
    if text is None:
        return iter(())
    language = LANGUAGES[path.suffix]
    if language == "Python":
        return python_functions(text, module, wanted)
    if not has_grammar(language):
        raise UnreadableSourceError(f"{language} needs tree-sitter and its grammar")
    return tree_functions(text, module, language, wanted)


def _module_of(path: Path, source: Path, *, by_package: bool) -> str:
    """The top-level package of a library (its functions are kin), or the file of a user's tree."""
    if source.is_file():
        return path.stem
    inside = path.relative_to(source)
    return inside.parts[0].removesuffix(".py") if by_package else inside.as_posix()


def _docstring_body(f: SourceFunction, _: Sequence[CodeKind]) -> CodePair | None:
    return _body(f, f.head, "docstring_body") if f.doc else None


def _signature_body(f: SourceFunction, wanted: Sequence[CodeKind]) -> CodePair | None:
    """Not of functions that are asked for their body with its documentation already."""
    return None if f.doc and "docstring_body" in wanted else _body(f, f.bare_head, "signature_body")


def _body(f: SourceFunction, head: str, kind: CodeKind) -> CodePair | None:
    question = f"Complete this {f.language} function. Answer with its body.\n\n{_fenced(f, head)}"
    return _pair(f, question, _fenced(f, f.body), kind)


def _fill_middle(f: SourceFunction, _: Sequence[CodeKind]) -> CodePair | None:
    if f.gap is None or MISSING in f.whole:
        return None
    lines = f.whole.split("\n")
    start, end = f.gap
    shown = "\n".join([*lines[:start], MISSING, *lines[end:]])
    question = (
        f"Lines are missing from this {f.language} function. Answer with the missing lines only.\n\n"
        f"{_fenced(f, shown)}"
    )
    return _pair(f, question, _fenced(f, "\n".join(lines[start:end])), "fill_middle")


def _question_code(f: SourceFunction, _: Sequence[CodeKind]) -> CodePair | None:
    if len(f.doc) < MIN_DOC_CHARS:
        return None
    question = f"Write the {f.language} function `{f.name}`.\n\n{f.doc}"
    return _pair(f, question, _fenced(f, f"{f.bare_head}\n{f.body}"), "question_code")


_MAKERS: dict[CodeKind, Callable[[SourceFunction, Sequence[CodeKind]], CodePair | None]] = {
    "docstring_body": _docstring_body,
    "signature_body": _signature_body,
    "fill_middle": _fill_middle,
    "question_code": _question_code,
}


def _fenced(f: SourceFunction, code: str) -> str:
    # Answers too: an indentation that opens an answer melts into one token with the template's line break,
    # and would be learned by nobody.
    return f"```{f.language.lower()}\n{code}\n```"


def _pair(f: SourceFunction, prompt: str, answer: str, kind: CodeKind) -> CodePair | None:
    if len(f.whole) > MAX_PAIR_CHARS:
        return None
    return CodePair(f.module, f.name, prompt, answer, kind, f.language)


def split_by_module(
    pairs: Sequence[CodePair], validation_fraction: float
) -> tuple[list[CodePair], list[CodePair]]:
    """(training, held-out), no module in both.

    Modules are taken by the hash of their name until the share is met. A single module cannot be split: then
    everything is training data.
    """
    if validation_fraction <= 0:
        return list(pairs), []
    modules = sorted({pair.module for pair in pairs}, key=lambda name: sha256(name.encode()).digest())
    sizes = dict.fromkeys(modules, 0)
    for pair in pairs:
        sizes[pair.module] += 1
    wanted = max(1, round(len(pairs) * validation_fraction))
    held: set[str] = set()
    taken = 0
    for module in modules[:-1]:  # at least one module trains
        # A module that would overshoot by far (half of the library, say) stays with the training data.
        if taken < wanted and taken + sizes[module] <= 2 * wanted:
            held.add(module)
            taken += sizes[module]
    if not held and len(modules) > 1:
        held.add(min(modules, key=lambda module: sizes[module]))
    return [p for p in pairs if p.module not in held], [p for p in pairs if p.module in held]


def _nothing_usable(
    source: Path, files: Sequence[Path], kinds: Sequence[CodeKind], readings: Readings
) -> str:
    unread = sorted({LANGUAGES[path.suffix] for path in files} - {"Python"})
    missing = [language for language in unread if not has_grammar(language)]
    if missing:
        return (
            f"{source} holds {', '.join(missing)}, which needs tree-sitter and its grammar. "
            "Install them: `make install` in the source tree."
        )
    looked = {0: "no source file", 1: "one source file"}.get(len(files), f"{len(files)} source files")
    documented = "" if {"signature_body", "fill_middle"} & set(kinds) else "documentation and "
    return (
        f"{source} holds {looked} and no function with {documented}a body of {MIN_BODY_CHARS} to "
        f"{MAX_PAIR_CHARS} characters to learn from. Choose a folder with more code in it."
        + "".join(f" Note: {note}." for note in readings.notes(source))
    )
