"""sage up, down, status, doctor."""

from __future__ import annotations

from typing import Annotated

import typer


def up(
    embedded: Annotated[bool, typer.Option("--embedded", help="Local processes, no Docker.")] = False,
    docker: Annotated[bool, typer.Option("--docker", help="Containers, through Docker Compose.")] = False,
    build: Annotated[bool, typer.Option("--build", help="With Docker: build the images anew.")] = False,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout", help="Seconds to wait until healthy.", min=1, show_default="120; with Docker 300"
        ),
    ] = None,
) -> None:
    """Start the stack and wait until it is healthy. Starting twice does nothing."""
    from sage_cli.stack.updown import up_command

    up_command(embedded=embedded, docker=docker, timeout_s=timeout_s, is_building=build)


def down(
    volumes: Annotated[
        bool, typer.Option("--volumes", help="With Docker: also delete the data volume, models included.")
    ] = False,
) -> None:
    """Stop everything that `sage up` started. Models and jobs are kept."""
    from sage_cli.stack.updown import down_command

    down_command(remove_volumes=volumes)


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parts, engines, jobs and devices."""
    from sage_cli.status import status_command

    status_command(as_json=as_json)


def doctor() -> None:
    """Check this machine and say what to do about each problem."""
    from sage_cli.doctor import doctor_command

    doctor_command()


def register(app: typer.Typer) -> None:
    """Add the commands to the top level."""
    for command in (up, down, status, doctor):
        app.command()(command)
