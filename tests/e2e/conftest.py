"""Fixtures of the end-to-end level: whole stacks, started once per session."""

from tests.e2e.compose_stack import compose_stack

__all__ = ["compose_stack"]
