"""sage chat."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Backend = Literal["mock", "openai", "finetune", "vllm", "ollama"]
MessageOption = Annotated[str | None, typer.Option("-m", "--message", help="Ask once and exit.")]
IndexOption = Annotated[
    str | None,
    typer.Option("--index", help="Answer with passages from this index: docs-public, or one of your own."),
]
SystemOption = Annotated[str | None, typer.Option("--system", help="System prompt.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", min=0, max=2, help="How freely words are chosen; 0 takes the likeliest."),
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")
]
KeepAliveOption = Annotated[
    float | None,
    typer.Option(
        "--keep-alive",
        min=0,
        help="Seconds the engine stays after you leave; 0 stops it, unless somebody else uses it.",
        show_default="SAGE_KEEP_ALIVE_S, 300",
    ),
]


def chat(
    context: typer.Context,
    backend: Annotated[
        Backend | None, typer.Option("--backend", "-b", envvar="SAGE_CHAT_BACKEND", help="Who answers.")
    ] = None,
    finetune_model: Annotated[
        str | None,
        typer.Option(envvar="SAGE_CHAT_FINETUNE_MODEL", help="Your tuned model: code, or code@3."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Any model: a name that `sage models` lists, or base:NAME for a plain base model."),
    ] = None,
    message: MessageOption = None,
    index: IndexOption = None,
    system: SystemOption = None,
    temperature: TemperatureOption = None,
    max_tokens: MaxTokensOption = None,
    keep_alive_s: KeepAliveOption = None,
) -> None:
    """Chat with a model.

    Interactively, once with -m, or with what comes through a pipe.
    In a conversation /bye leaves, /new starts over, Ctrl-C ends an answer and, twice, leaves.
    """
    from sage_cli.chat.session import ChatOptions, chat_command

    if "COMMANDLINE" in (_source(context, "model"), _source(context, "finetune_model")):
        # A model that is named here is the one: what the environment says is for when nobody does.
        backend = backend if _source(context, "backend") == "COMMANDLINE" else None
        finetune_model = finetune_model if _source(context, "finetune_model") == "COMMANDLINE" else None
    chat_command(
        ChatOptions(
            backend=backend,
            finetune_model=finetune_model,
            model=model,
            message=message,
            index=index,
            system=system,
            temperature=temperature,
            max_tokens=max_tokens,
            keep_alive_s=keep_alive_s,
        )
    )


def _source(context: typer.Context, name: str) -> str | None:
    """Who gave an option its value: COMMANDLINE, ENVIRONMENT or DEFAULT."""
    source = context.get_parameter_source(name)
    return source.name if source else None


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    app.command()(chat)
