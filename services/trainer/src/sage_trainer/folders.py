"""The output folder between runs: whose checkpoints lie there, and the versions that runs leave.

Nobody else writes here meanwhile: the orchestrator lets one job of a name run at a time.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sage.tools.finetune.checkpoints import holds_checkpoint
from sage.tools.finetune.storage import folder_written_whole
from sage_contracts.home import replaced_whole
from sage_trainer.messages import DoneMessage

RESULT_FILE = "result.json"
SOURCE = ".source"
"""Where a run sees its data under the names that people know."""
_OWNER_FILE = "job_id"
_WEIGHTS = "lora_weights", "full_model"
_RECORDS = "training_config.json", "finetune_meta.json"
_MERGED = "merged_model"
_PARKED = ".checkpoints-"


def remove_leftovers(output_dir: Path) -> None:
    """What an attempt that was killed had begun to write."""
    begun = [SOURCE, ".lora_weights.*", ".full_model.*", "checkpoints/.checkpoint-*", "versions/.*"]
    for left in [path for pattern in begun for path in output_dir.glob(pattern)]:
        shutil.rmtree(left, ignore_errors=True)


def named_as_given(stored: Path, filename: str | None, folder: Path) -> Path:
    """The file under the name that its owner knows, for what people read: a link in `folder`.

    As it is stored where that cannot be: not every disk has links, or takes every name.
    """
    if not filename:
        return stored
    link = folder / filename
    try:
        folder.mkdir(parents=True)
        link.symlink_to(stored)
    except (OSError, ValueError):
        return stored
    return link


def take_checkpoints(output_dir: Path, job_id: str, unfinished: Collection[str] | None = None) -> None:
    """Make `checkpoints/` hold those of this job's earlier attempts and no others.

    Those of `unfinished` jobs are put aside: they may be paused, and take them again. Of jobs that have
    ended, as a paused one that is cancelled, they go. None: it is not known who has ended, and nothing goes.
    """
    folder = output_dir / "checkpoints"
    owner_file = folder / _OWNER_FILE
    owner = _owner_of(owner_file)
    if owner != job_id:
        if owner:
            folder.replace(_parking_place(output_dir, owner))
        shutil.rmtree(folder, ignore_errors=True)
        own = _parking_place(output_dir, job_id)
        if own.exists():
            own.replace(folder)
        else:
            folder.mkdir(parents=True)
            owner_file.write_text(job_id)
    if unfinished is not None:
        kept = {_parking_place(output_dir, other) for other in unfinished}
        for parked in set(output_dir.glob(f"{_PARKED}*")) - kept:
            shutil.rmtree(parked, ignore_errors=True)


def sign_checkpoints(output_dir: Path, job_id: str) -> None:
    """Say whose they are once more where nothing says so: somebody may have cleared the folder away.

    Without a name they would be nobody's, and deleted instead of resumed.
    """
    owner_file = output_dir / "checkpoints" / _OWNER_FILE
    with suppress(OSError):
        if not owner_file.exists():
            owner_file.write_text(job_id)


def give_up_checkpoints(output_dir: Path, job_id: str) -> None:
    """The job has ended for good: its checkpoints stay to be looked at, until the next one starts.

    Should that one have started already, they lie aside and go, and its own are left alone.
    """
    owner_file = output_dir / "checkpoints" / _OWNER_FILE
    if _owner_of(owner_file) == job_id:
        owner_file.unlink(missing_ok=True)
    shutil.rmtree(_parking_place(output_dir, job_id), ignore_errors=True)


def has_checkpoint(output_dir: Path, job_id: str) -> bool:
    """Whether the job can go on from a checkpoint that an attempt of it has written to its end."""
    folder = output_dir / "checkpoints"
    is_own = _owner_of(folder / _OWNER_FILE) == job_id
    return holds_checkpoint(folder if is_own else _parking_place(output_dir, job_id))


def _parking_place(output_dir: Path, job_id: str) -> Path:
    return output_dir / f"{_PARKED}{job_id}"


def _owner_of(owner_file: Path) -> str:
    return owner_file.read_text() if owner_file.exists() else ""


class VersionResult(BaseModel):
    """What the run of this version came to, and whose it was."""

    model_config = ConfigDict(extra="forbid")

    job_id: str
    done: DoneMessage


def write_version(weights: Path, version_dir: Path, result: VersionResult) -> None:
    """Copy the finished run's folder of weights, and beside it config and metadata, which are in there too.

    The folder appears whole or not at all.

    Raises: StorageFullError.
    """
    # The link at the top leads to an older version's merge, and the top is this version's now.
    output_dir = weights.parent
    link = output_dir / _MERGED
    if link.is_symlink():
        link.unlink()
    with folder_written_whole(version_dir) as unfinished:
        shutil.copytree(weights, unfinished / weights.name, copy_function=_link_or_copy)
        for name in _RECORDS:
            _link_or_copy(weights / name, unfinished / name)
        (unfinished / RESULT_FILE).write_text(result.model_dump_json(indent=1), encoding="utf-8")


def show_version(output_dir: Path, version: int) -> None:
    """Have the files of a version lie at the top of the folder, where people look for the model.

    Another run has been there: an older one that ended later, or one that came to nothing. Where the version
    is not in this folder, as a sweep's best is not, the top stays as it is.

    Raises: OSError, StorageFullError.
    """
    version_dir = output_dir / "versions" / str(version)
    if not (version_dir / RESULT_FILE).is_file():
        return
    for name in _WEIGHTS:
        source, target = version_dir / name, output_dir / name
        if not source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        elif not _is_copy(target, source):
            with folder_written_whole(target) as unfinished:
                shutil.copytree(source, unfinished, copy_function=_link_or_copy, dirs_exist_ok=True)
    for name in _RECORDS:
        if not _is_copy(output_dir / name, version_dir / name):
            with replaced_whole(output_dir / name) as begun:
                _link_or_copy(version_dir / name, begun)
    link = output_dir / _MERGED
    if (version_dir / _MERGED).is_dir() and (link.is_symlink() or not link.exists()):
        with replaced_whole(link) as begun:
            begun.symlink_to(Path("versions", str(version), _MERGED), target_is_directory=True)


def _is_copy(target: Path, source: Path) -> bool:
    """Whether all that is in `source` is in `target` too; files of one size and time are taken for equal."""
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    pairs = [(target / path.relative_to(source), path) for path in files]
    return all(copy.is_file() and filecmp.cmp(copy, path) for copy, path in pairs)


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
