"""Whether a training file can be trained on, before anything is queued. No torch, nothing is extracted."""

from __future__ import annotations

from pathlib import Path

from sage_contracts.config import Task
from sage_contracts.home import Home


def check_data(
    path: Path, filename: str, task: Task, method: str, model: str, home: Home, *, is_held_out: bool = False
) -> None:
    """Rows as JSON, JSON Lines, CSV or TSV, also compressed, that suit the training method, and from which
    the model can learn, if it is on this machine.

    For the task `code` also a source tree as *.zip, *.tar.gz or *.tgz, uploaded with the purpose fine-tune:
    only the list of names in it is read here, the trainer extracts it.
    Raises: InvalidDataError, naming rows and fields, or what is wrong with the file as a whole.
    """
    from sage.tools.finetune.code_data.archives import check_archive, is_archive_name
    from sage.tools.finetune.data import validate_file
    from sage.tools.finetune.data.tokenizer_files import learnable_rows

    if is_archive_name(filename):
        check_archive(path, filename, task, method)
    else:
        learnable = learnable_rows(model, home.root)
        report = validate_file(path, filename, method=method, lengths=learnable)
        # What is held out need not teach anything.
        report.require_all_good() if is_held_out else report.require_trainable()
