"""The examples of docs/extending.md do what the page says, as scripts and as an installed package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fakes.worker_rig import rig

from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidRequestError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs/extending.md", ROOT / "docs/zh-CN/extending.md"]
TIMEOUT_S = 60


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUTF8": "1", "SAGE_HOME": str(folder / "home")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_examples_print_what_the_page_says(tmp_path: Path, page: Path) -> None:
    said = re.findall(r"(?:It prints|输出) `([^`]+)`", page.read_text(encoding="utf-8"))
    examples = blocks(page, "python")
    assert len(examples) == len(said) == 3
    for number, (example, output) in enumerate(zip(examples, said, strict=True)):
        lines = [line for line in example.splitlines() if line.strip()]
        assert len(lines) <= 20, "an example is twenty lines at most"
        script = tmp_path / f"example{number}.py"
        script.write_text(example, encoding="utf-8")
        ran = run(tmp_path, script.name)
        assert ran.stdout.strip() == output, ran.stderr


def install_help_desk(folder: Path) -> None:
    """The page's examples as an installed package."""
    package = folder / "help_desk"
    package.mkdir()
    (package / "__init__.py").touch()
    ends = {"rows": "\nPath(", "tasks": "\nprint(", "runs": "\nprint("}
    # Without what only shows its effect, and without the decorator, whose work the entry point does.
    for (name, end), example in zip(ends.items(), blocks(PAGES[0], "python"), strict=True):
        text = re.sub(r"^@\w+\.register.*\n", "", example.split(end)[0], flags=re.M)
        (package / f"{name}.py").write_text(text)
    installed = folder / "help_desk-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: help-desk\nVersion: 1\n")
    (toml,) = blocks(PAGES[0], "toml")
    groups = re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", toml).replace('"', "")
    (installed / "entry_points.txt").write_text(groups)


def test_a_package_with_entry_points_is_found_by_the_command_line(tmp_path: Path) -> None:
    install_help_desk(tmp_path)
    ticket = {"ticket": {"subject": "a", "body": "b"}, "reply": "c"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(ticket) + "\n" + json.dumps(ticket | {"reply": ""}))

    ran = run(tmp_path, "-m", "sage_cli.main", "finetune", "validate", "rows.jsonl", "--json")
    told = json.loads(ran.stdout)
    assert (ran.returncode, told["format"]) == (2, "ticket")
    assert told["bad"] == [{"row": 2, "field": "reply", "reason": "is missing: nobody has answered yet"}]
    program = (
        "from sage_contracts.config import TrainingConfig\n"
        "from sage.tools.finetune.task_data import prepare\n"
        "print(prepare(TrainingConfig(task='sums')).description)"
    )
    prepared = run(tmp_path, "-c", program)
    assert prepared.stdout.strip() == "sums up to 38", prepared.stderr


@pytest.mark.parametrize("trainer", ["owned", "onwed"])
def test_a_job_takes_the_packages_trainer_and_callbacks(
    tmp_path: Path, tiny_base: Path, trainer: str
) -> None:
    install_help_desk(tmp_path)
    settings = {
        "model_name": str(tiny_base), "trainer": trainer, "max_steps": 1, "validation_fraction": 0.5,
        "gradient_accumulation_steps": 1, "report_to": [],
    }  # fmt: skip
    with rig("folders", tmp_path) as made:
        (made.home / "rows.jsonl").write_text(
            "\n".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) for n in range(8))
        )
        config = TrainingConfig.model_validate({"task": "custom", **settings})
        job = made.records.add_job("job-1", "sums", config=config, training_path="rows.jsonl")
        made.env["SAGE_TRAIN_CHILD_COMMAND"] = f'["{sys.executable}", "-m", "sage_trainer.child"]'
        made.start_worker(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        made.ring("job-1")
        (finish,) = made.records.wait_for(lambda: job.finishes, TIMEOUT_S)
        log = (made.home / "finetune_output/sums/logs/train.log").read_text()
    if trainer == "owned":
        assert finish.meta["owner"] == "help desk", finish
        assert "pager: the tuned model has loss" in log
    else:
        assert (finish.error_code, finish.error_param) == (InvalidRequestError.code, "trainer")
        assert finish.error_message == (
            "no trainer named 'onwed'; there are: lora, owned (where this job runs)"
        )
