"""What people type, against a gateway that answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune.quickstart import quickstart_overrides
from sage_cli.client import Client
from sage_contracts.config import PresetConfigs, PresetName, Task
from sage_contracts.jobs import CreateJobRequest
from sage_orchestrator.jobs.resolve import resolve_config

Sage = Callable[..., Any]
Requests = Callable[[str], list[dict[str, Any]]]


def test_quickstart_shows_phases_figures_losses_and_both_answers(online: Sage, requests: Requests) -> None:
    ran = online("finetune", "quickstart", "code", "--set", "save_steps=2")
    sent = requests("job body")[0]["body"]["sage"]["config"]
    # The sizes of a quick start on a CPU; what was said wins.
    assert sent == quickstart_overrides("code", "cpu", has_gpu=False) | {"save_steps": 2}
    assert ran.exit_code == 0, ran.output
    for text in (
        "base model  smollm2-135m",
        "Preparing data",
        "step 2/2  loss 2.300  802 tok/s",
        "base 2.391 → tuned 1.898 (-20.6 %)",
        "perplexity      base 10.92 → tuned 6.673",
        "token accuracy  base 52.4% → tuned 58.1%",
        "finetune_output/code/",
        "base:smollm2-135m says: you asked",
        "code@1 says: you asked",
        "sage chat --backend finetune --finetune-model code",
    ):
        assert text in ran.output

    models = online("models")
    assert [line.split()[0] for line in models.output.splitlines()] == ["MODEL", "code", "code@1", "mock"]
    jobs = json.loads(online("finetune", "list", "--json").stdout)
    assert jobs[0]["fine_tuned_model"] == "code@1"
    assert "Registered code@1" in online("finetune", "logs", "code").output
    assert "Step 2/2" in online("finetune", "logs", "code", "--metrics").output
    shown = online("finetune", "show", "code@1").output
    assert "held-out loss   base 2.391" in shown
    assert "token accuracy  base 52.4% → tuned 58.1%" in shown
    assert "data            rows that come with the task" in shown
    assert "checkpoints     of step 2; chat with code@1:ckpt-step-2" in shown

    merged = online("finetune", "merge", "code")
    assert merged.exit_code == 0
    assert "writing weights" in merged.output
    assert "finetune_output/code/merged_model" in merged.output
    assert "2 of 3 questions" in merged.output
    assert online("finetune", "merge", "code", "--dtype", "fp16").exit_code == 2


def test_a_quickstart_is_short_on_a_cpu_whatever_the_preset(online: Sage, requests: Requests) -> None:
    ran = online("finetune", "quickstart", "code", "--preset", "minimal")
    assert ran.exit_code == 0, ran.output
    sent = requests("job body")[0]["body"]["sage"]
    assert sent["preset"] == "minimal"
    assert sent["config"] == {"max_steps": 32, "max_eval_rows": 32, "save_steps": 16}


def test_an_export_asks_for_its_format_and_says_what_ollama_wants(
    online: Sage, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online("finetune", "quickstart", "code")
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "my home"))
    folder = tmp_path / "my home/finetune_output/code/versions/1/exports/ollama"
    folder.mkdir(parents=True)
    (folder / "Modelfile").write_text("FROM ./code-1-q8_0.gguf\n")
    ran = online("finetune", "export", "code", "--format", "ollama")
    assert ran.exit_code == 0, ran.output
    assert f"ollama create code -f '{folder}/Modelfile'" in " ".join(ran.output.split())
    assert requests("merge body")[-1]["body"]["format"] == "ollama"


@pytest.mark.parametrize("words", [(), ("--allow-public",)])
def test_a_public_repository_has_to_be_meant(
    online: Sage, requests: Requests, words: tuple[str, ...]
) -> None:
    online("finetune", "quickstart", "code")
    ran = online("finetune", "export", "code", "--format", "hub", "--repo", "me/code", *words)
    assert ran.exit_code == 0, ran.output
    assert requests("merge body")[-1]["body"]["allow_public"] is bool(words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--format", "hub"), "--repo owner/name"),
        (("--format", "zip", "--repo", "me/code"), "owner/name"),
        (("--content", "adapter"), "zip and hub"),
        (("--format", "zip", "--allow-public"), "allow_public goes with the format hub"),
    ],
)
def test_an_export_that_cannot_be_meant_is_refused(online: Sage, words: tuple[str, ...], told: str) -> None:
    ran = online("finetune", "export", "code", *words)
    assert ran.exit_code == 2
    assert told in ran.stderr


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [("fails", 3, "The loss became NaN at step 4."), ("dies", 3, "trainer died"), ("no-hub", 2, "No hub")],
)
def test_a_failed_job_ends_with_its_reason(online: Sage, name: str, code: int, told: str) -> None:
    online("finetune", "start", "--task", "code", "--name", name, "--no-watch")
    for _ in range(8):
        online("finetune", "show", "ftjob-0001")
    ran = online("finetune", "watch", name)
    assert ran.exit_code == code
    assert told in ran.stderr
    assert "sage finetune logs ftjob-" in ran.stderr
    assert "Traceback" not in ran.output


@pytest.mark.parametrize("option", [["--data"], []])
def test_start_sends_what_was_said_and_says_what_was_chosen(
    online: Sage, requests: Requests, tmp_path: Path, option: list[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n')
    ran = online(
        *(
            "finetune",
            "start",
            "--task",
            "qa",
            *option,
            str(rows),
            "--preset",
            "cpu",
            "--model",
            "smollm2-135m",
        ),
        *("--epochs", "2", "--name", "mine", "--set", "lora.r=4", "--no-watch"),
    )
    assert ran.exit_code == 0, ran.output
    assert "sage finetune watch ftjob-" in ran.output
    body = requests("job body")[0]["body"]
    assert body["model"] == "smollm2-135m"
    assert body["training_file"].startswith("file-")
    assert body["sage"] == {
        "name": "mine",
        "task": "qa",
        "preset": "cpu",
        "config": {"num_train_epochs": 2, "lora": {"r": 4}},
    }
    assert requests("upload") == [{"path": "upload", "filename": "rows.jsonl", "bytes": rows.stat().st_size}]
    shown = online("finetune", "show", "mine").output
    assert "data        rows.jsonl" in shown
    assert "adapters    LoRA r=4, alpha 16" in shown
    with Client.from_env() as client:
        client.act(client.jobs(1)[0].id, "cancel")
        client.delete_file(body["training_file"])
    assert f"{body['training_file']} (deleted since)" in online("finetune", "show", "mine").output


def test_start_takes_a_runs_own_file(online: Sage, requests: Requests, tmp_path: Path) -> None:
    rows, path = tmp_path / "rows.jsonl", tmp_path / "training_config.json"
    rows.write_text('{"question": "q", "answer": "a"}\n')
    config = PresetConfigs.cpu().model_copy(update={"output_dir": "finetune_output/old", "task": Task.QA})
    path.write_text(config.model_dump_json())
    words = ("--config", str(path), "--data", str(rows), "--name", "rec", "--no-watch")
    ran = online("finetune", "start", *words)
    assert ran.exit_code == 0, ran.output
    body = requests("job body")[0]["body"]
    assert body["model"] == config.model_name
    assert {key: body["sage"][key] for key in ("name", "task", "preset")} == {
        "name": "rec", "task": "qa", "preset": "cpu",
    }  # fmt: skip
    request = CreateJobRequest.model_validate(body)
    found = resolve_config(
        request, task=Task.QA, preset=PresetName.CPU, model=body["model"], output_dir="finetune_output/rec"
    )
    assert found == config.model_copy(update={"output_dir": "finetune_output/rec"})


def test_a_refused_job_leaves_no_uploaded_file(online: Sage, requests: Requests, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n')
    ran = online("finetune", "start", "--task", "qa", "--data", str(rows), "--model", "nowhere/nothing")
    assert ran.exit_code == 2
    assert "nowhere/nothing" in ran.stderr
    deleted = [entry for entry in requests("/v1/files/file-1") if entry["method"] == "DELETE"]
    assert len(deleted) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--preset", "rtx_9000"], "Choose one of: rtx_3060"),
        (["--model", "./not-here"], "no such folder"),
        (["--data", "not-here.json"], "There is no not-here.json"),
        (["--name", "../etc"], "cannot be a model's name"),
        (["--name", "我的模型"], "use up to 64 Latin letters (a-z, A-Z), digits"),
        (["--set", "max_step=3"], "Did you mean 'max_steps'"),
        (["--task", "custom"], "--data FILE"),
        (["not-here.json"], "There is no not-here.json"),
        (["rows.json", "--data", "more.json"], "rows.json and --data more.json"),
        (["qa"], "--task qa"),
        (["--task", "poetry"], "poetry"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_asked(sage: Sage, words: list[str], told: str) -> None:
    ran = sage("finetune", "start", *(["--task", "code"] if "--task" not in words else []), *words)
    assert ran.exit_code == 2
    assert told in ran.stderr
    assert len(ran.stderr.splitlines()) < 12


def test_jobs_can_be_paused_resumed_and_cancelled_by_name(online: Sage) -> None:
    online("finetune", "start", "--task", "code", "--name", "endless", "--no-watch")
    assert "is paused" in online("finetune", "pause", "endless").output
    assert "Paused. Go on with: sage finetune resume ftjob-" in online("finetune", "watch", "endless").output
    assert "is queued again" in online("finetune", "resume", "endless").output
    assert "is cancelled" in online("finetune", "cancel", "endless").output
    again = online("finetune", "cancel", "endless")
    assert again.exit_code == 2
    assert "cannot be told to cancel" in again.stderr
    assert online("finetune", "watch", "endless").exit_code == 3
    missing = online("finetune", "show", "nobody")
    assert missing.exit_code == 2
    assert "Names that have jobs: endless" in missing.stderr
    for words in (("logs", "ftjob-x"), ("sweep", "show", "sweep-x")):
        told = online("finetune", *words)
        assert (told.exit_code, "GET /" in told.stderr) == (2, False)
        assert f"{words[-1]!r}" in told.stderr


def test_status_shows_parts_engines_devices_and_jobs(online: Sage) -> None:
    online("finetune", "start", "--task", "code", "--no-watch")
    ran = online("status")
    assert ran.exit_code == 0
    for text in ("trainer", "smollm2-135m", "training code", "ftjob-0001"):
        assert text in ran.output
    assert set(json.loads(online("status", "--json").stdout)) == {
        "gateway_url",
        "parts",
        "engines",
        "devices",
        "jobs",
    }


@pytest.mark.parametrize(
    "words",
    [["models"], ["status"], ["finetune", "list"], ["chat", "-m", "x", "--backend", "mock"]],
    ids=" ".join,
)
def test_a_silent_gateway_ends_with_4_and_says_what_to_do(sage: Sage, words: list[str]) -> None:
    ran = sage(*words)
    assert ran.exit_code == 4
    assert "Nothing answers at http://127.0.0.1:9. Start the stack: `sage up`." in ran.stderr
    assert "SAGE_GATEWAY_URL points there: correct it, or unset it" in ran.stderr


def test_a_silent_gateway_that_no_variable_names_may_be_elsewhere(
    sage: Sage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAGE_GATEWAY_URL")
    monkeypatch.setenv("SAGE_GATEWAY_PORT", "9")
    assert "`sage up`. Elsewhere? Set SAGE_GATEWAY_URL." in sage("models").stderr


def test_debug_shows_the_error_itself(sage: Sage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_DEBUG", "1")
    assert type(sage("models").exception).__name__ == "ServiceUnavailableError"


def test_a_wrong_choice_is_told_with_the_right_ones(sage: Sage) -> None:
    ran = sage("chat", "--backend", "nonsense")
    assert ran.exit_code == 2
    assert "'nonsense' is not one of 'mock', 'openai', 'finetune', 'vllm', 'ollama'." in ran.stderr
    ran_of_group = sage("finetune", "start", "--method", "nonsense")
    assert "'nonsense' is not one of 'sft', 'dpo', 'orpo', 'kto'." in ran_of_group.stderr
    assert "Value error" not in ran.stderr + ran_of_group.stderr


def test_docker_and_embedded_exclude_each_other(sage: Sage) -> None:
    ran = sage("up", "--docker", "--embedded")
    assert ran.exit_code == 2
    assert "exclude each other" in ran.stderr


def test_a_home_that_cannot_be_used_is_named(
    sage: Sage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "file"))
    ran = sage("up", "--embedded")
    assert ran.exit_code == 2
    assert f"{tmp_path / 'file'} cannot be used" in ran.stderr


def test_a_home_in_which_nothing_can_be_stopped_is_named(
    sage: Sage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "run" / "stack.lock"
    lock.mkdir(parents=True)  # in place of a read-only folder, which stops no administrator
    monkeypatch.setenv("SAGE_HOME", str(tmp_path))
    monkeypatch.delenv("SAGE_RUN_DIR", raising=False)
    ran = sage("down")
    assert ran.exit_code == 2
    assert f"{lock} cannot be written: Is a directory." in ran.stderr
    assert "the user who started the stack" in ran.stderr


def test_doctor_names_each_check_and_what_to_do(sage: Sage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SAGE_BROKER_URL", "redis://127.0.0.1:9/0")
    ran = sage("doctor")
    assert ran.exit_code == 2
    for name in ("python", "parts", "disk", "memory", "gpu", "docker", "ports", "broker", "hub", "stack"):
        assert f" {name} " in ran.output
    assert "Start Redis there, or unset SAGE_BROKER_URL" in ran.output


def test_doctor_says_where_a_compiler_would_make_training_faster(
    sage: Sage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler is installed" in sage("doctor").output
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh")
    compiler.chmod(0o755)
    assert "no C compiler is installed" not in sage("doctor").output


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("", "engine: vLLM"),
        ("vllm", "engine: vLLM"),
        ("transformers", "engine: transformers (by SAGE_ENGINE; vLLM is installed)"),
        ("foo", "SAGE_ENGINE='foo' is no engine"),
    ],
)
def test_doctor_names_the_engine_that_the_stack_would_take(
    sage: Sage, monkeypatch: pytest.MonkeyPatch, asked: str, told: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SAGE_VLLM_COMMAND", "vllm")
    monkeypatch.setenv("SAGE_ENGINE", asked)
    assert told in sage("doctor").output
