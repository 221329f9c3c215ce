"""Whether there is a GPU to train on, asked without torch: a card, and a torch that is built for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fakes.nvidia_smi import Card, install

ASK = (
    "import sys; from sage.tools.finetune.hardware import has_cuda; print(has_cuda(), 'torch' in sys.modules)"
)


@pytest.mark.parametrize(
    ("build", "cards", "visible", "answer"),
    [
        ("'13.0'", 1, None, True),
        ("'13.0'", 1, "0", True),
        ("'13.0'", 1, "", False),
        ("'13.0'", 0, None, False),
        ("None", 1, None, False),
    ],
)
def test_a_card_counts_where_torch_is_built_for_it(
    tmp_path: Path, build: str, cards: int, visible: str | None, answer: bool
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('torch is not to be imported')")
    (tmp_path / "torch/version.py").write_text(
        f"from typing import Optional\ncuda: Optional[str] = {build}\n"
    )
    install(tmp_path, *[Card("GPU-aa", 12288)] * cards)
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    shown = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=60)
    assert shown.stdout.split() == [str(answer), "False"], shown.stderr
