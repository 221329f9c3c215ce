"""The process that merges and exports: `python -m sage_merger.child SPEC.json`.

It says what happens on standard output (see messages.py); everything printed goes to the log. SIGTERM ends
it, and so does the end of standard input (its parent is gone). What it writes appears whole or not at all.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Any

from pydantic import BaseModel

from sage_contracts.errors import SageError, TrainingFailedError
from sage_contracts.home import Home
from sage_contracts.workers import MergeClaim
from sage_merger.folders import folder_of, newest_version, point_link, remove_leftovers
from sage_merger.messages import ChildSpec, DoneMessage, FailedMessage, PhaseMessage
from sage_servicekit.children import end_with_parent, take_stdout


class StopNow(BaseException):
    """SIGTERM arrived. Not for `except Exception` to catch; what is half written is removed on its way."""


def merge(spec: ChildSpec, out: IO[str]) -> DoneMessage:
    """Write `<output>/merged_model/`, or what is wished for into `<output>/exports/`.

    Raises: SageError, StopNow.
    """
    from sage.tools.finetune.base_models import resolve_base

    def phase(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        say(out, PhaseMessage(text=text))

    home, claim = Home(Path(spec.home)), spec.claim
    base = resolve_base(claim.base_model, home.root, phase)
    version_dir = home.resolve(claim.output_dir)
    target = version_dir / folder_of(claim)
    remove_leftovers(target)  # of an attempt whose worker was killed too
    adapter = home.resolve(claim.adapter_path) if claim.adapter_path else None
    newest = newest_version(version_dir)
    path, found = write(base, adapter, target, claim, phase)
    # A version that was trained meanwhile has taken the top of the folder for itself.
    if claim.link_path and newest_version(version_dir) == newest:
        point_link(home.resolve(claim.link_path), path)
    return DoneMessage(merged_path=home.relative(path), meta=found)


def write(
    base: Path, adapter: Path | None, target: Path, claim: MergeClaim, phase: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """(what was written, what was found of it). Raises: SageError."""
    from sage.tools.finetune.exporting.export import ExportWish, export_model
    from sage.tools.finetune.merging.merge import merge_adapter

    if claim.format == "safetensors":
        merged = merge_adapter(base, adapter, target, claim.dtype, phase)
        return merged.path, {"parity": asdict(merged.parity), "size_bytes": merged.size_bytes}
    wish = ExportWish(
        claim.format,
        f"{claim.name}-{claim.version}",
        claim.dtype,
        claim.content,
        claim.repo,
        allow_public=claim.allow_public,
    )
    found = asdict(export_model(base, adapter, target, wish, phase))
    return found.pop("path"), {key: value for key, value in found.items() if value}


def say(out: IO[str], message: BaseModel) -> None:
    out.write(message.model_dump_json() + "\n")


def last_words(spec: ChildSpec, out: IO[str]) -> DoneMessage | FailedMessage:
    """`merge`, with whatever goes wrong put into words."""
    try:
        return merge(spec, out)
    except SageError as error:
        traceback.print_exc()
        return FailedMessage(code=error.code, message=error.message, is_explained=True)
    except Exception as error:
        traceback.print_exc()
        return FailedMessage(code=TrainingFailedError.code, message=f"{type(error).__name__}: {error}")


def on_sigterm(number: int, frame: FrameType | None) -> None:
    raise StopNow


def main() -> int:
    end_with_parent()
    out = take_stdout()
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        words = last_words(ChildSpec.model_validate_json(Path(sys.argv[1]).read_bytes()), out)
    except StopNow:
        return 1
    say(out, words)
    return 1 if isinstance(words, FailedMessage) else 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Not `sys.exit`: libraries leave threads behind that would be waited for.
    os._exit(code)
