"""Programs of the engine: what they answer, whatever the locale, and how they break."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from sage_cli import engine
from sage_cli.failures import EngineFault, describe, exit_code_of
from sage_contracts.errors import InvalidDataError, ServiceUnavailableError, StorageFullError

ANSWERS = """
import sys
from pydantic import BaseModel
from sage.tools.finetune.answering import answer
from sage_contracts.errors import InvalidDataError
class Said(BaseModel):
    text: str
def make():
    print("a library's line")
    print("é" * 100_000, file=sys.stderr)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the module `program_of_a_test`, which programs find."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "program_of_a_test.py"


def ask() -> bytes:
    return engine.ask("program_of_a_test", [], Console(quiet=True), doing="Working")


def test_a_document_comes_whole_whatever_the_locale(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONIOENCODING", "ascii")):
        monkeypatch.setenv(name, value)
    program.write_text(f"{ANSWERS}    return Said(text='日é' * 100_000)\nsys.exit(answer(make, 'it'))\n")
    assert ask().decode() == '{"text":"' + "日é" * 100_000 + '"}\n'


@pytest.mark.parametrize(
    ("line", "raised", "told"),
    [
        ("raise InvalidDataError('No é rows.', param='data')", InvalidDataError, "No é rows."),
        (
            "open('/dev/full', 'w').writelines(['x' * 100_000])",
            StorageFullError,
            "set TMPDIR to another disk",
        ),
        ("import nothing_of_the_kind", ServiceUnavailableError, "No module named 'nothing_of_the_kind'"),
    ],
)
def test_what_it_raises_is_raised_here(program: Path, line: str, raised: type[Exception], told: str) -> None:
    program.write_text(f"{ANSWERS}    {line}\nsys.exit(answer(make, 'it'))\n")
    with pytest.raises(raised) as caught:
        ask()
    assert told in str(caught.value)


def test_a_fault_of_the_program_is_no_service_that_is_out_of_reach(program: Path) -> None:
    program.write_text("raise KeyError('boom')\n")
    with pytest.raises(EngineFault) as caught:
        ask()
    assert exit_code_of(caught.value) == 1
    assert describe(caught.value)[0] == "Working failed: KeyError: 'boom'"
    assert "SAGE_DEBUG=1" in describe(caught.value)[1]
