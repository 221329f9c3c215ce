"""Functions of JavaScript, TypeScript, Go, Rust and Java, by tree-sitter's grammars."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sage.tools.finetune.code_data.functions import (
    Lines,
    SourceFunction,
    Wanted,
    at_margin,
    holds_placeholder,
    usable_gaps,
)


@dataclass(frozen=True)
class _Grammar:
    package: str
    function: str
    """Of the package, which gives the grammar."""
    nodes: frozenset[str]


_BINDING = "variable_declarator"
_FIELDS = {"field_definition", "public_field_definition"}
"""Of a class: JavaScript's, TypeScript's."""
_BOUND = {"arrow_function", "function_expression", "generator_function"}
_DECLARED = {"function_declaration", "generator_function_declaration", "method_definition"}
_SCRIPT = frozenset({*_DECLARED, _BINDING, *_FIELDS})
_GRAMMARS = {
    "JavaScript": _Grammar("tree_sitter_javascript", "language", _SCRIPT),
    "TypeScript": _Grammar("tree_sitter_typescript", "language_typescript", _SCRIPT),
    "TSX": _Grammar("tree_sitter_typescript", "language_tsx", _SCRIPT),
    "Go": _Grammar("tree_sitter_go", "language", frozenset({"function_declaration", "method_declaration"})),
    "Rust": _Grammar("tree_sitter_rust", "language", frozenset({"function_item"})),
    "Java": _Grammar(
        "tree_sitter_java", "language", frozenset({"method_declaration", "constructor_declaration"})
    ),
}
_COMMENTS = {"comment", "line_comment", "block_comment"}
_ATTACHED = {*_COMMENTS, "attribute_item", "decorator"}
_DOC_MARKS = re.compile(r"^\s*(?:/\*\*?|\*/|\*|//[/!]?)\s?|\s*\*/\s*$")


def has_grammar(language: str) -> bool:
    """Whether this machine can read the language."""
    return _parser(language) is not None


def tree_functions(text: str, module: str, language: str, wanted: Wanted) -> Iterator[SourceFunction]:
    """Every function with a body to learn that the grammar reads without error."""
    parser = _parser(language)
    if parser is None:
        return
    source = text.encode()
    lines = text.split("\n")
    pending = [parser.parse(source).root_node]
    while pending:
        node = pending.pop()
        pending.extend(reversed(node.named_children))
        if node.type in _GRAMMARS[language].nodes and not node.has_error:
            found = _function(node, lines, module, language, wanted)
            if found is not None and (found.doc or wanted.undocumented):
                yield found


@functools.cache
def _parser(language: str) -> Any | None:
    grammar = _GRAMMARS[language]
    try:
        from tree_sitter import Language, Parser

        package = importlib.import_module(grammar.package)
    except ImportError:
        return None
    return Parser(Language(getattr(package, grammar.function)()))


def _function(
    node: Any, lines: list[str], module: str, language: str, wanted: Wanted
) -> SourceFunction | None:
    name, block, outer = _parts(node)
    if name is None or block is None or not _statements(block):
        return None
    first, opening, last = outer.start_point.row, block.start_point.row, block.end_point.row
    indent = len(lines[first]) - len(lines[first].lstrip())
    if (
        opening == last
        or not lines[opening].rstrip().endswith("{")
        or lines[last].strip() not in ("}", "};")
        or lines[first].encode()[: outer.start_point.column].strip()
    ):
        return None  # shares its lines with something else
    doc_first = _doc_row(outer, first)
    head = at_margin(lines[doc_first : opening + 1], indent)
    bare = at_margin(lines[first : opening + 1], indent)
    body = at_margin(lines[opening + 1 : last + 1], indent)
    if head is None or bare is None or body is None or holds_placeholder(body):
        return None
    gaps = _gaps(block, lines, doc_first) if wanted.gaps else []
    doc = _doc_text(lines[doc_first:first])
    whole = f"{head}\n{body}"
    called = "TypeScript" if language == "TSX" else language
    return SourceFunction(called, module, name.text.decode(), head, bare, doc, body, usable_gaps(whole, gaps))


def _parts(node: Any) -> tuple[Any, Any, Any]:
    """(name, block, the node with all that belongs to the function); None for what is not there."""
    name, block, outer = node.child_by_field_name("name"), node.child_by_field_name("body"), node
    if node.type == _BINDING or node.type in _FIELDS:
        value, outer = node.child_by_field_name("value"), node.parent if node.type == _BINDING else node
        name = name or node.child_by_field_name("property")  # of a field in JavaScript
        is_alone = outer is node or len(outer.named_children) == 1
        if value is not None and value.type in _BOUND and is_alone:
            block = value.child_by_field_name("body")  # an arrow's may be an expression: no lines of its own
    if outer.parent and outer.parent.type == "export_statement":
        outer = outer.parent
    return name, block, outer


def _statements(block: Any) -> list[Any]:
    lists = [child for child in block.named_children if child.type == "statement_list"]  # Go's
    return [
        child for node in lists or [block] for child in node.named_children if child.type not in _COMMENTS
    ]


def _doc_row(outer: Any, first: int) -> int:
    """The first row of the comments and attributes right above the function."""
    above = outer.prev_named_sibling
    while above is not None and above.type in _ATTACHED:
        # Grammars differ in whether a line comment ends on its own line or at the start of the next.
        end = above.end_point.row - (
            above.end_point.column == 0 and above.end_point.row > above.start_point.row
        )
        if end != first - 1:
            break
        first = above.start_point.row
        above = above.prev_named_sibling
    return first


def _doc_text(lines: list[str]) -> str:
    comments = [line for line in lines if line.lstrip().startswith(("/", "*"))]
    return "\n".join(_DOC_MARKS.sub("", line).rstrip() for line in comments).strip()


def _gaps(block: Any, lines: list[str], first_row: int) -> list[Lines]:
    """The block's statements that fill whole lines, at two depths."""
    found: list[Lines] = []
    statements = _statements(block)
    for statement in statements:
        nested = statement.child_by_field_name("body") or statement.child_by_field_name("consequence")
        inner = _statements(nested) if nested is not None else []
        for candidate in [*([statement] if len(statements) > 1 else []), *inner]:
            start, end = candidate.start_point, candidate.end_point
            before = lines[start.row].encode()[: start.column].strip()
            after = lines[end.row].encode()[end.column :].strip()
            if not before and after in (b"", b";", b","):
                found.append((start.row - first_row, end.row - first_row + 1))
    return found
