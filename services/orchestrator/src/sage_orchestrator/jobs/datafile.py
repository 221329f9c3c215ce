"""Whether a training file can be trained on, before anything is queued. No torch, nothing is extracted."""

from __future__ import annotations

from pathlib import Path

from sage_contracts.config import Task


def check_data(path: Path, filename: str, task: Task, method: str) -> None:
    """Rows as JSON, JSON Lines, CSV or TSV, also compressed, that suit the training method. For the task
    `code` also a source tree as *.zip, *.tar.gz or *.tgz, uploaded with the purpose fine-tune: only the list
    of names in it is read here, the trainer extracts it.

    Raises: InvalidDataError, naming rows and fields, or what is wrong with the file as a whole.
    """
    from sage.tools.finetune.code_data.archives import check_archive, is_archive_name
    from sage.tools.finetune.data import validate_file

    if is_archive_name(filename):
        check_archive(path, filename, task, method)
    else:
        validate_file(path, filename, method=method).require_all_good()
