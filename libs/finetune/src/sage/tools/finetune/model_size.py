"""How large a base model is, without loading it: from the headers of its weights, else from its name."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

from sage.tools.finetune.base_models import folder_name

_SIZE_IN_NAME = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)([bm])(?![a-z\d])", re.IGNORECASE)
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def parameters_of(model: str, home: Path) -> int | None:
    """Parameters of a base model as `resolve_base` names it; None when nothing says."""
    for folder in (Path(model).expanduser(), home / model, home / "base_models" / folder_name(model)):
        if (folder / "config.json").is_file():
            return count_parameters(folder) or _from_name(folder.name)
    return _from_name(model)


def count_parameters(folder: Path) -> int | None:
    """Elements of all tensors in a folder's safetensors files; None when there are no such files.

    Source: the format's description, huggingface.co/docs/safetensors: 8 bytes of length, then JSON.
    """
    counts = [_elements(path) for path in sorted(folder.glob("*.safetensors"))]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _elements(path: Path) -> int | None:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                return None
            header = json.loads(stream.read(length))
        shapes: list[list[int]] = [
            tensor["shape"] for name, tensor in header.items() if name != "__metadata__"
        ]
        return sum(map(prod, shapes))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _from_name(name: str) -> int | None:
    """`Qwen2.5-Coder-1.5B-Instruct` says 1.5 billion, `smollm2-135m` 135 million."""
    found = _SIZE_IN_NAME.search(name.rpartition("/")[2])
    if found is None:
        return None
    return round(float(found[1]) * {"b": 1e9, "m": 1e6}[found[2].lower()])
