"""What a training child is shown of the cards: the device that was leased, or all that the user named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.fakes.nvidia_smi import Card, install

from sage_servicekit.machine import find_device
from sage_trainer.runner import child_env
from sage_trainer.settings import TrainerSettings


@pytest.mark.parametrize(
    ("train_device", "visible", "leased", "shown"),
    [
        ("auto", None, "cuda:1", "1"),
        ("auto", "0", "cuda:0", "0"),
        ("auto", "1", "cuda:1", "1"),
        ("auto", "1,0", "cuda:1", "1,0"),  # docs/several-devices.md
        ("auto", "GPU-bb,GPU-aa", "cuda:1", "GPU-bb,GPU-aa"),
        ("auto", "", "cpu", ""),
        ("auto", "-1", "cpu", ""),
        ("cuda:1", "0,1", "cuda:1", "1"),
        ("cpu", "0,1", "cpu", ""),
    ],
)
def test_the_child_computes_on_what_is_leased(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_device: str,
    visible: str | None,
    leased: str,
    shown: str,
) -> None:
    install(tmp_path, Card("GPU-aa", 8192), Card("GPU-bb", 12288))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = TrainerSettings(home_dir=tmp_path, train_device=train_device)
    device = find_device(settings.train_device)
    env = child_env(settings, device)
    assert (device.name, env["CUDA_VISIBLE_DEVICES"]) == (leased, shown)
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID" and env["SAGE_HOME"] == str(tmp_path)
    assert "CUDA_DEVICE_ORDER" not in os.environ
