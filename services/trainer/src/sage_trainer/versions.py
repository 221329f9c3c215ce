"""The immutable copy that every finished run leaves: `<output>/versions/<n>/`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sage_trainer.messages import DoneMessage

RESULT_FILE = "result.json"


class VersionResult(BaseModel):
    """What the run of this version came to, and whose it was."""

    model_config = ConfigDict(extra="forbid")

    job_id: str
    done: DoneMessage


def write_version(output_dir: Path, version_dir: Path, result: VersionResult) -> None:
    """Copy adapter, config and metadata of the finished run. The folder appears whole or not at all.

    Raises: StorageFullError.
    """
    from sage.tools.finetune.storage import folder_written_whole

    with folder_written_whole(version_dir) as unfinished:
        shutil.copytree(output_dir / "lora_weights", unfinished / "lora_weights", copy_function=_link_or_copy)
        for name in ("training_config.json", "finetune_meta.json"):
            _link_or_copy(output_dir / name, unfinished / name)
        (unfinished / RESULT_FILE).write_text(result.model_dump_json(indent=1), encoding="utf-8")


def read_result(version_dir: Path, job_id: str) -> DoneMessage | None:
    """What an earlier attempt of this job finished but could not report; None when there is nothing."""
    try:
        result = VersionResult.model_validate_json((version_dir / RESULT_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return result.done if result.job_id == job_id else None


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    # The engine replaces files and never writes into one, so a link stays what it was. Some disks have none.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
