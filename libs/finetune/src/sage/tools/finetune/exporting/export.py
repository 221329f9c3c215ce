"""One tuned model in one form for elsewhere, whole and checked, or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sage.tools.finetune.base_models import base_info
from sage.tools.finetune.exporting import quantiser
from sage.tools.finetune.exporting.gguf_model import GgufNumbers, require_architecture, write_gguf
from sage.tools.finetune.exporting.ollama import chat_turns, has_template, modelfile
from sage.tools.finetune.exporting.packing import (
    make_portable,
    push_to_hub,
    require_private,
    require_token,
    zip_folder,
)
from sage.tools.finetune.hardware import memory_errors, wait_politely
from sage.tools.finetune.merging.folder import copy_tokenizer
from sage.tools.finetune.merging.merge import merge_adapter
from sage.tools.finetune.merging.numbers import ITEM_BYTES
from sage.tools.finetune.merging.parity import ParityReport, ask_tuned, compare_folder, require_parity
from sage.tools.finetune.merging.weights import merged_weights
from sage.tools.finetune.storage import folder_written_whole, require_free_space, storage_errors, write_json
from sage_contracts.errors import InvalidRequestError
from sage_contracts.models import ExportContent, ExportFormat, WeightsDtype

Report = Callable[[str], None]
_DTYPES = {"f16": "float16"}
"""GGUF's name of a number to the one that parity is judged by."""


@dataclass(frozen=True)
class ExportWish:
    """What somebody wants of a tuned model."""

    format: ExportFormat
    name: str
    """Of the files, and of the model inside them: `code-3`."""
    dtype: WeightsDtype = "auto"
    content: ExportContent = "merged"
    repo: str | None = None
    allow_public: bool = False
    """Whether everybody may be able to read that repository."""


@dataclass(frozen=True)
class ExportResult:
    path: Path
    """The file; for the Hub and for Ollama the folder."""
    size_bytes: int
    """Of the file or the folder; for the Hub, of what was sent."""
    parity: ParityReport | None
    """None where nothing was computed: an adapter is passed on as it is."""
    notes: list[str] = field(default_factory=list)
    url: str | None = None


def export_model(
    base: Path, adapter_dir: Path | None, out_dir: Path, wish: ExportWish, report: Report = lambda phase: None
) -> ExportResult:
    """Write the form that is wished for into the folder `out_dir`; of a model tuned in full without adapter.

    Raises: InvalidRequestError for what cannot be written, ModelNotFoundError, TrainingFailedError when the
    result is not what its adapter is, ServiceUnavailableError for a Hub that does not answer,
    StorageFullError, OutOfMemoryError.
    """
    wait_politely()
    with memory_errors(), storage_errors(out_dir):
        if wish.format in ("zip", "hub"):
            return _pass_on(base, adapter_dir, out_dir, wish, report)
        return _write_gguf(base, adapter_dir, out_dir, wish, report)


def _pass_on(
    base: Path, adapter_dir: Path | None, out_dir: Path, wish: ExportWish, report: Report
) -> ExportResult:
    if wish.format == "hub":
        # Before minutes are spent.
        require_token()
        if wish.repo is not None and not wish.allow_public:
            require_private(wish.repo)
    with folder_written_whole(out_dir) as unfinished:
        folder, parity = unfinished / wish.name, None
        if wish.content == "merged":
            parity = merge_adapter(base, adapter_dir, folder, wish.dtype, report).parity
        elif adapter_dir is None:
            raise InvalidRequestError("A model tuned in full has no adapter to export.", param="content")
        else:
            shutil.copytree(adapter_dir, folder)
        make_portable(folder, base)
        url, path, sent_bytes = None, out_dir, 0
        if wish.format == "hub":
            assert wish.repo is not None
            report(f"sending to {wish.repo}")
            url = push_to_hub(folder, wish.repo, allow_public=wish.allow_public)
            sent_bytes = _size_bytes(folder)
        else:
            report("packing")
            path = out_dir / f"{wish.name}-{wish.content}.zip"
            zip_folder(folder, unfinished / path.name)
        shutil.rmtree(folder)
        write_json(unfinished / "sage_export.json", _record(base, wish, parity) | {"url": url})
    return ExportResult(path, sent_bytes or _size_bytes(path), parity, url=url)


def _write_gguf(
    base: Path, adapter_dir: Path | None, out_dir: Path, wish: ExportWish, report: Report
) -> ExportResult:
    numbers = "q8_0" if wish.format == "ollama" else wish.format.removeprefix("gguf-")
    quantise = quantiser.find() if numbers == "q4_k_m" else None
    weights = merged_weights(base, adapter_dir)
    require_architecture(weights)
    require_free_space(out_dir.parent, weights.elements * ITEM_BYTES["F16"], "the GGUF file")
    with folder_written_whole(out_dir) as unfinished:
        file = unfinished / f"{wish.name}-{numbers}.gguf"
        copy_tokenizer(weights.adapter_dir, base, unfinished)
        text = modelfile(file.name, *chat_turns(unfinished))
        if wish.format == "ollama" and not has_template(text):
            raise InvalidRequestError(
                "The chat template of this model cannot be said in Ollama's. Export gguf-q8_0: there, "
                "Ollama guesses a template from the model's own; look at what it makes of a conversation.",
                param="format",
            )
        report("writing")
        licence = str(base_info(base).get("license") or "")
        plain = file if quantise is None else unfinished / "f16.gguf"
        stored: GgufNumbers = "q8_0" if numbers == "q8_0" else "f16"
        write_gguf(weights, unfinished, plain, stored, name=wish.name, licence=licence)
        if quantise is not None:
            report("quantising")
            quantise(plain, file)
            plain.unlink()
        report("asking the tuned model")
        wanted = ask_tuned(base, adapter_dir, unfinished)
        report("asking the GGUF file")
        # Through transformers' reader, which undoes what ours did by code of its own.
        parity = compare_folder(wanted, unfinished, _DTYPES.get(numbers, numbers), gguf_file=file.name)
        require_parity(parity, "The GGUF file")
        for path in unfinished.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != file:
                path.unlink()
        (unfinished / "Modelfile").write_text(text, encoding="utf-8")
        write_json(unfinished / "sage_export.json", _record(base, wish, parity))
    notes = [] if has_template(text) else ["The Modelfile leaves the chat template to Ollama's guess."]
    path = out_dir if wish.format == "ollama" else out_dir / file.name
    return ExportResult(path, _size_bytes(out_dir / file.name), parity, notes)


def _record(base: Path, wish: ExportWish, parity: ParityReport | None) -> dict[str, Any]:
    return {"base": str(base), **asdict(wish), "parity": asdict(parity) if parity else None}


def _size_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
