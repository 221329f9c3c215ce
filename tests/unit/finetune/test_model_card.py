"""The model card says what was measured, what is known, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sage.tools.finetune.model_card import model_card
from sage_contracts.config import LoRAConfig, TrainingConfig

META: dict[str, Any] = {
    "base_revision": "abc123",
    "base_licence": "apache-2.0",
    "created_at": "2026-01-02T03:04:05+00:00",
    "data": "rows.json",
    "data_sha256": "d" * 64,
    "chat_template_sha256": "c" * 64,
    "train_rows": 90,
    "held_out_rows": 10,
    "truncated_rows": 3,
    "precision": "bf16",
    "device": "cuda",
    "versions": {"torch": "2.13.0"},
    "rollbacks": [{"reason": "nan", "step": 12, "to_step": 6}],
    "metrics": {
        "steps": 40,
        "result_step": 30,
        "base_eval_loss": 2.391,
        "eval_loss": 1.898,
        "base_perplexity": 10.92,
        "perplexity": 6.673,
        "base_token_accuracy": 0.524,
        "token_accuracy": 0.581,
    },
}


def test_a_card_has_data_figures_usage_and_licence() -> None:
    config = TrainingConfig(
        model_name="HuggingFaceTB/SmolLM2: odd", output_dir="/home/x/code", lora=LoRAConfig(use_rslora=True)
    )
    card = model_card(config, META)
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "HuggingFaceTB/SmolLM2: odd"
    assert (front["license"], front["library_name"]) == ("apache-2.0", "peft")
    for told in (
        "revision `abc123`",
        "| loss | 2.3910 | 1.8980 |",
        "| perplexity | 10.92 | 6.673 |",
        "| token accuracy | 52.4% | 58.1% |",
        "90 rows (rows.json)",
        "3 rows were longer",
        "rsLoRA r=8",
        "those of step 30, the best",
        "went back from step 12 to 6",
        "--finetune-model code",
        "is `apache-2.0`",
    ):
        assert told in card


def test_a_built_in_base_is_named_as_others_know_it() -> None:
    config = TrainingConfig(model_name="smollm2-135m", output_dir="code")
    card = model_card(config, {**META, "base_upstream": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"' in card
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in card
    assert "on top of `smollm2-135m`" in card


def test_what_is_not_known_is_said() -> None:
    meta = {**META, "base_licence": None, "base_revision": None, "rollbacks": []}
    meta["metrics"] = {"steps": 40, "eval_loss": None, "base_eval_loss": None}
    card = model_card(TrainingConfig(output_dir="out"), meta)
    assert "No rows were held out" in card
    assert "is not known here: look it up" in card
    assert "license" not in yaml.safe_load(card.split("---")[1])


def test_a_base_in_a_folder_is_no_name_that_a_hub_would_take() -> None:
    card = model_card(TrainingConfig(model_name="/models/mine", output_dir="out"), META)
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "on top of `/models/mine`" in card


def test_a_merged_model_is_loaded_without_peft_and_says_what_it_was_made_of() -> None:
    config = TrainingConfig(model_name="org/base", output_dir="code")
    card = model_card(config, META, is_merged=True)
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["base_model"]) == ("transformers", "org/base")
    assert "lora" in front["tags"]
    assert "merged into `org/base`, revision `abc123`" in card
    assert "LoRA r=" in card
    assert "PeftModel" not in card
    assert 'AutoModelForCausalLM.from_pretrained(".")' in card


@pytest.mark.parametrize(("setting", "bits"), [("load_in_4bit", 4), ("load_in_8bit", 8)])
def test_figures_of_a_quantised_base_are_said_to_be_its_own(setting: str, bits: int) -> None:
    config = TrainingConfig.model_validate({"model_name": "org/base", "output_dir": "code", setting: True})
    told = f"on the base in {bits} bits, as it was trained"
    card = model_card(config, META)
    assert told in card
    assert "full precision, which the code below loads" in card
    merged = model_card(config, META, is_merged=True)
    assert told in merged
    assert "they were not measured" in merged
    plain = TrainingConfig(model_name="org/base", output_dir="code")
    assert "not on these weights" in model_card(plain, META, is_merged=True)
    assert "was measured" not in model_card(plain, META)
