"""sage models."""

from __future__ import annotations

from typing import Annotated

import typer


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models that can be chatted with."""
    from sage_cli.models import models_command

    models_command(as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    app.command()(models)
