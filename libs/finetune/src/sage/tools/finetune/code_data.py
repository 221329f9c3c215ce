"""Function-completion pairs from Python source: signature and docstring -> body. No torch.

Without a folder the source is the standard library of the running interpreter: real, documented code that
every machine has.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from textwrap import dedent
from warnings import catch_warnings, simplefilter

from sage.tools.finetune.data import Conversation, Message
from sage_contracts.errors import InvalidDataError

QUESTION = "Complete this Python function. Answer with its body.\n\n"
MIN_BODY_CHARS = 40
MAX_PAIR_CHARS = 1600  # about 500 tokens of code
MAX_FILE_BYTES = 1_000_000  # larger files are data or generated
_SKIPPED_FOLDERS = {
    "__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests", "idle_test", "venv",
    "build", "dist", "lib2to3", "encodings", "pydoc_data", "turtledemo", "_vendor",
}  # fmt: skip

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class CodePair:
    """One function. `module` is what the held-out split goes by."""

    module: str
    name: str
    prompt: str
    body: str

    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.body}]

    def conversation(self) -> Conversation:
        return Conversation(self.messages(), f"{self.name} in {self.module}")


def build_code_pairs(root: Path | None = None) -> list[CodePair]:
    """All usable functions below `root` (a folder or one .py file), without duplicates, in a fixed order.

    Raises: InvalidDataError when there is no such folder or nothing usable in it.
    """
    source = root.expanduser() if root is not None else Path(sysconfig.get_paths()["stdlib"])
    if not source.exists():
        raise InvalidDataError(f"There is no folder {source}. Give a folder with Python source in it.")
    files = sorted(_python_files(source))
    pairs: list[CodePair] = []
    seen: set[str] = set()
    for path in files:
        for pair in _pairs_of(path, source, by_package=root is None):
            if pair.body not in seen:
                seen.add(pair.body)
                pairs.append(pair)
    if not pairs:
        raise InvalidDataError(_nothing_usable(source, len(files)))
    return pairs


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


def _python_files(source: Path) -> Iterator[Path]:
    if source.is_file():
        if source.suffix == ".py":
            yield source
        return
    for entry in source.iterdir():
        if entry.is_symlink() or entry.name.startswith("."):
            continue
        if entry.is_dir() and entry.name not in _SKIPPED_FOLDERS:
            yield from _python_files(entry)
        elif entry.suffix == ".py" and entry.is_file() and entry.stat().st_size <= MAX_FILE_BYTES:
            yield entry


def _pairs_of(path: Path, source: Path, *, by_package: bool) -> Iterator[CodePair]:
    try:
        text = path.read_text(encoding="utf-8")
        with catch_warnings():  # old escapes in somebody's source are not our news
            simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return  # not Python of this version: nothing to learn from
    lines = text.split("\n")
    module = _module_of(path, source, by_package=by_package)
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode):
            pair = _pair_of(node, lines, module)
            if pair is not None:
                yield pair


def _module_of(path: Path, source: Path, *, by_package: bool) -> str:
    """The top-level package of a library (its functions are kin), or the file of a user's tree."""
    if source.is_file():
        return path.stem
    inside = path.relative_to(source)
    return inside.parts[0].removesuffix(".py") if by_package else inside.as_posix()


def _pair_of(node: FunctionNode, lines: Sequence[str], module: str) -> CodePair | None:
    if ast.get_docstring(node) is None or len(node.body) < 2:
        return None
    docstring, first = node.body[0], node.body[1]
    if docstring.end_lineno is None or node.end_lineno is None or first.lineno <= docstring.end_lineno:
        return None
    head = dedent("\n".join(lines[node.lineno - 1 : docstring.end_lineno])).rstrip()
    # The body begins after the docstring, so that comments above its first statement stay with it.
    indented = "\n".join(lines[docstring.end_lineno : node.end_lineno]).strip("\n").rstrip()
    body = _reindent(indented)
    if len(body) < MIN_BODY_CHARS or len(head) + len(body) > MAX_PAIR_CHARS or _is_placeholder(node):
        return None
    return CodePair(module, node.name, f"{QUESTION}```python\n{head}\n```", body)


def _reindent(body: str) -> str:
    """The body as it stands in a function at the left margin."""
    return "\n".join(f"    {line}" if line.strip() else "" for line in dedent(body).split("\n"))


def _is_placeholder(node: FunctionNode) -> bool:
    statement = node.body[1]
    return len(node.body) == 2 and (
        isinstance(statement, ast.Pass | ast.Raise)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
    )


def _nothing_usable(source: Path, files: int) -> str:
    looked = f"{files} Python files" if files else "no Python file"
    return (
        f"{source} holds {looked} and no function with a docstring and a body of {MIN_BODY_CHARS} to "
        f"{MAX_PAIR_CHARS} characters to learn from. Choose a folder with documented Python code."
    )
