"""The embedded stack on real weights, as a person meets it: `sage finetune quickstart` with nothing running.

One home and one stack for the whole file, in the order of the tests; the sizes are small, the path is whole.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e import openai_sdk

from sage_cli import locate
from sage_cli.stack.processes import STACK_MARK

pytestmark = pytest.mark.weights

# Generous: the machine may be busy, and the base model is fetched and converted once.
COMMAND_TIMEOUT_S = 900.0
SHORT_TIMEOUT_S = 180.0
SIZES = [
    "max_steps=6",
    "max_eval_rows=8",
    "per_device_train_batch_size=4",
    "max_length=256",
    "learning_rate=0.001",
]
FUNCTION = "def add(a, b):\n    return a + b\n"


@dataclass(frozen=True)
class Machine:
    """A home of its own, ports of its own, and nothing running."""

    environment: dict[str, str]
    home: Path

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self.environment['SAGE_GATEWAY_PORT']}"

    def sage(
        self, *words: str, timeout_s: float = SHORT_TIMEOUT_S, stdin: str = "", **extra: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sage_cli.main", *words],
            env=self.environment | extra,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def processes(self) -> list[str]:
        """Every living process that carries this home in its environment, by command."""
        wanted = f"SAGE_HOME={self.home}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            try:
                given = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
            if wanted in given and command:
                found.append(command)
        return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    home = tmp_path_factory.mktemp("embedded") / "home"
    sockets = [socket.socket() for _ in locate.DEFAULT_PORTS]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = {part: str(one.getsockname()[1]) for part, one in zip(locate.DEFAULT_PORTS, sockets, strict=True)}
    for one in sockets:
        one.close()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SAGE_")}
    clean.pop(STACK_MARK, None)
    environment = clean | {
        "SAGE_HOME": str(home),
        "SAGE_ENGINE": "transformers",
        "NO_COLOR": "1",
        # A `down` without a record looks for containers: never for those of somebody else.
        "COMPOSE_PROJECT_NAME": f"sage-test-{os.getpid()}",
        **{locate.PORT_VARIABLES[part]: port for part, port in ports.items()},
    }
    machine = Machine(environment, home)
    yield machine
    machine.sage("down")


def ok(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode == 0, f"rc {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def quickstart(machine: Machine, *words: str) -> str:
    sizes = [word for size in SIZES for word in ("--set", size)]
    return ok(machine.sage("finetune", "quickstart", "code", *sizes, *words, timeout_s=COMMAND_TIMEOUT_S))


def newest_job(machine: Machine) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = json.loads(ok(machine.sage("finetune", "list", "--json")))
    return jobs[0]


def answers(screen: str) -> tuple[str, str]:
    """What the base said and what the tuned model said, from the quickstart's screen."""
    found = re.search(r"\(before\)[ ─-]*\n(.*?)\n\S+ \(yours\)[ ─-]*\n(.*?)\n\nGo on:", screen, re.DOTALL)
    assert found, screen
    return found.group(1).strip(), found.group(2).strip()


def test_a_wrong_command_starts_nothing(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text(FUNCTION)
    for words, told in (
        (["--preset", "rtx_9000"], "There is no preset"),
        (["--data", str(tmp_path / "empty")], "no source code"),
        (["--data", str(tmp_path / "code")], "no function with a body"),
        (["--model", str(tmp_path / "nothing")], "no such folder"),
    ):
        ran = machine.sage("finetune", "quickstart", "code", *words)
        assert ran.returncode == 2, ran.stderr
        assert told in ran.stderr
        assert "Traceback" not in ran.stderr
    assert not machine.home.exists()


def test_a_port_in_use_is_named_and_nothing_is_left(machine: Machine) -> None:
    port = int(machine.environment["SAGE_GATEWAY_PORT"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        ran = machine.sage("finetune", "quickstart", "code")
    assert ran.returncode == 2
    assert f"Port {port} for gateway is in use" in ran.stderr
    assert f"pid {os.getpid()}" in ran.stderr
    assert "SAGE_GATEWAY_PORT=" in ran.stderr
    assert machine.processes() == []


def test_quickstart_trains_a_model_that_is_better_on_unseen_code(machine: Machine) -> None:
    screen = quickstart(machine)
    for text in ("Preparing data", "step 6/6", "tok/s", "held-out loss", "base:smollm2-135m (before)"):
        assert text in screen

    job = newest_job(machine)
    metrics = job["sage"]["metrics"]
    assert job["fine_tuned_model"] == "code@1"
    assert metrics["eval_loss"] < metrics["base_eval_loss"]

    folder = machine.home / "finetune_output" / "code"
    assert str(folder) in screen
    assert (folder / "lora_weights" / "adapter_config.json").is_file()
    assert (folder / "lora_weights" / "adapter_model.safetensors").stat().st_size > 0
    assert (folder / "versions" / "1" / "lora_weights" / "adapter_model.safetensors").is_file()
    for name in ("checkpoints", "logs"):
        assert (folder / name).is_dir()
    for name in ("training_config.json", "finetune_meta.json"):
        assert json.loads((folder / name).read_text())

    base, tuned = answers(screen)
    assert tuned
    assert base != tuned


def test_the_tuned_model_s_answer_is_streamed_and_is_not_the_base_s(machine: Machine) -> None:
    prompt = "Complete this Python function. Answer with its body."

    def pieces(model: str) -> list[str]:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 32,
            "stream": True,
        }
        url = f"{machine.gateway_url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=SHORT_TIMEOUT_S) as response:
            assert response.status_code == 200, response.read()
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        return [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]

    tuned, base = pieces("code"), pieces("base:smollm2-135m")
    assert len(tuned) > 3
    assert tuned != base
    # The immutable name and the alias are one model.
    assert pieces("code@1") == tuned
    one_shot = ok(
        machine.sage("finetune", "chat", "code", "-m", prompt, "--temperature", "0", "--max-tokens", "32")
    )
    assert one_shot.strip() == "".join(tuned).strip()


def test_a_wrong_model_name_lists_the_right_ones(machine: Machine) -> None:
    ran = machine.sage("chat", "--backend", "finetune", "--finetune-model", "cod", "-m", "hello")
    assert ran.returncode == 2
    assert "code" in ran.stderr
    assert "code@1" in ran.stderr


def test_the_mock_backend_cites_the_project_s_own_documentation(machine: Machine) -> None:
    ran = machine.sage(
        "chat", "--index", "docs-public", "-m", "Which presets exist?", SAGE_CHAT_BACKEND="mock"
    )
    assert "[1]" in ok(ran)
    assert ".md" in ran.stdout


def test_status_shows_every_part_and_up_again_changes_nothing(machine: Machine) -> None:
    before = sorted(machine.processes())
    screen = ok(machine.sage("status"))
    for part in ("orchestrator", "trainer", "merger", "inference", "gateway"):
        assert re.search(rf"^{part}\s+up", screen, re.MULTILINE), screen
    ok(machine.sage("up", "--embedded"))
    assert sorted(machine.processes()) == before
    assert machine.sage("up", "--docker").returncode == 2


def test_a_second_run_reuses_everything_and_numbers_a_new_version(machine: Machine, tmp_path: Path) -> None:
    functions = [
        f'def scale_{n}(values):\n    """Return the values multiplied by {n}, as a list."""\n'
        f"    scaled = []\n    for value in values:\n        scaled.append(value * {n})\n    return scaled\n"
        for n in range(24)
    ]
    for n in range(0, 24, 4):
        (tmp_path / f"part_{n}.py").write_text("\n\n".join(functions[n : n + 4]))
    screen = quickstart(machine, "--data", str(tmp_path), "--set", "max_steps=2")
    assert "Converting" not in screen
    job = newest_job(machine)
    assert job["fine_tuned_model"] == "code@2"
    assert job["training_file"].startswith("file-")
    models = ok(machine.sage("models"))
    assert {"code", "code@1", "code@2"} <= {line.split()[0] for line in models.splitlines()}
    assert (machine.home / "finetune_output" / "code" / "versions" / "2" / "lora_weights").is_dir()


def test_merge_writes_a_whole_model(machine: Machine) -> None:
    screen = ok(machine.sage("finetune", "merge", "code", timeout_s=COMMAND_TIMEOUT_S))
    merged = machine.home / "finetune_output" / "code" / "merged_model"
    assert str(merged) in screen
    assert merged.samefile(merged.parent / "versions" / "2" / "merged_model")
    assert (merged / "config.json").is_file()
    assert list(merged.glob("*.safetensors"))


def test_the_official_sdk_does_the_same(machine: Machine) -> None:
    seen = openai_sdk.run(
        f"{machine.gateway_url}/v1", "smollm2-135m", suffix="sdk", deadline_s=COMMAND_TIMEOUT_S, rows=24
    )
    assert seen.job.fine_tuned_model == "sdk@1"
    assert seen.event_messages
    assert seen.step_metrics.startswith("step,train_loss,")
    accuracies = seen.train_accuracies()
    assert accuracies and all(0 <= share <= 1 for share in accuracies)
    assert seen.chunks > 1
    assert seen.tuned_answer != seen.base_answer
    assert seen.responded == seen.tuned_answer
    assert "5" in seen.continued
    # The newest checkpoint is that of the last step.
    assert next(iter(seen.checkpoint_answers.values())) == seen.tuned_answer


def test_down_during_a_job_leaves_no_process_and_the_job_goes_on_after_up(machine: Machine) -> None:
    ok(
        machine.sage(
            "finetune", "start", "--task", "code", "--name", "later", "--no-watch", "--set", "max_steps=500"
        )
    )
    deadline = time.monotonic() + SHORT_TIMEOUT_S
    while newest_job(machine)["status"] != "running":
        assert time.monotonic() < deadline, "the job does not start"
    ok(machine.sage("down"))
    assert machine.processes() == []
    assert not (machine.home / "run" / "stack.json").exists()

    ok(machine.sage("up", "--embedded"))
    assert newest_job(machine)["status"] in ("queued", "running")
    ok(machine.sage("finetune", "cancel", "later"))
    ok(machine.sage("down"))
    assert machine.processes() == []
