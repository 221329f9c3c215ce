"""The official openai SDK against a running stack: nothing of ours is imported, only base_url differs.

By hand: python tests/e2e/openai_sdk.py --base-url http://127.0.0.1:8080/v1 --model smollm2-135m
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import time
from dataclasses import dataclass

import openai
from openai.types.fine_tuning import FineTuningJob

POLL_S = 0.5


@dataclass
class SdkRun:
    """What the script saw, for assertions and for eyes."""

    job: FineTuningJob
    event_messages: list[str]
    step_metrics: str
    """The result file: one row a step, as CSV."""
    tuned_answer: str
    base_answer: str
    checkpoint_answers: dict[str, str]
    """By the checkpoint's name, the newest first."""
    continued: str
    """What came after a bare prompt."""
    responded: str
    """The tuned answer once more, by the Responses API."""
    chunks: int

    def train_accuracies(self) -> list[float]:
        """Of all rows that have a training loss."""
        rows = csv.DictReader(io.StringIO(self.step_metrics))
        return [float(row["train_accuracy"]) for row in rows if row["train_loss"]]


def training_rows(count: int) -> bytes:
    """`count` distinct OpenAI-format rows with a manner that a small model picks up in a few steps."""
    rows = []
    for number in range(count):
        question = f"What is {number} plus {number + 3}?"
        answer = f"SAGE says: the sum of {number} and {number + 3} is {2 * number + 3}. Over and out."
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        )
    return "\n".join(json.dumps(row) for row in rows).encode()


def answer(client: openai.OpenAI, model: str, prompt: str, *, max_tokens: int = 32) -> tuple[str, int]:
    """A greedy streamed answer and the number of chunks it came in."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
    )
    pieces = [
        chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content
    ]
    return "".join(pieces), len(pieces)


def run(base_url: str, model: str, *, suffix: str = "sdk", deadline_s: float = 900, rows: int = 64) -> SdkRun:
    """Upload, train, follow and chat. Raises: TimeoutError, RuntimeError (with the job's error)."""
    client = openai.OpenAI(
        base_url=base_url, api_key=os.environ.get("SAGE_API_KEY", "unused"), timeout=300, max_retries=2
    )
    uploaded = client.files.create(file=("sums.jsonl", io.BytesIO(training_rows(rows))), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=uploaded.id,
        suffix=suffix,
        hyperparameters={"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 5},
    )
    deadline = time.monotonic() + deadline_s
    while job.status not in ("succeeded", "failed", "cancelled"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job.id} is still {job.status} after {deadline_s:.0f} s")
        time.sleep(POLL_S)
        job = client.fine_tuning.jobs.retrieve(job.id)
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    if job.status != "succeeded" or job.fine_tuned_model is None:
        raise RuntimeError(f"job {job.id} {job.status}: {job.error}")
    step_metrics = client.files.content(job.result_files[0]).text
    probe = "What is 4 plus 7?"
    tuned, chunks = answer(client, job.fine_tuned_model, probe)
    base, _ = answer(client, f"base:{model}", probe)
    bare = client.completions.create(
        model=job.fine_tuned_model, prompt="Count: 1, 2, 3, 4,", max_tokens=8, temperature=0
    )
    response = client.responses.create(
        model=job.fine_tuned_model, input=probe, max_output_tokens=32, temperature=0
    )
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    names = [checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints]
    return SdkRun(
        job=job,
        event_messages=messages,
        step_metrics=step_metrics,
        tuned_answer=tuned,
        base_answer=base,
        checkpoint_answers={name: answer(client, name, probe)[0] for name in names},
        continued=bare.choices[0].text,
        responded=response.output_text,
        chunks=chunks,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    seen = run(arguments.base_url, arguments.model)
    print("\n".join(reversed(seen.event_messages)))
    print(f"\n{seen.step_metrics}")
    print(f"{seen.job.fine_tuned_model}: {seen.tuned_answer!r}\nbase: {seen.base_answer!r}")
    print(f"bare prompt: {seen.continued!r}\nby responses: {seen.responded!r}")
    for name, said in seen.checkpoint_answers.items():
        print(f"{name}: {said!r}")


if __name__ == "__main__":
    main()
