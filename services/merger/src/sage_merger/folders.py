"""Where a merge or an export of a version lies, and what is seen of it from the top of the model's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sage_contracts.home import replaced_whole
from sage_contracts.workers import MergeClaim


def folder_of(claim: MergeClaim) -> Path:
    """Below the version's folder; each format has its own, which a later export replaces."""
    if claim.format == "safetensors":
        return Path("merged_model")
    content = f"-{claim.content}" if claim.format in ("zip", "hub") else ""
    return Path("exports") / f"{claim.format}{content}"


def remove_leftovers(target: Path) -> None:
    """What an attempt that was killed had begun to write in place of `target`; a whole model, often."""
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def newest_version(version_dir: Path) -> int:
    """The highest number among the versions beside this one and itself."""
    return max((int(path.name) for path in version_dir.parent.glob("*") if path.name.isdecimal()), default=0)


def point_link(link: Path, target: Path) -> None:
    """Make `link` lead to `target`, by a relative path (homes move), in one step for whoever looks."""
    with replaced_whole(link) as unfinished:
        unfinished.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
