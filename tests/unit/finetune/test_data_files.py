"""Files are read by what is in them, and a file that cannot be used says where and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from sage.tools.finetune.data import load_conversations, load_rows, validate_file
from sage_contracts.errors import InvalidDataError

QA = {"question": "Q?", "answer": "A"}


@pytest.mark.parametrize(
    ("opening", "said"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": "a", "answer": "', "make several rows of it"),
        ('[{"question": "a", "answer": "b"},\n{"question": "a", "answer": "', "make several rows of it"),
        ('question,answer\na,b\na,"', "a cell of more than 16 MiB"),
    ],
)
@pytest.mark.parametrize("row_mib", [17, 40])
def test_a_row_of_more_than_16_mib_is_refused(tmp_path: Path, opening: str, said: str, row_mib: int) -> None:
    closing = '"}]\n' if opening[0] == "[" else '"\n' if opening[0] == "q" else '"}\n'
    (tmp_path / "rows").write_text(opening + "x" * (row_mib << 20) + closing)
    report = validate_file(tmp_path / "rows")
    assert (report.rows, report.good, report.bad[0].row) == (2, 1, 2)
    assert "16 MiB" in report.bad[0].reason and said in report.bad[0].reason


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps([QA, QA])),
        ("list.jsonl", json.dumps([QA, QA], indent=2)),
        ("lines.jsonl", json.dumps(QA) + "\n\n" + json.dumps(QA) + "\n"),
        ("lines.json", json.dumps(QA) + "\n" + json.dumps(QA)),
        ("file-without-suffix", "\ufeff" + json.dumps(QA) + "\n" + json.dumps(QA)),
    ],
)
def test_lists_and_lines_are_told_apart_by_content(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert [(row.number, row.value) for row in load_rows(path)] == [(1, QA), (2, QA)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "data.json is empty"),
        ("[]", "data.json is empty"),
        (" \n ", "data.json is empty"),
        ('{"rows": [1]}', "not a list"),
        ('{\n "rows": [1]\n}', "not a list"),
        ("7", "not a list"),
        ("hello\nworld\n", "neither JSON nor a table"),
        ('{"a": [{"x": 1}], "b": [{"x": 1}]}', "2 lists of objects"),
    ],
)
def test_a_file_that_is_no_list_of_rows_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "upload"
    path.write_text(text)
    with pytest.raises(InvalidDataError, match=said):
        validate_file(path, "data.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("\n<!DOCTYPE html>\n<html>404</html>", "a web page"),
    ],
)
def test_what_was_fetched_in_place_of_the_data_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(InvalidDataError, match=said):
        validate_file(tmp_path / "rows.jsonl")


def test_a_single_row_of_columns_of_turns_is_a_row(tmp_path: Path) -> None:
    columns = {"from": ["human", "gpt"], "value": ["a", "b"]}
    assert rows_of(tmp_path / "rows.json", json.dumps({"conversations": columns}))


def test_a_missing_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match=r"There is no file .*gone\.json"):
        validate_file(tmp_path / "gone.json")
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02\xff")
    with pytest.raises(InvalidDataError, match="not UTF-8"):
        validate_file(tmp_path / "weights.bin")


def test_the_report_counts_and_names_every_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [QA, {"question": "Q2"}, QA, {"text": "t"}, [1]]
    path.write_text("\n".join(map(json.dumps, rows)))
    report = validate_file(path)
    assert (report.format, report.rows, report.good, report.duplicates) == ("qa", 5, 3, 1)
    assert [(bad.row, bad.field) for bad in report.bad] == [(2, "answer"), (5, "row")]
    with pytest.raises(
        InvalidDataError, match=r"mixed\.jsonl: 2 of 5 rows .* row 2, field answer: is missing"
    ):
        report.require_all_good()
    with pytest.raises(InvalidDataError, match="row 5, field row"):
        load_conversations(path)


def test_conversations_remember_their_row(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([QA, QA]))
    assert [c.origin for c in load_conversations(path)] == ["row 1 of data.json", "row 2 of data.json"]


def test_a_table_of_one_column_has_no_delimiters(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\nHello, world; hello | all\n"quoted, ""too"""\n')
    assert [c.messages[1]["content"] for c in load_conversations(path)] == [
        "Hello, world; hello | all",
        'quoted, "too"',
    ]


@pytest.mark.parametrize("digits", [str(2**63), str(2**64), str(-(2**63)), str(-(2**63) - 1), "1" * 300])
def test_integers_of_any_size_are_the_same_in_lists_and_in_lines(tmp_path: Path, digits: str) -> None:
    row = f'{{"question": "Q?", "answer": "A", "id": {digits}}}'
    (tmp_path / "lines.jsonl").write_text(f"{row}\n{row}\n")
    (tmp_path / "list.json").write_text(f"[{row},\n{row}]")
    lines, listed = (
        [row.value["id"] for row in load_rows(tmp_path / name)] for name in ("lines.jsonl", "list.json")
    )
    assert lines == listed
    assert [type(number) for number in lines] == [type(number) for number in listed]
    assert orjson.dumps(lines) == orjson.dumps(listed)


@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("digits", [str(2**64 - 1), str(2**64), str(-(2**63)), str(-(2**63) - 1), "9" * 30])
def test_a_number_in_a_call_is_learned_to_its_last_digit_or_refused(
    tmp_path: Path, digits: str, is_text: bool
) -> None:
    arguments: Any = {"amount": int(digits), "mass_kg": 1.989e30}
    call = {"function": {"name": "pay", "arguments": json.dumps(arguments) if is_text else arguments}}
    turns = [{"role": "user", "content": "Pay."}, {"role": "assistant", "tool_calls": [call]}]
    row = {"messages": turns, "id": 10**20}
    for name, text in (
        ("lines.jsonl", f"{json.dumps(row)}\n{json.dumps(row)}"),
        ("list.json", json.dumps([row, row])),
        ("one.json", json.dumps(row, indent=1)),
        ("rows.csv", 'messages\n"' + json.dumps(turns).replace('"', '""') + '"\n'),
        ("utf16.jsonl", f"{json.dumps(row)}\n{json.dumps(row)}"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-16" if "utf16" in name else "utf-8")
        report = validate_file(tmp_path / name)
        if -(2**63) <= int(digits) < 2**64:
            read = load_conversations(tmp_path / name)[0].messages[1]["tool_calls"][0]["function"]
            assert (report.bad, read["arguments"]) == ([], arguments)
        else:
            assert report.good == 0
            assert report.bad[0].field == "messages[1].tool_calls[0].function.arguments"
            assert "whole number beyond 64 bits" in report.bad[0].reason


NO_NUMBERS = {
    "NaN": "NaN is no JSON",
    "Infinity": "Infinity is no JSON",
    "-Infinity": "Infinity is no JSON",
    "1e400": "number is infinity",
    "-1.5E+999": "number is infinity",
    "1" * 400: "number is infinity",
    "1" * 5000: "number is infinity",
}


@pytest.mark.parametrize("number", NO_NUMBERS, ids=lambda number: number[:9])
@pytest.mark.parametrize("where", ['"id": {}', '"tools": [{{"deep": [1, {}]}}]'])
def test_what_is_no_number_makes_its_row_bad_in_lists_and_in_lines(
    tmp_path: Path, number: str, where: str
) -> None:
    good, bad = json.dumps(QA), f'{{"question": "Q?", "answer": "A", {where.format(number)}}}'
    reasons = []
    for name, text in (
        ("lines.jsonl", f"{good}\n{bad}\n{good}\n"),
        ("list.json", f"[{good},\n{bad},\n{good}]"),
        ("documents.json", "\n".join(f"{{\n{row[1:]}" for row in (good, bad, good))),
    ):
        path = tmp_path / name
        path.write_text(text)
        report = validate_file(path)
        assert (report.rows, [row.row for row in report.bad]) == (3, [2])
        reasons.append(report.bad[0].reason.split(" in line ")[0])
    assert NO_NUMBERS[number] in reasons[0]
    assert set(reasons) == {reasons[0]}


def test_words_that_look_like_no_number_are_words(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"question": "NaN", "answer": "Infinity, 1e400"}]))
    assert validate_file(path).good == 1


@pytest.mark.parametrize("field", ["tools", "tool_calls", "arguments"])
def test_what_is_nested_too_deeply_makes_its_row_bad(tmp_path: Path, field: str) -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"p": deep}
    function: dict[str, Any] = {"name": "f", "parameters": deep}
    if field != "tools":
        function = {"name": "f", "arguments": deep if field == "tool_calls" else json.dumps(deep)}
    call = {"type": "function", "function": function}
    says = {"role": "assistant", "content": "a", **({} if field == "tools" else {"tool_calls": [call]})}
    row = {
        "messages": [{"role": "user", "content": "q"}, says],
        **({"tools": [call]} if field == "tools" else {}),
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n{json.dumps(QA)}\n")
    (bad,) = validate_file(path).bad
    assert (bad.row, "cannot be written as JSON" in bad.reason) == (1, True)
    with pytest.raises(InvalidDataError, match="row 1"):
        load_conversations(path)


@pytest.mark.parametrize("first", ["\n", "\n\r\n", "  \n", ",\n"])
def test_the_header_is_the_first_line_that_is_not_blank(tmp_path: Path, first: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{first}question,answer\na,b\n\nc,d\n")
    assert [row.messages[1]["content"] for row in load_conversations(path)] == ["b", "d"]


def test_a_quotation_mark_that_is_never_closed_is_told_where_its_row_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\na,"two\nlines"\nb,"c\nd,e\n' + "f,g\n" * 50)
    (bad,) = validate_file(path).bad
    assert (bad.row, "begins in line 4 is never closed" in bad.reason) == (2, True)
    assert "what follows was not read" in bad.reason


def test_rows_that_differ_in_white_space_are_no_exact_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "p", "completion": f"c{end}"}) for end in ("", "\n", "")))
    assert validate_file(path).duplicates == 1


LARGE = "x" * (2 << 20)
"""More than is looked at before it is decided how a file is read."""


def rows_of(path: Path, text: str | bytes) -> list[Any]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [row.value if isinstance(row.value, dict) else str(row.value) for row in load_rows(path)]


def test_the_rows_of_an_object_may_stand_in_lines_of_their_own(tmp_path: Path) -> None:
    text = f'{{"data": [\n{json.dumps(QA)},\n{json.dumps(QA)}\n]}}\n'
    assert rows_of(tmp_path / "a.json", text) == [QA, QA]


@pytest.mark.parametrize("is_first", [True, False])
def test_the_rows_of_a_large_object_are_the_only_list_of_objects_in_it(
    tmp_path: Path, is_first: bool
) -> None:
    others = {"version": 1, "tags": ["a", "b"], "none": [], "about": {"by": [1]}, "license": LARGE}
    rows = {"data": [QA, {**QA, "more": [{"deep": {}}]}]}
    whole = rows | others if is_first else others | rows
    for indent in (None, 1):
        assert rows_of(tmp_path / "a.json", json.dumps(whole, indent=indent)) == rows["data"]
    loaded = load_rows(tmp_path / "a.json")
    list(loaded)
    assert loaded.notes == ["the rows of a.json are the list in its field 'data'"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"a": [QA], "b": [QA], "c": LARGE}), r"2 lists of objects \(a, b\)"),
        (json.dumps({"a": [1, QA], "b": {}, "c": LARGE}), "no list of objects"),
    ],
)
def test_a_large_object_without_one_list_of_rows_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidDataError, match=said):
        rows_of(tmp_path / "a.json", text)


def test_a_large_row_is_a_row_and_several_are_several(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": LARGE}, {"role": "assistant", "content": "A"}]}
    assert rows_of(tmp_path / "a.json", json.dumps(row, indent=1)) == [row]
    assert rows_of(tmp_path / "a.json", json.dumps(row, indent=1) * 2) == [row, row]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    ("lines", "bad"),
    [
        ([{"text": LARGE}, '{"text": }', *[QA] * 200], [2]),
        ([f'{{"text": "{LARGE}}}', *[QA] * 200], [1]),
        (['{"text": }', f'{{"text": "{LARGE}}}', "", {"text": LARGE * 7}, QA], [1, 2]),
        ([{"text": LARGE}, {"text": LARGE}], []),
        (['{"text": }', {"text": LARGE}], [1]),
    ],
)
def test_lines_are_lines_however_long_the_first_are(
    tmp_path: Path, lines: list[Any], bad: list[int], encoding: str
) -> None:
    path = tmp_path / "rows.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding)
    report = validate_file(path)
    rows = sum(line != "" for line in lines)
    assert (report.container, report.rows, [row.row for row in report.bad]) == ("JSON Lines", rows, bad)


def test_a_broken_object_gives_its_rows_up_to_there(tmp_path: Path) -> None:
    good = json.dumps(QA)
    for text, said in (
        (f'{{"data": [{good}, {good} {good}]}}', "a comma or the list's ] is missing"),
        (f'{{"data": [{good}, {good}, {{"question": ', "in line 1, column"),
        (f'{{"data": [{good}, {good}], "a" 7}}', "a field's name in quotation marks or its : is missing"),
        (f'{{"data": [{good}, {good}] "a": 7}}', "a comma or the object's } is missing"),
        (f'{{"data": [{good}, {good}]', "a comma or the object's } is missing"),
    ):
        *rows, problem = rows_of(tmp_path / "a.json", text)
        assert rows == [QA, QA], text
        assert problem.startswith("row: is not valid JSON"), text
        assert said in problem
        assert problem.endswith("what follows was not read")


def test_of_two_fields_with_one_name_the_last_holds_the_rows(tmp_path: Path) -> None:
    text = f'{{"data": [{{"text": "t"}}], "license": "{LARGE}", "data": [{json.dumps(QA)}]}}'
    assert rows_of(tmp_path / "a.json", text) == [QA]


def test_wrong_bytes_in_a_large_object_make_their_row_bad(tmp_path: Path) -> None:
    text = json.dumps({"license": LARGE, "data": [QA, {"text": "!"}, QA]}).encode().replace(b"!", b"\xff")
    assert rows_of(tmp_path / "a.json", text) == [QA, "text: holds bytes that are not UTF-8", QA]


@pytest.mark.parametrize("separator", [";", ",", "\t", "|"])
@pytest.mark.parametrize("line", ["sep={}\r\n", "\ufeffsep={}\n", '"sep={}"\n', "sep={}\n\n"])
def test_excels_line_that_names_the_separator_is_no_header(tmp_path: Path, line: str, separator: str) -> None:
    text = f'question{separator}answer\n"sep=;"{separator}A\n'
    assert rows_of(tmp_path / "rows.csv", line.format(separator) + text) == [
        {"question": "sep=;", "answer": "A"}
    ]
    assert rows_of(tmp_path / "rows.csv", line.format(separator) + "text\nHello\n") == [{"text": "Hello"}]


def test_lines_may_end_with_a_carriage_return_alone(tmp_path: Path) -> None:
    lines = [json.dumps(QA), json.dumps({**QA, "answer": "B\r\n"}), "{broken", json.dumps(QA)]
    path = tmp_path / "rows.jsonl"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("\r".join(lines).encode(encoding))
        report = validate_file(path)
        assert (report.container, report.rows, [bad.row for bad in report.bad]) == ("JSON Lines", 4, [3])
        assert "in line 3" in report.bad[0].reason


@pytest.mark.parametrize("opening", ['{"rows": [\n', '{"a": 1\n,"rows": [\n', '{"rows":\n[\n'])
def test_a_large_object_may_have_its_commas_where_lines_begin(tmp_path: Path, opening: str) -> None:
    row = json.dumps({**QA, "answer": "A" * 1000})
    for comma in ("\n,", "\n  , "):
        rows = rows_of(tmp_path / "rows.json", opening + comma.join([row] * 2000) + "\n]}")
        assert rows == [json.loads(row)] * 2000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": ["a", "b"], "answer": ["c", "d"]}', "holds columns .question, answer., not rows"),
        ('{"question": {"0": "a"}, "answer": {"0": "c"}}', "orient='records', lines=True"),
        ('{"input": "a", "output": "b"}', "one JSON object with the fields input, output"),
    ],
)
def test_a_single_object_that_is_no_row_is_told_what_it_is(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InvalidDataError, match=said):
        validate_file(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"question": "a", "answer": "b"},\n]', "a comma stands before the list's ]"),
        ('{"question": "a", "answer": "b"},\n{"question":\n"a"},', "a comma follows an object"),
    ],
)
def test_commas_in_wrong_places_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    report = validate_file(tmp_path / "rows.json")
    assert (report.rows, report.good) == (2, 1)
    assert said in report.bad[0].reason
