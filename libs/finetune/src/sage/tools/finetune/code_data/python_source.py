"""Functions of Python source, by Python's own parser."""

from __future__ import annotations

import ast
import sys
from collections import deque
from collections.abc import Iterator
from warnings import catch_warnings, simplefilter

from sage.tools.finetune.code_data.functions import (
    Lines,
    SourceFunction,
    Wanted,
    at_margin,
    holds_placeholder,
    usable_gaps,
)
from sage.tools.finetune.code_data.source_files import UnreadableSourceError

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def parse_python(text: str) -> ast.Module:
    """Raises: UnreadableSourceError for text that is not Python of this version."""
    try:
        with catch_warnings():  # old escapes in somebody's source are not our news
            simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        version = ".".join(map(str, sys.version_info[:2]))
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise UnreadableSourceError(f"does not parse as Python {version}{where}") from error


def python_functions(text: str, module: str, wanted: Wanted) -> Iterator[SourceFunction]:
    """Every function with a body to learn. Raises: UnreadableSourceError."""
    tree = parse_python(text)
    lines = text.split("\n")
    for node in _function_nodes(tree):
        found = _function(node, lines, module, wanted)
        if found is not None:
            yield found


def _function_nodes(tree: ast.Module) -> Iterator[FunctionNode]:
    """In the order of `ast.walk`, without looking into expressions: those hold no functions."""
    pending: deque[ast.AST] = deque([tree])
    while pending:
        node = pending.popleft()
        if isinstance(node, FunctionNode):
            yield node
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                pending.extend(children)


def _function(node: FunctionNode, lines: list[str], module: str, wanted: Wanted) -> SourceFunction | None:
    doc = ast.get_docstring(node)
    if doc is None and not wanted.undocumented:
        return None
    statements = node.body[1:] if doc is not None else node.body
    if not statements or node.end_lineno is None or _is_placeholder(statements):
        return None
    body_line = _body_line(node, lines, has_doc=doc is not None)
    bare_end = node.body[0].lineno - 1 if doc is not None else body_line - 1
    if body_line > statements[0].lineno or bare_end < node.lineno:
        return None  # several of these on one line
    indent = node.col_offset
    head = at_margin(lines[node.lineno - 1 : body_line - 1], indent)
    bare = at_margin(lines[node.lineno - 1 : bare_end], indent)
    body = at_margin(lines[body_line - 1 : node.end_lineno], indent)
    if head is None or bare is None or body is None or holds_placeholder(body):
        return None
    head = head.rstrip()
    # Blank lines between the two are left out, and all gaps move up by them.
    first_line = body_line + len(body) - len(body.lstrip("\n"))
    body = body.strip("\n").rstrip()
    gaps = _gaps(statements, lines, first_line - head.count("\n") - 1) if wanted.gaps else []
    whole = f"{head}\n{body}"
    return SourceFunction(
        "Python", module, node.name, head, bare.rstrip(), (doc or "").strip(), body, usable_gaps(whole, gaps)
    )


def _body_line(node: FunctionNode, lines: list[str], *, has_doc: bool) -> int:
    """The first line of the body, from 1; comments above its first statement are part of it."""
    if has_doc:
        return (node.body[0].end_lineno or node.body[0].lineno) + 1
    line = node.body[0].lineno
    decorators: list[ast.expr] = getattr(node.body[0], "decorator_list", [])
    line = min([line, *(decorator.lineno for decorator in decorators)])
    while line - 1 > node.lineno and (not (above := lines[line - 2].strip()) or above.startswith("#")):
        line -= 1
    return line


def _gaps(statements: list[ast.stmt], lines: list[str], first_line: int) -> list[Lines]:
    """Statements at every depth that fill whole lines, the whole body not being one of them."""
    found: list[Lines] = []
    pending: deque[list[ast.stmt]] = deque([statements])
    while pending:
        block = pending.popleft()
        for statement in block:
            if not isinstance(statement, FunctionNode | ast.ClassDef):
                for field in ("body", "orelse", "finalbody"):
                    if nested := getattr(statement, field, None):
                        pending.append(nested)
            end = statement.end_lineno or statement.lineno
            is_alone = len(statements) == 1 and block is statements
            if not is_alone and _fills_its_lines(statement, lines):
                found.append((statement.lineno - first_line, end - first_line + 1))
    return found


def _fills_its_lines(statement: ast.stmt, lines: list[str]) -> bool:
    last = lines[(statement.end_lineno or statement.lineno) - 1].encode()
    after = last[statement.end_col_offset or 0 :].strip()
    before = lines[statement.lineno - 1].encode()[: statement.col_offset]
    return not before.strip() and (not after or after.startswith(b"#"))


def _is_placeholder(statements: list[ast.stmt]) -> bool:
    """Nothing is done: passes, constants, a bare return, or a refusal alone."""
    if len(statements) == 1 and isinstance(statements[0], ast.Raise):
        return True
    return all(
        isinstance(s, ast.Pass)
        or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        or (isinstance(s, ast.Return) and s.value is None)
        for s in statements
    )
