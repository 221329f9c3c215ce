"""The command groups: fast help, and errors as one screen of text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup


class FastHelpGroup(TyperGroup):
    """A group whose help costs no pydantic."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            # An absent flag without a default is coerced, and coercion imports pydantic (0.2 s).
            option.default = False
        return option


class ErrorScreenGroup(FastHelpGroup):
    """Turns whatever a command raises into one screen of text and an exit code."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _error_screen():  # `--help` and `--version` are written here
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _error_screen():
            return super().invoke(ctx)


@contextmanager
def _error_screen() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nInterrupted.", err=True)
        raise typer.Exit(130) from None
    except typer.BadParameter as error:
        # What checks the values of options puts its own word in front.
        error.message = error.message.removeprefix("Value error, ")
        raise
    except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError, EOFError):
        raise
    except Exception as error:
        if os.environ.get("SAGE_DEBUG", "") not in ("", "0"):
            raise
        from sage_cli.failures import exit_code_of, show

        show(error)
        raise typer.Exit(exit_code_of(error)) from None
