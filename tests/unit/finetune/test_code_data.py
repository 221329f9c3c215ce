"""Function-completion pairs from source trees, and their split by module."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage.tools.finetune.code_data import build_code_pairs, split_by_module
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
    assert pair.body == (
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
        f"def undocumented(x):\n    {'y = x + 1; ' * 10}return y\n\n"
        f'def long(x):\n    """Long."""\n' + "    x = x + 1\n" * 300
    )
    (tmp_path / "broken.py").write_text("def broken(:\n")
    (tmp_path / "tests").mkdir()
    write_module(tmp_path / "tests", "skipped", 2)
    with pytest.raises(InvalidDataError, match=r"holds 2 Python files and no function"):
        build_code_pairs(tmp_path)


def test_the_same_body_counts_once(tmp_path: Path) -> None:
    write_module(tmp_path, "one", 3)
    write_module(tmp_path, "two", 3)
    write_module(tmp_path, "three", 4)
    assert [pair.name for pair in build_code_pairs(tmp_path)] == ["one", "three"]


def test_folders_without_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="no Python file"):
        build_code_pairs(tmp_path)
    with pytest.raises(InvalidDataError, match="There is no folder"):
        build_code_pairs(tmp_path / "gone")


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
