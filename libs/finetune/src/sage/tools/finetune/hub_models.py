"""Models of a model hub, as folders on this machine."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from stat import S_ISREG

from sage.tools.finetune.storage import require_free_space, storage_errors
from sage_contracts.errors import ModelNotFoundError, StorageFullError

Report = Callable[[str], None]

HUB_ANSWER_S = 10.0
REPORT_EVERY_S = 10.0
WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
UNWANTED_FILES = ("consolidated*", "original/*")
"""The same weights once more, in the form of those who trained them."""


def download_model(name: str, folder: Path, report: Report, instead: str) -> dict[str, str | None]:
    """Fill the folder; returns where the model comes from: source, revision, license.

    The caller alone may use the folder meanwhile. After a download that broke off, the next one to the same
    folder fetches only the files that are not whole yet. `instead` tells the user what to do without a hub.
    Raises: ModelNotFoundError, StorageFullError.
    """
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        with storage_errors(folder):
            return _download(name, folder, report)
    except (StorageFullError, ModelNotFoundError):
        raise
    except GatedRepoError as error:
        told = f"The hub wants a login or an accepted licence for {name}. Set HF_TOKEN. {instead}"
        raise ModelNotFoundError(told, param="model") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(f"The model hub knows no model {name}. {instead}", param="model") from error
    except BrokenOffError as error:
        told = f"The download of {name} broke off ({error}). Start again; whole files are kept. {instead}"
        raise ModelNotFoundError(told, param="model") from error
    except Exception as error:  # httpx, DNS, proxies, offline mode: all mean the same to the user
        raise ModelNotFoundError(
            f"The base model {name} is not on this machine and no model hub could be reached "
            f"({type(error).__name__}). {instead}",
            param="model",
        ) from error


class BrokenOffError(Exception):
    """The hub had answered, and then something went wrong."""


@contextmanager
def after_the_answer() -> Iterator[None]:
    """Raises: BrokenOffError for whatever goes wrong inside; GatedRepoError."""
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except GatedRepoError:  # many show what they hold to everybody, and their files to nobody
        raise
    except Exception as error:
        raise BrokenOffError(str(error).partition("\n")[0] or type(error).__name__) from error


def _download(name: str, folder: Path, report: Report) -> dict[str, str | None]:
    """Raises: what huggingface_hub raises, StorageFullError, BrokenOffError."""
    from huggingface_hub import HfApi, snapshot_download

    report(f"Asking the model hub for {name}")
    info = HfApi().model_info(name, timeout=HUB_ANSWER_S, files_metadata=True)
    for broken_off in folder.rglob("*.incomplete"):  # of a process that was killed; no download reads them
        broken_off.unlink()
    files = [file for file in info.siblings or [] if _is_wanted(file.rfilename)]
    names = [file.rfilename for file in files]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelNotFoundError(
            f"The repository {name} holds no whole model as transformers writes it (config.json and weights "
            "in *.safetensors). An adapter, or a GGUF file, is none.",
            param="model",
        )
    total_bytes = sum(file.size or 0 for file in files)
    require_free_space(folder, total_bytes - _bytes_in(folder), f"The base model {name}")
    report(f"Downloading {name}, {total_bytes / 1e9:.1f} GB")
    with after_the_answer(), _told(folder, total_bytes, report):
        snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=names)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    licence: str | None = getattr(info.card_data, "license", None)
    return {"source": f"hub:{name}", "revision": info.sha, "license": licence}


def _is_wanted(file: str) -> bool:
    def fits(patterns: Sequence[str]) -> bool:
        return any(fnmatch(file, pattern) for pattern in patterns)

    return fits(WANTED_FILES) and not fits(UNWANTED_FILES)


@contextmanager
def _told(folder: Path, total_bytes: int, report: Report) -> Iterator[None]:
    """Say every `REPORT_EVERY_S` how much of the total is in the folder, while the block runs."""
    is_over = threading.Event()

    def tell() -> None:
        began, first = time.monotonic(), _bytes_in(folder)
        while not is_over.wait(REPORT_EVERY_S):
            report(progress_text(first, _bytes_in(folder), total_bytes, time.monotonic() - began))

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        is_over.set()
        teller.join()


def progress_text(first_bytes: int, here_bytes: int, total_bytes: int, passed_s: float) -> str:
    """How far a download is that found `first_bytes` when it began, `passed_s` ago."""
    here_bytes = min(here_bytes, total_bytes)
    text = f"Downloaded {here_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB"
    if here_bytes <= first_bytes:
        return text
    left_s = (total_bytes - here_bytes) / (here_bytes - first_bytes) * passed_s
    left = f"{left_s / 60:.0f} min" if left_s >= 90 else f"{left_s:.0f} s"
    return f"{text}, {left} left"


def _bytes_in(folder: Path) -> int:
    """What its files occupy: some are made in their whole length before anything is in them."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            status = path.stat()
            found += status.st_blocks * 512 if S_ISREG(status.st_mode) else 0
    return found
