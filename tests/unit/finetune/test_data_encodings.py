"""Files come in the encodings of the world, and damaged ones are not taken for short ones."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from sage.tools.finetune.data import load_conversations, validate_file
from sage.tools.finetune.data.opening import open_plain
from sage_contracts.errors import InvalidDataError

TEXTS = {
    "gb18030": "什么是网关？请用中文回答,网关是所有请求的入口。",
    "big5": "什麼是閘道？請用中文回答,閘道是所有請求的入口。",
    "cp932": "ゲートウェイとは何ですか,すべてのリクエストの入口です。",
    "cp949": "게이트웨이가 무엇입니까,모든 요청의 입구입니다.",
    "cp1252": "Où est le café ?,Près de l'église à côté.",
    "utf-16": "什么是网关？,网关是入口。",
    "utf-16-be": "什么是网关？,网关是入口。",
    "utf-32": "Où est le café ?,Près de l'église.",
    "utf-8-sig": "什么是网关？,网关是入口。",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_a_table_in_any_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.csv"
    question, answer = TEXTS[encoding].split(",")
    path.write_bytes(f"Question,Answer\r\n{TEXTS[encoding]}\r\n".encode(encoding))
    (row,) = load_conversations(path)
    assert [message["content"] for message in row.messages] == [question, answer]
    report = validate_file(path)
    assert (report.container, bool(report.notes)) == ("CSV", encoding != "utf-8-sig")


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, compress: object) -> None:
    path = tmp_path / "rows"
    content = compress(b"".join(b'{"question": "Q%d", "answer": "A"}\n' % n for n in range(5000)))  # type: ignore[operator]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidDataError, match="damaged or was cut off"):
        validate_file(path)


ROWS = b"".join(b'{"question": "Q%d", "answer": "A"}\n' % n for n in range(5000))


def packed(window_log: int) -> bytes:
    """As `zstd --long=<window_log>` packs."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return bytes(frame.compress(ROWS) + frame.flush())


def skippable(number: int, content: bytes) -> bytes:
    return (0x184D2A50 + number).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content


def test_a_file_packed_with_a_large_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(packed(28))
    assert validate_file(path).good == 5000


def test_a_file_that_takes_more_memory_to_unpack_than_there_is_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(packed(28))
    refused = pytest.raises(InvalidDataError, match=r"rows\.jsonl\.zst takes more memory .* without --long")
    with refused, open_plain(path, path.name, max_window_bytes=1 << 27) as stream:
        stream.read()


@pytest.mark.parametrize("number", [0, 15])
def test_frames_that_hold_no_data_are_passed_over(tmp_path: Path, number: int) -> None:
    path = tmp_path / "rows"
    half = len(ROWS) // 2
    path.write_bytes(
        skippable(number, b"\0" * 4)  # as pzstd begins
        + zstandard.compress(ROWS[:half])
        + skippable(number, b"x" * 300_000)
        + zstandard.compress(ROWS[half:])
        + skippable(number, b"")
    )
    assert validate_file(path).good == 5000
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InvalidDataError, match="damaged or was cut off"):
        validate_file(path)


@pytest.mark.parametrize(
    ("text", "row", "reason"),
    [
        ('[{"text": "a"},]', 2, "line 1, column 16"),
        ('[{"text": "a"}, {"text": }]', 2, "line 1, column 26"),
        ('[{"text": "a"} {"text": "b"}]', 2, "comma"),
        ('[{"text": "a"}', 2, "missing"),
        ('[{"text": "a"}] x', 2, "follows after"),
        ('[{"text": "\\ud83d"}]', 1, "not valid JSON"),
        ('[{"text": "a"},\n{"text": "b\nc"}]', 2, "line 2"),
        ("[" * 100_000, 1, "nested too deeply"),
        ("text,system\na,b,c\n", 1, "3 cells where the header has 2"),
        ('text\n"a"b\n', 1, "not valid CSV"),
    ],
)
def test_the_place_of_a_syntax_error_is_told(tmp_path: Path, text: str, row: int, reason: str) -> None:
    path = tmp_path / "rows"
    path.write_text(text)
    (bad,) = validate_file(path).bad
    assert (bad.row, bad.field) == (row, "row")
    assert reason in bad.reason


def test_a_list_is_read_across_the_pieces_it_is_read_in(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    texts = ["é" * (n * 40_000 % 700_000 + 1) for n in range(12)]
    path.write_text("[" + ",\n".join(f'{{"text": "{text}"}}' for text in texts) + "]")
    assert [c.messages[1]["content"] for c in load_conversations(path)] == texts


@pytest.mark.parametrize("first_line", ["[", "[\n"])
def test_the_column_counts_from_the_line_start_however_far_back_that_was_read(
    tmp_path: Path, first_line: str
) -> None:
    path = tmp_path / "rows"
    good = f'{{"text": "{"é" * 100_000}"}}, ' * 30
    text = f'{first_line}{good}{{"text": }}]'
    path.write_text(text)
    (bad,) = validate_file(path).bad
    line = text.splitlines()[-1]
    where = f"in line {text.count(chr(10)) + 1}, column {line.index('}]') + 1}; "
    assert (bad.row, where in bad.reason) == (31, True), (bad.reason, where)


def test_a_broken_character_is_a_fault_of_its_row_and_not_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [f'{{"question": "什么是{n}？", "answer": "答案"}}'.encode() for n in range(5)]
    rows[2] = rows[2].replace("答".encode(), b"\xe7\xad")
    path.write_bytes(b"\n".join(rows))
    report = validate_file(path)
    assert [(bad.row, bad.field) for bad in report.bad] == [(3, "row")]
    assert (report.good, report.notes) == (4, [])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text", ['{{"text": "{}"}}\n{{"text": "b"}}\n', '[{{"text": "{}"}}]', "text\n{}\nb\n"]
)
def test_unicode_without_a_mark_is_told_by_its_first_character(
    tmp_path: Path, encoding: str, text: str
) -> None:
    path = tmp_path / "rows"
    path.write_bytes(text.format("网关").encode(encoding))
    assert load_conversations(path)[0].messages[1]["content"] == "网关"


@pytest.mark.parametrize("is_table", [True, False])
@pytest.mark.parametrize(
    ("encoding", "mark", "length"),
    [
        ("utf-8", b"", 1),
        ("utf-8", b"\xef\xbb\xbf", 1),
        # Only behind its beginning: there such a byte makes the file no GB18030.
        ("gb18030", b"", 300),
        ("utf-8", b"", 300),
    ],
)
def test_a_byte_that_is_no_character_is_a_fault_of_its_row(
    tmp_path: Path, encoding: str, mark: bytes, length: int, is_table: bool
) -> None:
    row = "什么是{}？,{}\n" if is_table else '{{"question": "什么是{}？", "answer": "{}"}},\n'
    rows = [row.format(number, "网关是所有请求的入口。" * length).encode(encoding) for number in range(400)]
    rows[299] = rows[299].replace("入".encode(encoding), b"\xff", 1)
    text = b"".join(rows)
    path = tmp_path / "rows"
    path.write_bytes(mark + (b"question,answer\n" + text if is_table else b"[" + text[:-2] + b"]"))
    report = validate_file(path)
    assert [(bad.row, bad.field) for bad in report.bad] == [(300, "answer")]
    assert f"holds bytes that are not {encoding.upper()}" in report.bad[0].reason
    assert (report.rows, report.good) == (400, 399)


def test_a_zero_in_text_does_not_make_it_another_encoding(tmp_path: Path) -> None:
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    table.write_text("question,answer\na,b\nc\0,d\n")
    assert [row.messages[0]["content"] for row in load_conversations(table)] == ["a", "c\0"]
    lines.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a\0", "completion": "b"}\n')
    (bad,) = validate_file(lines).bad
    assert (bad.row, "is not valid JSON" in bad.reason) == (2, True)
    (tmp_path / "zeros").write_bytes(bytes(4000))
    with pytest.raises(InvalidDataError, match="not UTF-8 text"):
        validate_file(tmp_path / "zeros")
