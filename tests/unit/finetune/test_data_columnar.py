"""Rows of Parquet and Arrow files."""

from __future__ import annotations

import gzip
import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune.data import load_conversations, load_rows, validate_file
from sage.tools.finetune.task_data import prepare
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidDataError

QA = {"question": "Q?", "answer": "A"}


def test_values_that_only_parquet_has_can_be_arguments_of_calls(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    call = {
        "type": "function",
        "function": {"name": "pay", "arguments": {"sum": Decimal("1.50"), "to": b"x"}},
    }
    turns = [{"role": "user", "content": "Pay"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    path = tmp_path / "rows.parquet"
    parquet.write_table(Table.from_pylist([{"messages": turns}] * 2), path)
    report = validate_file(path)
    assert (report.good, report.duplicates) == (2, 1)
    assert prepare(TrainingConfig(data_path=str(path))).fingerprint()


def test_what_one_row_of_parquet_calls_is_not_asked_of_another(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = [calling("weather", {"city": "Paris", "days": [{"in": 1}, {"on": "Monday"}]}), calling("time", {})]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    plain, tabular = (load_conversations(tmp_path / name) for name in ("rows.json", "rows.parquet"))
    assert [(row.messages, row.tools) for row in tabular] == [(row.messages, row.tools) for row in plain]


def calling(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    properties = {key: {"type": "string"} for key in arguments} or {"zone": {"enum": ["CET"]}}
    tool = {"name": name, "parameters": {"type": "object", "properties": properties}}
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments or {"zone": "CET"}}}]
    turns = [{"role": "user", "content": name}, {"role": "assistant", "content": "", "tool_calls": calls}]
    return {"messages": turns, "tools": [{"type": "function", "function": tool}]}


def called_with(pairs: list[tuple[str, Any]]) -> Any:
    """A column of rows that call with a map, as Spark and DuckDB write objects whose fields differ."""
    import pyarrow as pa

    inner = pa.map_(pa.string(), pa.list_(pa.map_(pa.string(), pa.string())))
    function = pa.struct([("name", pa.string()), ("arguments", inner)])
    call = pa.struct([("type", pa.string()), ("function", function)])
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    calls = [{"type": "function", "function": {"name": "pay", "arguments": pairs}}]
    turns = [{"role": "user", "content": "Pay"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    return pa.array([turns], pa.list_(turn))


def test_a_map_is_an_object_however_deep_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, messages=called_with([("to", [[("name", "Ann"), ("city", "Oslo")], []]), ("by", [])]))
    (row,) = load_conversations(path)
    function = row.messages[1]["tool_calls"][0]["function"]
    assert function["arguments"] == {"to": [{"name": "Ann", "city": "Oslo"}, {}], "by": []}
    write_parquet(path, messages=called_with([("to", []), ("to", [])]))
    (bad,) = validate_file(path).bad
    assert (bad.field, "duplicate" in bad.reason) == ("messages", True)


def write_parquet(path: Path, **columns: Any) -> None:
    from pyarrow import parquet, table

    parquet.write_table(table(columns), path, compression="none")


def test_a_value_that_python_cannot_hold_makes_its_row_bad(tmp_path: Path) -> None:
    from pyarrow import array, int64, string, timestamp

    path = tmp_path / "rows.parquet"
    long_ago = array([0, 10**18, 0], int64()).cast(timestamp("ms"))
    text = array([b"a", b"b", b"caf\xe9"]).cast("binary").view(string())
    write_parquet(path, question=text, answer=["x", "y", "z"], at=long_ago)
    report = validate_file(path)
    assert [(bad.row, bad.field) for bad in report.bad] == [(2, "at"), (3, "question")]
    assert all("cannot be read" in bad.reason for bad in report.bad)


def test_a_damaged_page_names_the_file(tmp_path: Path) -> None:
    from pyarrow import parquet, table

    path = tmp_path / "rows.parquet"
    parquet.write_table(
        table({"question": ["a" * 99] * 99, "answer": ["b"] * 99}), path, compression="snappy"
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:30] + bytes(byte ^ 255 for byte in whole[30:90]) + whole[90:])
    with pytest.raises(InvalidDataError, match=r"rows\.parquet cannot be read as Parquet"):
        validate_file(path)


def test_what_only_parquet_has_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, question=[b"a", b"b"], answer=["x", "y"])
    assert {bad.reason for bad in validate_file(path).bad} == {"is bytes, not text"}
    write_parquet(path, question=["a"], answer=[date(2020, 1, 1)])
    assert [bad.reason for bad in validate_file(path).bad] == ["is a date, not text"]


def save_to_disk(folder: Path, rows: list[dict[str, Any]]) -> None:
    """As `datasets` 4 does."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    folder.mkdir(parents=True)
    path = str(folder / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"question": {"dtype": "string"}}}))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    rows = [{"question": f"Q{n}", "answer": "A", "turns": [{"a": n}]} for n in range(3000)]
    save_to_disk(tmp_path / "one", rows)
    assert [row.value for row in load_rows(tmp_path / "one")] == rows
    for split in ("train", "test"):
        save_to_disk(tmp_path / "several" / split, [{"question": split, "answer": "A"}])
    (tmp_path / "several" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    report = validate_file(tmp_path / "several")
    assert (report.rows, report.container) == (1, "Arrow")
    assert "its split test (test/data-00000-of-00001.arrow)" in report.notes[1]


def test_arrow_files_are_read_and_damaged_ones_named(tmp_path: Path) -> None:
    feather = pytest.importorskip("pyarrow.feather")
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "rows.feather"
    feather.write_feather(pyarrow.table({"question": ["Q?"], "answer": ["A"]}), path)
    assert [row.value for row in load_rows(path)] == [QA]
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [row.value for row in load_rows(path.with_suffix(".gz"))] == [QA]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidDataError, match=r"rows\.feather cannot be read as Arrow"):
        list(load_rows(path))
    path.write_bytes(b"\xff\xff\xff\xff no Arrow")
    with pytest.raises(InvalidDataError, match=r"rows\.feather cannot be read as Arrow"):
        list(load_rows(path))
