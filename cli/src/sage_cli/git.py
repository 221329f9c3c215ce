"""What git ignores of a folder, where it can be asked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

_TIMEOUT_S = 30


def ignored_in(folder: Path) -> Callable[[Path], bool]:
    """Whether a file below the folder, or all that is in a folder below it, is ignored.

    Nothing is where git cannot be asked, and in a folder that is ignored as a whole: whoever names that one
    wants it all the same.
    """
    listed = _listed(folder)
    holding = {above for path in listed for above in path.parents}

    def is_ignored(path: Path) -> bool:
        # Of a repository inside, git lists the folder alone.
        is_kept = path in listed or path in holding or not listed.isdisjoint(path.parents)
        return bool(listed) and not is_kept

    return is_ignored


def _listed(folder: Path) -> set[Path]:
    """What git keeps, or would keep if it were added."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return set()
    # Nothing is written when it fails.
    return {folder / os.fsdecode(name) for name in listing.stdout.split(b"\0") if name}
