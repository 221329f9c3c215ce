"""The stack in containers, as its users meet it: train real weights, chat with real vLLM, read the curves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from tests.e2e import openai_sdk
from tests.e2e.compose_stack import ComposeStack
from tests.fakes.asgi_server import serving, unused_url

from sage_gateway.main import build_app
from sage_gateway.settings import GatewaySettings

pytestmark = pytest.mark.docker

BASE = "smollm2-135m"
SMALL_RUN = ["--set", "max_steps=12", "--set", "max_eval_rows=16"]


@pytest.fixture(scope="module")
def sdk_run(compose_stack: ComposeStack) -> openai_sdk.SdkRun:
    """The official SDK's whole way, once for all tests that look at what came of it."""
    return openai_sdk.run(f"{compose_stack.gateway_url}/v1", BASE, suffix="sdk")


def sage(stack: ComposeStack, home: Path, *arguments: str, timeout_s: float = 900) -> str:
    """Run the CLI on the host against the containers; its output. Raises: CalledProcessError."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_")}
    environment |= {
        "SAGE_HOME": str(home),
        "SAGE_GATEWAY_URL": stack.gateway_url,
        "SAGE_ORCHESTRATOR_URL": stack.orchestrator_url,
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [Path(sys.executable).parent / "sage", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, (
        f"sage {' '.join(arguments)} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def quickstart_output(
    compose_stack: ComposeStack, sdk_run: openai_sdk.SdkRun, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """`sage finetune quickstart code` on the host, trained in the trainer container."""
    home = tmp_path_factory.mktemp("home")
    return sage(compose_stack, home, "finetune", "quickstart", "code", "--model", BASE, *SMALL_RUN)


def test_the_sdk_trains_and_the_held_out_loss_falls(sdk_run: openai_sdk.SdkRun) -> None:
    job = sdk_run.job
    assert job.status == "succeeded"
    assert job.fine_tuned_model == "sdk@1"
    assert job.trained_tokens
    metrics = job.model_extra["sage"]["metrics"] if job.model_extra else {}
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    assert sdk_run.event_messages
    slower = [said for said in sdk_run.event_messages if "kernels in C" in said]
    assert not slower, "the image brings what it has no compiler for"
    assert sdk_run.step_metrics.startswith("step,train_loss,")
    accuracies = sdk_run.train_accuracies()
    assert accuracies and all(0 <= share <= 1 for share in accuracies)


def test_the_answer_comes_streamed_from_the_adapter(sdk_run: openai_sdk.SdkRun) -> None:
    assert sdk_run.chunks > 1
    assert sdk_run.tuned_answer != sdk_run.base_answer
    assert "SAGE says" in sdk_run.tuned_answer


def test_the_checkpoint_of_the_last_step_answers_as_its_result_does(sdk_run: openai_sdk.SdkRun) -> None:
    assert next(iter(sdk_run.checkpoint_answers.values())) == sdk_run.tuned_answer


def test_the_responses_api_answers_the_same(sdk_run: openai_sdk.SdkRun) -> None:
    assert sdk_run.responded == sdk_run.tuned_answer


def test_a_bare_prompt_is_gone_on_from(sdk_run: openai_sdk.SdkRun) -> None:
    assert "5" in sdk_run.continued


def test_vllm_serves_it(compose_stack: ComposeStack, sdk_run: openai_sdk.SdkRun) -> None:
    status = httpx.get(f"{compose_stack.gateway_url}/v1/sage/engines", timeout=10).json()
    assert [engine["kind"] for engine in status["engines"]] == ["vllm"]
    assert sdk_run.job.fine_tuned_model in status["engines"][0]["adapters"]


def test_the_vllm_backend_talks_to_our_own_vllm(
    compose_stack: ComposeStack, sdk_run: openai_sdk.SdkRun, tmp_path: Path
) -> None:
    elsewhere = GatewaySettings(
        home_dir=tmp_path,
        vllm_base_url=f"{compose_stack.url('inference')}/v1",
        orchestrator_url=unused_url(),
        inference_url=unused_url(),
    )
    with (
        serving(build_app(elsewhere)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client,
    ):
        answer, chunks = openai_sdk.answer(
            client, f"vllm/{sdk_run.job.fine_tuned_model}", "What is 4 plus 7?"
        )
    assert answer == sdk_run.tuned_answer
    assert chunks > 1


def test_quickstart_shows_both_losses_and_answers(quickstart_output: str) -> None:
    assert "code@1" in quickstart_output
    assert "held-out" in quickstart_output.lower()


def test_both_chat_commands_of_the_readme_answer(
    compose_stack: ComposeStack, quickstart_output: str, tmp_path: Path
) -> None:
    question = ["-m", "Write a function that adds two numbers.", "--max-tokens", "24"]
    short = sage(compose_stack, tmp_path, "finetune", "chat", "code", *question)
    unified = sage(
        compose_stack, tmp_path, "chat", "--backend", "finetune", "--finetune-model", "code", *question
    )
    assert short.strip()
    assert unified.strip()


def test_mock_answers_with_cited_passages(compose_stack: ComposeStack, tmp_path: Path) -> None:
    answer = sage(
        compose_stack,
        tmp_path,
        "chat",
        "--backend",
        "mock",
        "--index",
        "docs-public",
        "-m",
        "Which presets exist?",
    )
    assert "[1]" in answer


def test_merging_writes_a_model_that_is_offered(
    compose_stack: ComposeStack, quickstart_output: str, tmp_path: Path
) -> None:
    sage(compose_stack, tmp_path, "finetune", "merge", "code")
    listed = compose_stack.execute("merger", "ls", "/sage/finetune_output/code/merged_model")
    assert "model.safetensors" in listed
    assert "config.json" in listed


def test_tensorboard_shows_the_loss(compose_stack: ComposeStack, quickstart_output: str) -> None:
    tags = httpx.get(
        f"{compose_stack.url('tensorboard')}/data/plugin/scalars/tags", timeout=60, follow_redirects=True
    ).json()
    shown = {tag for run in tags.values() for tag in run}
    assert any("loss" in tag for tag in shown), tags
