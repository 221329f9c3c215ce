"""One question to the base model and to the tuned one, answers streamed, so that the difference is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from sage_cli.chat.stream import Printer, stream_answer
from sage_cli.client import Client
from sage_contracts.config import Task
from sage_contracts.errors import InvalidDataError
from sage_contracts.jobs import FineTuningJob

_MAX_TOKENS = 120
_MAX_PROMPT_CHARS = 600

# In the manner of the training data, and not part of it.
_QUESTIONS = {
    Task.CODE: "Complete this Python function. Answer with its body.\n\n```python\n"
    'def count_words(text):\n    """Return a dictionary from each word of text to its count."""\n```',
    Task.QA: "How do I train on my own data?",
    Task.CHAT: "Hello! What can I do with SAGE Finetune?",
    Task.INSTRUCTION: "Explain in two sentences what a LoRA adapter is.",
    Task.CUSTOM: "Hello! What can you do?",
}


def compare(console: Console, client: Client, job: FineTuningJob, data: Path | None) -> None:
    """Ask both and stream both answers, the tuned model last. Raises: SageError."""
    messages = probe_messages(job.sage.task, data)
    console.print()
    console.print(Text("The same question to both", style="bold"))
    for text_line in str(messages[-1]["content"]).splitlines():
        console.print(Text(f"  {text_line}", style="dim"), soft_wrap=True)
    base, tuned = f"base:{job.sage.config.model_name}", job.fine_tuned_model or job.sage.name
    for title, model, style in ((f"{base} (before)", base, "yellow"), (f"{tuned} (yours)", tuned, "green")):
        console.print(Rule(Text(title, style=f"bold {style}"), style=style, align="left"))
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
        stream_answer(client, body, Printer(console))


def probe_messages(task: Task, data: Path | None) -> list[dict[str, Any]]:
    """The task's own question, or for a user's file of rows the prompt of one of them."""
    if data is not None and data.is_file() and (messages := _from_rows(data)):
        return messages
    return [{"role": "user", "content": _QUESTIONS[task]}]


def _from_rows(data: Path) -> list[dict[str, Any]]:
    from sage.tools.finetune.data import load_conversations

    try:
        messages = load_conversations(data)[-1].messages
    except (InvalidDataError, IndexError):
        return []
    prompt: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant":
            break
        prompt.append({"role": message["role"], "content": message["content"][:_MAX_PROMPT_CHARS]})
    return prompt
