"""Tables whose columns share a name, and what their quotation marks mean."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.data import load_rows, validate_file
from sage.tools.finetune.data.tables import EMPTY_ROW, table_rows
from sage_contracts.errors import InvalidDataError


def rows_of(path: Path, text: str) -> list[object]:
    path.write_text(text)
    return [row.value if isinstance(row.value, dict) else str(row.value) for row in load_rows(path)]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_two_columns_of_one_name_are_refused_with_their_places(tmp_path: Path, delimiter: str) -> None:
    header = delimiter.join(["Question", "answer", "note", "ANSWER"])
    with pytest.raises(InvalidDataError) as refused:
        rows_of(tmp_path / "rows.csv", f"\n{header}\n{delimiter.join('abcd')}\n")
    said = "rows.csv has 2 columns called 'answer' in its header (line 2): columns 2 and 4"
    assert said in str(refused.value)
    assert "Rename or remove" in str(refused.value)


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "rows.csv", "question,answer,,\na,b,,\n")
    assert row == {"question": "a", "answer": "b", "": ""}


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_rows_of_empty_cells_are_left_out_and_counted(tmp_path: Path, delimiter: str, name: str) -> None:
    path = tmp_path / name
    lines = ["question,answer,,", "a,b,,", ",,,", "c,,,", "d,e,,", ",,,", ' ,"",,', ",,,,,"]
    path.write_text("".join(line.replace(",", delimiter) + "\r\n" for line in lines))
    report = validate_file(path)
    assert [(bad.row, bad.field) for bad in report.bad] == [(3, "answer")]
    assert (report.rows, report.good) == (3, 2)
    assert f"{name} has 4 rows of empty cells: left out" in report.notes


def test_a_table_of_nothing_but_empty_cells_is_empty(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\n,\n,\n")
    with pytest.raises(InvalidDataError, match="is empty"):
        validate_file(tmp_path / "rows.csv")


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    from pyarrow import parquet, table

    path = tmp_path / "rows.parquet"
    parquet.write_table(table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"]), path)
    with pytest.raises(InvalidDataError, match=r"2 columns called 'answer': columns 2 and 3"):
        list(load_rows(path))


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        (['"Yes" in French?\tOui', "next\trow"], [('"Yes" in French?', "Oui"), ("next", "row")]),
        (['"never closed\tOui', "next\trow"], [('"never closed', "Oui"), ("next", "row")]),
        (
            ['"opened\tOui', "next\trow", 'closed"\tend'],
            [('"opened', "Oui"), ("next", "row"), ('closed"', "end")],
        ),
        (['"\t"', "next\trow"], [('"', '"'), ("next", "row")]),
        (['5" pipe\t"a" or "b"', "next\trow"], [('5" pipe', '"a" or "b"'), ("next", "row")]),
        (['"a ""quoted"" b"\t"Yes" then'], [('a "quoted" b', '"Yes" then')]),
        (
            ['"tab\tinside"\tb', 'a\t"two\nlines"', '"a ""b"""\tc'],
            [("tab\tinside", "b"), ("a", "two\nlines"), ('a "b"', "c")],
        ),
        (['"two\nlines"\t"and\n\ttwo"'], [("two\nlines", "and\n\ttwo")]),
        (['"a" b\tc\td', "next\trow"], ["row: has 3 cells where the header has 2", ("next", "row")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_tabs_part_cells_whether_or_not_they_are_quoted(
    tmp_path: Path, lines: list[str], rows: list[tuple[str, str] | str], ending: str
) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes("".join(line + ending for line in ["question\tanswer", *lines]).encode())
    expected = [r if isinstance(r, str) else dict(zip(("question", "answer"), r, strict=True)) for r in rows]
    assert [r.value if isinstance(r.value, dict) else str(r.value) for r in load_rows(path)] == expected
    assert validate_file(path).container == "TSV"


# Lines that are all rows without the marks are taken for rows: no row here has both tabs and ends of lines.
quoted_row = st.sampled_from(['ab", é\t', 'ab", é\n']).flatmap(
    lambda signs: st.tuples(*[st.text(st.sampled_from(signs), max_size=6)] * 3)
)


def filled(cells: tuple[str, ...]) -> tuple[str, ...]:
    """Nothing of a row whose cells are all empty."""
    return cells if any(map(str.strip, cells)) else ()


def cells_read(text: io.StringIO, delimiter: str) -> list[tuple[str, ...]]:
    rows = table_rows(text, delimiter, "rows")
    return [() if row is EMPTY_ROW else tuple(row.values()) for row in rows]


@given(st.lists(quoted_row, max_size=6), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_quoted_cells_come_back_as_they_were(rows: list[tuple[str, ...]], quoting: int) -> None:
    for delimiter in ",\t":
        written = io.StringIO(newline="")
        csv.writer(written, delimiter=delimiter, quoting=quoting).writerows([("a", "b", "c"), *rows])  # type: ignore[arg-type]
        written.seek(0)
        assert cells_read(written, delimiter) == [filled(row) for row in rows]


@given(st.lists(st.tuples(*[st.text(st.sampled_from('ab" ,é'), min_size=1, max_size=5)] * 2), max_size=8))
def test_no_cell_that_was_never_quoted_swallows_another(rows: list[tuple[str, ...]]) -> None:
    text = io.StringIO("".join("\t".join(row) + "\n" for row in [("x", "y"), *rows]), newline="")
    read, written = (
        [filled(tuple(cell.strip('"').replace('""', '"') for cell in row)) for row in some]
        for some in (cells_read(text, "\t"), rows)
    )
    assert read == written


@pytest.mark.parametrize("header", ["text", "question,answer", "question;answer"])
def test_what_is_wrong_with_the_marks_of_a_row_says_what_to_do(tmp_path: Path, header: str) -> None:
    delimiter = header[8:9] or "\n"
    bad, good = rows_of(
        tmp_path / "rows.csv", f'{header}\n"Yes" in French?{delimiter}Oui\n"a"{delimiter}b\n'
    )[:2]
    assert bad.startswith(
        "row: is not valid CSV: text follows the closing quotation mark of a cell, near line 2"
    )  # type: ignore[attr-defined]
    assert "write each quotation mark inside a cell twice" in str(bad)
    assert str(bad).isprintable()
    assert isinstance(good, dict)


@pytest.mark.parametrize("delimiter", [",", ";", "|"])
@pytest.mark.parametrize("header", ["question, answer", '"question", "answer"', '"Question", answer'])
def test_blanks_behind_the_delimiters_of_header_and_rows_are_no_text(
    tmp_path: Path, header: str, delimiter: str
) -> None:
    lines = [header, '"What, or who?", "A tool, and ""more""."', "Which port?,  8080", '"a", "two\nlines"']
    text = "\r\n".join(lines).replace(",", delimiter).replace(f"{delimiter} and", ", and")
    path = tmp_path / "rows.csv"
    assert rows_of(path, text) == [
        {"question": f"What{delimiter} or who?", "answer": 'A tool, and "more".'},
        {"question": "Which port?", "answer": "8080"},
        {"question": "a", "answer": "two\nlines"},
    ]
    assert validate_file(path).good == 3


@pytest.mark.parametrize(
    "row", ['"q", "a"', '"q, or", "a, or b"', 'q, "a" or "b"', ' "q","a"', '"q",   "a"', '"q", "two\nlines"']
)
def test_a_blank_before_a_quotation_mark_that_the_header_does_not_have_is_told(
    tmp_path: Path, row: str
) -> None:
    path = tmp_path / "rows.csv"
    bad, *_, good = rows_of(path, f"question,answer\n{row}\n5, 6\n")
    assert str(bad).startswith("row: has a cell that begins with a blank before its quotation mark")
    assert good == {"question": "5", "answer": " 6"}


def test_a_quoted_cell_may_begin_with_a_blank_and_a_mark(tmp_path: Path) -> None:
    rows = [{"question": ' "Yes" in French?', "answer": ' "Oui"\n'}, {"question": "a", "answer": ' b, "c"'}]
    for quoting in (csv.QUOTE_ALL, csv.QUOTE_MINIMAL):
        written = io.StringIO(newline="")
        writer = csv.DictWriter(written, ["question", "answer"], quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
        assert rows_of(tmp_path / "rows.csv", written.getvalue()) == rows


def test_blanks_beside_tabs_stay_text(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "rows.tsv", 'question\t answer\nq\t "a"\n')
    assert row == {"question": "q", "answer": ' "a"'}


@pytest.mark.parametrize(
    "drawn",
    [
        '| Question | answer |\n|---|:---:|\n| "What" is it? | A tool. |\n| Which port? | 8080|\n|- | --|\n',
        '|question|answer|\n|-|-|\n|"What" is it?|A tool.|\n|Which port?|8080|\n|-|--|',
        'question | answer\r\n--- | ---\r\n"What" is it? | A tool.\r\nWhich port? | 8080\r\n- | --\r\n',
        '\nquestion|answer\n---|---\n"What" is it?|A tool.\nWhich port?|8080\n-|--\n',
    ],
)
def test_a_table_drawn_with_bars_has_no_row_of_its_rule(tmp_path: Path, drawn: str) -> None:
    rows = [{k: v for k, v in row.items() if k} for row in rows_of(tmp_path / "rows.md", drawn)]  # type: ignore[attr-defined]
    assert [tuple(row.values()) for row in rows] == [
        ('"What" is it?', "A tool."), ("Which port?", "8080"), ("-", "--"),
    ]  # fmt: skip
    assert set(rows[0]) == {"question", "answer"}
    assert validate_file(tmp_path / "rows.md").rows == 3


def test_bars_without_a_rule_may_hold_quoted_cells(tmp_path: Path) -> None:
    for sides in ("", "|"):
        lines = [f"{sides}{line}{sides}\n" for line in ("question|answer", '"a|b"|"c "', "-|--")]
        rows = rows_of(tmp_path / "rows.csv", "".join(lines))
        assert [(row["question"], row["answer"]) for row in rows] == [("a|b", "c "), ("-", "--")]  # type: ignore[index]
    (row,) = rows_of(tmp_path / "rows.csv", "question | answer\nWhat? | A tool. \n")
    assert row == {"question": "What?", "answer": "A tool."}


@pytest.mark.parametrize(
    "header", ["question,answer", '"Question","Answer"', "text", "question;answer", "question\tanswer"]
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_header_that_comes_again_is_no_row(tmp_path: Path, header: str, mark: str) -> None:
    delimiter = next((sign for sign in ",;\t" if sign in header), "\n")
    row = "answer" if delimiter == "\n" else f"answer{delimiter}question"
    first, again, last = rows_of(tmp_path / "rows.csv", f"{header}\n{row}\n{mark}{header}\n{row}\n")
    assert again == "row: repeats the header: remove it"
    assert first == last
