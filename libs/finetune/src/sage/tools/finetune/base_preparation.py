"""Prepares a base model for a program that imports no torch, which converting a built-in one takes.

`python -m sage.tools.finetune.base_preparation NAME HOME` prints {"folder": …}, or an ErrorBody, as JSON on
standard output.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel

from sage.tools.finetune.answering import answer
from sage.tools.finetune.base_models import resolve_base


class PreparedBase(BaseModel):
    folder: Path


def main(name: str, home: str) -> int:
    """The process: fetches and converts what is not here yet, telling how far it is on standard error."""

    def report(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    return answer(lambda: PreparedBase(folder=resolve_base(name, Path(home), report)), "base model")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
