"""Rows that are written in any format and any container are read back as the same messages; a row that is
spoilt is refused with its number and its field."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.tools.finetune.data import Conversation, load_conversations, load_preferences, validate_file
from sage.tools.finetune.task_data import prepare
from sage_contracts.config import TrainingConfig

Json = dict[str, Any]


class Example(NamedTuple):
    """A row, and what it has to become."""

    row: Json
    messages: list[Json]
    answer_field: str
    tools: list[Json] | None = None


texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
).filter(lambda text: text.strip() != "")
tidy = texts.map(str.strip).filter(lambda text: text.strip() == text)


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def says(text: str) -> Json:
    return {"role": "assistant", "content": text}


def two(question: str, answer: str, system: str = "") -> list[Json]:
    return [*([{"role": "system", "content": system}] if system else []), user(question), says(answer)]


@st.composite
def alpaca(draw: Any) -> Example:
    asked, extra, answer, system = draw(st.tuples(texts, st.just("") | tidy, texts, st.just("") | tidy))
    row = {"instruction": asked, "input": extra, "output": answer} | ({"system": system} if system else {})
    return Example(row, two(f"{asked}\n\n{extra}" if extra else asked, answer, system), "output")


@st.composite
def qa(draw: Any) -> Example:
    asked, context, answer = draw(st.tuples(texts, st.just("") | tidy, texts))
    row = {"question": asked, "answer": answer} | ({"context": context} if context else {})
    return Example(row, two(f"{context}\n\n{asked}" if context else asked, answer), "answer")


@st.composite
def dialogue(draw: Any) -> list[Json]:
    turns = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    system = draw(st.lists(tidy.map(lambda text: {"role": "system", "content": text}), max_size=1))
    return [*system, *(m for asked, answer in turns for m in (user(asked), says(answer)))]


@st.composite
def conversations(draw: Any) -> Example:
    turns = draw(dialogue())
    return Example({"conversations": turns}, turns, f"conversations[{len(turns) - 1}].content")


@st.composite
def sharegpt(draw: Any) -> Example:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = draw(dialogue())
    given_turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    return Example({"conversations": given_turns}, turns, f"conversations[{len(turns) - 1}].value")


@st.composite
def openai(draw: Any) -> Example:
    turns = draw(dialogue())
    weighted = [m | {"weight": 1} if m["role"] == "assistant" else m for m in turns]
    return Example({"messages": weighted}, weighted, f"messages[{len(turns) - 1}].content")


@st.composite
def tool_use(draw: Any) -> Example:
    name, value, answer = draw(st.tuples(tidy, texts, texts))
    tools = [{"type": "function", "function": {"name": name}}]
    function = {"name": name, "arguments": json.dumps({"x": value})}
    call = {"id": "c1", "type": "function", "function": function}
    read = call | {"function": {"name": name, "arguments": {"x": value}}}
    result = {"role": "tool", "content": value, "tool_call_id": "c1"}
    turns = [user(value), {"role": "assistant", "content": "", "tool_calls": [call]}, result, says(answer)]
    expected = [turns[0], turns[1] | {"tool_calls": [read]}, result, turns[3]]
    return Example({"messages": turns, "tools": tools}, expected, "messages[3].content", tools)


@st.composite
def completion(draw: Any) -> Example:
    prompt, answer = draw(st.tuples(texts, texts))
    return Example({"prompt": prompt, "completion": answer}, two(prompt, answer), "completion")


@st.composite
def plain(draw: Any) -> Example:
    text = draw(texts)
    return Example({"text": text}, two("", text), "text")


FORMATS = (alpaca, qa, conversations, sharegpt, openai, tool_use, completion, plain)
one_format = st.sampled_from(FORMATS).flatmap(lambda make: st.lists(make(), min_size=1, max_size=4))
mixed = st.lists(st.one_of([make() for make in FORMATS]), min_size=1, max_size=6)


def cells(row: Json) -> Json:
    """Structured fields as JSON text, as tables hold them."""
    return {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}


def table(rows: Sequence[Json], delimiter: str) -> str:
    stream = io.StringIO(newline="")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(stream, columns, delimiter=delimiter, restval="")
    writer.writeheader()
    writer.writerows(map(cells, rows))
    return stream.getvalue()


TEXT_CONTAINERS: dict[str, Callable[[Sequence[Json]], str]] = {
    "json": json.dumps,
    "json-unescaped": lambda rows: json.dumps(rows, ensure_ascii=False),
    "json-indented": lambda rows: json.dumps(rows, indent=2),
    "json-lines": lambda rows: "\n".join(map(json.dumps, rows)) + "\n",
    "json-lines-blank": lambda rows: "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "json-objects": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "json-wrapped": lambda rows: json.dumps({"version": 1, "data": rows}),
    "csv": lambda rows: table(rows, ","),
    "csv-semicolon": lambda rows: table(rows, ";"),
    "tsv": lambda rows: table(rows, "\t"),
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le")
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda content: content,
    "gzip": lambda content: gzip.compress(content, 1),
    "zstd": zstandard.compress,
    "zstd-frames": lambda content: zstandard.compress(content[:7]) + zstandard.compress(content[7:]),
}


def read_back(content: bytes) -> list[Conversation]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "upload"  # a name that tells nothing
        path.write_bytes(content)
        return load_conversations(path)


def same(found: Sequence[Conversation], examples: Sequence[Example]) -> None:
    assert [c.messages for c in found] == [example.messages for example in examples]
    assert [c.tools for c in found] == [example.tools for example in examples]
    assert [c.origin for c in found] == [f"row {n} of upload" for n in range(1, len(examples) + 1)]


@pytest.mark.parametrize("container", TEXT_CONTAINERS)
@given(
    examples=mixed,
    encoding=st.sampled_from(ENCODINGS),
    compress=st.sampled_from(sorted(COMPRESSIONS)),
)
@settings(max_examples=25, deadline=None)
def test_text_files_are_read_back(
    container: str, examples: list[Example], encoding: str, compress: str
) -> None:
    text = TEXT_CONTAINERS[container]([example.row for example in examples])
    same(read_back(COMPRESSIONS[compress](text.encode(encoding))), examples)


@given(examples=one_format, compress=st.sampled_from(sorted(COMPRESSIONS)))
@settings(max_examples=25, deadline=None)
def test_parquet_files_are_read_back(examples: list[Example], compress: str) -> None:
    from pyarrow import Table, parquet

    stream = io.BytesIO()
    columns = dict.fromkeys(name for example in examples for name in example.row)
    parquet.write_table(Table.from_pylist([columns | example.row for example in examples]), stream)
    found = read_back(COMPRESSIONS[compress](stream.getvalue()))
    same(found, examples)


@given(examples=one_format)
@settings(max_examples=25, deadline=None)
def test_a_folder_is_read_back_in_the_order_of_its_names(examples: list[Example]) -> None:
    with TemporaryDirectory() as folder:
        for number, example in enumerate(examples):
            suffix, text = [(".json", json.dumps([example.row])), (".csv.gz", table([example.row], ","))][
                number % 2
            ]
            compress = COMPRESSIONS["gzip" if suffix.endswith("gz") else "plain"]
            (Path(folder) / f"{number}{suffix}").write_bytes(compress(text.encode()))
        (Path(folder) / ".hidden.json").write_text("[")
        found = load_conversations(Path(folder), "set")
    assert [c.messages for c in found] == [example.messages for example in examples]
    assert [c.origin.split(".")[0] for c in found] == [f"row 1 of set/{n}" for n in range(len(examples))]


def spoilt(example: Example, how: str) -> tuple[Json, str]:
    """The row without its answer, and the field that must be named."""
    row: Json = json.loads(json.dumps(example.row))
    holder, key = row, example.answer_field
    if "[" in key:
        name, _, rest = key.partition("[")
        index, _, key = rest.partition("].")
        holder = row[name][int(index)]
    if how == "empty":
        holder[key] = " "
    elif how == "number":
        holder[key] = 7
    else:
        holder[key] = None
    return row, example.answer_field


@pytest.mark.parametrize("container", ["json", "json-lines", "json-objects", "csv", "tsv"])
@given(
    examples=mixed,
    at=st.integers(0, 5),
    how=st.sampled_from(["empty", "number", "null"]),
)
@settings(max_examples=15, deadline=None)
def test_a_spoilt_row_is_refused_with_its_number_and_field(
    container: str, examples: list[Example], at: int, how: str
) -> None:
    at %= len(examples)
    is_table = container in ("csv", "tsv")
    if examples[at].answer_field == "text" and (how == "null" or is_table):
        return  # a row of nothing has no format
    row, field = spoilt(examples[at], "empty" if is_table else how)
    rows = [example.row for example in examples]
    text = TEXT_CONTAINERS[container]([*rows[:at], row, *rows[at + 1 :]])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_text(text, encoding="utf-8", newline="")
        report = validate_file(path)
    assert [(bad.row, bad.field) for bad in report.bad] == [(at + 1, field)]
    assert (report.rows, report.good) == (len(rows), len(rows) - 1)


@given(examples=mixed, at=st.integers(0, 5), cut=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_a_line_that_is_no_json_is_one_bad_row_among_good_ones(
    examples: list[Example], at: int, cut: int
) -> None:
    lines = [json.dumps(example.row) for example in examples]
    lines.insert(at % len(lines) + 1, lines[0][:-cut])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_text("\n".join(lines))
        report = validate_file(path)
    assert [(bad.row, bad.field) for bad in report.bad] == [(at % len(examples) + 2, "row")]
    assert report.good == len(examples)


@given(pairs=st.lists(st.tuples(texts, texts, texts).filter(lambda t: t[1] != t[2]), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_preference_pairs_are_read_back(pairs: list[tuple[str, str, str]]) -> None:
    rows = [
        {"prompt": [user(p)], "chosen": [says(c)], "rejected": [says(r)]}
        if number % 2
        else {
            "input": {"messages": [user(p)]},
            "preferred_output": [says(c)],
            "non_preferred_output": [says(r)],
        }
        for number, (p, c, r) in enumerate(pairs)
    ]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        for text in (json.dumps(rows), table(rows, ",")):
            path.write_text(text, newline="")
            found = load_preferences(path)
            assert [(p.prompt_messages, p.chosen, p.rejected) for p in found] == [
                ([user(p)], [says(c)], [says(r)]) for p, c, r in pairs
            ]


@given(
    picks=st.lists(st.integers(0, 6), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
    blanks=st.lists(st.sampled_from(["", " ", "\n"]), min_size=40, max_size=40),
)
@settings(max_examples=40, deadline=None)
def test_the_split_never_shares_a_duplicate(
    picks: list[int], fraction: float, seed: int, blanks: list[str]
) -> None:
    # White space around a text makes it no exact duplicate, but nothing new to be asked about either.
    rows = [{"question": f"Q{n}{blank}", "answer": f"A{n}"} for n, blank in zip(picks, blanks, strict=False)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_text(json.dumps(rows))
        splits = prepare(TrainingConfig(data_path=str(path), validation_fraction=fraction, seed=seed))
    train = [row.messages[0]["content"].strip() for row in splits.train]
    held = [row.messages[0]["content"].strip() for row in splits.validation]
    assert set(train).isdisjoint(held)
    assert {*train, *held} == {f"Q{n}" for n in picks}
    contents = [row.messages[0]["content"] for row in [*splits.train, *splits.validation]]
    assert len(contents) == len(set(contents))
