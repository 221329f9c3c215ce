"""Data sets of a model hub, as files on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sage_contracts.errors import InvalidDataError

HUB_ANSWER_S = 10.0
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(path: Path) -> bool:
    """Whether `owner/name` can only mean a hub: there is no such path, nor the folder it would lie in."""
    return bool(_ID.fullmatch(str(path))) and not path.exists() and not path.parent.exists()


def choose_files(names: Sequence[str]) -> list[str]:
    """Of a data set's data files those to train on: its `train` split where the names tell splits apart."""
    train = [name for name in names if re.search(r"(?<![a-z])train(?![a-z])", name.lower())]
    return sorted(train or names)


def fetch_dataset(name: str, is_data: re.Pattern[str]) -> tuple[Path, list[str]]:
    """The folder of a downloaded snapshot, and the files in it to read. Raises: InvalidDataError."""
    instead = "Download it elsewhere and give the file or the folder."
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        raise InvalidDataError(
            f"There is no file {name}. As a data set of a model hub it cannot be fetched: the Python package "
            f"huggingface_hub is not installed. {instead}"
        ) from error
    try:
        info = HfApi().dataset_info(name, timeout=HUB_ANSWER_S)
        found = [sibling.rfilename for sibling in info.siblings or []]
        files = choose_files([file for file in found if is_data.search(file)])
        if not files:
            raise InvalidDataError(f"The data set {name} holds no JSON, CSV or Parquet file. {instead}")
        folder = snapshot_download(name, repo_type="dataset", revision=info.sha, allow_patterns=files)
    except GatedRepoError as error:
        raise InvalidDataError(f"The hub wants a login for the data set {name}. Set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise InvalidDataError(f"There is neither a file nor a data set {name} on the model hub.") from error
    except InvalidDataError:
        raise
    except Exception as error:  # httpx, DNS, proxies, offline mode: all mean the same to the user
        raise InvalidDataError(
            f"There is no file {name}, and no model hub could be reached to look for a data set of that name "
            f"({type(error).__name__}). {instead}"
        ) from error
    return Path(folder), files
