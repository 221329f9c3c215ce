"""The lengths that validation counts are those of training; and it is flat in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.chat_templates import FAMILIES, make_tokenizer

from sage.tools.finetune.base_models import SMOLLM2
from sage.tools.finetune.data import Conversation, Message, RowError, load_conversations, validate_file
from sage.tools.finetune.data.conversation import THOUGHTS_LEFT_OUT
from sage.tools.finetune.data.lengths import TokenReport
from sage.tools.finetune.data.tokenizer_files import checks, learnable_rows, length_counter
from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.rendering import ChatRenderer
from sage_cli.jobs.validate import validate_command
from sage_contracts.errors import InvalidDataError

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": " One? <|im_end|> "},
    {"role": "assistant", "content": "Yes, one.\n"},
    {"role": "user", "content": "Two? 二"},
    {"role": "assistant", "content": "Two it is."},
]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Osló"}}}
TOOL_TALK = [
    TALK[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "-4", "tool_call_id": "call00001"},
    TALK[3],
]
ROWS = 120_000
BAD_EVERY = 3
MAX_GROWTH_BYTES = 60 << 20

_MEASURED = """
import sys
from pathlib import Path
from sage_cli.jobs.validate import validate_command

def memory_bytes(of):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(of)).split()[1]) * 1024

before = memory_bytes("VmRSS")
try:
    validate_command(Path(sys.argv[1]), max_length=1024, model=None, method=None, as_json=True)
finally:
    print(memory_bytes("VmHWM") - before, file=sys.stderr)
"""


def numbers_of_training(tokenizer: Any, rows: Sequence[Conversation], max_length: int) -> tuple[int, ...]:
    """Tokens in all and of the longest row, rows that are cut or left out, tokens with loss that are lost."""
    renderer = ChatRenderer(tokenizer, max_length)
    whole = list(renderer.tokenised(rows))
    renderer.samples(rows)
    lost = [label != IGNORED for text in whole for label in text.labels[max_length:]]
    sizes = [len(text.ids) for text in whole]
    return sum(sizes), max(sizes), renderer.stats.truncated + renderer.stats.dropped, sum(lost)


def numbers_of(report: TokenReport | None) -> tuple[int, ...]:
    assert report is not None
    assert not report.is_estimate
    return report.total, report.longest, report.too_long, report.answer_tokens_cut


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_as_long_as_training_makes_it(tmp_path: Path, name: str, is_marked: bool) -> None:
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = family.marked if is_marked else family.unmarked
    tokenizer.save_pretrained(tmp_path)
    rows: list[tuple[list[Any], Any]] = [(TALK, None), (TALK[:2], None), ([SYSTEM, *TALK], None)]
    rows += [([*TALK, TALK[0]], None), ([*TALK[:3], {**TALK[3], "weight": 0}], None), (TOOL_TALK, [TOOL])]
    told = 0
    for messages, tools in rows:
        counter = length_counter(str(tmp_path), tmp_path, 40)
        row = Conversation(messages, "row 1", tools)
        try:
            for _ in range(3):
                counter.add(messages, tools)
        except RowError:
            with pytest.raises(InvalidDataError):
                numbers_of_training(tokenizer, [row], 40)
            continue
        told += 1
        assert numbers_of(counter.report()) == numbers_of_training(tokenizer, [row] * 3, 40)
    assert told >= 4


# White space, thoughts and what templates look for.
pieces = st.lists(
    st.sampled_from([*" \n\t<aXé二😀", "er", "\n\n", "<think>", "<think>\n", "</think>", "Xq7"]), max_size=8
)


@st.composite
def talks(draw: st.DrawFn) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "".join(draw(pieces))}] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 3))):
        said: Message = {"role": "assistant", "content": "".join(draw(pieces))}
        said["weight"] = draw(st.integers(0, 1))
        messages += [{"role": "user", "content": "".join(draw(pieces))}, said]
    messages[-1]["weight"] = 1
    return [*messages, *messages[-2:-1]] if draw(st.booleans()) else messages


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_of_any_rows_are_those_of_training(tmp_path: Path, name: str, merges: bool) -> None:
    tokenizer = make_tokenizer(FAMILIES[name], trims_offsets=merges, merges=merges)
    tokenizer.save_pretrained(tmp_path)

    @settings(max_examples=20, deadline=None)
    @given(st.lists(talks(), min_size=1, max_size=8), st.integers(1, 60))
    def agree(rows: list[list[Message]], max_length: int) -> None:
        counter = length_counter(str(tmp_path), tmp_path, max_length)
        kept: list[Conversation] = []
        for messages in [*rows, *rows, *rows]:
            row = Conversation(messages, "row 1")
            try:
                counter.add(messages, None)
            except RowError:
                with pytest.raises(InvalidDataError):
                    list(ChatRenderer(tokenizer, max_length).tokenised([row]))
            else:
                kept.append(row)
        if kept:
            assert numbers_of(counter.report()) == numbers_of_training(tokenizer, kept, max_length)

    agree()


@pytest.mark.parametrize("is_named", [True, False])
def test_rows_that_the_chosen_model_refuses_are_no_rows_to_train_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_named: bool
) -> None:
    monkeypatch.setenv("SAGE_HOME", str(tmp_path))
    folder = tmp_path / "base_models" / SMOLLM2
    make_tokenizer(FAMILIES["gemma"]).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": turns}) for turns in (TALK, [SYSTEM, *TALK])))
    model = str(folder) if is_named else None

    def validate() -> None:
        validate_command(path, max_length=512, model=model, method=None, as_json=False)

    if is_named:
        with pytest.raises(typer.Exit) as ended:
            validate()
        assert ended.value.exit_code == 2
    else:  # the run may be of another model
        validate()
    told = " ".join(capsys.readouterr().out.split())
    assert "the chat template refuses it (System role not supported)" in told
    assert ("1 of 2 rows cannot be used" in told) == is_named
    assert ("would stop at 1 row: row 2 of rows.jsonl" in told) != is_named
    assert ("with a model whose chat template takes it" in told) != is_named


def test_a_template_that_refuses_by_content_is_asked_about_every_row(tmp_path: Path) -> None:
    family = FAMILIES["chatml"]
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not m.content.strip() or '<image>' in m.content %}"
        "{{ raise_exception('No text in the turn of the ' ~ m.role) }}{% endif %}{% endfor %}"
    ) + family.unmarked
    tokenizer.save_pretrained(tmp_path / "model")
    says = {"role": "assistant", "content": "Yes."}
    rows = [{"messages": [{"role": "user", "content": text}, says]} for text in ("One?", "", "<image>", "2?")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = validate_file(path, lengths=length_counter(str(tmp_path / "model"), tmp_path, 100))
    assert [bad.row for bad in report.bad] == [2, 3]
    assert "the chat template refuses it (No text in the turn of the user)" in report.bad[0].reason


def test_rows_whose_thoughts_the_template_cuts_out_are_bad_rows_for_the_chosen_model(tmp_path: Path) -> None:
    make_tokenizer(FAMILIES["r1"]).save_pretrained(tmp_path / "model")
    said = ("Plain.", "<think>hm</think>Yes.", "Plain too.")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"question": "Q?", "answer": answer}) for answer in said))
    report = validate_file(path, lengths=length_counter(str(tmp_path / "model"), tmp_path, 100))
    assert [(bad.row, THOUGHTS_LEFT_OUT in bad.reason) for bad in report.bad] == [(2, True)]


def test_what_a_template_does_with_thoughts_is_done_before_they_are_counted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(FAMILIES["qwen3"])
    tokenizer.save_pretrained(tmp_path / "model")
    said = ("Plain.", "<think>\nhm\n</think>\n\nYes.", "<think>hm</think>Yes.", "no </think> beginning")
    talks = [[TALK[0], {"role": "assistant", "content": text}] for text in said]
    talks.append([turn for talk in talks for turn in talk])  # thoughts of earlier turns are left out
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    report = validate_file(path, lengths=length_counter(str(tmp_path / "model"), tmp_path, 100)).tokens
    assert numbers_of(report) == numbers_of_training(tokenizer, load_conversations(path), 100)


def test_a_template_writes_json_as_it_asks_for_it(tmp_path: Path) -> None:
    family = FAMILIES["qwen25"]
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = family.unmarked.replace("tojson", "tojson(ensure_ascii=False, indent=1)")
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TOOL_TALK, "tools": [TOOL]}))
    report = validate_file(path, lengths=length_counter(str(tmp_path / "model"), tmp_path, 100))
    assert not report.bad
    assert numbers_of(report.tokens) == numbers_of_training(tokenizer, load_conversations(path), 100)


@pytest.mark.parametrize("is_one_file", [True, False])
def test_rows_with_tools_are_held_against_the_template_for_tools(tmp_path: Path, is_one_file: bool) -> None:
    without, with_tools = FAMILIES["chatml"].unmarked, FAMILIES["qwen25"].unmarked
    tokenizer = make_tokenizer(FAMILIES["qwen25"])
    tokenizer.chat_template = {"default": without, "tool_use": with_tools}
    tokenizer.save_pretrained(tmp_path / "model", save_jinja_files=not is_one_file)
    rows = [{"messages": TALK}, {"messages": TOOL_TALK, "tools": [TOOL]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = validate_file(path, lengths=length_counter(str(tmp_path / "model"), tmp_path, 100))
    assert not report.bad
    assert numbers_of(report.tokens) == numbers_of_training(tokenizer, load_conversations(path), 100)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_and_training_note_the_same_rows_for_the_templates_marks(tmp_path: Path, name: str) -> None:
    tokenizer = make_tokenizer(FAMILIES[name])
    tokenizer.save_pretrained(tmp_path / "model")
    rendered = tokenizer.apply_chat_template(TALK[2:], tokenize=False)
    end = FAMILIES[name].turn_end
    path = tmp_path / "rows.jsonl"
    texts = ["Yes.", "<think>hm</think>?", rendered, f"Yes.{end}"]
    path.write_text("\n".join(json.dumps({"question": text, "answer": "Yes."}) for text in texts))
    counter, marks = checks(str(tmp_path / "model"), tmp_path, 500)
    report = validate_file(path, lengths=counter, marks=marks)
    (note,) = report.notes
    assert note.startswith("2 rows have marks in the text")
    assert "row 3 of rows.jsonl holds" in note
    renderer = ChatRenderer(tokenizer, 500)
    renderer.samples(load_conversations(path))
    assert renderer.marked.note() == note


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bad_row_is_one_that_training_refuses(tmp_path: Path, name: str) -> None:
    tokenizer = make_tokenizer(FAMILIES[name])
    tokenizer.chat_template = FAMILIES[name].unmarked
    tokenizer.save_pretrained(tmp_path / "model")
    talks = [TALK, [SYSTEM, *TALK], [TALK[0], *TALK], [*TALK, TALK[0], TALK[0]], TOOL_TALK, TALK[1:]]
    rows = [{"messages": talk} for talk in talks] + [{"messages": TOOL_TALK, "tools": [TOOL]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = validate_file(path, lengths=length_counter(str(tmp_path / "model"), tmp_path, 100))
    on_submission = validate_file(path, lengths=learnable_rows(str(tmp_path / "model"), tmp_path))
    assert on_submission.bad == report.bad

    renderer = ChatRenderer(tokenizer, 100)
    refused = {}
    for number, conversation in enumerate(load_conversations(path), 1):
        try:
            renderer.samples([conversation])
        except InvalidDataError as error:
            refused[number] = error.message
    assert [bad.row for bad in report.bad] == list(refused)
    for bad in report.bad:
        assert bad.reason.partition(": ")[2] in refused[bad.row]


def test_a_model_without_a_template_is_refused_as_training_refuses_it(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(FAMILIES["chatml"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvalidDataError, match="has no chat template"):
        length_counter(str(tmp_path), tmp_path, 100)


@pytest.mark.parametrize(("start", "between", "end"), [("", "\n", "\n"), ('{"data": [', ",\n", "]}")])
def test_many_rows_good_and_bad_need_no_more_memory_than_few(
    tmp_path: Path, start: str, between: str, end: str
) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as stream:
        for n in range(ROWS):
            answer = "" if n % BAD_EVERY == 0 else f"answer {n} " * 20
            row = json.dumps({"question": f"question {n}", "answer": answer})
            stream.write((between if n else start) + row)
        stream.write(end)
    with (tmp_path / "out.json").open("w") as out:
        ran = subprocess.run(
            [sys.executable, "-c", _MEASURED, str(path)],
            env=os.environ | {"SAGE_HOME": str(tmp_path)},
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    told = json.loads((tmp_path / "out.json").read_text())
    assert (told["rows"], len(told["bad"]), told["empty_answers"]) == (
        ROWS,
        ROWS // BAD_EVERY,
        ROWS // BAD_EVERY,
    )
    growth = int(next(line for line in ran.stderr.splitlines() if line.strip().isdecimal()))
    assert growth < MAX_GROWTH_BYTES


def test_a_hub_model_without_a_tokenizer_file_is_refused(tmp_path: Path) -> None:
    snapshot = "0" * 40
    cached = tmp_path / "hub" / "models--someone--bare"
    (cached / "snapshots" / snapshot).mkdir(parents=True)
    (cached / "snapshots" / snapshot / "tokenizer_config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot)
    script = (
        "from pathlib import Path\n"
        "from sage.tools.finetune.data.tokenizer_files import checks, learnable_rows, length_counter\n"
        "from sage_contracts.errors import InvalidRequestError\n"
        "try:\n    length_counter('someone/bare', Path('/nowhere'), 10)\n"
        "except InvalidRequestError as error:\n    print(error.message)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, "FileNotFoundError" in ran.stdout) == (0, True), ran.stderr
