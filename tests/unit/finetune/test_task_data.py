"""Which rows a run gets, and that nothing is in both splits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune.data import validate_file
from sage.tools.finetune.preferences.splits import prepare_preferences
from sage.tools.finetune.task_data import is_source_tree, prepare
from sage_contracts.config import Task, TrainingConfig
from sage_contracts.errors import InvalidDataError


def write_rows(path: Path, numbers: range) -> Path:
    path.write_text(json.dumps([{"question": f"Q{n}", "answer": f"A{n}"} for n in numbers]))
    return path


def questions(rows: list) -> set[str]:  # type: ignore[type-arg]
    return {row.messages[0]["content"] for row in rows}


def test_rows_are_split_without_duplicates_in_both(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    rows = [{"question": f"Q{n % 40}", "answer": f"A{n % 40}"} for n in range(80)]
    path.write_text(json.dumps(rows))
    config = TrainingConfig(data_path=str(path), validation_fraction=0.25)
    splits = prepare(config)
    assert (len(splits.train), len(splits.validation)) == (30, 10)
    assert questions(splits.train).isdisjoint(questions(splits.validation))
    assert "40 duplicates removed" in splits.description
    assert prepare(config).fingerprint() == splits.fingerprint()
    assert prepare(config.model_copy(update={"seed": 7})).fingerprint() != splits.fingerprint()


def test_limits_and_a_validation_file(tmp_path: Path) -> None:
    train, held = write_rows(tmp_path / "a.json", range(50)), write_rows(tmp_path / "b.json", range(45, 60))
    config = TrainingConfig(max_train_rows=20, max_eval_rows=5)
    splits = prepare(config, training_path=train, validation_path=held)
    assert (len(splits.train), len(splits.validation)) == (20, 5)
    assert questions(splits.train).isdisjoint(questions(splits.validation))
    with pytest.raises(InvalidDataError, match="nothing to train on"):
        prepare(config, training_path=train, validation_path=train)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_what_became_of_every_row_is_told(tmp_path: Path, method: Any) -> None:
    train, held = tmp_path / "a.json", tmp_path / "b.json"
    rows = [
        {"prompt": f"Q{n}", "completion": f"A{n}", "chosen": f"A{n}", "rejected": "No"} for n in range(20)
    ]
    unread = {"chosen", "rejected"} if method == "sft" else {"completion"}
    rows = [{field: row[field] for field in row if field not in unread} for row in rows]
    train.write_text(json.dumps(rows * 2))
    held.write_text(json.dumps(rows[12:]))
    load: Any = prepare if method == "sft" else prepare_preferences

    def said(validation: Path | None, **fields: Any) -> str:
        config = TrainingConfig(method=method, **fields)
        return str(load(config, training_path=train, validation_path=validation).description)

    kind = "rows" if method == "sft" else "preferences"
    assert said(None) == f"a.json: 18 {kind}, 2 held out, 20 duplicates removed"
    assert said(None, max_train_rows=5).startswith(f"a.json: 5 of 18 {kind}, 2 held out")
    assert said(None, max_train_rows=18).startswith(f"a.json: 18 {kind}, 2 held out")
    told = said(held, max_train_rows=5)
    assert told.startswith(f"a.json: 5 of 12 {kind}, ")
    assert "20 duplicates removed, 8 left out" in told
    assert ("held out: 8 of b.json" if method == "sft" else "8 held out") in told


def test_two_rows_are_enough_for_a_split(tmp_path: Path) -> None:
    splits = prepare(TrainingConfig(), training_path=write_rows(tmp_path / "a.json", range(2)))
    assert (len(splits.train), len(splits.validation)) == (1, 1)
    splits = prepare(TrainingConfig(), training_path=write_rows(tmp_path / "a.json", range(1)))
    assert (len(splits.train), len(splits.validation)) == (1, 0)


@pytest.mark.parametrize("task", [Task.QA, Task.CHAT, Task.INSTRUCTION])
def test_tasks_bring_their_samples(task: Task) -> None:
    splits = prepare(TrainingConfig(task=task))
    assert len(splits.train) >= 80
    assert task.value in splits.description


def test_code_learns_from_a_tree(tmp_path: Path) -> None:
    body = "\n".join(f"    value = value + {n}" for n in range(5))
    functions = [f'def f{n}(value):\n    """Add."""\n{body}\n    return value * {n}\n' for n in range(10)]
    (tmp_path / "only.py").write_text("\n\n".join(functions))
    splits = prepare(TrainingConfig(task=Task.CODE, data_path=str(tmp_path)))
    assert (len(splits.train), len(splits.validation)) == (9, 1)
    assert splits.description.endswith("(one module, split by function): 9 rows, 1 held out")
    few = prepare(TrainingConfig(task=Task.CODE, data_path=str(tmp_path), max_train_rows=4))
    assert few.description.endswith(": 4 of 9 rows, 1 held out")
    assert "4 of " in prepare(TrainingConfig(task=Task.CODE, max_train_rows=4)).description
    write_rows(tmp_path / "rows.json", range(5))
    splits = prepare(TrainingConfig(task=Task.CODE, data_path=str(tmp_path)))
    assert (len(splits.train), len(splits.validation)) == (9, 1)
    assert "rows in rows.json are left out" in splits.description
    (tmp_path / "two.py").write_text("print 'hello'\n")
    (tmp_path / "cn.py").write_bytes("# 返回总数\n".encode("gbk"))
    said = prepare(TrainingConfig(task=Task.CODE, data_path=str(tmp_path))).description
    assert "; cn.py is read as GB18030; 1 source file is left out: two.py (does not parse as" in said


def test_custom_needs_data_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="give some with --data"):
        prepare(TrainingConfig(task=Task.CUSTOM))
    with pytest.raises(InvalidDataError, match="holds no data"):
        prepare(TrainingConfig(task=Task.QA, data_path=str(tmp_path)))


@pytest.mark.parametrize("task", [Task.QA, Task.CODE])
def test_a_folder_of_rows_is_read_as_one_file(tmp_path: Path, task: Task) -> None:
    write_rows(tmp_path / "b.json", range(10, 20))
    write_rows(tmp_path / "a.json", range(10))
    (tmp_path / "README.md").write_text("not data")
    splits = prepare(TrainingConfig(task=task, data_path=str(tmp_path)))
    assert questions(splits.train + splits.validation) == {f"Q{n}" for n in range(20)}
    origins = {row.messages[0]["content"]: row.origin for row in splits.train + splits.validation}
    assert origins["Q12"] == f"row 3 of {tmp_path.name}/b.json"


def test_which_rows_a_limit_leaves_beside_a_validation_file_is_the_seeds_choice(tmp_path: Path) -> None:
    train, held = write_rows(tmp_path / "a.json", range(50)), write_rows(tmp_path / "b.json", range(3))
    seen = [
        questions(
            prepare(
                TrainingConfig(seed=seed, max_train_rows=5), training_path=train, validation_path=held
            ).train
        )
        for seed in (0, 0, 1)
    ]
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_sorted_validation_file_is_not_judged_by_its_head(tmp_path: Path, method: Any) -> None:
    train, held = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, numbers in ((train, range(100, 110)), (held, range(40))):
        rows = ({"prompt": f"{n:03}", "chosen": f"A{n}", "rejected": f"B{n}"} for n in numbers)
        text = "\n".join(map(json.dumps, rows))
        path.write_text(text if method == "dpo" else text.replace("chosen", "completion"))
        if method == "sft":
            path.write_text(re.sub(', "rejected": "B[0-9]+"', "", path.read_text()))
    load: Any = prepare if method == "sft" else prepare_preferences

    def judged(**fields: Any) -> list[str]:
        config = TrainingConfig(method=method, **fields)
        rows = load(config, training_path=train, validation_path=held).validation
        return [(row.messages if method == "sft" else row.prompt_messages)[0]["content"] for row in rows]

    seeds = [judged(max_eval_rows=10, seed=seed) for seed in (0, 0, 1)]
    assert [len(seen) for seen in seeds] == [10] * 3
    assert seeds[0] == seeds[1] != seeds[2]
    assert any(int(question) >= 20 for question in seeds[0])
    assert judged(max_eval_rows=40) == [f"{n:03}" for n in range(40)], "a file that fits keeps its order"


def talk(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "first", "weight": more.pop("weight", 1)},
            {"role": "user", "content": "go on"},
            {"role": "assistant", "content": answer},
        ],
        **more,
    }


def test_rows_that_differ_in_tools_or_weights_are_no_duplicates_but_held_out_together(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [r for n in range(20) for r in (talk(f"Q{n}", "A"), talk(f"Q{n}", "A", weight=0))]
    rows += [talk("Q0", "A", tools=tools), talk("Q0", "A")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert validate_file(path).duplicates == 1
    splits = prepare(TrainingConfig(data_path=str(path), validation_fraction=0))
    assert (len(splits.train), "1 duplicates removed" in splits.description) == (41, True)
    splits = prepare(TrainingConfig(data_path=str(path), validation_fraction=0.25))
    assert len(splits.validation) == 10
    assert questions(splits.train).isdisjoint(questions(splits.validation))
    left_out = 41 - 10 - len(splits.train)
    assert left_out > 0
    assert f"{left_out} left out" in splits.description


def test_two_rows_that_say_the_same_are_both_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([talk("Q", "A"), talk("Q", "A", weight=0)]))
    splits = prepare(TrainingConfig(data_path=str(path)))
    assert (len(splits.train), len(splits.validation)) == (2, 0)


@pytest.mark.parametrize("folder", [".venv/lib", "node_modules", ".git"])
def test_code_that_is_not_ones_own_makes_no_source_tree(tmp_path: Path, folder: str) -> None:
    write_rows(tmp_path / "rows.json", range(5))
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "hook.py").write_text("def f():\n    return 1\n")
    assert not is_source_tree(Task.CODE, tmp_path)
    (tmp_path / "own.py").write_text("def f():\n    return 1\n")
    assert is_source_tree(Task.CODE, tmp_path)


@pytest.mark.parametrize("is_validation", [False, True])
@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_a_run_says_which_encoding_it_reads(tmp_path: Path, method: str, is_validation: bool) -> None:
    legacy, plain = tmp_path / "legacy.csv", tmp_path / "plain.csv"
    for path in (legacy, plain):
        rows = [f"At what heat, {path.stem} {n}?;At 150°C;At 15°C" for n in range(8)]
        encoding = "cp1252" if path == legacy else "utf-8"
        path.write_text("\n".join(["prompt;chosen;rejected", *rows]), encoding=encoding)
        if method == "sft":
            path.write_bytes(path.read_bytes().replace(b"prompt;chosen;rejected", b"question;answer;other"))
    training, validation = (plain, legacy) if is_validation else (legacy, None)
    load = prepare if method == "sft" else prepare_preferences
    splits = load(TrainingConfig(method=method), training_path=training, validation_path=validation)
    assert splits.description.endswith("; legacy.csv is read as CP1252")
