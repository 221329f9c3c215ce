"""Help answers at once: nothing heavy is imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from sage_cli import main
from sage_cli.commands import chat, options
from sage_contracts.config import PresetName, Task

HEAVY = ["httpx", "openai", "pydantic", "rich", "sage_contracts", "supervisor", "yaml"]

_PROBE = """
import json, sys
from sage_cli.main import app
try:
    app(sys.argv[1:], prog_name="sage")
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps({"code": code, "loaded": sorted(sys.modules)}))
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        [],
        ["--version"],
        ["finetune", "--help"],
        ["finetune", "quickstart", "--help"],
        ["chat", "-h"],
        ["up", "--help"],
        ["index", "--help"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _PROBE, *words], capture_output=True, text=True, timeout=30, check=True
    )
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen["code"] == 0
    assert [name for name in HEAVY if name in seen["loaded"]] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["chat", "--help"]], ids=" ".join)
def test_help_for_a_full_disk_says_so(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "sage_cli.main", *words]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30)
    assert ran.returncode == 2
    assert "The disk is full" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault(closed: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What is it?", "answer": "A row."}\n')
    words = [sys.executable, "-m", "sage_cli", "finetune", "validate", str(rows), "--json"]
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *words]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("{") == (closed in ("2>&-", "<&-"))


def test_the_commands_name_the_tasks_and_presets_that_exist() -> None:
    assert tuple(task.value for task in Task) == options.TASK_NAMES
    help_of_preset = get_args(options.PresetOption)[1].help
    assert all(preset.value in help_of_preset for preset in PresetName)


def test_every_option_says_what_it_does() -> None:
    pending: list[tuple[str, Any]] = [("sage", typer.main.get_command(main.app))]
    silent = []
    while pending:
        name, command = pending.pop()
        pending += [(f"{name} {word}", sub) for word, sub in getattr(command, "commands", {}).items()]
        silent += [f"{name} {option.opts[0]}" for option in command.params if not option.help]
    assert silent == []


def test_every_line_of_the_list_of_commands_is_whole() -> None:
    for words in ([], ["finetune"], ["finetune", "sweep"], ["index"]):
        shown = CliRunner().invoke(main.app, [*words, "--help"], env={"COLUMNS": "80"}).output
        assert "..." not in shown.partition("Commands:")[2]


def test_every_backend_of_the_product_page_is_offered() -> None:
    assert set(get_args(chat.Backend)) == {"mock", "openai", "finetune", "vllm", "ollama"}


def test_an_interruption_while_it_is_imported_ends_it_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    ran = subprocess.run([sys.executable, "-m", "sage_cli", "--help"], capture_output=True, timeout=30)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, b"", b"")
