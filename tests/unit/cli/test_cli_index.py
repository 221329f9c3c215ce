"""sage index, against the real gateway: what is added is what chats answer from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.asgi_server import serving

from sage_gateway.main import build_app
from sage_gateway.settings import GatewaySettings

Sage = Callable[..., Any]

MANUAL = "# 手册\n\n## 退货\n\n客户可以在三十天内申请退货，需要出示购买凭证。" + "这里是说明文字。" * 30


@pytest.fixture
def real(sage: Sage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sage]:
    """`sage …` with a gateway that has nothing behind it, and takes bodies of 100 kB."""
    for name in ("OPENAI_API_KEY", "SAGE_OPENAI_BASE_URL", "SAGE_VLLM_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    settings = GatewaySettings(
        home_dir=tmp_path / "stack",
        orchestrator_url="http://127.0.0.1:9",
        inference_url="http://127.0.0.1:9",
        ollama_base_url="http://127.0.0.1:9",
        max_body_bytes=100_000,
    )
    with serving(build_app(settings)) as url:
        monkeypatch.setenv("SAGE_GATEWAY_URL", url)
        yield sage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "handbook"
    (root / "guide").mkdir(parents=True)
    (root / "guide" / "manual.md").write_bytes(MANUAL.encode("gbk"))
    (root / "start.rst").write_text("Start\n=====\n\n" + "Open the box before anything else. " * 10)
    return root


def ask(sage: Sage, question: str) -> Any:
    return sage("chat", "--backend", "mock", "--index", "mine", "-m", question)


def test_a_folder_is_added_asked_listed_replaced_and_removed(real: Sage, folder: Path) -> None:
    assert "sage index add NAME FOLDER" in real("index", "list").stdout
    ran = real("index", "add", "mine", str(folder))
    assert ran.exit_code == 0, ran.output
    for text in (
        "guide/manual.md is read as GB18030",
        "mine: files 2, passages 2",
        "sage chat --backend mock --index mine",
    ):
        assert text in ran.stdout
    answer = ask(real, "多少天内可以退货？").stdout
    assert "三十天" in answer and "guide/manual.md#退货" in answer

    (listed,) = json.loads(real("index", "list", "--json").stdout)
    assert (listed["id"], listed["files"], listed["passages"]) == ("mine", 2, 2)
    header, row = real("index", "list").stdout.splitlines()
    assert header.split() == ["INDEX", "FILES", "PASSAGES", "MADE"] and row.split()[:3] == ["mine", "2", "2"]

    assert real("index", "add", "mine", str(folder / "start.rst")).exit_code == 0
    assert "三十天" not in ask(real, "多少天内可以退货？").stdout
    assert "start.rst#start" in ask(real, "How do I open the box?").stdout

    assert "mine is removed" in real("index", "remove", "mine").stdout
    gone = ask(real, "box")
    assert (gone.exit_code, "no index 'mine'" in gone.stderr) == (2, True)
    assert real("index", "remove", "mine").exit_code == 2


def test_sources_are_shown_with_the_brackets_of_their_names(real: Sage, tmp_path: Path) -> None:
    names = [
        f"{folder}/page{number}.ts" for number, folder in enumerate(("[slug]", "[bold]", "[/b]", "[[id]]"))
    ]
    for number, name in enumerate(names):
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True)
        path.write_text(f"// Orders are listed here. {'word ' * 60} {number}")
    assert real("index", "add", "mine", str(tmp_path / "site")).exit_code == 0
    ran = ask(real, "Where are orders listed?")
    assert (ran.exit_code, "\n[4] " in f"\n{ran.stderr}") == (0, True)  # the answer names three
    assert [name for name in names if name not in ran.output] == []


def test_files_that_are_left_out_are_named_with_the_reason(real: Sage, folder: Path) -> None:
    for path in ("node_modules/a.md", "env/pyvenv.cfg", "env/b.md", ".git/c.md", "guide/.d.md"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("# Not mine\n\nzeppelin")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (folder / "empty.md").write_text(" \n")
    (folder / "large.txt").write_text("zeppelin " * 300_000)
    (folder / "nowhere.md").symlink_to(folder / "absent.md")
    ran = real("index", "add", "mine", str(folder), "--json")
    told = json.loads(ran.stdout)
    reasons = dict(line.split(": ", 1) for line in told["left_out"])
    assert set(reasons) == {
        *("node_modules/", "env/", "picture.png", "binary.txt", "empty.md", "large.txt", "nowhere.md")
    }
    assert reasons["large.txt"] == "larger than 2.0 MiB" and "encoding" in reasons["binary.txt"]
    assert (told["files"], "zeppelin" in ask(real, "zeppelin").stdout.split("\n", 1)[-1]) == (2, False)
    shown = real("index", "add", "mine", str(folder)).stdout
    assert "left out: picture.png: no kind of text" in shown


@pytest.mark.parametrize("name", ["docs-public", "a b", "a/b", ".."])
def test_names_that_are_refused(real: Sage, folder: Path, name: str) -> None:
    for words in (("add", name, str(folder)), ("remove", name)):
        ran = real("index", *words)
        assert ran.exit_code == 2, ran.output
        assert ("own documentation" if name == "docs-public" else "no name") in ran.stderr


def test_more_than_the_gateway_takes_says_what_to_do(real: Sage, folder: Path) -> None:
    (folder / "long.txt").write_text("All of it is text. " * 50_000)
    ran = real("index", "add", "mine", str(folder))
    assert ran.exit_code == 2, ran.output
    assert "SAGE_MAX_BODY_BYTES" in ran.stderr and "KiB of text" in ran.stderr


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("absent.md", None, "There is no"),
        ("book.pdf", b"%PDF-1.7", "no kind of text"),
        ("empty.md", b"", "empty"),
    ],
)
def test_what_is_no_text_is_refused_before_anything_is_asked(
    sage: Sage, tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ran = sage("index", "add", "mine", str(tmp_path / name))
    assert (ran.exit_code, told in ran.stderr) == (2, True), ran.output


def test_without_a_stack_it_is_said(sage: Sage, folder: Path) -> None:
    for words in (("add", "mine", str(folder)), ("list",), ("remove", "mine")):
        ran = sage("index", *words)
        assert (ran.exit_code, "sage up" in ran.stderr) == (4, True), ran.output
