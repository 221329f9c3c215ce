"""Archives from people: only regular files, only inside, only so many bytes."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from sage_contracts.errors import InvalidDataError
from sage_trainer.unpack import is_archive, tree_name, unpack_tree


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_tree_is_unpacked(tmp_path: Path, make: type) -> None:
    archive = make(tmp_path / "file-1", {"pkg/a.py": b"a = 1\n", "b.py": b""})
    assert is_archive(archive)
    into = unpack_tree(archive, tmp_path / "tree")
    assert (into / "pkg/a.py").read_bytes() == b"a = 1\n"
    assert (into / "b.py").read_bytes() == b""


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("name", ["../out.py", "/etc/out.py", "a/../../out.py", "..\\out.py", "C:/out.py"])
def test_a_path_that_leads_out_is_refused_and_nothing_is_left(tmp_path: Path, make: type, name: str) -> None:
    archive = make(tmp_path / "file-1", {"good.py": b"1", name: b"bad"})
    with pytest.raises(InvalidDataError, match=r"leads out|file-1"):
        unpack_tree(archive, tmp_path / "deep" / "tree")
    assert not list(tmp_path.rglob("*.py"))
    assert not (tmp_path / "deep" / "tree").exists()


def test_links_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"entry-{kind.decode()}")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    with zipfile.ZipFile(tmp_path / "z", "w") as zipped:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(link, "/etc/passwd")
    assert list(unpack_tree(tmp_path / "t", tmp_path / "one").iterdir()) == []
    assert list(unpack_tree(tmp_path / "z", tmp_path / "two").iterdir()) == []


def test_size_and_number_are_bounded_while_writing(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "bomb", {"zeros.py": bytes(1_000_000), "more.py": b"1"})
    with pytest.raises(InvalidDataError, match="more than"):
        unpack_tree(archive, tmp_path / "one", max_bytes=999_999)
    with pytest.raises(InvalidDataError, match="more than 1 files"):
        unpack_tree(archive, tmp_path / "two", max_files=1)
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / "two").exists()


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    good = make_tar(tmp_path / "good", {"a.py": bytes(range(256)) * 400})
    damaged = tmp_path / "damaged"
    damaged.write_bytes(good.read_bytes()[:-40])
    with pytest.raises(InvalidDataError, match="damaged"):
        unpack_tree(damaged, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "bomb", "w:gz") as archive:
        header = tarfile.TarInfo("header")
        header.type, header.size = kind, 2 << 20
        archive.addfile(header, io.BytesIO(bytes(header.size)))
        archive.addfile(tarfile.TarInfo("a.py"))
    assert is_archive(tmp_path / "bomb")
    with pytest.raises(InvalidDataError, match=r"bomb cannot be unpacked: a header in it takes 2\.0 MiB"):
        unpack_tree(tmp_path / "bomb", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_rows_are_no_archive(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    assert not is_archive(rows)
    assert not is_archive(tmp_path)


@pytest.mark.parametrize(
    ("archive", "name"),
    [
        ("project.zip", "project"),
        ("my.project-1.2.TAR.GZ", "my.project-1.2"),
        ("code.tgz", "code"),
        ("file-1", "file-1"),
        (".zip", "sources"),
        ("...zip", "sources"),
    ],
)
def test_a_tree_is_called_as_its_archive_is(archive: str, name: str) -> None:
    assert tree_name(archive) == name
