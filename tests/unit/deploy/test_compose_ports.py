"""What compose publishes beyond this machine."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]


def test_the_gateway_which_asks_for_keys_is_all_that_a_setting_can_open() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    published = {
        name: port for name, service in compose["services"].items() for port in service.get("ports", [])
    }
    assert set(published) == {"orchestrator", "inference", "gateway", "tensorboard"}
    assert published.pop("gateway").startswith("${SAGE_BIND:-127.0.0.1}:")
    assert all(port.startswith("127.0.0.1:") for port in published.values())


def test_each_service_knows_where_it_is_published() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    ours = {name: service for name, service in compose["services"].items() if "environment" in service}
    assert set(ours) == {"orchestrator", "trainer", "merger", "inference", "gateway", "tensorboard"}
    for name, service in ours.items():
        address = service["environment"]["SAGE_PUBLISHED_ON"]
        for port in service.get("ports", []):
            assert port.startswith(f"{address}:"), name


def test_the_gpu_overlay_publishes_nothing() -> None:
    overlay = yaml.safe_load((ROOT / "deploy" / "compose.gpu.yaml").read_text(encoding="utf-8"))
    assert [name for name, service in overlay["services"].items() if "ports" in service] == []
