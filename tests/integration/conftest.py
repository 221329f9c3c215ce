"""A tiny random model that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fakes.tiny_llama import make_model


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny")
