"""What git knows of a folder's files, where it can be asked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_TIMEOUT_S = 30


def listed_files(folder: Path) -> set[Path]:
    """Those it keeps or would keep, so all but the ignored ones; of a repository inside only its folder.

    Empty where it cannot be asked, and for a folder that is ignored as a whole: whoever names that one wants
    it all the same.
    """
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
