"""What people are told when a job starts and when it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from sage_cli import locate, render
from sage_cli.failures import INTERRUPTED
from sage_contracts.config import LoRAConfig, TrainingConfig
from sage_contracts.errors import (
    InvalidRequestError,
    NotFoundError,
    StorageFullError,
    TrainingFailedError,
    all_errors,
)
from sage_contracts.jobs import FineTuningJob, JobMetrics, JobStatus

# Wrong input that only the trainer could notice is still the user's input.
_TOLD_AS_THEY_ARE = (InvalidRequestError, NotFoundError, StorageFullError, TrainingFailedError)


def show_choices(
    console: Console, job: FineTuningJob, data: Path | None, why_preset: str | None = None
) -> None:
    """How the job was set up: everything that was chosen on the user's behalf is named."""
    config = job.sage.config
    batch = f"{config.per_device_train_batch_size}×{config.gradient_accumulation_steps}"
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    quantised = ", 8-bit" if config.load_in_8bit else ", 4-bit" if config.load_in_4bit else ""
    what = f"LoRA r={config.lora.r}" if config.tuning == "lora" else "all weights"
    rows = [
        ("job", job.id),
        ("base model", config.model_name),
        ("data", str(data) if data else own_data_text(job.sage.task.value, config.method)),
        ("preset", f"{job.sage.preset.value if job.sage.preset else 'none'}{quantised}"),
        *([("because", why_preset)] if why_preset else []),
        (
            "training",
            f"{length}, batch {batch}, learning rate {config.learning_rate:g}, {what}",
        ),
        _row_length(config),
    ]
    if config.method != "sft":
        rows.insert(1, ("method", f"{config.method}, beta {config.preference_beta:g}"))
    console.print(Text(f"Training {job.sage.name!r} ({job.sage.task.value})", style="bold"))
    facts(console, rows)


def settings_rows(config: TrainingConfig) -> list[tuple[str, str]]:
    """What trains, in which numbers, on how long rows."""
    quantised = "8-bit" if config.load_in_8bit else f"4-bit {config.bnb_4bit_quant_type}"
    is_quantised = config.load_in_8bit or config.load_in_4bit
    base = [f"base in {quantised}" if is_quantised else "base not quantised"]
    numbers = [
        config.precision,
        *(base if config.tuning == "lora" else []),
        *(["gradient checkpointing"] if config.gradient_checkpointing else []),
    ]
    adapters = _adapters_text(config.lora) if config.tuning == "lora" else "none: all weights train"
    return [("adapters", adapters), ("precision", ", ".join(numbers)), _row_length(config)]


def _adapters_text(lora: LoRAConfig) -> str:
    """`LoRA r=8, alpha 16, dropout 0.05 on q_proj, v_proj`, and what of its variants is on."""
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    variants = [
        *(["rsLoRA"] if lora.use_rslora else []),
        *(["DoRA"] if lora.use_dora else []),
        *([f"LoRA+ ratio {lora.loraplus_lr_ratio:g}"] if lora.loraplus_lr_ratio else []),
        *([f"biases: {lora.bias}"] if lora.bias != "none" else []),
    ]
    sizes = f"LoRA r={lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout:g}"
    return ", ".join([f"{sizes} on {', '.join(targets)}", *variants])


def _row_length(config: TrainingConfig) -> tuple[str, str]:
    return ("row length", f"at most {config.max_length} tokens")


def own_data_text(task: str, method: str) -> str:
    """Where the rows of a task come from when the user gives none."""
    if method != "sft":
        return "the sample set of preferences"
    return "functions of Python's standard library" if task == "code" else f"the sample set for {task}"


def facts(console: Console, rows: list[tuple[str, str]]) -> None:
    """Names and values, one a line; on a terminal long values continue under themselves."""
    width = max(len(name) for name, _ in rows)
    if not console.is_terminal:
        for name, value in rows:
            console.print(Text(f"  {name.ljust(width)}  {value}"), soft_wrap=True)
        return
    console.print(render.pairs([(name, Text(value)) for name, value in rows]))


def require_success(job: FineTuningJob) -> None:
    """Raises: the SageError behind a job that failed, was cancelled or cannot go on; typer.Exit(0) for one
    that somebody paused."""
    if job.status is JobStatus.PAUSED and job.error:
        cls = all_errors().get(job.error.code, TrainingFailedError)
        raise cls(f"The job is paused: {job.error.message}\nThen go on with: sage finetune resume {job.id}")
    if job.status is JobStatus.PAUSED:
        typer.echo(f"Paused. Go on with: sage finetune resume {job.id}")
        raise typer.Exit(0)
    if job.status is JobStatus.SUCCEEDED:
        return
    if job.status is JobStatus.CANCELLED:
        raise TrainingFailedError(f"The job {job.id} was cancelled.")
    problem = job.error.message if job.error else "no reason was recorded"
    cls = all_errors().get(job.error.code if job.error else "", TrainingFailedError)
    if not issubclass(cls, _TOLD_AS_THEY_ARE):
        cls = TrainingFailedError
    raise cls(f"The job {job.id} failed: {problem}\nWhat happened before: sage finetune logs {job.id}")


def show_result(console: Console, job: FineTuningJob) -> None:
    """Held-out loss before and after, and where the model lies."""
    metrics = job.sage.metrics
    rows = [("model", f"{job.fine_tuned_model}   (newest version of {job.sage.name!r})")]
    rows += quality_rows(metrics)
    rows += reward_rows(metrics)
    rows.append(("files", str(output_folder(job))))
    if job.finished_at:
        rows.append(("took", render.seconds_text(job.finished_at - job.created_at)))
    console.print()
    console.print(Text("Your model is ready", style="bold green"))
    facts(console, rows)
    if has_become_worse(metrics):
        render.line(
            console,
            "warn",
            "On rows it has not seen it became worse: it learned its own by heart. Give it more rows, fewer "
            "epochs or a lower learning_rate; eval_steps with early_stopping_patience stops in time.",
        )


def has_become_worse(metrics: JobMetrics) -> bool:
    """Whether the tuned model knows the held-out rows less well than its base."""
    base, tuned = metrics.base_eval_loss, metrics.eval_loss
    return base is not None and tuned is not None and tuned > base


def quality_rows(metrics: JobMetrics) -> list[tuple[str, str]]:
    """How well the base and the tuned model know the held-out rows, as far as that was measured."""
    rows = []
    if metrics.base_eval_loss is not None and metrics.eval_loss is not None:
        rows.append(("held-out loss", loss_text(metrics.base_eval_loss, metrics.eval_loss)))
    if metrics.base_perplexity is not None and metrics.perplexity is not None:
        rows.append(("perplexity", f"base {metrics.base_perplexity:.4g} → tuned {metrics.perplexity:.4g}"))
    if metrics.base_token_accuracy is not None and metrics.token_accuracy is not None:
        before, after = metrics.base_token_accuracy, metrics.token_accuracy
        rows.append(("token accuracy", f"base {before:.1%} → tuned {after:.1%}"))
    return rows


def loss_text(base: float, tuned: float) -> str:
    """`base 2.391 → tuned 1.898 (-20.6 %)`."""
    change = f" ({(tuned - base) / base * 100:+.1f} %)" if base else ""
    return f"base {base:.3f} → tuned {tuned:.3f}{change}"


def reward_rows(metrics: JobMetrics) -> list[tuple[str, str]]:
    """How well held-out preferences are told apart; nothing for supervised jobs."""
    if metrics.reward_accuracy is None or metrics.reward_margin is None:
        return []
    before = metrics.base_reward_accuracy
    was = f"base {before:.0%} → " if before is not None else ""
    margin = f"mean margin {metrics.reward_margin:.3g}"
    return [("preferred answers", f"{was}tuned {metrics.reward_accuracy:.0%} ranked first, {margin}")]


def output_folder(job: FineTuningJob) -> str:
    """Where the files are: on this machine, or the place inside the stack's own volume."""
    stored = job.sage.output_dir or f"finetune_output/{job.sage.name}"
    path = locate.home_root() / stored
    return f"{path}/" if path.is_dir() else f"{stored}/ (in the stack's SAGE_HOME)"


@contextmanager
def detaching(job_id: str) -> Iterator[None]:
    """Ctrl-C leaves the block and not the job. Raises: typer.Exit then."""
    try:
        yield
    except KeyboardInterrupt:
        raise detached(job_id) from None


def nothing_queued() -> typer.Exit:
    """After Ctrl-C before there was anything to go on."""
    typer.echo("\nInterrupted; nothing was queued.", err=True)
    return typer.Exit(INTERRUPTED)


def detached(job_id: str) -> typer.Exit:
    """After Ctrl-C: the job goes on; say how to come back to it and how to stop it."""
    typer.echo(
        f"\nDetached: the job goes on without you.\n"
        f"  come back  sage finetune watch {job_id}\n"
        f"  stop it    sage finetune cancel {job_id}"
    )
    return typer.Exit(INTERRUPTED)
