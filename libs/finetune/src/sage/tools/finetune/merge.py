"""An adapter folded into its base: plain weights for export, checked against the adapter first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sage.tools.finetune.hardware import memory_errors, set_threads, torch_dtype, wait_politely
from sage.tools.finetune.modeling import load_tokenizer, quiet_bitsandbytes
from sage.tools.finetune.storage import folder_written_whole, require_free_space, storage_errors, write_json
from sage_contracts.errors import ModelNotFoundError, TrainingFailedError

MergeDtype = Literal["auto", "fp32", "fp16", "bf16"]

PROBES = (
    "Write a Python function that returns the largest number of a list.",
    "What is the capital of France?",
    "Explain in one sentence what a unit test is for.",
)
PROBE_TOKENS = 24


@dataclass(frozen=True)
class ProbeReport:
    """Greedy answers of adapter and merged weights on the fixed probes."""

    dtype: str
    probes: int
    same: int
    """Probes answered with exactly the same tokens."""
    same_tokens: int
    """Tokens up to the first difference, summed."""
    tokens: int


@dataclass(frozen=True)
class MergeResult:
    path: Path
    parity: ProbeReport
    size_bytes: int


def merge_adapter(
    base: Path,
    adapter_dir: Path,
    out_dir: Path,
    dtype: MergeDtype = "auto",
    report: Callable[[str], None] = lambda phase: None,
) -> MergeResult:
    """Write base + adapter to `out_dir`, whole, with the adapter's tokenizer and chat template.

    The merge is computed in fp32. What was written is loaded again and has to answer the probes: in fp32 with
    the adapter's very tokens, or nothing is kept; in half precision rounding may flip a close choice, and the
    share that agrees is reported. "auto" is the base's own dtype.
    Raises: ModelNotFoundError, TrainingFailedError on disagreement, StorageFullError, OutOfMemoryError.
    """
    if not (adapter_dir / "adapter_config.json").is_file():
        raise ModelNotFoundError(f"{adapter_dir} holds no adapter (no adapter_config.json).")
    wait_politely()
    set_threads()
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    require_free_space(out_dir.parent, 2 * weights, "the merged model")
    with memory_errors(), storage_errors(out_dir):
        return _merge(base, adapter_dir, out_dir, dtype, report)


def _merge(
    base: Path, adapter_dir: Path, out_dir: Path, dtype: MergeDtype, report: Callable[[str], None]
) -> MergeResult:
    import torch

    quiet_bitsandbytes()
    from peft import PeftModel

    tokenizer = load_tokenizer(adapter_dir if (adapter_dir / "tokenizer_config.json").is_file() else base)
    report("loading base and adapter")
    model, own_dtype = _load_fp32(base)
    tuned = PeftModel.from_pretrained(model, str(adapter_dir)).eval()
    report("asking the adapter")
    wanted = _answers(tuned, tokenizer)
    report("merging")
    # safe_merge refuses weights that became NaN or infinite.
    merged = tuned.merge_and_unload(safe_merge=True)
    target = own_dtype if dtype == "auto" else torch_dtype(dtype)
    with folder_written_whole(out_dir) as unfinished:
        report("writing")
        merged.to(target).save_pretrained(str(unfinished))
        tokenizer.save_pretrained(str(unfinished))
        del merged, tuned, model
        report("asking the merged model")
        parity = _compare(wanted, _answers(_load_fp32(unfinished)[0].eval(), tokenizer), str(target))
        if target == torch.float32 and parity.same < parity.probes:
            raise TrainingFailedError(
                f"The merged model answers {parity.probes - parity.same} of {parity.probes} probes unlike "
                "its adapter, so it is not kept. Chat with the adapter, and report this."
            )
        write_json(unfinished / "sage_merge.json", {"base": str(base), "parity": asdict(parity)})
    size = sum(path.stat().st_size for path in out_dir.rglob("*") if path.is_file())
    return MergeResult(out_dir, parity, size)


def _load_fp32(folder: Path) -> tuple[Any, Any]:
    """(the model in fp32, the dtype that its weights are stored in)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        stored = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{folder} holds no model that can be loaded: {error}") from error
    own_dtype = stored.dtype
    return stored.to(torch.float32), own_dtype


def _answers(model: Any, tokenizer: Any) -> list[list[int]]:
    """Greedy token ids for each probe."""
    import torch

    answers = []
    for probe in PROBES:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": probe}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            ids = model.generate(
                **asked, max_new_tokens=PROBE_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        answers.append(ids[0, asked["input_ids"].shape[1] :].tolist())
    return answers


def _compare(wanted: Sequence[list[int]], found: Sequence[list[int]], dtype: str) -> ProbeReport:
    agreeing = 0
    for left, right in zip(wanted, found, strict=True):
        same = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
        agreeing += next(same, min(len(left), len(right)))
    return ProbeReport(
        dtype=dtype.removeprefix("torch."),
        probes=len(wanted),
        same=sum(left == right for left, right in zip(wanted, found, strict=True)),
        same_tokens=agreeing,
        tokens=sum(len(answer) for answer in wanted),
    )
