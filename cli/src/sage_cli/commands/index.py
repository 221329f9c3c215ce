"""sage index …: documents that chats retrieve passages from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sage_cli.commands.options import JsonOption
from sage_cli.groups import FastHelpGroup

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the index.")]

app = typer.Typer(
    cls=FastHelpGroup,
    help="Documents that chats answer from, with sources.",
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def add(
    name: NameArgument,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder of text files, or one such file.")],
    as_json: JsonOption = False,
) -> None:
    """Make an index of your documents, or replace it.

    Sends the text files of the folder to the stack, and says which files are left out and why. Until the new
    index is whole, the old one answers.
    """
    from sage_cli.indexes.command import add_command

    add_command(name, path, as_json=as_json)


@app.command("list")
def list_indexes(as_json: JsonOption = False) -> None:
    """List the indexes."""
    from sage_cli.indexes.command import list_command

    list_command(as_json=as_json)


@app.command()
def remove(name: NameArgument) -> None:
    """Delete an index; your files stay."""
    from sage_cli.indexes.command import remove_command

    remove_command(name)
