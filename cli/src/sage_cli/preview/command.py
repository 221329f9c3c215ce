"""sage finetune preview: asks the engine, and shows what it answers."""

from __future__ import annotations

from sage.tools.finetune.preview_types import Preview, PreviewRequest
from sage_cli import engine, failures, locate, render
from sage_cli.jobs.wish import JobWish
from sage_cli.preview.view import show
from sage_contracts.config import Task
from sage_contracts.errors import InvalidRequestError

PROGRAM = "sage.tools.finetune.preview"


def preview_command(
    wish: JobWish, *, rows: int, max_length: int | None, with_tokens: bool, as_json: bool
) -> None:
    wish, settings = wish.with_settings(is_trained=False)
    task, method = Task(wish.task or Task.CUSTOM), settings.get("method")
    if wish.data is None and task == Task.CUSTOM and method in (None, "sft"):
        raise InvalidRequestError(
            "Give a FILE to preview, or with --task code, qa, chat or instruction the data such a task has; "
            "--method dpo, orpo and kto bring a sample set too."
        )
    request = PreviewRequest(
        home=locate.home_root(),
        data=wish.data,
        task=task,
        method=method,
        model=wish.model,
        rows=rows,
        max_length=max_length or settings.get("max_length"),
    )
    answer = engine.ask(PROGRAM, [request.model_dump_json()], render.error_console(), doing="Rendering")
    found = Preview.model_validate_json(answer)
    if as_json:
        failures.print_json(found.model_dump(mode="json"))
    else:
        show(found, render.output(), with_tokens=with_tokens)
