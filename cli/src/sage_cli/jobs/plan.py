"""sage finetune plan: what a run would take, measured in a child process. Needs no server."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.text import Text

from sage.tools.finetune.code_data.archives import is_archive_name
from sage.tools.finetune.storage import temporary_folder
from sage_cli import locate, render
from sage_cli.failures import EngineFault, print_json
from sage_cli.jobs import outcome
from sage_cli.jobs.submit import CheckedWish, check
from sage_cli.jobs.wish import JobWish
from sage_contracts.errors import InvalidRequestError, ServiceUnavailableError, all_errors

PROGRAM = "sage.tools.finetune.planning"


def plan_command(wish: JobWish, *, is_auto: bool, as_json: bool) -> None:
    checked = check(wish, is_trained=False)
    spec = _spec(checked, is_auto=is_auto)
    _require_packages(spec)
    found = _run(spec)
    if as_json:
        print_json(found)
        return
    show(render.output(), found)


def _spec(wish: CheckedWish, *, is_auto: bool) -> dict[str, Any]:
    if wish.data is not None and is_archive_name(wish.data.name):
        raise InvalidRequestError(f"{wish.data}: unpack the archive first and give the folder.", param="data")
    return {
        "home": str(locate.home_root()),
        "task": wish.task.value,
        "model": wish.model,
        "data": str(wish.data.absolute()) if wish.data else None,
        "preset": wish.options.preset.value if wish.options.preset else None,
        "settings": wish.options.config,
        "is_auto": is_auto,
    }


def _require_packages(spec: dict[str, Any]) -> None:
    needed = ["torch", "transformers", "peft"]
    if spec["settings"].get("method", "sft") != "sft":
        needed += ["trl", "datasets"]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ServiceUnavailableError(
            f"Planning runs a real training step, and {', '.join(missing)} is not installed beside this "
            "command. Install it (`make install` in the source tree), or plan inside the trainer's "
            f"container: docker compose exec trainer python -m {PROGRAM} SPEC.json (docs/out-of-memory.md)."
        )


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    """The plan. Raises: the child's SageError; ServiceUnavailableError when it was killed; EngineFault."""
    console = render.error_console()
    with temporary_folder("sage-plan-") as folder:
        path, log = folder / "spec.json", folder / "log"
        path.write_text(json.dumps(spec), encoding="utf-8")
        # -P: what lies in the user's folder is no part of the program.
        command = [sys.executable, "-P", "-m", PROGRAM, str(path)]
        with (
            log.open("wb") as stderr,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as child,
        ):
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    said = json.loads(line)
                    if said["kind"] == "progress":
                        render.line(console, "wait", said["message"])
                    elif said["kind"] == "failed":
                        raise all_errors()[said["code"]](said["message"], param=said["param"])
                    else:
                        plan: dict[str, Any] = said["plan"]
                        return plan
                child.wait()
            finally:
                child.kill()
        tail = log.read_text(errors="replace").strip().splitlines()[-5:]
        told = "\n".join(["Planning ended without a plan.", *tail])
        # Whoever kills it, such as a system short of memory, may let it live another time.
        raise ServiceUnavailableError(told) if child.returncode < 0 else EngineFault(told)


def show(console: Console, plan: dict[str, Any]) -> None:
    """A Plan for people, with what would fit where it does not."""
    config, counts, trial = plan["config"], plan["counts"], plan["trial"]
    outcome.facts(console, [*_data_rows(plan, counts, config), *_run_rows(plan, config, trial)])
    console.print()
    if plan["length_warning"]:
        render.line(console, "warn", plan["length_warning"])
    if plan["fits"]:
        untried = " By the size of its shards; nothing was measured." if plan["trial"] is None else ""
        render.line(console, "ok", f"This run fits.{untried}")
        return
    render.line(console, "bad", f"This run does not fit: {plan['problem']}")
    changes = plan["would_fit"]
    for change in changes:
        state = "warn" if change["untried"] else "ok" if change["fits"] else "bad"
        render.line(console, state, f"{change['name']}: {_verdict(change)}")
    if changes and all(change["untried"] for change in changes):
        console.print(Text("No alternative could be tried: take a smaller base model."))
    elif not any(change["fits"] for change in changes):
        console.print(Text("Nothing that was tried fits: take a smaller base model."))
    elif config["oom_ladder"] != "off" and any(map(_is_fitting_rung, changes)):
        console.print(Text("Started as it is, the run would find the fitting rung by itself."))


def _is_fitting_rung(change: dict[str, Any]) -> bool:
    return change["fits"] and not change["name"].startswith("--preset")


def _verdict(change: dict[str, Any]) -> str:
    if change["untried"]:
        return f"could not be tried: {change['untried']}"
    peak = f" (peak {render.bytes_text(change['peak_memory_bytes'])})" if change["peak_memory_bytes"] else ""
    return f"{'fits' if change['fits'] else 'does not fit either'}{peak}. {change['change']}"


def _computing_rows(trial: dict[str, Any] | None) -> list[tuple[str, str]]:
    saved = round(100 * (1 - trial["computed_share"])) if trial else 0
    why = "what rows begin with alike is computed once, ends that predict nothing never"
    return [("computing saved", f"{saved} % of the tokens: {why}")] if saved else []


def _data_rows(plan: dict[str, Any], counts: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str]]:
    shares = ", ".join(f"{share} % ≤ {length}" for share, length in counts["percentiles"].items())
    bins = "  ".join(f"≤{top}: {rows}" for top, rows in counts["histogram"])
    cut = f"{counts['truncated_rows']} rows, {counts['lost_tokens']:,} tokens"
    if counts["dropped_rows"]:
        cut += f"; {counts['dropped_rows']} rows lose their whole answer and are left out"
    is_supervised = config["method"] == "sft"
    rows = "rows" if is_supervised else "answers with their prompts"
    padding = f"{counts['padded_tokens']:,} tokens an epoch"
    padded = (
        ("padding saved", f"{counts['padding_saved'] * 100:.0f} % ({padding} if padded)")
        if is_supervised
        else ("padded", f"about {padding}")
    )
    return [
        ("base model", config["model_name"]),
        ("preset", f"{config['preset']}" + (f": {plan['why_preset']}" if plan["why_preset"] else "")),
        ("data", plan["data"]),
        (
            "tokens",
            f"{counts['tokens']:,} an epoch in {counts['rows']:,} {rows}; {plan['tokens_in_all']:,} in all",
        ),
        ("row length", f"mean {counts['mean']:.0f}, {shares}, longest {counts['longest']}"),
        ("rows by tokens", bins),
        (f"cut at {config['max_length']}", cut),
        padded,
        *_computing_rows(plan["trial"]),
    ]


def _run_rows(
    plan: dict[str, Any], config: dict[str, Any], trial: dict[str, Any] | None
) -> list[tuple[str, str]]:
    batch = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    rows = [("steps", f"{plan['steps']:,} of {batch} rows")]
    limit = render.bytes_text(plan["memory_limit_bytes"])
    spread = plan["spread"]
    if spread["ranks"] > 1:
        rows.append(("devices", f"{spread['ranks']} with {spread['kind']}: {spread['why']}"))
    if spread["kind"] == "fsdp" and spread["fits"] is not None:
        return [*rows, ("memory", f"not measured: a plan uses one device; {plan['device']} has {limit}")]
    if trial is None:
        return [*rows, ("memory", f"no step got through; {plan['device']} has {limit}")]
    trained, total = trial["trainable_parameters"], trial["total_parameters"]
    low, high = plan["run_s"]
    merged = f", merged {render.bytes_text(plan['merged_bytes'])}" if plan["merged_bytes"] else ""
    disk = (
        f"checkpoints {render.bytes_text(plan['checkpoints_bytes'])}, {'adapter' if merged else 'model'} "
        f"{render.bytes_text(plan['adapter_bytes'])}{merged}; "
        f"{render.bytes_text(plan['free_disk_bytes'])} free"
    )
    on = f" on one of the {spread['ranks']} devices" if spread["ranks"] > 1 else ""
    return [
        *rows,
        ("trained", f"{trained:,} of {total:,} parameters ({trained / total * 100:.2f} %)"),
        (
            "memory",
            f"{render.bytes_text(trial['peak_memory_bytes'])}, measured on {trial['device']} "
            f"({limit}) in {trial['precision']}, with {trial['longest_pass_tokens']} tokens a pass",
        ),
        ("step", f"{plan['step_s']:.2f} s, measured"),
        ("run", f"{render.seconds_text(low)} to {render.seconds_text(high)}{on}"),
        ("disk", disk),
        *(("note", note) for note in trial["notes"]),
    ]
