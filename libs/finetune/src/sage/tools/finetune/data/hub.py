"""Data sets of a model hub, as files on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sage.tools.finetune.data.layout import choose_files, data_names
from sage.tools.finetune.hub_models import HUB_ANSWER_S, BrokenOffError, after_the_answer
from sage.tools.finetune.storage import require_free_space, storage_errors
from sage_contracts.errors import InvalidDataError, StorageFullError

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?::[\w./-]+){0,2})")
"""A configuration, a split or both may follow the id after colons."""


def is_hub_id(path: Path) -> bool:
    """Whether `owner/name` can only mean a hub: there is no such path, nor the folder it would lie in."""
    return bool(_ID.fullmatch(str(path))) and not path.exists() and not Path(path.parts[0]).exists()


def split_id(name: str) -> tuple[str, list[str]]:
    """(`owner/name`, the names that follow it after colons)."""
    found = _ID.fullmatch(name)
    assert found is not None
    return found[1], found[2].split(":")[1:]


def fetch_dataset(name: str, notes: list[str]) -> tuple[Path, list[str]]:
    """The folder of a downloaded snapshot, and the files in it to read; what was left out goes into `notes`.

    Raises: InvalidDataError, StorageFullError.
    """
    instead = "Download it elsewhere and give the file or the folder."
    name, asked = split_id(name)
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        raise InvalidDataError(
            f"There is no file {name}. As a data set of a model hub it cannot be fetched: the Python package "
            f"huggingface_hub is not installed. {instead}"
        ) from error
    try:
        with storage_errors(Path(HF_HUB_CACHE)):
            return _download(name, asked, Path(HF_HUB_CACHE), instead, notes)
    except (InvalidDataError, StorageFullError):
        raise
    except GatedRepoError as error:
        raise InvalidDataError(f"The hub wants a login for the data set {name}. Set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise InvalidDataError(f"There is neither a file nor a data set {name} on the model hub.") from error
    except BrokenOffError as error:
        raise InvalidDataError(
            f"The download of the data set {name} broke off ({error}). Start again; whole files are kept. "
            f"{instead}"
        ) from error
    except Exception as error:  # httpx, DNS, proxies, offline mode: all mean the same to the user
        raise InvalidDataError(
            f"There is no file {name}, and no model hub could be reached to look for a data set of that name "
            f"({type(error).__name__}). {instead}"
        ) from error


def _download(
    name: str, asked: Sequence[str], cache: Path, instead: str, notes: list[str]
) -> tuple[Path, list[str]]:
    """Raises: what huggingface_hub raises, InvalidDataError, StorageFullError, BrokenOffError."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    info = HfApi().dataset_info(name, timeout=HUB_ANSWER_S, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    found = data_names(sizes)
    if not found:
        raise InvalidDataError(f"The data set {name} holds no JSON, CSV or Parquet file. {instead}")
    card = {"configs": getattr(info.card_data, "configs", None)}
    files, left_out = choose_files(name, found, card, asked)
    notes += left_out
    missing = [
        file
        for file in files
        if not isinstance(try_to_load_from_cache(name, file, revision=info.sha, repo_type="dataset"), str)
    ]
    needed_bytes = sum(sizes[file] for file in missing)
    require_free_space(cache, needed_bytes, f"The data set {name}", "HF_HOME")
    with after_the_answer():
        folder = snapshot_download(name, repo_type="dataset", revision=info.sha, allow_patterns=files)
    return Path(folder), files
