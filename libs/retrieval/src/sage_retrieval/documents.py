"""Which files an index is made of, and where the project's own documentation lies."""

from __future__ import annotations

from pathlib import Path

from sage_contracts.errors import InvalidRequestError
from sage_contracts.indexes import MAX_FILE_BYTES, SKIPPED_FOLDERS, TEXT_SUFFIXES


def files_in(folder: Path) -> list[Path]:
    """The text files below a folder, sorted; hidden ones, build folders and very large files are left out."""
    found: list[Path] = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") or part in SKIPPED_FOLDERS for part in parts):
            continue
        if path.suffix.lower() in TEXT_SUFFIXES and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
            found.append(path)
    return sorted(found)


def docs_files(root: Path) -> list[Path]:
    """The documentation under a root: README*.md and docs/, or the whole folder when it is the docs."""
    if not (root / "docs").is_dir():
        return files_in(root)
    return sorted([*root.glob("README*.md"), *files_in(root / "docs")])


def docs_root(configured: Path | None) -> Path:
    """Where docs-public comes from: the setting, else what the package carries, else the source tree.

    Raises: InvalidRequestError, saying what to set.
    """
    if configured is not None:
        if configured.is_dir():
            return configured
        raise InvalidRequestError(f"SAGE_DOCS_DIR names {configured}, which is no folder.", param="index")
    here = Path(__file__).resolve()
    bundled = here.parent / "bundled"
    if bundled.is_dir():
        return bundled
    for parent in here.parents:
        if (parent / "docs").is_dir() and (parent / "libs").is_dir():
            return parent
    raise InvalidRequestError(
        "The project's documentation is not on this machine: set SAGE_DOCS_DIR to the folder that has it.",
        param="index",
    )
