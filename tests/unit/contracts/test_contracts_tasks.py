"""The tasks are these and what plug-ins add; a typo is still an error."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sage_contracts.config import Task, TrainingConfig


def test_a_task_that_was_added_is_one_everywhere() -> None:
    with pytest.raises(ValidationError, match="Input should be 'code', 'qa'"):
        TrainingConfig.model_validate({"task": "limericks"})
    added = Task.add("limericks")
    assert Task.add("limericks") is Task("limericks") is added
    config = TrainingConfig.model_validate({"task": "limericks"})
    assert config.task is added
    assert TrainingConfig.model_validate_json(config.model_dump_json()).task is added


@pytest.mark.parametrize("value", ["cdoe", 7, None, {}, ["code"]])
def test_what_was_not_added_is_none(value: object) -> None:
    with pytest.raises(ValueError, match=r"Input should be|not a valid"):
        TrainingConfig.model_validate({"task": value})
