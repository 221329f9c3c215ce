"""4-bit k-quants by llama.cpp's own program: the `gguf` package reads them, but cannot make them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from sage_contracts.errors import InvalidRequestError, TrainingFailedError

_LIMIT_S = 3600.0

Quantise = Callable[[Path, Path], None]
"""(f16 file, file to write)."""


def find() -> Quantise:
    """llama-quantize, from the PATH. Raises: InvalidRequestError where it is not."""
    program = shutil.which("llama-quantize")
    if program is None:
        raise InvalidRequestError(
            "gguf-q4_k_m is made by llama.cpp's llama-quantize, which is not on the merger's PATH. Install "
            "llama.cpp there, or export gguf-q8_0, which needs nothing.",
            param="format",
        )
    return lambda source, target: _run(program, source, target)


def _run(program: str, source: Path, target: Path) -> None:
    try:
        run = subprocess.run(
            [program, str(source), str(target), "Q4_K_M"], capture_output=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TrainingFailedError(f"llama-quantize was not done within {_LIMIT_S:.0f} s.") from error
    if run.returncode:
        last = run.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise TrainingFailedError(f"llama-quantize ended with code {run.returncode}: {' / '.join(last)}")
