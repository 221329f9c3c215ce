"""What compose does for a stack that runs for months."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
STACK: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
GPU: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.gpu.yaml").read_text(encoding="utf-8"))[
    "services"
]

each_service = pytest.mark.parametrize("name", STACK)


@each_service
def test_a_reboot_brings_every_service_back_and_one_that_was_stopped_stays_so(name: str) -> None:
    # A service ends with exit code 0 when the machine goes down, which is no failure to Docker.
    assert (STACK[name] | GPU.get(name, {}))["restart"] == "unless-stopped"


@each_service
def test_what_a_service_says_does_not_fill_the_disk(name: str) -> None:
    logging = (STACK[name] | GPU.get(name, {}))["logging"]
    assert logging["options"] == {"max-size": "10m", "max-file": "3"}
    assert logging["driver"] == "json-file"  # that of the machine may know no such options
