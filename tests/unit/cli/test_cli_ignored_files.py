"""Which files `sage index add` leaves out of a folder that git looks after."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sage_cli.indexes.documents import read_documents


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository in which `out/` and `*.log.md` are ignored, but for one that was added all the same."""
    tree = tmp_path / "handbook"
    for name in (
        "a.md",
        "out/b.md",
        "docs/c.log.md",
        "docs/d.md",
        "docs/kept.log.md",
        "other/e.md",
        "other/f.log.md",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("words")
    (tree / ".gitignore").write_text("out/\n*.log.md\n")
    git(tree, "init", "-q")
    git(tree, "add", "--force", "docs/kept.log.md")
    git(tree / "other", "init", "-q")
    return tree


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, check=True, timeout=30)


def paths(folder: Path) -> list[str]:
    return [document.path for document in read_documents(folder).read]


def test_what_git_ignores_is_left_out_and_said(tree: Path) -> None:
    # Of a repository inside, git says no more than that it is there.
    assert paths(tree) == ["a.md", "docs/d.md", "docs/kept.log.md", "other/e.md", "other/f.log.md"]
    assert read_documents(tree).left_out == ["out/: git ignores all of it", "docs/c.log.md: git ignores it"]


def test_a_folder_or_file_that_is_named_is_read_although_git_ignores_it(tree: Path) -> None:
    assert paths(tree / "out") == ["b.md"]
    assert paths(tree / "docs" / "c.log.md") == ["c.log.md"]


def test_without_git_all_is_read(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {"out/b.md", "docs/c.log.md"} <= set(paths(tree))
