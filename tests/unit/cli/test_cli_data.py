"""--data: refused before anything starts, or packed for the upload."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from sage_cli.jobs import data
from sage_cli.jobs.plan import plan_command
from sage_cli.jobs.wish import JobWish
from sage_contracts.config import Task
from sage_contracts.errors import InvalidDataError, InvalidRequestError
from sage_contracts.home import Home
from sage_orchestrator.jobs.datafile import check_data

FUNCTION = '''
def count_words(text):
    """Return a dictionary from each word of text to its count."""
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name in ("app.py", "lib/words.py", ".venv/lib/x.py", "node_modules/y.py", "env/z.py", "made/gen.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FUNCTION)
    (root / "env" / "pyvenv.cfg").touch()
    (root / "data.bin").write_bytes(bytes(1000))
    (root / "huge.py").write_bytes(b"#" * 2_000_000)
    (root / "link.py").symlink_to(root / "app.py")
    return root


def test_a_folder_is_packed_with_its_own_sources_only(tree: Path) -> None:
    data.check(tree, Task.CODE)
    with data.packed(tree, Task.CODE) as file:
        assert file.filename == "project.zip"
        names = zipfile.ZipFile(file.path).namelist()
    assert sorted(names) == ["app.py", "lib/words.py", "made/gen.py"]
    assert not file.path.exists()


def test_what_git_ignores_is_left_out(tree: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tree)], check=True, timeout=30)
    (tree / ".gitignore").write_text("made/\n")
    names = [str(file.relative_to(tree)) for file in data.uploadable_sources(tree)]
    assert names == ["app.py", "lib/words.py"]


def test_a_repository_inside_is_not_lost(tree: Path) -> None:
    for folder in (tree, tree / "lib"):
        subprocess.run(["git", "init", "-q", str(folder)], check=True, timeout=30)
    names = [str(file.relative_to(tree)) for file in data.uploadable_sources(tree)]
    assert names == ["app.py", "lib/words.py", "made/gen.py"]


def test_a_file_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')
    data.check(path, Task.CUSTOM)
    with data.packed(path, Task.CUSTOM) as file:
        assert (file.path, file.filename) == (path, "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "task", "told"),
    [
        ("missing.json", None, Task.CUSTOM, "There is no"),
        ("empty.json", "", Task.CUSTOM, "is empty"),
        ("one.json", '{"rows": "a"}', Task.CUSTOM, "list"),
        ("rows.jsonl", '{"instruction": "a"}\n', Task.CUSTOM, "row 1"),
        ("folder/readme.md", "text", Task.CODE, "no source code"),
        ("folder/app.py", "x = 1\n", Task.CODE, "no function with a body"),
        ("folder/app.py", FUNCTION, Task.QA, "holds no data"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    tmp_path: Path, name: str, content: str | None, task: Task, told: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(InvalidDataError, match=told):
        data.check(path.parent if name.startswith("folder") else path, task)


def test_what_the_server_cannot_read_is_sent_as_json_lines(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = [{"question": f"Q{n}", "answer": f"A{n}"} for n in range(3)]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    (folder / "b.csv").write_text("question,answer\nQ1,A1\nQ2,A2\n")
    (folder / "package.py").write_text(FUNCTION)
    for path in (tmp_path / "rows.parquet", folder):
        data.check(path, Task.QA)
        with data.packed(path, Task.QA) as file:
            assert file.filename == f"{path.stem}.jsonl"
            assert [json.loads(line) for line in file.path.read_text().splitlines()] == rows
        assert not file.path.exists()


def test_a_number_of_any_size_beside_a_call_is_sent_as_it_is(tmp_path: Path) -> None:
    call = {"function": {"name": "now", "arguments": {"zone": "UTC"}}}
    turns = [{"role": "user", "content": "When?"}, {"role": "assistant", "tool_calls": [call]}]
    row = {"messages": turns, "id": 10**30}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data.check(tmp_path, Task.QA)
    with data.packed(tmp_path, Task.QA) as file:
        assert json.loads(file.path.read_text()) == row


def test_a_source_tree_with_json_in_it_is_still_one(tree: Path) -> None:
    (tree / "package.json").write_text("{}")
    data.check(tree, Task.CODE)
    with data.packed(tree, Task.CODE) as file:
        assert file.filename == "project.zip"


def test_rows_that_a_script_beside_them_hides_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(FUNCTION)
    (tmp_path / "package.json").write_text('{"name": "no row"}')
    (tmp_path / "broken.csv").write_text("")
    assert data.check(tmp_path, Task.CODE) == []
    for name in ("data/train.jsonl", "node_modules/x.jsonl", ".cache/y.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"question": "a?", "answer": "b"}\n')
    (note,) = data.check(tmp_path, Task.CODE)
    assert "source code" in note
    assert "rows in data/train.jsonl are left out" in note
    assert note.endswith("; give that file or a folder without code to train on rows")
    assert data.check(tmp_path / "data", Task.CODE) == [
        "1 file of the folder data, in the order of their names"
    ]
    for number in range(5):
        (tmp_path / f"{number}.csv").write_text("question,answer\nQ?,A\n")
    (note,) = data.check(tmp_path, Task.CODE)
    assert "rows in 0.csv, 1.csv, 2.csv and more are left out" in note


@pytest.mark.parametrize("beside", ["words.js", "words.py"])
def test_sources_that_nothing_can_be_made_of_are_named(tmp_path: Path, beside: str) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=30)
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    (tmp_path / "app.py").write_text(FUNCTION)
    (tmp_path / beside).write_bytes(
        "// 返回总数\n".replace("//", "//" if beside[-1] == "s" else "#").encode("gbk")
    )
    for name in ("two.py", "ignored.py"):
        (tmp_path / name).write_text("print 'hello'\n")
    read, left_out = data.check(tmp_path, Task.CODE)
    assert read == f"{beside} is read as GB18030"
    assert left_out.startswith("1 source file is left out: two.py (does not parse")


def test_rows_are_checked_for_the_method(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    data.check(path, Task.CUSTOM, "dpo")
    with pytest.raises(InvalidDataError, match="use method=dpo, orpo or kto"):
        data.check(path, Task.CUSTOM)


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_a_folder_of_pairs_with_code_beside_them_is_sent_as_rows(tmp_path: Path, method: str) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    (folder / "make_pairs.py").write_text(FUNCTION)
    data.check(folder, Task.CODE, method)
    with data.packed(folder, Task.CODE, method) as file:
        assert file.filename == "pairs.jsonl"
        check_data(file.path, file.filename, Task.CODE, method, "smollm2-135m", Home(tmp_path))
    data.check(folder, Task.CODE)
    with data.packed(folder, Task.CODE) as file:
        assert file.filename == "pairs.zip"


def test_a_single_source_file_is_packed_so_that_the_server_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "app.py"
    path.write_text(FUNCTION)
    (tmp_path / "other.py").write_text(FUNCTION)
    data.check(path, Task.CODE)
    with data.packed(path, Task.CODE) as file:
        check_data(file.path, file.filename, Task.CODE, "sft", "smollm2-135m", Home(tmp_path))
        assert zipfile.ZipFile(file.path).namelist() == ["app.py"]
    with pytest.raises(InvalidDataError, match="neither JSON nor a table"):
        data.check(path, Task.QA)
    path.write_text("x = 1\n")
    with pytest.raises(InvalidDataError, match="no function with a body"):
        data.check(path, Task.CODE)


def test_files_from_before_zip_can_say_when_are_packed(tree: Path) -> None:
    os.utime(tree / "app.py", (0, 0))
    with data.packed(tree, Task.CODE) as file:
        assert "app.py" in zipfile.ZipFile(file.path).namelist()


def packed_tree(path: Path, *names: str) -> Path:
    source = path.parent / "one.js"
    source.write_text("function f() { return 1 }\n")
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.write(source, name)
    else:
        with tarfile.open(path, "w:gz") as tarball:
            for name in names:
                tarball.add(source, name)
    return path


@pytest.mark.parametrize("name", ["tree.zip", "tree.tar.gz", "tree.tgz", "TREE.TGZ"])
def test_archives_are_taken_here_as_by_the_server(tmp_path: Path, name: str) -> None:
    path = packed_tree(tmp_path / name, "project/src/a.js")
    data.check(path, Task.CODE)
    with data.packed(path, Task.CODE) as file:
        assert (file.path, file.filename) == (path, name)
        check_data(file.path, file.filename, Task.CODE, "sft", "smollm2-135m", Home(tmp_path))
    # What neither takes is refused here already, and in the same words.
    nothing = packed_tree(tmp_path / f"none-{name}", "project/tests/a.js", "node_modules/b.js", "c.min.js")
    for refused, task, method, told in (
        (path, Task.QA, "sft", "only the task `code` takes"),
        (path, Task.CODE, "dpo", "says no preference"),
        (nothing, Task.CODE, "sft", "no source file"),
    ):
        with pytest.raises(InvalidDataError, match=told) as here:
            data.check(refused, task, method)
        with pytest.raises(InvalidDataError) as there:
            check_data(refused, refused.name, task, method, "smollm2-135m", Home(tmp_path))
        assert str(here.value) == str(there.value)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGLINK])
def test_an_archive_whose_header_would_fill_the_memory_is_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "tree.tgz", "w:gz") as tarball:
        header = tarfile.TarInfo("header")
        header.type, header.size = kind, 2 << 20
        tarball.addfile(header, io.BytesIO(bytes(header.size)))
        tarball.addfile(tarfile.TarInfo("a.py"))
    with pytest.raises(InvalidDataError, match=r"tree\.tgz cannot be read .* a header in it takes 2\.0 MiB"):
        data.check(tmp_path / "tree.tgz", Task.CODE)


def test_a_plan_needs_the_archive_unpacked(tmp_path: Path) -> None:
    path = packed_tree(tmp_path / "tree.tgz", "a.js")
    with pytest.raises(InvalidRequestError, match="unpack"):
        plan_command(JobWish("code", data=path), is_auto=False, as_json=True)


def test_what_the_trainer_would_pass_over_is_neither_counted_nor_packed(tmp_path: Path) -> None:
    tree = tmp_path / "site"
    for name in ("tests/a.js", "vendor/b.go", "api_pb2.py", "c.min.js"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(FUNCTION)
    with pytest.raises(InvalidDataError, match="no source code"):
        data.check(tree, Task.CODE)
    (tree / "env").mkdir()
    (tree / "env" / "kept.py").write_text(FUNCTION)  # a package of that name, no virtual environment
    data.check(tree, Task.CODE)
    with data.packed(tree, Task.CODE) as file:
        assert zipfile.ZipFile(file.path).namelist() == ["env/kept.py"]
    # So a folder of rows is one even where its tests are code.
    rows = tmp_path / "rows"
    (rows / "tests").mkdir(parents=True)
    (rows / "tests" / "test_rows.py").write_text(FUNCTION)
    (rows / "rows.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    data.check(rows, Task.CODE)
    with data.packed(rows, Task.CODE) as file:
        assert file.filename == "rows.jsonl"


def test_what_git_ignores_is_not_sent_even_where_nothing_else_is_code(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=30)
    (tmp_path / ".gitignore").write_text("private/\n")
    (tmp_path / "README.md").write_text("# notes\n")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.py").write_text(FUNCTION)
    with pytest.raises(InvalidDataError, match="no source code"):
        data.check(tmp_path, Task.CODE)


def test_a_folder_that_git_ignores_as_a_whole_is_taken_as_it_is(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=30)
    (tmp_path / ".gitignore").write_text("fetched/\n")
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "app.py").write_text(FUNCTION)
    data.check(tmp_path / "fetched", Task.CODE)
    with data.packed(tmp_path / "fetched", Task.CODE) as file:
        assert zipfile.ZipFile(file.path).namelist() == ["app.py"]


def test_what_a_folder_holds_beside_its_training_rows_is_said(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "A"}))
    assert data.check(tmp_path, Task.QA)[1:] == [f"left out of {tmp_path.name}: its split test (test.jsonl)"]
    with data.packed(tmp_path, Task.QA) as file:
        assert json.loads(file.path.read_text())["question"] == "train"
