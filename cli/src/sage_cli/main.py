"""Entry point of `sage`. Only Typer is imported here and in commands/: `--help` has to answer at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sage_cli.commands import chat, finetune, index, models, stack
from sage_cli.groups import ErrorScreenGroup

# rich_markup_mode=None: Typer's rich help costs more than all the rest of `--help` together.
app = typer.Typer(
    cls=ErrorScreenGroup,
    help="Fine-tune language models and chat with them, on this machine.",
    epilog="Start here: sage finetune quickstart code",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stack.register(app)
chat.register(app)
models.register(app)
app.add_typer(index.app, name="index")
app.add_typer(finetune.app, name="finetune")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"sage {version('sage-cli')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _open_closed_streams() -> None:
    """A caller may close them (`sage … >&-`): they are None then, and the next file gets their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 (open until the end)
            setattr(sys, name, stream)


def main() -> None:
    """Run the command line; never returns normally."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a sign gets a replacement, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="sage")


if __name__ == "__main__":
    main()
