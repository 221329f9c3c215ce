"""What a job may name as its model: bases, and never a tuned model, however that is spelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.fakes.orchestrator_rig import Rig

JOBS = "/v1/fine_tuning/jobs"
MERGED = "finetune_output/code/versions/1/merged_model"


def refused(rig: Rig, model: str, *, status: int = 400) -> str:
    before = len(rig.get(JOBS)["data"])
    error = rig.post(JOBS, {"model": model, "sage": {"task": "code"}}, status=status)["error"]
    assert error["param"] == "model" and len(rig.get(JOBS)["data"]) == before
    return str(error["message"])


def add_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def merge(rig: Rig) -> None:
    merge_id = rig.post("/v1/sage/models/code/merge")["id"]
    rig.post(f"/internal/merges/{merge_id}/claim", {"worker_id": "m1"})
    done = {"worker_id": "m1", "attempt": 1, "outcome": "succeeded", "merged_path": MERGED}
    rig.post(f"/internal/merges/{merge_id}/finish", done)
    add_model(rig.home / MERGED)


@pytest.mark.parametrize("name", ["code", "code@1", "code@1:ckpt-step-2", "code:ckpt-step-2"])
@pytest.mark.parametrize("prefix", ["", "finetune/"])
def test_a_tuned_model_is_refused_with_the_way_to_go_on_from_it(rig: Rig, prefix: str, name: str) -> None:
    rig.train()
    message = refused(rig, prefix + name)
    assert f"{prefix}{name} is " in message and "the tuned model code@1" in message
    assert "`sage finetune merge code@1`" in message and f"model={MERGED!r}" in message


def test_what_is_merged_already_is_named_and_can_be_trained(rig: Rig) -> None:
    rig.train()
    merge(rig)
    message = refused(rig, "finetune/code")
    assert f"model={MERGED!r}" in message and "sage finetune merge" not in message
    assert rig.train(model=MERGED)["fine_tuned_model"] == "code@2"


def test_a_model_tuned_in_full_has_nothing_to_merge(rig: Rig) -> None:
    own = "finetune_output/code/versions/1/full_model"
    job_id = rig.create_job(sage={"task": "code", "config": {"tuning": "full"}})["id"]
    rig.claim(job_id)
    rig.finish(job_id, base_model=own, adapter_path=None)
    message = refused(rig, "code")
    assert f"model={own!r}" in message and "sage finetune merge" not in message


def test_a_name_that_a_base_has_too_means_the_base(rig: Rig) -> None:
    """Or whoever gives a model a base's name would keep all others from that base."""
    add_model(rig.home / "base_models" / "twin")
    rig.train(suffix="twin")
    assert rig.create_job(model="twin")["model"] == "twin"
    assert rig.create_job(model="base:twin")["model"] == "twin"
    assert "is the tuned model twin@1" in refused(rig, "finetune/twin")


def test_a_sweep_starts_from_no_tuned_model_either(rig: Rig) -> None:
    rig.train()
    body: dict[str, Any] = {"model": "code", "sage": {"task": "qa"}, "grid": {"learning_rate": [1e-4]}}
    assert "is the tuned model code@1" in rig.post("/v1/sage/sweeps", body, status=400)["error"]["message"]


@pytest.mark.parametrize(
    "wrong", ["finetune/cod", "finetune/", "finetune/code@7", "finetune/Org/Tiny", "finetune_output/code"]
)
def test_what_means_something_here_is_never_asked_of_a_hub(rig: Rig, wrong: str) -> None:
    rig.train()
    (rig.home / "finetune_output" / "code").mkdir(parents=True)
    assert wrong.removeprefix("finetune/") in refused(rig, wrong, status=404)


def test_a_folder_may_have_the_mark_of_a_version_in_its_name(rig: Rig) -> None:
    add_model(rig.home / "mine@home")
    assert rig.create_job(model=str(rig.home / "mine@home"))["model"].endswith("/mine@home")


def test_the_bases_name_may_have_both_prefixes(rig: Rig) -> None:
    assert rig.create_job(model="finetune/base:smollm2-135m")["model"] == "smollm2-135m"
