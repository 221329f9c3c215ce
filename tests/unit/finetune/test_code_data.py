"""Function-completion pairs from source trees, and their split by module."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from textwrap import indent
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.tools.finetune.code_data import CodePair, build_code_pairs, split_by_module
from sage.tools.finetune.code_data.functions import holds_placeholder
from sage.tools.finetune.code_data.readings import Readings
from sage_contracts.config import CodeKind
from sage_contracts.errors import InvalidDataError

FUNCTION = '''
class Box:
    def {name}(self, items):
        """Return the {name} of items."""
        # a comment that belongs to the body
        total = 0
        for item in items:
            total += item * {factor}
        return total
'''


def write_module(folder: Path, name: str, factor: int) -> None:
    (folder / f"{name}.py").write_text(FUNCTION.format(name=name, factor=factor))


def test_signature_and_docstring_ask_for_the_body(tmp_path: Path) -> None:
    write_module(tmp_path, "double", 2)
    (pair,) = build_code_pairs(tmp_path)
    assert pair.prompt.endswith(
        '```python\ndef double(self, items):\n    """Return the double of items."""\n```'
    )
    # Fenced, so that the first indentation is learned too.
    assert pair.answer.startswith("```python\n")
    assert code_in(pair.answer) == (
        "    # a comment that belongs to the body\n"
        "    total = 0\n"
        "    for item in items:\n"
        "        total += item * 2\n"
        "    return total"
    )
    assert [message["role"] for message in pair.messages()] == ["user", "assistant"]
    assert pair.conversation().origin == "double in double.py"


def test_what_teaches_nothing_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "mixed.py").write_text(
        'def abstract(self):\n    """Must be implemented by each and every subclass of this."""\n'
        '    raise NotImplementedError("implement this in the subclass, please")\n\n'
        'def short(x):\n    """Short."""\n    return x\n\n'
        f"def on_one_line(x): {'y = x + 1; ' * 10}return y\n\n"
        "def later(x):\n    # TODO: think of something better than adding one to it\n    return x + 1\n\n"
        "def never(x):\n    if x:\n        return 'something quite long to be a body'\n"
        "    raise NotImplementedError\n\n"
        "def elided(x):\n    value = compute_something_about(x)\n    ...\n    return value\n\n"
        f'def long(x):\n    """Long."""\n' + "    x = x + 1\n" * 300
    )
    (tmp_path / "broken.py").write_text("def broken(:\n")
    (tmp_path / "tests").mkdir()
    write_module(tmp_path / "tests", "skipped", 2)
    with pytest.raises(InvalidDataError, match=r"holds 2 source files and no function"):
        build_code_pairs(tmp_path)


@pytest.mark.parametrize(
    ("line", "is_placeholder"),
    [
        ("todo = [item for item in items if not item.done]", False),
        ("return total // todo", False),
        ("# Each todo has a title", False),
        ("this.#todo = this.#todo.concat(fixme);", False),
        ("if (todo!=null) { $('#todo').text(todo!.title); }", False),
        ("fetch('https://todo.example/xxx')", False),
        ("#todo = [];", False),
        ("return joined(first, *todo, **xxx)", False),
        ("*todo = 1;", False),
        ("raise ValueError('TODO')", True),
        ("x = 1  # FIXME", True),
        ("# todo think of something", True),
        ("x = 1  #todo: think", True),
        ("// Todo(ann) think", True),
        ("f(); /* fixme later */", True),
        ("/**\n * xxx: later\n */", True),
        ("todo!()", True),
        ("unimplemented!{}", True),
    ],
)
def test_a_variable_called_todo_is_no_remark(line: str, is_placeholder: bool) -> None:
    assert holds_placeholder(f"    {line}\n    return 1") == is_placeholder


def test_the_same_body_counts_once(tmp_path: Path) -> None:
    write_module(tmp_path, "one", 3)
    write_module(tmp_path, "two", 3)
    write_module(tmp_path, "three", 4)
    assert [pair.name for pair in build_code_pairs(tmp_path)] == ["one", "three"]


def test_folders_without_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="no source file"):
        build_code_pairs(tmp_path)
    with pytest.raises(InvalidDataError, match="There is no folder"):
        build_code_pairs(tmp_path / "gone")


@pytest.mark.parametrize(
    ("first", "encoding"),
    [
        ("", "utf-8"),
        ("", "utf-8-sig"),
        ("# -*- coding: latin-1 -*-\n", "latin-1"),
        ("#!/usr/bin/env python\n# coding=gbk\n", "gbk"),
    ],
)
def test_sources_are_read_in_the_encoding_that_they_name(tmp_path: Path, first: str, encoding: str) -> None:
    word = "总数" if encoding == "gbk" else "Summe, größer"
    text = first + FUNCTION.format(name="double", factor=2).replace("a comment", word)
    (tmp_path / "double.py").write_bytes(text.encode(encoding))
    (pair,) = build_code_pairs(tmp_path)
    assert word in pair.answer


@pytest.mark.parametrize("first", ["", "# -*- coding: utf-8 -*-\n"], ids=["no coding line", "a wrong one"])
@pytest.mark.parametrize(
    ("word", "encoding"),
    [("返回总数", "gbk"), ("größer", "latin-1"), ("傳回總數", "big5"), ("всего", "cp1251")],
)
def test_sources_are_read_in_the_encoding_that_makes_sense_of_them(
    tmp_path: Path, word: str, encoding: str, first: str
) -> None:
    text = first + FUNCTION.format(name="double", factor=2).replace("a comment", word)
    (tmp_path / "double.py").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    readings = Readings()
    (pair,) = build_code_pairs(tmp_path, readings=readings)
    assert word in pair.answer
    assert "\r" not in pair.answer
    [note] = readings.notes(tmp_path)
    assert re.fullmatch(r"double\.py is read as (GB18030|CP1252|BIG5|CP1251)", note)


def test_sources_that_nothing_can_be_made_of_are_named(tmp_path: Path) -> None:
    write_module(tmp_path, "good", 2)
    (tmp_path / "noise.py").write_bytes(b"x = '\xa1\x00\xfe\x01'\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "two.py").write_text("def f(x):\n    print 'hello', x\n    return x\n")
    readings = Readings()
    build_code_pairs(tmp_path, readings=readings)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert readings.notes(tmp_path) == [
        "2 source files are left out: noise.py (no text in an encoding that is known), "
        f"old/two.py (does not parse as Python {version}, line 2)"
    ]


def test_of_many_sources_that_are_left_out_a_few_are_named(tmp_path: Path) -> None:
    write_module(tmp_path, "good", 2)
    for number in range(5):
        (tmp_path / f"two{number}.py").write_text("print 'hello'\n")
    readings = Readings()
    build_code_pairs(tmp_path, readings=readings)
    [note] = readings.notes(tmp_path)
    assert note.startswith("5 source files are left out: two0.py (")
    assert note.endswith(", and 2 more")


def test_where_no_source_can_be_read_it_is_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_bytes(b"x = '\xa1\x00\xfe\x01'\n")
    with pytest.raises(InvalidDataError, match=r"holds 2 source files .* 2 source files are left out: a\.py"):
        build_code_pairs(tmp_path)


def test_held_out_modules_are_unseen_and_always_the_same(tmp_path: Path) -> None:
    for index in range(20):
        write_module(tmp_path, f"module_{index}", index + 2)
    pairs = build_code_pairs(tmp_path)
    train, held = split_by_module(pairs, 0.2)
    assert 3 <= len(held) <= 8
    assert len(train) + len(held) == 20
    assert not {pair.module for pair in train} & {pair.module for pair in held}
    assert split_by_module(list(reversed(pairs)), 0.2)[1] == list(reversed(held))
    assert split_by_module(pairs, 0) == (pairs, [])
    assert split_by_module(pairs[:1], 0.5) == (pairs[:1], [])


ALL_KINDS: list[CodeKind] = list(get_args(CodeKind))


def code_in(text: str) -> str:
    found = re.search(r"```\w+\n(.*)\n```", text, re.DOTALL)
    assert found is not None
    return found[1]


def reassembled(pair: CodePair) -> str:
    """The function that a question and its answer are about."""
    if pair.kind == "question_code":
        return code_in(pair.answer)
    shown = code_in(pair.prompt)
    if pair.kind == "fill_middle":
        return shown.replace("<missing lines>", code_in(pair.answer))
    return f"{shown}\n{code_in(pair.answer)}"


def test_every_kind_asks_for_something_else_of_the_same_function(tmp_path: Path) -> None:
    write_module(tmp_path, "double", 2)
    pairs = {pair.kind: pair for pair in build_code_pairs(tmp_path, ALL_KINDS)}
    assert set(pairs) == {"docstring_body", "fill_middle", "question_code"}  # the body is asked for once
    (bare,) = build_code_pairs(tmp_path, ["signature_body"])
    assert code_in(bare.prompt) == "def double(self, items):"
    assert bare.answer == pairs["docstring_body"].answer
    question = pairs["question_code"]
    assert question.prompt == "Write the Python function `double`.\n\nReturn the double of items."
    assert question.answer == f"```python\ndef double(self, items):\n{code_in(bare.answer)}\n```"
    whole = reassembled(pairs["docstring_body"])
    assert reassembled(pairs["fill_middle"]) == whole
    assert len(code_in(pairs["fill_middle"].answer).strip()) >= 20


def test_functions_without_docstring_are_asked_for_their_body_in_a_tree(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "class A:\n    @property\n    def f(self):\n        # why\n        total = sum(self.values)\n"
        "        return total / len(self.values)\n"
    )
    (pair,) = build_code_pairs(tmp_path)
    assert (pair.kind, code_in(pair.prompt)) == ("signature_body", "def f(self):")
    assert code_in(pair.answer).startswith("    # why\n    total")


def test_generated_files_are_left_out(tmp_path: Path) -> None:
    write_module(tmp_path, "rows_pb2", 2)
    write_module(tmp_path, "made", 3)
    made = tmp_path / "made.py"
    made.write_text(f"# Generated by a tool. DO NOT EDIT.\n{made.read_text()}")
    write_module(tmp_path, "kept", 4)
    assert [pair.name for pair in build_code_pairs(tmp_path)] == ["kept"]


def without_doc(function: ast.FunctionDef) -> list[str]:
    """What it does; a method's doc moves to the margin with it."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return [ast.dump(statement) for statement in [function.args, *statements]]


names = st.sampled_from(["alpha", "beta", "gamma", "delta_value", "epsilon_total"])
simple = st.builds(
    "{} = {}".format, names, st.sampled_from(["1", "len(items)", "'a\\n'", "(2,\n3)", '"""x\ny"""'])
)
statements = st.recursive(
    simple | st.just("# a remark") | st.just(""),
    lambda inner: st.builds(
        lambda head, lines: f"{head}\n" + indent("\n".join([*lines, "gamma += 1"]), "    "),
        st.sampled_from(["for x in items:", "if alpha:", "while beta > 2:", "with open(gamma) as f:"]),
        st.lists(inner, max_size=3),
    ),
    max_leaves=6,
)
docs = st.sampled_from(["", '"""Say what it does, in words."""', "'''Two\n\n    lines of it.\n    '''"])


@settings(max_examples=60, deadline=None)
@given(
    bodies=st.lists(st.tuples(docs, st.lists(statements, min_size=1, max_size=5)), min_size=1, max_size=4),
    in_class=st.booleans(),
)
def test_every_answer_reassembles_to_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[tuple[str, list[str]]], in_class: bool
) -> None:
    functions = [
        f"def f{number}(items, *, beta=2):\n"
        + indent("\n".join([*([doc] if doc else []), *lines, f"return {number}"]), "    ")
        for number, (doc, lines) in enumerate(bodies)
    ]
    source = "\n\n".join(functions)
    if in_class:
        source = "class Box:\n" + indent(source, "    ")
    path = tmp_path_factory.mktemp("tree") / "a.py"
    path.write_text(source)
    ast.parse(source)
    try:
        pairs = build_code_pairs(path, ALL_KINDS)
    except InvalidDataError:
        return  # every body was too short
    for pair in pairs:
        (function,) = ast.parse(reassembled(pair)).body
        assert isinstance(function, ast.FunctionDef)
        original = next(
            n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == pair.name
        )
        if pair.kind in ("fill_middle", "docstring_body") and '"""x' not in source:
            assert without_doc(function) == without_doc(original)
