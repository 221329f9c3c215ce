"""Compiles the C of this folder. Needs nothing but a C compiler; image builds run it by itself.

A library for each level of the x86-64 instruction set, and not for the chip at hand: what one machine
compiled may be kept in an image that another one runs.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from functools import cache
from hashlib import sha256
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = ("adapters.c", "attention.c", "attention_half.c", "elementwise.c", "mlp.c", "products.c")
HEADERS = ("blocks.h", "gating.h", "mixing.h", "panels.h", "tiles.h", "turning.h", "vectors.h", "words.h")
LEVELS = {
    "x86-64-v4-bf16-amx": ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "x86-64-v4-bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "x86-64-v4": ("-march=x86-64-v4",),
    "x86-64-v3": ("-march=x86-64-v3",),
}
"""What chips can do, the most able first: AVX-512 with products of bf16 by tiles, by vectors or not at all,
AVX2."""
# No `-ffast-math`: rounding to an integer by adding a large number must stay, and so must NaN.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
COMPILE_S = 120
_HERE = Path(__file__).parent


class CompilerError(Exception):
    """There is no library for this machine; the message says why."""


def compile_into(folder: Path, level: str) -> Path:
    """Returns the library, written whole. Raises: CompilerError, OSError."""
    require_known_machine()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".compiling.", dir=folder) as unfinished:
        built = Path(unfinished) / "kernels.so"
        sources = [str(_HERE / name) for name in SOURCES]
        command = [*_compiler(), *FLAGS, *LEVELS[level], "-o", str(built), *sources, "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or "no word").splitlines()[0]
            raise CompilerError(f"{command[0]} failed: {reason}") from error
        except subprocess.TimeoutExpired as error:
            raise CompilerError(f"{command[0]} took more than {COMPILE_S} s") from error
        with built.open("rb") as whole:
            os.fsync(whole.fileno())
        return built.replace(folder / file_name(level))


def require_known_machine() -> None:
    """Raises: CompilerError."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise CompilerError(f"they are for Linux on x86-64, not for {sys.platform} on {platform.machine()}")


def file_name(level: str) -> str:
    """Another one for other sources or flags, so that none is taken for what it is not."""
    return f"kernels-{_sources_hash()}-{level}.so"


@cache
def _sources_hash() -> str:
    digest = sha256(" ".join(chain(FLAGS, *LEVELS.values())).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((_HERE / name).read_bytes())
    return digest.hexdigest()[:12]


def _compiler() -> list[str]:
    """Raises: CompilerError."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in (asked, ["gcc"], ["cc"]):
        if command and (found := shutil.which(command[0])):
            return [found, *command[1:]]
    raise CompilerError("no C compiler is installed (on Debian and Ubuntu: gcc and libc6-dev)")


def lacks_compiler() -> str:
    """What is missing, for people; empty where nothing is, or where no compiler would help."""
    try:
        require_known_machine()
    except CompilerError:
        return ""
    try:
        _compiler()
    except CompilerError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """For all levels; where these kernels are not for, the folder stays empty."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        require_known_machine()
    except CompilerError as error:
        print(f"no kernels in C: {error}")
        return
    for level in LEVELS:
        print(compile_into(folder, level))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
