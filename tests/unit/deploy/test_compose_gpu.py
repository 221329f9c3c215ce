"""What the overlay for NVIDIA grants beyond the cards."""

from __future__ import annotations

from pathlib import Path

import yaml

OVERLAY = Path(__file__).parents[3] / "deploy" / "compose.gpu.yaml"


def test_processes_on_several_cards_have_room_to_exchange_gradients() -> None:
    trainer = yaml.safe_load(OVERLAY.read_text(encoding="utf-8"))["services"]["trainer"]
    assert trainer.get("shm_size") == "8g"
