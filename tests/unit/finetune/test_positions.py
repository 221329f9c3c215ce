"""What base models say of the length they were made for, in the spellings that are in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune.positions import beyond_positions, positions_of

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN | {"type": "yarn"}}, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": YARN | {"rope_type": "yarn"}}, 131072),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2}}, 4096),
        # Llama 3.1 states what it reaches with the scaling.
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                },
            },
            32768,
        ),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_theta": 1e4}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({"model_type": "mamba"}, None),
        ([], None),
    ],
)
def test_the_config_says_how_far_a_model_reaches(tmp_path: Path, config: Any, positions: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert positions_of(tmp_path) == positions


def test_a_folder_without_a_config_says_nothing(tmp_path: Path) -> None:
    assert positions_of(tmp_path) is None


def test_only_rows_that_are_longer_are_told() -> None:
    assert beyond_positions(64, 64) == beyond_positions(10**6, None) == ""
    told = beyond_positions(9945, 8192)
    assert "up to 9,945 tokens" in told and "max_length=8192" in told
