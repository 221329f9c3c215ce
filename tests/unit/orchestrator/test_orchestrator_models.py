"""Names, versions, merges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from tests.fakes.orchestrator_rig import Rig

from sage_orchestrator.rows import VersionRow


def add_base(rig: Rig, name: str) -> None:
    folder = rig.home / "base_models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def resolve(rig: Rig, name: str, *, status: int = 200) -> dict[str, object]:
    answer: dict[str, object] = rig.get("/internal/models/resolve", name=name, status=status)
    return answer


def test_names_and_versions_are_listed(rig: Rig) -> None:
    rig.train()
    rig.clock.advance(5)
    rig.train()
    rig.clock.advance(5)
    rig.train(suffix="other")
    listed = rig.get("/v1/models")["data"]
    assert [card["id"] for card in listed] == ["code", "other", "other@1", "code@2", "code@1"]
    alias = listed[0]
    assert (alias["object"], alias["owned_by"]) == ("model", "sage")
    assert (alias["sage"]["alias_of"], alias["sage"]["version"]) == ("code@2", 2)
    assert rig.get("/v1/models/code")["sage"]["alias_of"] == "code@2"
    assert rig.get("/v1/models/code@1")["sage"]["alias_of"] is None


def test_names_resolve_to_what_serving_needs(rig: Rig) -> None:
    job = rig.train(sage={"task": "code", "config": {"lora": {"r": 24}}})
    assert resolve(rig, "code") == {
        "id": "code@1",
        "base_model": "base_models/smollm2-135m",
        "adapter_path": f"adapters/{job['id']}",
        "merged_path": None,
        "max_lora_rank": 24,
        "turn_end_ids": [],
    }
    rig.train()
    assert resolve(rig, "code@1")["adapter_path"] == f"adapters/{job['id']}"
    assert resolve(rig, "code@2")["max_lora_rank"] == 8


def test_a_model_tuned_in_full_is_its_own_base_and_has_nothing_to_merge(rig: Rig) -> None:
    job_id = rig.create_job(sage={"task": "code", "config": {"tuning": "full"}})["id"]
    rig.claim(job_id)
    own = "finetune_output/code/versions/1/full_model"
    rig.finish(job_id, base_model=own, adapter_path=None)
    assert resolve(rig, "code") == {
        "id": "code@1", "base_model": own, "adapter_path": None, "merged_path": None, "max_lora_rank": 8,
        "turn_end_ids": [],
    }  # fmt: skip
    refused = rig.post("/v1/sage/models/code/merge", {}, status=400)
    assert f"{own} is a plain model folder already" in refused["error"]["message"]
    refused = rig.post("/v1/sage/models/code/merge", {"format": "zip", "content": "adapter"}, status=400)
    assert "no adapter to export" in refused["error"]["message"]


def test_a_model_tuned_in_full_is_exported_from_its_own_folder(rig: Rig) -> None:
    job_id = rig.create_job(sage={"task": "code", "config": {"tuning": "full"}})["id"]
    rig.claim(job_id)
    own = "finetune_output/code/versions/1/full_model"
    rig.finish(job_id, base_model=own, adapter_path=None)
    claim = claim_merge(rig, merge(rig, format="ollama"))
    assert (claim["base_model"], claim["adapter_path"]) == (own, "")


def test_base_models_resolve_to_the_folder_that_adapters_stand_on(rig: Rig) -> None:
    add_base(rig, "smollm2-135m")
    add_base(rig, "Org--Tiny")
    plain = {"adapter_path": None, "merged_path": None, "max_lora_rank": 16, "turn_end_ids": []}
    assert resolve(rig, "base:smollm2-135m") == {
        "id": "base:smollm2-135m",
        "base_model": "base_models/smollm2-135m",
        **plain,
    }
    assert resolve(rig, "base:Org/Tiny")["base_model"] == "base_models/Org--Tiny"
    assert rig.get("/v1/models/base:Org/Tiny")["id"] == "base:Org/Tiny"


@pytest.mark.parametrize("wrong", ["cod", "code@7", "code@", "code@x", "base:", "base:smollm2-153m"])
def test_a_wrong_name_lists_the_right_ones(rig: Rig, wrong: str) -> None:
    add_base(rig, "smollm2-135m")
    rig.train()
    rig.train(suffix="zebra")
    answer = rig.get("/internal/models/resolve", name=wrong, status=404)["error"]
    assert answer["code"] == "model_not_found"
    for right in ("code", "code@1", "zebra", "base:smollm2-135m"):
        assert right in answer["message"]
    close = "base:smollm2-135m" if wrong.startswith("base:s") else "code"
    if wrong != "base:":
        assert answer["message"].split("There are: ")[1].startswith(close)


@pytest.mark.parametrize("digits", ["99999999999999999999999", "9999999999", "9" * 5000, "٣"])
def test_a_version_that_no_database_could_hold_is_unknown_like_any_other(rig: Rig, digits: str) -> None:
    rig.train()
    wrong = f"code@{digits}"
    for answer in (
        rig.http.get(f"/v1/models/{wrong}"),
        rig.http.delete(f"/v1/models/{wrong}"),
        rig.http.post(f"/v1/sage/models/{wrong}/merge", json={}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def train_with_checkpoints(
    rig: Rig, *steps: int, as_result: Mapping[str, Any] | None = None, **fields: Any
) -> str:
    """A finished job of these checkpoints, all of which are kept; returns its id."""
    job_id = str(rig.create_job(**fields)["id"])
    rig.claim(job_id)
    for step in steps:
        path = f"finetune_output/code/checkpoints/checkpoint-{step}"
        rig.report(job_id, checkpoints=[{"step": step, "path": path, "train_loss": 1.0}])
        keep(rig.home / path, job_id)
    rig.finish(job_id, **(as_result or {}))
    return job_id


def keep(folder: Path, job_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"run": {"run_id": job_id}}))


def test_checkpoints_of_a_finished_job_resolve_by_the_names_they_are_listed_under(rig: Rig) -> None:
    job_id = train_with_checkpoints(rig, 2, 4)
    listed = rig.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints")["data"]
    names = [item["fine_tuned_model_checkpoint"] for item in listed]
    assert names == ["code@1:ckpt-step-4", "code@1:ckpt-step-2"]
    for name, step in zip(names, (4, 2), strict=True):
        assert resolve(rig, name) == {
            **resolve(rig, "code@1"),
            "id": name,
            "adapter_path": f"finetune_output/code/checkpoints/checkpoint-{step}",
        }
        assert rig.get(f"/v1/models/{name}")["id"] == name
    assert resolve(rig, "code:ckpt-step-2")["id"] == "code@1:ckpt-step-2"
    assert [item["sage"]["is_servable"] for item in listed] == [True, True]


def test_serving_hears_where_the_run_taught_its_answers_to_end(rig: Rig) -> None:
    train_with_checkpoints(rig, 2, as_result={"meta": {"turn_end_ids": [2]}})
    for name in ("code", "code@1:ckpt-step-2"):
        assert resolve(rig, name)["turn_end_ids"] == [2]


def test_a_checkpoint_that_is_gone_names_those_that_are_there(rig: Rig) -> None:
    train_with_checkpoints(rig, 2, 4, 6)
    shutil.rmtree(rig.home / "finetune_output/code/checkpoints/checkpoint-2")
    for wrong in ("code@1:ckpt-step-2", "code@1:ckpt-step-7"):
        message = str(resolve(rig, wrong, status=404)["error"])
        assert f"There is no checkpoint '{wrong}'" in message and "that are there: 4, 6;" in message
    shutil.rmtree(rig.home / "finetune_output/code/checkpoints")
    train_with_checkpoints(rig, 4)  # the next run of the name, whose steps have the same folders
    assert "that are there: none; or ask for its job's result, 'code@1'" in str(
        resolve(rig, "code@1:ckpt-step-4", status=404)["error"]
    )
    assert resolve(rig, "code@2:ckpt-step-4")["id"] == "code@2:ckpt-step-4"


def test_a_checkpoint_of_an_unfinished_job_or_of_whole_weights_answers_nobody(rig: Rig) -> None:
    whole = {"base_model": "finetune_output/code/versions/1/full_model", "adapter_path": None}
    train_with_checkpoints(rig, 2, as_result=whole, sage={"task": "code", "config": {"tuning": "full"}})
    refused = str(resolve(rig, "code@1:ckpt-step-2", status=404)["error"])
    assert "tuned in full" in refused and "'code@1'" in refused
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    keep(rig.home / "c/2", job_id)
    rig.report(job_id, checkpoints=[{"step": 2, "path": "c/2", "train_loss": 1.0}])
    (listed,) = rig.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints")["data"]
    assert listed["sage"]["is_servable"] is False
    assert "There is no model 'code@2'" in str(resolve(rig, "code@2:ckpt-step-2", status=404)["error"])


def test_without_models_the_way_to_one_is_said(rig: Rig) -> None:
    assert "sage finetune quickstart" in rig.get("/v1/models/code", status=404)["error"]["message"]


def test_deleting_a_version_moves_the_name_back_and_keeps_the_files(rig: Rig) -> None:
    adapter = rig.home / "finetune_output" / "code" / "versions" / "2"
    rig.train()
    rig.train()
    adapter.mkdir(parents=True)
    assert rig.http.delete("/v1/models/code@2").json() == {"id": "code@2", "object": "model", "deleted": True}
    assert resolve(rig, "code")["id"] == "code@1"
    assert adapter.is_dir()
    # The number is not given again: somebody may still serve what it meant.
    assert rig.train()["fine_tuned_model"] == "code@3"


def test_deleting_a_name_forgets_all_its_versions(rig: Rig) -> None:
    rig.train()
    rig.train()
    rig.train(suffix="other")
    assert rig.http.delete("/v1/models/code").status_code == 200
    assert [card["id"] for card in rig.get("/v1/models")["data"]] == ["other", "other@1"]
    assert rig.http.delete("/v1/models/code").status_code == 404


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("base:smollm2-135m", "a base model"),
        ("smollm2-135m", "a base model"),
        ("code@1:ckpt-step-2", "a checkpoint"),
        ("code:ckpt-step-2", "a checkpoint"),
    ],
)
def test_what_is_only_files_is_not_deleted_here(rig: Rig, name: str, what: str) -> None:
    add_base(rig, "smollm2-135m")
    train_with_checkpoints(rig, 2)
    before = rig.get("/v1/models")
    refused = rig.http.delete(f"/v1/models/{name}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    assert f"{name} is {what}" in refused.json()["error"]["message"]
    assert rig.get("/v1/models") == before
    assert rig.get(f"/v1/models/{name}")["id"].endswith(name.partition(":")[2] or name)


@pytest.mark.parametrize("name", ["base:nope", "nope", "code@1:ckpt-step-9", "Org/NotHere"])
def test_what_is_not_there_is_not_found_when_it_is_deleted(rig: Rig, name: str) -> None:
    rig.train()
    assert rig.http.delete(f"/v1/models/{name}").status_code == 404


def test_a_base_is_found_by_the_name_that_jobs_have_for_it(rig: Rig) -> None:
    assert rig.get("/v1/models/smollm2-135m")["id"] == "smollm2-135m"  # jobs take it before it is fetched
    add_base(rig, "Org--Tiny")
    assert rig.get("/v1/models/Org/Tiny") == {
        "id": "Org/Tiny", "object": "model", "created": 0, "owned_by": "sage", "sage": None
    }  # fmt: skip
    rig.train(suffix="twin", model="Org/Tiny")
    add_base(rig, "twin")
    assert rig.get("/v1/models/twin")["sage"]["alias_of"] == "twin@1"


def test_a_job_that_ends_late_does_not_pull_the_name_back(rig: Rig) -> None:
    old = rig.create_job()["id"]
    rig.claim(old)
    rig.post(f"/v1/fine_tuning/jobs/{old}/pause")
    rig.finish(old, "paused")
    assert rig.train()["fine_tuned_model"] == "code@2"
    rig.post(f"/v1/fine_tuning/jobs/{old}/resume")
    rig.claim(old)
    assert rig.finish(old, attempt=2)["fine_tuned_model"] == "code@1"
    assert resolve(rig, "code")["id"] == "code@2"


def merge(rig: Rig, name: str = "code", **body: Any) -> str:
    return str(rig.post(f"/v1/sage/models/{name}/merge", body or None)["id"])


def claim_merge(rig: Rig, merge_id: str, *, status: int = 200) -> dict[str, object]:
    body = {"worker_id": "m1"}
    answer: dict[str, object] = rig.post(f"/internal/merges/{merge_id}/claim", body, status=status)
    return answer


def end_merge(
    rig: Rig, merge_id: str, outcome: str, attempt: int = 1, *, status: int = 200, **fields: Any
) -> dict[str, object]:
    body = {"worker_id": "m1", "attempt": attempt, "outcome": outcome, **fields}
    answer: dict[str, object] = rig.post(f"/internal/merges/{merge_id}/finish", body, status=status)
    return answer


def test_a_merge_from_request_to_record(rig: Rig) -> None:
    rig.sweep()
    rig.train()
    merge_id = merge(rig, dtype="fp16")
    assert rig.sweep() == [merge_id]
    assert claim_merge(rig, merge_id) == {
        "merge_id": merge_id,
        "attempt": 1,
        "lease_s": 30.0,
        "name": "code",
        "version": 1,
        "base_model": "base_models/smollm2-135m",
        "adapter_path": rig.get("/v1/models/code")["sage"]["adapter_path"],
        "output_dir": "finetune_output/code/versions/1",
        "link_path": "finetune_output/code/merged_model",
        "dtype": "fp16",
        "format": "safetensors",
        "content": "merged",
        "repo": None,
        "allow_public": False,
    }
    claim_merge(rig, merge_id, status=409)
    rig.post(f"/internal/merges/{merge_id}/events", {"worker_id": "m1", "attempt": 1, "phase": "writing"})
    assert rig.get(f"/v1/sage/merges/{merge_id}")["phase"] == "writing"
    assert rig.http.delete("/v1/models/code").status_code == 409
    end_merge(rig, merge_id, "succeeded", status=400)
    done = end_merge(rig, merge_id, "succeeded", merged_path="finetune_output/code/merged_model")
    assert (done["status"], done["merged_path"]) == ("succeeded", "finetune_output/code/merged_model")
    assert end_merge(rig, merge_id, "succeeded", merged_path="again") == done
    assert rig.get("/v1/models/code@1")["sage"]["merged_path"] == "finetune_output/code/merged_model"
    assert resolve(rig, "code")["merged_path"] == "finetune_output/code/merged_model"


def test_asked_twice_a_version_is_merged_once(rig: Rig) -> None:
    rig.train()
    first = merge(rig)
    assert merge(rig, "code@1") == first
    claim_merge(rig, first)
    end_merge(rig, first, "failed", error_message="no room")
    assert rig.get(f"/v1/sage/merges/{first}")["error"] == "no room"
    assert merge(rig) != first


@pytest.mark.parametrize(
    "wish", [{}, {"format": "zip"}, {"format": "hub", "repo": "me/code"}], ids=["plain", "zip", "hub"]
)
def test_a_merge_under_way_is_no_answer_to_another_dtype(rig: Rig, wish: dict[str, str]) -> None:
    rig.train()
    first = merge(rig, **wish, dtype="fp16")
    assert rig.get(f"/v1/sage/merges/{first}")["dtype"] == "fp16"
    refused = rig.post("/v1/sage/models/code/merge", {**wish, "dtype": "fp32"}, status=409)["error"]
    assert first in refused["message"] and "dtype=fp16" in refused["message"]
    assert merge(rig, **wish, dtype="fp16") == first
    claim_merge(rig, first)
    end_merge(rig, first, "failed", error_message="no room")
    assert merge(rig, **wish, dtype="fp32") != first


@pytest.mark.parametrize("wish", [{"format": "gguf-f16"}, {"format": "zip", "content": "adapter"}])
def test_what_has_no_weights_of_a_dtype_is_the_same_with_any(rig: Rig, wish: dict[str, str]) -> None:
    rig.train()
    assert merge(rig, **wish, dtype="fp16") == merge(rig, **wish, dtype="fp32")


def test_an_export_is_work_of_its_own_and_leaves_the_merge_alone(rig: Rig) -> None:
    rig.train()
    first = merge(rig, format="gguf-q8_0")
    assert merge(rig, format="gguf-q8_0") == first
    assert merge(rig, format="gguf-f16") != first
    claim = claim_merge(rig, first)
    assert (claim["format"], claim["link_path"]) == ("gguf-q8_0", None)
    path = "finetune_output/code/versions/1/exports/gguf-q8_0/code-1-q8_0.gguf"
    done = end_merge(rig, first, "succeeded", merged_path=path, meta={"parity": {"same": 3}})
    assert (done["result_path"], done["merged_path"]) == (path, None)
    assert done["report"] == {"parity": {"same": 3}}
    assert rig.get("/v1/models/code@1")["sage"]["merged_path"] is None


def test_what_a_repository_holds_is_part_of_the_wish(rig: Rig) -> None:
    rig.train()
    wish = {"format": "hub", "repo": "me/code", "content": "adapter"}
    first = merge(rig, **wish)
    assert merge(rig, **wish) == first
    assert merge(rig, **wish | {"repo": "me/other"}) != first
    assert claim_merge(rig, first)["repo"] == "me/code"
    public = wish | {"repo": "me/public", "allow_public": True}
    meant = merge(rig, **public)
    assert merge(rig, **public) == meant
    claim = claim_merge(rig, meant)
    assert (claim["repo"], claim["allow_public"]) == ("me/public", True)
    refused = rig.post("/v1/sage/models/code/merge", public | {"allow_public": False}, status=409)["error"]
    assert meant in refused["message"] and refused["param"] == "allow_public"
    for wrong in (
        {"format": "hub"},
        {"repo": "me/code"},
        {"content": "adapter"},
        {"allow_public": True},
        wish | {"repo": "public:me/code"},
        wish | {"repo": "a" * 300},
    ):
        rig.post("/v1/sage/models/code/merge", wrong, status=400)


def test_every_version_keeps_its_own_merge_and_the_newest_has_the_link(rig: Rig) -> None:
    rig.train()
    first = merge(rig)
    claim_merge(rig, first)
    end_merge(rig, first, "succeeded", merged_path="finetune_output/code/versions/1/merged_model")
    rig.train()
    second = merge(rig)
    claim = claim_merge(rig, second)
    assert claim["output_dir"] == "finetune_output/code/versions/2"
    assert claim["link_path"] == "finetune_output/code/merged_model"
    end_merge(rig, second, "succeeded", merged_path="finetune_output/code/versions/2/merged_model")
    assert rig.get("/v1/models/code@1")["sage"]["merged_path"].endswith("versions/1/merged_model")
    assert rig.get("/v1/models/code@2")["sage"]["merged_path"].endswith("versions/2/merged_model")
    old = claim_merge(rig, merge(rig, "code@1"))
    assert old["output_dir"] == "finetune_output/code/versions/1"
    assert old["link_path"] is None


def test_a_lost_merger_is_replaced_and_given_up_after_five(rig: Rig) -> None:
    rig.train()
    rig.sweep()
    merge_id = merge(rig)
    for attempt in range(1, 6):
        assert rig.sweep() == [merge_id]
        assert claim_merge(rig, merge_id)["attempt"] == attempt
        rig.clock.advance(31)
    assert rig.sweep() == []
    assert "5 mergers" in rig.get(f"/v1/sage/merges/{merge_id}")["error"]
    assert end_merge(rig, merge_id, "succeeded", 4, status=409, merged_path="late")


def test_an_end_that_comes_after_the_merge_was_taken_back_is_not_taken_for_a_repetition(rig: Rig) -> None:
    rig.train()
    merge_id = merge(rig)
    claim_merge(rig, merge_id)
    rig.clock.advance(31)
    rig.sweep()
    end_merge(rig, merge_id, "succeeded", status=409, merged_path="late")
    end_merge(rig, merge_id, "failed", status=409)
    assert end_merge(rig, merge_id, "released")["status"] == "queued"


def test_a_merger_that_leaves_gives_the_merge_back(rig: Rig) -> None:
    rig.train()
    rig.sweep()
    merge_id = merge(rig)
    rig.sweep()
    claim_merge(rig, merge_id)
    assert end_merge(rig, merge_id, "released")["status"] == "queued"
    assert rig.sweep() == [merge_id]
    assert claim_merge(rig, merge_id)["attempt"] == 2


def test_what_cannot_be_merged_is_said(rig: Rig) -> None:
    rig.post("/v1/sage/models/base:smollm2-135m/merge", {}, status=400)
    rig.post("/v1/sage/models/nope/merge", {}, status=404)
    rig.get("/v1/sage/merges/merge-no", status=404)


def test_a_model_of_a_task_whose_plug_in_is_gone_is_still_listed(rig: Rig) -> None:
    rig.train()
    with rig.parts.database.write() as session:
        session.execute(update(VersionRow).values(task="sums"))
    assert [card["sage"]["task"] for card in rig.get("/v1/models")["data"]] == ["sums", "sums"]
