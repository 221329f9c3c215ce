"""Training speed side by side with TRL and LLaMA-Factory: same model, rows, adapters, masks, batch, format.

    python tests/bench/train_speed.py --base DIR [--peer-python PYTHON] [--steps 4] [--only ours,lf_packed]

Every contender runs in a process of its own, one after the other, `--rounds` times round. DIR is a base
model's folder (`$SAGE_HOME/base_models/smollm2-135m`). LLaMA-Factory pins other versions of the same
libraries, so it wants an environment of its own: its interpreter is PYTHON; without one only TRL runs, from
this environment.

Rows are function completions from the standard library, 63 to 511 tokens, the same for everybody. Real tokens
are counted without padding, after the first step. Peak memory is the process's resident set. `ours` is the
trainer's own child with its defaults; warm means that it has imported its libraries before the job came.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = ("ours", "ours_cold")
PEERS = ("trl_defaults", "trl_packed", "lf_defaults", "lf_packed")
TITLES = {
    "ours": "ours, warm worker",
    "ours_cold": "ours, cold",
    "trl_defaults": "TRL defaults",
    "trl_packed": "TRL packed (bfd), checkpointing off",
    "lf_defaults": "LLaMA-Factory defaults",
    "lf_packed": "LLaMA-Factory neat packing, checkpointing off",
}


def prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows in every contender's format, and what they share."""
    from sage.tools.finetune.hardware import resolve_precision
    from sage.tools.finetune.modeling import load_tokenizer
    from sage.tools.finetune.rendering import ChatRenderer
    from sage.tools.finetune.task_data import prepare as prepare_rows
    from sage_contracts.config import Task, TrainingConfig

    splits = prepare_rows(TrainingConfig(task=Task.CODE, max_eval_rows=1000))
    tokenizer = load_tokenizer(Path(arguments.base))
    renderer = ChatRenderer(tokenizer, 4096)
    prompt = system_prompt(tokenizer, arguments.prompt_tokens)
    chosen: dict[str, list[tuple[Any, Any]]] = {}
    for name, rows, count in (
        ("train", splits.train, arguments.batch * arguments.steps),
        ("held", splits.validation, arguments.held_rows),
    ):
        rows = random.Random(7).sample(rows, min(len(rows), 3 * count))
        pairs = [(row, renderer.samples([row])) for row in rows]
        fitting = [row for row, made in pairs if made and 63 <= len(made[0].ids) <= 511][:count]
        prompted = [replace(row, messages=[*prompt, *row.messages]) for row in fitting]
        chosen[name] = [(row, renderer.samples([row])[0]) for row in prompted]
    train = chosen["train"]
    lines = {name: [{"messages": row.messages} for row, _ in rows] for name, rows in chosen.items()}
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, file in (("train", "tokens"), ("held", "held")):
        ids = [{"ids": list(sample.ids), "labels": list(sample.labels)} for _, sample in chosen[name]]
        (folder / f"{file}.json").write_text(json.dumps(ids))
    alpaca = [
        {
            "instruction": row.messages[-2]["content"],
            "input": "",
            "output": row.messages[-1]["content"],
            **{message["role"]: message["content"] for message in prompt},
        }
        for row, _ in train
    ]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    columns |= {"system": "system"} if prompt else {}
    info = {"rows": {"file_name": "alpaca.json", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    tokens = [len(sample.ids) for _, sample in train]
    setting = {
        "base": str(Path(arguments.base).resolve()),
        "base_in_format": str(base_in_format(folder, arguments)),
        "steps": arguments.steps,
        "batch": arguments.batch,
        "learning_rate": 1e-3,
        "dropout": arguments.dropout,
        "precision": arguments.precision,
        "chosen_precision": resolve_precision(arguments.precision, "cpu")[0],
        "pack_tokens": arguments.pack_tokens,
        "packs": max(1, round(sum(tokens) / arguments.steps / (0.95 * arguments.pack_tokens))),
        "tokens": sum(tokens),
        "labels": sum(sample.label_count for _, sample in train),
        "longest": max(tokens),
        "shortest": min(tokens),
        "lengths": tokens,
        "computed": computed_share([sample for _, sample in train], arguments.batch),
        "adapters": {},
    }
    (folder / "setting.json").write_text(json.dumps(setting))
    return setting


def base_in_format(folder: Path, arguments: argparse.Namespace) -> Path:
    """The base by which LLaMA-Factory trains in the format of the run.

    It has no setting for fp32, and loads weights in the format that their config.json names.
    """
    base = Path(arguments.base).resolve()
    if arguments.precision == "auto":
        return base
    view = folder / "base"
    view.mkdir()
    for file in base.iterdir():
        if file.name != "config.json":
            (view / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[arguments.precision]
    (view / "config.json").write_text(json.dumps(config | {"dtype": dtype, "torch_dtype": dtype}))
    return view


def system_prompt(tokenizer: Any, tokens: int) -> list[dict[str, str]]:
    """A message of that many tokens for every row, as a team's instructions or a document would be."""
    if not tokens:
        return []
    text = tokenizer(inspect.getdoc(argparse), add_special_tokens=False)["input_ids"]
    return [{"role": "system", "content": tokenizer.decode((text * (1 + tokens // len(text)))[:tokens])}]


def computed_share(rows: list[Any], batch: int) -> float:
    """Of the tokens, where no label's input is computed twice: what rows of a step begin with in common."""
    from sage.tools.finetune.prefix_tree import distinct_tokens

    inputs = [list(row.inputs) for row in rows]
    steps = [inputs[start : start + batch] for start in range(0, len(inputs), batch)]
    return sum(map(distinct_tokens, steps)) / sum(len(row.ids) for row in rows)


def environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DISABLE_VERSION_CHECK": "1",
    }


def forget_files() -> None:
    """Raises: SystemExit where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        raise SystemExit(f"--cold-files: {error}") from error


def reaped(process: subprocess.Popen[Any], log: Path) -> int:
    """Peak resident bytes of a process that is ending. Raises: SystemExit when it failed."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{log.stem} failed:\n" + "\n".join(log.read_text().splitlines()[-25:]))
    return int(usage.ru_maxrss) * 1024


def run_peer(
    name: str, folder: Path, setting: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    python = arguments.peer_python if name.startswith("lf_") else sys.executable
    log = folder / f"{name}.log"
    env = environment(arguments.threads)
    if python != sys.executable:
        env.pop("PYTHONPATH", None)
    began = time.time()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [python, str(HERE / "train_contenders.py"), name, str(folder)],
            stdout=stream,
            stderr=stream,
            cwd=folder,
            env=env,
        )
    peak = reaped(process, log)
    steps = json.loads((folder / f"{name}.json").read_text())
    if name in PEERS:
        rate = (steps[-1]["tokens"] - steps[0]["tokens"]) / (steps[-1]["at"] - steps[0]["at"])
        return {
            "tokens_per_s": rate,
            "peak_bytes": peak,
            "first_step_s": steps[0]["at"] - began,
            "labels": steps[-1]["labels"],
            "adapter": str(folder / name),
        }
    return {"steps": steps}


def run_ours(
    name: str, folder: Path, setting: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The trainer's child as the trainer runs it."""
    home = folder / name
    (home / "base_models").mkdir(parents=True)
    (home / "base_models" / "base").symlink_to(setting["base"])
    for split in ("train", "held"):
        (home / f"{split}.jsonl").write_bytes((folder / f"{split}.jsonl").read_bytes())
    config = {
        "model_name": str(home / "base_models" / "base"),
        "task": "custom",
        "max_steps": setting["steps"],
        "per_device_train_batch_size": setting["batch"],
        "gradient_accumulation_steps": 1,
        "learning_rate": setting["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "weight_decay": 0,
        "precision": setting["precision"],
        "lora": {"lora_dropout": setting["dropout"]},
    }
    claim = {
        "job_id": "bench", "attempt": 1, "lease_s": 60, "name": "bench", "version": 1, "config": config,
        "training_path": "train.jsonl", "validation_path": "held.jsonl",
        "output_dir": "finetune_output/bench",
    }  # fmt: skip
    spec, log = home / "spec.json", folder / f"{name}.log"
    spec.write_text(json.dumps({"home": str(home), "device": "cpu", "claim": claim}))
    is_warm = name == "ours"
    # As the trainer keeps one after a job with this base.
    how = ["--wait", config["model_name"]] if is_warm else [str(spec)]
    command = [sys.executable, "-m", "sage_trainer.child", *how]
    began = time.time()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=environment(arguments.threads) | {"SAGE_HOME": str(home)},
            start_new_session=True,
        )
    assert process.stdout is not None and process.stdin is not None
    steps: list[dict[str, Any]] = []
    steady_since = before_s = 0.0
    for line in process.stdout:
        said = json.loads(line)
        if said["kind"] == "ready":
            began = time.time()
            process.stdin.write(json.dumps({"spec": str(spec), "log": str(log)}) + "\n")
            process.stdin.flush()
        elif said["kind"] == "phase" and said["name"] == "training" and not steps:
            before_s = time.time() - began
        elif said["kind"] == "step":
            steps.append({"at": time.time(), "tokens": said["trained_tokens"]})
        if len(steps) == 1:
            steady_since = time.time()  # the base's held-out loss is measured here, which no peer does
    peak = reaped(process, log)
    rate = (steps[-1]["tokens"] - steps[0]["tokens"]) / (steps[-1]["at"] - steady_since)
    return {
        "tokens_per_s": rate,
        "peak_bytes": peak,
        "first_step_s": steps[0]["at"] - began,
        "before_s": before_s,
        "labels": setting["labels"],
        "adapter": str(home / "finetune_output" / "bench" / "lora_weights"),
    }


def flops_per_token(setting: dict[str, Any], computed: float = 1.0) -> float:
    """What training one token must compute, on average over these rows; `computed` is the share that is.

    A frozen matrix of n weights: 2n forward, 2n for the gradient of its input. An adapter also 2n for its
    own gradient. The output layer counts only where there are labels. Attention, causal, over a row of T
    tokens and width d: 2 T^2 d forward and 4 T^2 d backward a layer. Below the first adapters nothing flows
    back. What a program computes twice, and everything that is no matrix product, is not counted.
    """
    config = json.loads((Path(setting["base"]) / "config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
    qkv, rank = width * (width + 2 * kv), 8
    frozen = layers * (qkv + width * width + 3 * width * inner)
    adapters = layers * rank * (3 * width + width + 2 * kv + 2 * width)
    head = width * config["vocab_size"] * setting["labels"] / setting["tokens"]
    attention = 6 * layers * width * sum(n * n for n in setting["lengths"]) / setting["tokens"]
    return computed * (4 * frozen - 2 * qkv + 6 * adapters) + 4 * head + attention


def summary(results: dict[str, list[dict[str, Any]]], held: dict[str, float]) -> dict[str, dict[str, float]]:
    found = {}
    for name, runs in results.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0].keys() - {"adapter"}}
        found[name] = middle | {"held_out_loss": held[name]}
    return found


def print_table(table: dict[str, dict[str, float]], setting: dict[str, Any], held: dict[str, float]) -> None:
    mean = setting["tokens"] / len(setting["lengths"])
    rows = f"{len(setting['lengths'])} rows of {setting['shortest']} to {setting['longest']} tokens"
    print(f"{rows} (mean {mean:.0f}), {setting['steps']} steps of {setting['batch']} rows")
    print(f"held-out loss of the base: {held['base']:.4f}")
    titles = f"{'tokens/s':>9} {'peak MB':>8} {'first step':>10} {'held-out':>9} {'labels':>7}"
    print(f"{'':46} {titles}   ours/theirs")
    ours = table.get("ours") or table.get("ours_cold")
    for name, row in table.items():
        line = (
            f"{TITLES[name]:46} {row['tokens_per_s']:9.1f} {row['peak_bytes'] / 1e6:8.0f} "
            f"{row['first_step_s']:9.1f}s {row['held_out_loss']:9.4f} {row['labels']:7.0f}"
        )
        if ours and name in PEERS:
            line += (
                f"   speed x{ours['tokens_per_s'] / row['tokens_per_s']:.2f}"
                f"  memory x{ours['peak_bytes'] / row['peak_bytes']:.2f}"
                f"  first step x{ours['first_step_s'] / row['first_step_s']:.2f}"
            )
        print(line)
    if ours:
        print(f"of ours {ours['before_s']:.2f} s are over when the first step begins")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=str(Path("~/.sage/base_models/smollm2-135m").expanduser()))
    parser.add_argument("--peer-python", help="interpreter of an environment with llamafactory")
    parser.add_argument("--only", help="comma-separated names: " + ", ".join((*OURS, *PEERS)))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--batch", type=int, default=8, help="rows per optimiser step (the peers' default is 8)"
    )
    parser.add_argument("--pack-tokens", type=int, default=512, help="length of the peers' packed sequences")
    parser.add_argument(
        "--prompt-tokens", type=int, default=0, help="length of a system message that all rows begin with"
    )
    parser.add_argument("--held-rows", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "auto"),
        default="fp32",
        help="everybody's; auto: what each chooses by itself",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--cold-files",
        action="store_true",
        help="before every contender the system forgets what it read from disk, as after a start; for root",
    )
    parser.add_argument("--json", action="store_true", help="print figures for programs")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else [*OURS, *PEERS]
    if not arguments.peer_python:
        names = [name for name in names if not name.startswith("lf_")]
    with tempfile.TemporaryDirectory() as scratch:
        results: dict[str, list[dict[str, Any]]] = {}
        peaks: list[float] = []
        for number in range(arguments.rounds):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            setting = prepare(folder, arguments)
            for name in names:
                if arguments.cold_files:
                    forget_files()
                run = run_ours if name in OURS else run_peer
                results.setdefault(name, []).append(run(name, folder, setting, arguments))
                print(
                    f"{TITLES[name]}: {results[name][-1]['tokens_per_s']:.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
            run_peer("gemm", folder, setting, arguments)
            peaks += json.loads((folder / "gemm.json").read_text()).values()
        setting["adapters"] = {name: runs[-1]["adapter"] for name, runs in results.items()}
        (folder / "setting.json").write_text(json.dumps(setting))
        run_peer("held_out", folder, setting, arguments)
        held = json.loads((folder / "held_out.json").read_text())
    table = summary(results, held)
    peak, needed = max(peaks), flops_per_token(setting)
    if arguments.json:
        print(json.dumps({"contenders": table, "gemm_gflops": peak, "mflop_per_token": needed / 1e6}))
        return
    print_table(table, setting, held)
    print(f"{setting['chosen_precision']} matrix products at the model's sizes: {peak:.0f} GFLOP/s")
    least = flops_per_token(setting, setting["computed"])
    print(
        f"training a token of these rows takes {needed / 1e6:.0f} MFLOP; {least / 1e6:.0f} without "
        f"{1 - setting['computed']:.0%} of them: common beginnings, once more, and last labels, at all"
    )
    for name, row in table.items():
        share = row["tokens_per_s"] * needed / 1e9 / peak
        done = f", {share * least / needed:.0%} of it in products that were computed" if name in OURS else ""
        print(f"{TITLES[name]:46} {share:.0%} of that{done}")


if __name__ == "__main__":
    main()
