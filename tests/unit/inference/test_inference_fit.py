"""From an adapter's configuration to whether an engine can load it."""

from __future__ import annotations

from typing import Any

import pytest

from sage_inference.fit import largest_rank, why_not

PLAIN = {"r": 8, "bias": "none", "use_dora": False, "modules_to_save": None, "init_lora_weights": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"r": 512},
        {"rank_pattern": {"q_proj": 64}, "alpha_pattern": {"q_proj": 32}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "mica"},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_both_engines_take_plain_adapters(changes: dict[str, Any]) -> None:
    assert why_not(PLAIN | changes, "vllm") is None
    assert why_not(PLAIN | changes, "transformers") is None
    assert why_not({"r": 8}, "vllm") is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "biases"),
        ({"trainable_token_indices": [5]}, "trained tokens"),
        ({"r": 640}, "rank 640"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank 1024"),
    ],
)
def test_what_only_peft_can_do_is_not_for_vllm(changes: dict[str, Any], named: str) -> None:
    reason = why_not(PLAIN | changes, "vllm")
    assert reason == f"vLLM cannot load an adapter with {named}"
    assert why_not(PLAIN | changes, "transformers") is None


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_what_starts_by_changing_the_base_would_change_everybodys(start: str) -> None:
    for kind, engine in (("vllm", "vLLM"), ("transformers", "the transformers engine")):
        reason = why_not(PLAIN | {"init_lora_weights": start}, kind)
        assert reason == f"{engine} cannot load an adapter with init_lora_weights={start}"


def test_trained_biases_would_change_everybodys_base() -> None:
    for kind in ("lora_only", "all"):
        assert why_not(PLAIN | {"bias": kind}, "transformers") is not None
    both = why_not(PLAIN | {"bias": "all", "lora_bias": True, "use_dora": True}, "vllm")
    assert both == "vLLM cannot load an adapter with biases, DoRA"


def test_the_largest_rank_counts_all_layers() -> None:
    assert largest_rank({"r": 8, "rank_pattern": {"q": 32, "k": 4}}) == 32
    assert largest_rank({}, otherwise=16) == 16
