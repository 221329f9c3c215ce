"""The merging child puts what goes wrong into words, and settings read the environment."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from sage_contracts.workers import MergeClaim
from sage_merger.child import last_words
from sage_merger.folders import point_link
from sage_merger.messages import CHILD_MESSAGE, ChildSpec, DoneMessage, FailedMessage, PhaseMessage
from sage_merger.settings import MergerSettings


def spec_of(home: Path) -> ChildSpec:
    claim = MergeClaim(
        merge_id="merge-1",
        attempt=1,
        lease_s=30,
        name="code",
        version=1,
        base_model="base_models/none",
        adapter_path="finetune_output/code/versions/1/lora_weights",
        output_dir="finetune_output/code",
    )
    return ChildSpec(home=str(home), claim=claim)


def test_a_base_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "base_models/none").mkdir(parents=True)
    spec = spec_of(tmp_path)
    spec.claim.base_model = "./base_models/none"
    words = last_words(spec, io.StringIO())
    assert isinstance(words, FailedMessage)
    assert (words.code, words.is_explained) == ("model_not_found", True)
    assert "base_models/none" in words.message


@pytest.mark.parametrize(
    "message",
    [
        PhaseMessage(text="merging"),
        DoneMessage(merged_path="finetune_output/code/merged_model", meta={"size_bytes": 1}),
        FailedMessage(code="out_of_memory", message="no"),
    ],
)
def test_messages_survive_the_pipe(message: PhaseMessage | DoneMessage | FailedMessage) -> None:
    assert CHILD_MESSAGE.validate_json(message.model_dump_json()) == message


def test_the_child_is_our_own_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MergerSettings().merge_child_command == [sys.executable, "-m", "sage_merger.child"]
    monkeypatch.setenv("SAGE_MERGE_CHILD_COMMAND", '["prog", "--flag"]')
    assert MergerSettings().merge_child_command == ["prog", "--flag"]


def test_the_link_at_the_top_moves_in_one_step(tmp_path: Path) -> None:
    link = tmp_path / "code" / "merged_model"
    for version in ("1", "2"):
        target = tmp_path / "code" / "versions" / version / "merged_model"
        target.mkdir(parents=True)
        point_link(link, target)
        assert link.resolve() == target
    assert not link.readlink().is_absolute()
