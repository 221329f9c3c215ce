"""Whether a checkpoint's folder can still be served: runs remove theirs, and those of runs before them."""

from __future__ import annotations

import json
from pathlib import Path


def is_kept(folder: Path, job_id: str) -> bool:
    """Whether an adapter lies there, and is of this job: a later run's may have the same path."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError):
        return False
    run = state.get("run", {}) if isinstance(state, dict) else {}
    return run.get("run_id") == job_id and (folder / "adapter_config.json").is_file()
