"""Rows per second and memory of reading data: ours beside LLaMA-Factory's preprocessing of the same file.

python tests/bench/validate_rows.py --model FOLDER --peer-python VENV/bin/python
    [--rows 1000000] [--peer-workers 2] [--work read tokens]

Two pieces of work, each in a process of its own, with the same tokenizer and the same file of Alpaca rows
(functions of the standard library, numbered so that no two are alike):

read    ours: detect, convert and check every row, find duplicates (`validate_file`).
        theirs: load the file and convert its rows to their own (`_get_merged_dataset`).
tokens  ours: the same, and render and tokenise every row for its length, as `sage finetune validate` does.
        theirs: the same, and render and tokenise every row for training (`get_dataset`).

Theirs keeps what it makes in Arrow files on the disk, ours keeps none of it; ours counts duplicates and bad
rows, theirs does not. Time runs from after the imports and the loading of the tokenizer; CPU seconds are of
all threads and processes; memory is the peak of the resident set above what it was then, of the largest
process where there are several.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FILE = "rows.jsonl"
TIMEOUT_S = 3600.0
MAX_LENGTH = 1024
GOAL = 3.0


def write_rows(path: Path, count: int) -> None:
    from sage.tools.finetune.code_data import build_code_pairs

    pairs = build_code_pairs(None)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            asked, answer = (turn["content"] for turn in pairs[number % len(pairs)].messages())
            row = {"instruction": f"{asked}\n# {number}", "input": "", "output": answer}
            stream.write(json.dumps(row) + "\n")


def memory_bytes(of: str) -> int:
    """`VmRSS`, the resident set, or `VmHWM`, its peak. Source: Linux Documentation/filesystems/proc.rst."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(of)).split()[1]) * 1024


def measure(work: Callable[[], int]) -> None:
    """Print what one piece of work took, as JSON on the last line."""
    before = memory_bytes("VmRSS")
    # Resets the peak, so that what importing needed for a moment is not taken for the work's.
    Path("/proc/self/clear_refs").write_text("5")
    started, cpu_before = time.perf_counter(), sum(os.times()[:4])
    rows = work()
    seconds, cpu_seconds = time.perf_counter() - started, sum(os.times()[:4]) - cpu_before
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    peak = max(memory_bytes("VmHWM"), children) - before
    found = {"rows": rows, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}
    print("\n" + json.dumps(found))


def run_ours(folder: Path, model: str, work: str) -> None:
    from sage.tools.finetune.data import validate_file
    from sage.tools.finetune.data.tokenizer_files import length_counter

    lengths = length_counter(model, folder, MAX_LENGTH) if work == "tokens" else None

    def validate() -> int:
        report = validate_file(folder / FILE, lengths=lengths)
        assert report.good == report.rows
        assert not report.duplicates
        return report.rows

    measure(validate)


def run_theirs(folder: Path, model: str, work: str, workers: int) -> None:
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.loader import _get_merged_dataset, get_dataset
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    settings: dict[str, Any] = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": model,
        "template": "smollm2",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "cutoff_len": MAX_LENGTH,
        "overwrite_cache": True,
        "report_to": "none",
    }
    if workers > 1:
        settings["preprocessing_num_workers"] = workers
    model_args, data_args, training_args, _, _ = get_train_args(settings)
    tokenizer = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)

    def preprocess() -> int:
        if work == "read":
            return len(_get_merged_dataset(data_args.dataset, model_args, data_args, training_args, "sft"))
        found = get_dataset(template, model_args, data_args, training_args, "sft", **tokenizer)
        return len(found["train_dataset"])

    measure(preprocess)


def in_process(python: str, folder: Path, options: list[str]) -> dict[str, float]:
    environment = os.environ | {
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "DISABLE_VERSION_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    command = [python, str(Path(__file__).resolve()), "--folder", str(folder), *options]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ran.stderr[-3000:]}")
    result: dict[str, float] = json.loads(ran.stdout.strip().splitlines()[-1])
    return result


def compare(options: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="sage-bench-") as scratch:
        folder = Path(scratch)
        write_rows(folder / FILE, options.rows)
        (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": FILE}}))
        size = (folder / FILE).stat().st_size
        print(f"{options.rows:,} rows, {size / 1e6:,.0f} MB, {os.cpu_count()} cores")
        for work in options.work:
            common = ["--model", options.model, "--work", work]
            ours = in_process(sys.executable, folder, [*common, "--side", "ours"])
            show(work, "ours", ours)
            if not options.peer_python:
                continue
            for workers in sorted({1, options.peer_workers}):
                words = [*common, "--side", "theirs", "--peer-workers", str(workers)]
                theirs = in_process(options.peer_python, folder, words)
                show(work, f"LLaMA-Factory, {workers} worker{'s' if workers > 1 else ''}", theirs)
                ratio = theirs["seconds"] / ours["seconds"]
                print(f"{work:7} ratio {ratio:.2f} (goal {GOAL:g}: {'met' if ratio >= GOAL else 'missed'})")


def show(work: str, side: str, result: dict[str, float]) -> None:
    rate = result["rows"] / result["seconds"]
    print(
        f"{work:7} {side:25} {rate:>10,.0f} rows/s  {result['seconds']:>7.1f} s  "
        f"{result['cpu_seconds']:>7.1f} CPU s  "
        f"peak {result['peak_bytes'] / 2**20:>7,.0f} MiB above imports",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", required=True, help="a folder with a tokenizer, such as smollm2-135m")
    parser.add_argument("--peer-python", help="a Python that has LLaMA-Factory")
    parser.add_argument("--peer-workers", type=int, default=1, help="also with so many of their processes")
    parser.add_argument("--work", nargs="+", choices=["read", "tokens"], default=["read", "tokens"])
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = str(Path(options.model).absolute())
    if options.side == "ours":
        run_ours(options.folder, options.model, options.work[0])
    elif options.side == "theirs":
        run_theirs(options.folder, options.model, options.work[0], options.peer_workers)
    else:
        compare(options)


if __name__ == "__main__":
    main()
