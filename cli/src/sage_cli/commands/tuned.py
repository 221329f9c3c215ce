"""sage finetune merge, export, chat: what to do with a tuned model."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from sage_cli.commands.chat import (
    IndexOption,
    KeepAliveOption,
    MaxTokensOption,
    MessageOption,
    SystemOption,
    TemperatureOption,
)

TunedArgument = Annotated[str, typer.Argument(metavar="NAME", help="A tuned model: code, or code@3.")]

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def merge(
    name: TunedArgument,
    dtype: Annotated[
        Literal["auto", "fp32", "fp16", "bf16"], typer.Option("--dtype", help="Number format of the weights.")
    ] = "auto",
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait.")] = 1800,
) -> None:
    """Merge a tuned model into whole weights, for export."""
    from sage_cli.jobs.merge import merge_command

    merge_command(name, dtype=dtype, timeout_s=timeout_s)


@app.command()
def export(
    name: TunedArgument,
    format_name: Annotated[
        Literal["safetensors", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "ollama", "zip", "hub"],
        typer.Option("--format", help="What to write."),
    ] = "gguf-q8_0",
    content: Annotated[
        Literal["merged", "adapter"], typer.Option("--content", help="What a zip or a repository holds.")
    ] = "merged",
    dtype: Annotated[
        Literal["auto", "fp32", "fp16", "bf16"],
        typer.Option("--dtype", help="Number format of weights in safetensors."),
    ] = "auto",
    repo: Annotated[
        str | None, typer.Option("--repo", help="With --format hub: the repository, owner/name.")
    ] = None,
    allow_public: Annotated[
        bool,
        typer.Option("--allow-public", help="Write to the repository even if everybody can read it."),
    ] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait.")] = 1800,
) -> None:
    """Write a tuned model for other programs.

    GGUF for llama.cpp and Ollama, a zip, or a repository on the Hub; checked against the adapter first.
    """
    from sage_cli.jobs.merge import export_command

    export_command(
        name,
        format_name=format_name,
        content=content,
        dtype=dtype,
        repo=repo,
        allow_public=allow_public,
        timeout_s=timeout_s,
    )


@app.command("chat")
def chat_with(
    name: TunedArgument,
    message: MessageOption = None,
    index: IndexOption = None,
    system: SystemOption = None,
    temperature: TemperatureOption = None,
    max_tokens: MaxTokensOption = None,
    keep_alive_s: KeepAliveOption = None,
) -> None:
    """Chat with a tuned model.

    Short for `sage chat --backend finetune --finetune-model NAME`.
    """
    from sage_cli.chat.session import ChatOptions, chat_command

    chat_command(
        ChatOptions(
            backend="finetune",
            finetune_model=name,
            message=message,
            index=index,
            system=system,
            temperature=temperature,
            max_tokens=max_tokens,
            keep_alive_s=keep_alive_s,
        )
    )
