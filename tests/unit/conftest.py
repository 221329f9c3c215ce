"""Unit tests take seconds: what loads torch belongs to the integration tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def torch_stays_out() -> Iterator[None]:
    # By module, since tests of other levels may load it before or after in the same process.
    was_loaded = "torch" in sys.modules
    yield
    assert was_loaded or "torch" not in sys.modules, "a unit test loaded torch: move it to tests/integration"
