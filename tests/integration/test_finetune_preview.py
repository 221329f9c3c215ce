"""Previews by the engine, and by the command in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sage.tools.finetune.preview import preview
from sage.tools.finetune.preview_types import PreviewRequest, PreviewSample
from sage_cli.main import app
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidDataError

ROWS: list[dict[str, Any]] = [
    {"question": "", "answer": "lost"},
    {"question": "Hé 👋?", "answer": "Sí.\nYes"},
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away"},
    {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "late"}]},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


def request(data: Path | None, base: Path, **more: Any) -> PreviewRequest:
    return PreviewRequest(home=base.parent, data=data, model=str(base), **more)


def text_of(sample: PreviewSample, *kinds: str) -> str:
    pieces = [piece for piece in sample.pieces if not kinds or piece.kind in kinds]
    return "".join(token for piece in pieces for token in piece.tokens)


def test_rows_are_shown_as_the_model_sees_them(data: Path, tiny_base: Path) -> None:
    found = preview(request(data, tiny_base, max_length=200))
    first, chosen, rejected, late = found.samples
    assert text_of(first) == "<|im_start|>user\nHé 👋?<|im_end|>\n<|im_start|>assistant\nSí.\nYes<|im_end|>"
    assert text_of(first, "learned") == "Sí.\nYes"
    assert text_of(first, "turn_end") == "<|im_end|>"
    assert first.learned == len("Sí.\nYes".encode()) + 1
    assert [(s.answer, text_of(s, "learned")) for s in (chosen, rejected)] == [
        ("chosen", "Hello!"), ("rejected", "Go away"),
    ]  # fmt: skip
    assert (late.learned, late.cut) == (0, late.tokens - 200)
    assert sum(len(piece.tokens) for piece in late.pieces if piece.is_cut) == late.cut
    assert [(row.row, row.field) for row in found.unusable] == [(1, "question")]


def test_only_as_many_rows_as_wanted_are_read(data: Path, tiny_base: Path) -> None:
    assert [s.origin for s in preview(request(data, tiny_base, rows=1)).samples] == ["row 2 of rows.jsonl"]


def test_the_encoding_that_was_recognised_is_told(tmp_path: Path, tiny_base: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nHow hot?,150°C\n", encoding="cp1252")
    shown = preview(request(path, tiny_base))
    assert (shown.source, text_of(shown.samples[0], "learned")) == (
        "rows.csv; rows.csv is read as CP1252", "150°C",
    )  # fmt: skip


def test_data_without_a_row_to_show_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "?"}')
    with pytest.raises(InvalidDataError, match=r"No row of bad\.jsonl can be shown: row 1, field answer"):
        preview(request(path, tiny_base))


def test_the_command_shows_the_tasks_own_data(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the user is no part of the program')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "home"))
    words = ["finetune", "preview", "--task", "qa", "--model", str(tiny_base), "--rows", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "the sample set 'qa'" in result.stdout
    assert "<|im_end|>⟧" in result.stdout


def test_a_runs_own_file_says_what_it_saw(
    data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "home"))
    config = TrainingConfig(
        model_name=str(tiny_base), data_path=str(data), output_dir="./output", method="dpo", max_length=77
    )
    path = tmp_path / "training_config.json"
    path.write_text(config.model_dump_json())
    result = CliRunner().invoke(app, ["finetune", "preview", "--config", str(path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["max_length"], [row["answer"] for row in found["samples"]]) == (77, ["chosen", "rejected"])


def test_the_commands_errors_are_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(app, ["finetune", "preview", str(tmp_path / "gone.jsonl")])
    assert result.exit_code == 2
    assert "gone.jsonl" in result.stderr


def test_a_folders_bad_rows_name_their_file_and_the_reason_of_their_format(
    tmp_path: Path, tiny_base: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "same", "rejected": "same"}))
    (folder / "b.jsonl").write_text(json.dumps({"question": "Q?", "answer": "A"}))
    (folder / "c.jsonl").write_text(json.dumps({"question": "say method=sft"}))
    found = preview(request(folder, tiny_base))
    assert [(row.file, row.row, row.field) for row in found.unusable] == [
        ("set/a.jsonl", 1, "rejected"),
        ("set/c.jsonl", 1, "answer"),
    ]


PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away"}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Pairs beside the source code that read them."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text(json.dumps(PAIR))
    body = "    total = 0\n    for value in values:\n        total += value\n    return total\n"
    (folder / "load.py").write_text(f'def add_all(values):\n    """Add all of the values."""\n{body}')
    return folder


@pytest.mark.parametrize(
    ("method", "answers"),
    [
        ("dpo", ["chosen", "rejected"]),
        ("orpo", ["chosen", "rejected"]),
        ("kto", ["wanted", "unwanted"]),
        ("sft", [""]),
        (None, [""]),
    ],
)
def test_a_method_shows_what_its_run_would_train_on(
    mixed: Path, tiny_base: Path, method: Any, answers: list[str]
) -> None:
    found = preview(request(mixed, tiny_base, task="code", method=method))
    assert [sample.answer for sample in found.samples] == answers
    said = "".join(text_of(sample, "learned") for sample in found.samples)
    assert ("total += value" in said) == (answers == [""])


def test_rows_that_a_method_cannot_use_are_passed_over(data: Path, tiny_base: Path) -> None:
    found = preview(request(data, tiny_base, method="dpo"))
    assert {sample.origin for sample in found.samples} == {"row 3 of rows.jsonl"}
    assert [row.row for row in found.unusable] == [1, 2, 4]
    with pytest.raises(InvalidDataError, match="use method=dpo, orpo or kto"):
        path = data.with_name("pairs.jsonl")
        path.write_text(json.dumps(PAIR))
        preview(request(path, tiny_base, method="sft"))


def test_the_command_shows_the_sample_set_of_a_preference_method(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "home"))
    words = ["finetune", "preview", "--method", "dpo", "--model", str(tiny_base), "--rows", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "the sample set 'preferences'" in result.stdout
    assert "chosen" in result.stdout
