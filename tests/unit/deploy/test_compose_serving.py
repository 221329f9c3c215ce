"""What compose hands on to the engines' host is what its settings read."""

from __future__ import annotations

from pathlib import Path

import yaml

from sage_inference.settings import InferenceSettings


def test_the_host_is_handed_settings_that_it_has_and_the_parser_among_them() -> None:
    compose = yaml.safe_load((Path(__file__).parents[3] / "compose.yaml").read_text(encoding="utf-8"))
    handed_on = compose["x-serving"]
    fields = {f"SAGE_{name.upper()}" for name in InferenceSettings.model_fields}
    assert set(handed_on) <= fields and "SAGE_TOOL_CALL_PARSER" in handed_on
    assert set(handed_on.values()) == {None}  # no value here: absent unless the caller has one
