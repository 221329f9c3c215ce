"""`python -m sage_retrieval.build FOLDER`: index the documents in a folder, beside the process that answers.

Large ones take many seconds and hundreds of megabytes: here they hold up no chat, the memory is given back,
and a system that has not enough of it ends this process instead of the gateway.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sage_contracts.errors import InvalidRequestError
from sage_contracts.indexes import PutIndexRequest
from sage_contracts.lifeline import die_first, end_with_parent
from sage_retrieval.index import write_index
from sage_retrieval.splitting import split

DOCUMENTS = "documents.json"
_HARMLESS_BYTES = 256 << 10
"""Read in this process: starting another takes longer."""
_NICENESS = 5
_DEADLINE_S = 600.0
"""The largest that may be sent take half a minute."""


def build(folder: Path) -> int:
    """Index the documents in a folder, in it. Returns the number of passages; of none there is no index.

    Raises: OSError; InvalidRequestError when there is not the memory for it.
    """
    if (folder / DOCUMENTS).stat().st_size <= _HARMLESS_BYTES:
        return _build(folder)
    command = [sys.executable, "-m", "sage_retrieval.build", str(folder)]
    # Its standard input says nothing, and ends with this process, however that ends.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            child.wait(_DEADLINE_S)
        except subprocess.TimeoutExpired:
            child.kill()
        answer = child.stdout.read()
    if child.returncode != 0 or not answer:
        raise InvalidRequestError(
            f"The documents could not be indexed: the process for it ended with {child.returncode}, perhaps "
            "for want of memory. Make several indexes of them.",
            param="documents",
        )
    told = json.loads(answer)
    if "errno" in told:
        raise OSError(told["errno"], told["strerror"])
    return int(told["passages"])


def _build(folder: Path) -> int:
    documents = PutIndexRequest.model_validate_json((folder / DOCUMENTS).read_bytes()).documents
    return write_index((piece for it in documents for piece in split(it.path, it.text)), folder)


def main() -> None:
    end_with_parent()
    die_first()
    os.nice(_NICENESS)
    try:
        told: dict[str, object] = {"passages": _build(Path(sys.argv[1]))}
    except OSError as error:
        told = {"errno": error.errno, "strerror": error.strerror}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
