"""`sage finetune sweep` as people type it, against a gateway that answers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sage_cli.jobs.grid import parse_grid
from sage_cli.jobs.sweep_table import table_of
from sage_contracts.config import LoRAConfig, PresetConfigs
from sage_contracts.jobs import JobError, JobStatus
from sage_contracts.sweeps import Sweep, SweepChild, SweepStatus

Sage = Callable[..., Any]
Requests = Callable[[str], list[dict[str, Any]]]
GRID = ("--grid", "learning_rate=1e-4,2e-4", "--grid", "lora.r=4,8")


def test_a_sweep_fills_its_table_and_names_the_best(online: Sage, requests: Requests) -> None:
    ran = online("finetune", "sweep", "--task", "code", *GRID, "--set", "max_steps=2", "--max-jobs", "4")
    assert ran.exit_code == 0, ran.output
    body = requests("sweep body")[0]["body"]
    assert body["grid"] == {"learning_rate": [1e-4, 2e-4], "lora.r": [4, 8]}
    assert (body["max_jobs"], body["sage"]["config"]) == (4, {"max_steps": 2})
    for text in (
        "Sweep 'code' (code): 4 jobs",
        "code-s1  learning_rate=0.0001, lora.r=4  succeeded  held-out loss 1.898",
        "code-s2  learning_rate=0.0001, lora.r=8  failed  The loss became NaN at step 4.",
        "Best: code-s3  learning_rate=0.0002, lora.r=4",
        "base 2.391 → tuned 1.698",
        "'code' is now code@1, the same model as code-s3@1",
    ):
        assert text in ran.output
    shown = online("finetune", "sweep", "show", "code").output.splitlines()
    assert shown[1].split() == ["JOB", "learning_rate", "lora.r", "STATE", "STEP", "LOSS", "HELD-OUT"]
    assert shown[4].split() == ["code-s3", "0.0002", "4", "succeeded", "4/4", "2.100", "1.698", "best"]
    best_id = json.loads(online("finetune", "sweep", "show", "code", "--json").stdout)["best_job_id"]
    # The name is no job's: it stands for the one that it was taken from.
    assert online("finetune", "show", "code").output.startswith(f"{best_id}  code-s3")


def test_a_sweep_takes_what_a_start_takes(online: Sage, requests: Requests, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "p", "chosen": "good", "rejected": "bad"}\n' * 20)
    words = ("--data", str(pairs), "--method", "dpo", "--set", "max_steps=2", "--grid", "lora.r=4,8")
    ran = online("finetune", "sweep", *words, "--no-watch")
    assert ran.exit_code == 0, ran.output
    body = requests("sweep body")[0]["body"]
    assert body["sage"]["config"] == {"max_steps": 2, "method": "dpo"}
    assert body["grid"] == {"lora.r": [4, 8]}


def test_a_task_that_nobody_knows_is_refused_as_by_start(sage: Sage) -> None:
    told = [sage("finetune", *words, "--task", "nonsense") for words in (["start"], ["sweep", *GRID])]
    assert [ran.exit_code for ran in told] == [2, 2]
    assert all("'nonsense' is not one of code, qa, chat" in ran.stderr for ran in told)


def test_a_sweep_without_a_model_ends_with_3(online: Sage) -> None:
    ran = online("finetune", "sweep", "--task", "code", "--name", "fails", "--grid", "lora.r=4,8")
    assert ran.exit_code == 3
    assert "The loss became NaN" in ran.stderr


def test_a_sweep_that_waits_for_a_paused_job_alone_says_so_and_is_left(online: Sage) -> None:
    ran = online("finetune", "sweep", "--task", "code", "--name", "stuck", "--grid", "lora.r=4,8")
    assert ran.exit_code == 3
    assert "waits for what is paused: The disk is full." in ran.stderr
    assert "sage finetune resume stuck-s2" in ran.stderr
    assert "sage finetune sweep cancel sweep-" in ran.stderr


def test_a_sweep_goes_on_without_its_watcher_until_it_is_cancelled(online: Sage) -> None:
    ran = online("finetune", "sweep", "--task", "code", "--name", "endless", *GRID, "--no-watch")
    assert "sage finetune sweep watch sweep-" in ran.output
    assert "is cancelled" in online("finetune", "sweep", "cancel", "endless").output
    missing = online("finetune", "sweep", "show", "nobody")
    assert missing.exit_code == 2
    assert "There are: endless" in missing.stderr


def test_a_refused_sweep_leaves_no_uploaded_file(online: Sage, requests: Requests, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n')
    words = ("--task", "qa", "--data", str(rows), "--model", "nowhere/nothing", "--grid", "lora.r=4")
    ran = online("finetune", "sweep", *words)
    assert ran.exit_code == 2
    assert "nowhere/nothing" in ran.stderr
    assert [entry["method"] for entry in requests("/v1/files/file-1")] == ["DELETE"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "needs a grid"),
        (["--grid", "learning_rate"], "KEY=V1,V2"),
        (["--grid", "lora.r=4", "--grid", "lora.r=8"], "given twice"),
        (["--grid", "learning_rat=1"], "Did you mean 'learning_rate'"),
        (["--grid", "lora.r=4,0"], "--grid lora.r: 0: Input should be greater than 0"),
        (["--grid", "max_steps=1,2,3", "--max-jobs", "2"], "more than --max-jobs, 2"),
        (["--grid", "seed=1,2"], "set it for all of them with --set"),
        (["--grid", "model_name=a,b"], "--grid model_name is the same for all jobs: use --model."),
        (["--grid", "max_steps=1,2", "--set", "max_steps=3"], "max_steps is in --set and in --grid"),
        (["--grid", "lora.r=1,2", "--set", "lora.r=3"], "lora.r is in --set and in --grid"),
        (["--grid", "lora.r=1,2", "--name", "n" * 64], "--name: its jobs are called"),
        (
            ["--grid", "lora.target_modules=q_proj,v_proj"],
            """--grid 'lora.target_modules=["q_proj","v_proj"],["q_proj"]'""",
        ),
        (["--grid", "sample_prompts=hello"], "each value is a list, written as JSON"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_asked(sage: Sage, words: list[str], told: str) -> None:
    ran = sage("finetune", "sweep", "--task", "code", *words)
    assert ran.exit_code == 2
    assert told in ran.stderr


def test_a_runs_own_file_gives_way_to_the_grid(online: Sage, requests: Requests, tmp_path: Path) -> None:
    config = PresetConfigs.cpu().model_copy(update={"output_dir": "finetune_output/rec", "max_steps": 9})
    path = tmp_path / "training_config.json"
    path.write_text(config.model_dump_json())
    words = (
        "--task",
        "code",
        "--config",
        str(path),
        "--grid",
        "num_train_epochs=1,2",
        "--grid",
        "lora.r=4,8",
    )
    ran = online("finetune", "sweep", *words, "--no-watch")
    assert ran.exit_code == 0, ran.output
    sent = requests("sweep body")[0]["body"]["sage"]
    assert (sent["name"], sent["preset"], sent["config"]["save_steps"]) == ("rec", "cpu", 50)
    assert not {"num_train_epochs", "max_steps", "output_dir", "data_path"} & set(sent["config"])
    assert sent["config"]["lora"].keys() == LoRAConfig.model_fields.keys() - {"r"}


def test_grids_take_numbers_words_and_lists() -> None:
    assert parse_grid(["optim=adamw_torch,paged_adamw_8bit", "load_in_8bit=true,false"]) == {
        "optim": ["adamw_torch", "paged_adamw_8bit"],
        "load_in_8bit": [True, False],
    }
    lists = parse_grid(['lora.target_modules=["q_proj"],["q_proj","v_proj"]'])
    assert lists == {"lora.target_modules": [["q_proj"], ["q_proj", "v_proj"]]}


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_long_error_hides_no_column_of_a_sweep(width: int) -> None:
    error = JobError(code="training_failed", message="The loss became NaN at step 4. " * 4)
    child = SweepChild(job_id="j", name="code-s1", point={"lora.r": 4}, status=JobStatus.FAILED, error=error)
    sweep = Sweep(
        id="sweep-1",
        created_at=0,
        status=SweepStatus.RUNNING,
        name="code",
        task="code",
        model="m",
        grid={"lora.r": [4]},
        children=[child],
    )
    console = Console(file=io.StringIO(), force_terminal=True, no_color=True, width=width)
    console.print(table_of(sweep, console.width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert all(text in lines[1] for text in ("code-s1", "4", "failed", "The lo"))


def test_the_live_table_shows_a_job_on_its_way() -> None:
    child = SweepChild(job_id="j", name="code-s1", point={"lora.r": 4}, status=JobStatus.RUNNING)
    sweep = Sweep(
        id="sweep-1",
        created_at=0,
        status=SweepStatus.RUNNING,
        name="code",
        task="code",
        model="m",
        grid={"lora.r": [4]},
        children=[child.model_copy(update={"step": 3, "total_steps": 40, "loss": 2.25})],
    )
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    console.print(table_of(sweep, console.width))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(text in printed for text in ("JOB", "lora.r", "running", "3/40", "2.250"))
