"""An adapter folded into its base: plain weights for export, checked against the adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sage.tools.finetune.hardware import memory_errors, wait_politely
from sage.tools.finetune.merging.folder import model_bytes, write_model
from sage.tools.finetune.merging.numbers import CODES, FLOATS
from sage.tools.finetune.merging.parity import ParityReport, ask_tuned, compare_folder, require_parity
from sage.tools.finetune.merging.tensor_files import MAX_SHARD_BYTES
from sage.tools.finetune.merging.weights import merged_weights
from sage.tools.finetune.storage import folder_written_whole, require_free_space, storage_errors, write_json
from sage_contracts.models import WeightsDtype

Report = Callable[[str], None]


@dataclass(frozen=True)
class MergeResult:
    path: Path
    parity: ParityReport
    size_bytes: int


def merge_adapter(
    base: Path,
    adapter_dir: Path | None,
    out_dir: Path,
    dtype: WeightsDtype = "auto",
    report: Report = lambda phase: None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> MergeResult:
    """Write base + adapter to `out_dir`, whole, with the adapter's tokenizer and chat template.

    `adapter_dir=None` writes a model tuned in full anew, with its own. The merge is computed in fp32, a few
    rows at a time. What was written is loaded and has to answer the
    probes as the adapter does, or nothing is kept. "auto" leaves every weight in the base's own dtype.
    Raises: ModelNotFoundError, InvalidRequestError for what cannot be merged, TrainingFailedError on
    disagreement, StorageFullError, OutOfMemoryError.
    """
    wait_politely()
    code = None if dtype == "auto" else CODES[dtype]
    with memory_errors(), storage_errors(out_dir):
        weights = merged_weights(base, adapter_dir)
        require_free_space(out_dir.parent, model_bytes(weights, code), "the merged model")
        with folder_written_whole(out_dir) as unfinished:
            report("merging")
            write_model(weights, unfinished, code, max_shard_bytes)
            report("asking the tuned model")
            wanted = ask_tuned(base, adapter_dir, unfinished)
            report("asking the merged model")
            parity = compare_folder(wanted, unfinished, FLOATS[code or weights.main_code])
            require_parity(parity, "The merged model")
            write_json(unfinished / "sage_merge.json", {"base": str(base), "parity": asdict(parity)})
    size = sum(path.stat().st_size for path in out_dir.rglob("*") if path.is_file())
    return MergeResult(out_dir, parity, size)
