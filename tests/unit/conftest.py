"""Unit tests take seconds: what loads torch belongs to the integration tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def torch_stays_out() -> Iterator[None]:
    yield
    assert "torch" not in sys.modules, "a unit test loaded torch: move it to tests/integration"
