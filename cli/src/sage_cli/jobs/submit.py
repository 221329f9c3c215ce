"""From what a person asked for to a job that is queued; refused jobs leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sage_cli import render
from sage_cli.client import Client
from sage_cli.jobs import data as job_data
from sage_cli.jobs import outcome
from sage_cli.jobs.wish import JobWish
from sage_contracts.config import PresetName, Task, preset_fields
from sage_contracts.errors import ConflictError, InvalidRequestError, SageError
from sage_contracts.jobs import CreateJobRequest, FineTuningJob, SageJobOptions, name_fault


@dataclass(frozen=True)
class CheckedWish:
    """The same, found to be in order."""

    task: Task
    model: str
    data: Path | None
    options: SageJobOptions

    def sized_for(self, client: Client) -> CheckedWish:
        """With the sizes of a quick start for the trainer's machine; what the user said wins."""
        from sage.tools.finetune.quickstart import quickstart_overrides

        preset = self.options.preset
        has_gpu = any(device.device != "cpu" for device in client.devices())
        if preset in (None, PresetName.AUTO):
            # Which of the GPU's presets it will be is the orchestrator's choice; the sizes are the same.
            preset = PresetName.A100 if has_gpu else PresetName.CPU
        sizes = quickstart_overrides(
            self.task, preset, self.options.config.get("method", "sft"), has_gpu=has_gpu
        )
        if "num_train_epochs" in self.options.config:
            sizes.pop("max_steps", None)
        return self.with_config(sizes | self.options.config)

    def with_config(self, config: dict[str, Any]) -> CheckedWish:
        return replace(self, options=self.options.model_copy(update={"config": config}))


def check(wish: JobWish, *, is_trained: bool = True) -> CheckedWish:
    """Look at everything that can be judged here, before anything runs. Raises: InvalidRequestError."""
    wish, fields = wish.with_settings(is_trained=is_trained)
    task = Task(wish.task or Task.CUSTOM)
    # The trainer may run elsewhere: a path in the settings is uploaded like one of --data.
    model, data = _model(wish.model), wish.data
    if wish.preset is not None:
        preset_fields(wish.preset)
    if wish.name is not None and (fault := name_fault(wish.name)):
        raise InvalidRequestError(f"--name {fault}", param="name")
    method = fields.get("method", "sft")
    if data is None and task is Task.CUSTOM and method == "sft":
        raise InvalidRequestError(
            "The task custom has no data of its own: give some with --data FILE, or choose a task that has"
            " (code, qa, chat, instruction); the methods dpo, orpo and kto bring a sample set too."
        )
    if data is not None:
        data = data.expanduser()
        for note in job_data.check(data, task, method):
            render.line(render.error_console(), "wait", note)
    preset = PresetName(wish.preset) if wish.preset else None
    options = SageJobOptions(name=wish.name, task=task, preset=preset, config=fields)
    return CheckedWish(task, model, data, options)


def submit(client: Client, wish: CheckedWish) -> FineTuningJob:
    """Upload the data and create the job.

    Raises: SageError; then the uploaded data is deleted again. typer.Exit after Ctrl-C, told how it stands.
    """
    with uploaded(client, wish) as file_id:
        request = CreateJobRequest(model=wish.model, training_file=file_id, sage=wish.options)
        try:
            return client.create_job(request)
        except KeyboardInterrupt:
            job = queued_anyway(client, wish, file_id)
            raise (outcome.detached(job.id) if job else outcome.nothing_queued()) from None


def queued_anyway(client: Client, wish: CheckedWish, file_id: str | None) -> FineTuningJob | None:
    """The job that the server made of a request whose answer was not waited for; None: it makes none."""
    if file_id is None:
        # Of the task's own rows a job is made at once.
        newest = client.jobs(1)
        name = wish.options.name or wish.task.value
        return next((job for job in newest if job.sage.name == name and not job.status.is_terminal), None)
    with suppress(ConflictError):
        # Refused once a job needs the file; before that the job is refused for want of it.
        client.delete_file(file_id)
        return None
    return next((job for job in client.jobs(100) if job.training_file == file_id), None)


@contextmanager
def uploaded(client: Client, wish: CheckedWish) -> Iterator[str | None]:
    """The id of the uploaded data, None without any; deleted again when the block fails."""
    if wish.data is None:
        yield None
        return
    with job_data.packed(wish.data, wish.task, wish.options.config.get("method", "sft")) as file:
        file_id = client.upload(file.path, file.filename).id
    try:
        yield file_id
    except SageError:
        with suppress(SageError):
            client.delete_file(file_id)
        raise


def why_preset(client: Client, job: FineTuningJob) -> str | None:
    """Why `auto` chose the job's preset, as its first events say; None when nothing was chosen."""
    start = f"Preset {job.sage.preset.value}: " if job.sage.preset else None
    told = (event.message for event in client.events_page(job.id, after=None).data)
    return next((text.removeprefix(start) for text in told if start and text.startswith(start)), None)


def _model(model: str) -> str:
    """The base model; a folder becomes absolute."""
    looks_like_path = model.startswith(("/", "./", "../", "~"))
    folder = Path(model).expanduser()
    if looks_like_path and not folder.is_dir():
        raise InvalidRequestError(
            f"--model {model}: there is no such folder. Give a Hub id, a folder, or a built-in name such as"
            " smollm2-135m.",
            param="model",
        )
    if looks_like_path or (folder.is_dir() and (folder / "config.json").is_file()):
        return str(folder.absolute())
    return model
