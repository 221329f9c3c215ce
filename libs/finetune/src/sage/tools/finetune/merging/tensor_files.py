"""safetensors files read by the slice and written as a stream: no tensor has to be in memory whole.

Source: the format's description at github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sage.tools.finetune.merging.numbers import ITEM_BYTES, to_fp32
from sage_contracts.errors import ModelNotFoundError

MAX_SHARD_BYTES = 5_000_000_000
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file."""

    name: str
    path: Path
    code: str
    """safetensors' dtype: F32, BF16, …"""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    size_bytes: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])

    def read_rows(self, first: int, last: int) -> Any:
        """fp32 of shape (last - first, all other axes in one)."""
        row_bytes = self.row_elements * ITEM_BYTES.get(self.code, 1)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + first * row_bytes)
            raw = _read_exactly(file, (last - first) * row_bytes, self.path)
        return to_fp32(raw, self.code).reshape(last - first, self.row_elements)

    def read(self) -> Any:
        """fp32 in the tensor's own shape."""
        return self.read_rows(0, self.rows).reshape(self.shape)

    def copy_to(self, out: IO[bytes]) -> None:
        """The stored bytes as they are."""
        left = self.size_bytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                block = _read_exactly(file, min(left, _COPY_BYTES), self.path)
                out.write(block)
                left -= len(block)


def stored_tensors(folder: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """Every tensor of a folder's `<stem>*.safetensors`, one file or shards. Raises: ModelNotFoundError."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / file for file in sorted(set(names.values()))]
    else:
        files = [folder / f"{stem}.safetensors"]
    for file in files:
        if not file.is_file():
            raise ModelNotFoundError(
                f"{folder} has no {file.name}. Merging reads safetensors: save the model in that format."
            )
    return {tensor.name: tensor for file in files for tensor in _tensors_of(file)}


def _tensors_of(path: Path) -> Iterator[StoredTensor]:
    try:
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(_read_exactly(file, _LENGTH_BYTES, path), "little")
            if not 0 < length <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(bytes(_read_exactly(file, length, path)))
    except ValueError as error:
        raise ModelNotFoundError(f"{path} is no safetensors file: {error}.") from error
    size = path.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (_LENGTH_BYTES + length + offset for offset in entry["data_offsets"])
        if last > size:
            raise ModelNotFoundError(f"{path} is cut off: {name} would end at byte {last} of {size}.")
        yield StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), first, last - first)


def _read_exactly(file: IO[bytes], size: int, path: Path) -> bytearray:
    block = bytearray(size)
    view, filled = memoryview(block), 0
    while filled < size:
        got = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not got:
            raise ModelNotFoundError(f"{path} is cut off: {size - filled} bytes are missing.")
        filled += got
    return block


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is about to be written: its header entry, and what writes its bytes."""

    name: str
    code: str
    shape: tuple[int, ...]
    write: Callable[[IO[bytes]], None]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES.get(self.code, 1)


def write_tensors(
    folder: Path, tensors: Sequence[PlannedTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """`model.safetensors`, or shards of at most `max_shard_bytes` (or one tensor) with their index."""
    shards = _in_shards(tensors, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    if len(shards) > 1:
        places = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(tensor.size_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _in_shards(tensors: Iterable[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.size_bytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.size_bytes
    return shards


def _write_file(path: Path, tensors: Sequence[PlannedTensor]) -> None:
    # Widest numbers first: every tensor then starts at a multiple of its own width, as readers like it.
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES.get(tensor.code, 1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.size_bytes
        header[tensor.name] = {
            "dtype": tensor.code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(_LENGTH_BYTES, "little") + head)
        start = file.tell()
        for tensor in ordered:
            tensor.write(file)
            assert file.tell() - start == header[tensor.name]["data_offsets"][1], tensor.name
