"""Our merge beside peft's `merge_and_unload` + `save_pretrained`: wall and peak memory, and their ratios.

python tests/bench/merge.py --base ~/.sage/base_models/smollm2-135m

Each side is a process of its own, started alike, that loads the base and the adapter, merges and writes; wall
is that of the whole process, imports included, and peak memory is its largest resident set. Before both, the
files are read once, so that neither reads a cold disk. Our parity check is a further process, reported by
itself: peft has none. Ours syncs its files to disk before they count as written; `save_pretrained` does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20

OURS = """
from pathlib import Path
from sage.tools.finetune.merging.folder import write_model
from sage.tools.finetune.merging.weights import merged_weights
from sage.tools.finetune.storage import folder_written_whole
with folder_written_whole(Path(out)) as folder:
    write_model(merged_weights(Path(base), Path(adapter)), folder)
"""

PEFT = """
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""

PARITY = """
from dataclasses import asdict
import json
from pathlib import Path
from sage.tools.finetune.merging.parity import ask_tuned, compare_folder
wanted = ask_tuned(Path(base), Path(adapter))
print(json.dumps(asdict(compare_folder(wanted, Path(out), "stored"))))
"""

# Not in this process: a child's peak starts at the size that its parent has when it is forked.
WARM = """
from pathlib import Path
for path in Path(base).glob("*.safetensors"):
    path.read_bytes()
"""

ADAPTER = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
for name, parameter in tuned.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.01)
tuned.save_pretrained(adapter)
"""


def run(code: str, **paths: Path) -> tuple[float, float, str]:
    """(seconds, peak MiB, standard output) of a fresh interpreter."""
    head = "".join(f"{name} = {str(path)!r}\n" for name, path in paths.items())
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", head + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    out, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(errors)
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / MIB, out


def largest_difference(ours: Path, theirs: Path) -> float:
    from sage.tools.finetune.merging.tensor_files import stored_tensors

    left, right = stored_tensors(ours), stored_tensors(theirs)
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    return max(float(abs(left[name].read() - right[name].read()).max()) for name in left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--adapter", type=Path, help="folder of a LoRA adapter; otherwise a random one is made"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        adapter = arguments.adapter or scratch / "adapter"
        if arguments.adapter is None:
            run(ADAPTER, base=arguments.base, adapter=adapter)
        run(WARM, base=arguments.base)
        best: dict[str, tuple[float, float]] = {}
        for _ in range(arguments.rounds):
            for side, code in (("sage", OURS), ("peft", PEFT)):
                wall_s, peak_mib, _ = run(code, base=arguments.base, adapter=adapter, out=scratch / side)
                known = best.get(side, (wall_s, peak_mib))
                best[side] = (min(known[0], wall_s), min(known[1], peak_mib))
        for side, (wall_s, peak_mib) in best.items():
            print(f"{side}: {wall_s:6.2f} s  {peak_mib:7.0f} MiB   (best of {arguments.rounds})")
        (ours_s, ours_mib), (theirs_s, theirs_mib) = best["sage"], best["peft"]
        print(f"sage / peft: wall {ours_s / theirs_s:.3f} (goal 0.5)")
        print(f"sage / peft: peak memory {ours_mib / theirs_mib:.3f} (goal 0.4)")
        print(f"largest difference of a weight: {largest_difference(scratch / 'sage', scratch / 'peft'):.3g}")
        wall_s, peak_mib, out = run(PARITY, base=arguments.base, adapter=adapter, out=scratch / "sage")
        report = json.loads(out.splitlines()[-1])
        print(
            f"parity check: {wall_s:.1f} s  {peak_mib:.0f} MiB   {report['same_tokens']}/{report['tokens']} "
            f"tokens, KL {report['mean_kl']:.2g} (plain base: {report['base_kl']:.2g})"
        )


if __name__ == "__main__":
    main()
