"""Jobs, their events and their checkpoints, found and listed over HTTP."""

from __future__ import annotations

from typing import Any

from tests.fakes.orchestrator_rig import Rig

JOBS = "/v1/fine_tuning/jobs"


def test_lists_are_paged_newest_first(rig: Rig) -> None:
    ids = [rig.create_job(suffix=f"job{number}")["id"] for number in range(5)]
    page = rig.get(JOBS, limit=2)
    assert [job["id"] for job in page["data"]] == [ids[4], ids[3]]
    assert page["object"] == "list" and page["has_more"] is True
    page = rig.get(JOBS, limit=10, after=page["last_id"])
    assert [job["id"] for job in page["data"]] == [ids[2], ids[1], ids[0]]
    assert page["has_more"] is False
    assert rig.get(JOBS, after="ftjob-none", status=400)["error"]["param"] == "after"


def test_jobs_are_found_by_name(rig: Rig) -> None:
    older, _, newer = (rig.create_job(sage={"task": "code", "name": name}) for name in ("mine", "mi", "mine"))
    page = rig.get(JOBS, name="mine", limit=1)
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([newer["id"]], True)
    page = rig.get(JOBS, name="mine", limit=1, after=page["last_id"])
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([older["id"]], False)
    for nobody in ("", "MINE", "mine%", "mi\0ne"):
        assert rig.get(JOBS, name=nobody)["data"] == []


def test_jobs_are_found_by_metadata(rig: Rig) -> None:
    rig.create_job(suffix="a", metadata={"team": "red"})
    blue = rig.create_job(suffix="b", metadata={"team": "blue"})
    found = rig.get(JOBS, **{"metadata[team]": "blue"})["data"]
    assert [job["id"] for job in found] == [blue["id"]]


def test_events_can_be_followed_forwards(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    seen = rig.get(f"{JOBS}/{job_id}/events", order="asc")
    rig.report(
        job_id, events=[{"created_at": 5.0, "message": "Step 1/4", "type": "metrics", "data": {"step": 1}}]
    )
    news = rig.get(f"{JOBS}/{job_id}/events", order="asc", after=seen["last_id"])["data"]
    assert [(event["message"], event["type"], event["data"]) for event in news] == [
        ("Step 1/4", "metrics", {"step": 1})
    ]
    newest_first = rig.get(f"{JOBS}/{job_id}/events", limit=1)
    assert newest_first["data"] == news and newest_first["has_more"]


def test_events_of_one_kind_are_followed_past_all_others(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    path = f"{JOBS}/{job_id}/events"

    def told(kind: str, **params: Any) -> tuple[list[str], dict[str, Any]]:
        page = rig.get(path, type=kind, order="asc", **params)
        return [event["message"] for event in page["data"]], page

    def news(kind: str, message: str) -> dict[str, Any]:
        return {"created_at": 5.0, "message": message, "type": kind, "data": {"step": 1}}

    before, _ = told("message")
    rig.report(job_id, events=[news("metrics", "Step 1"), news("message", "Loss"), news("metrics", "Step 2")])
    newest = rig.get(path, limit=1)["data"][0]
    texts, page = told("message")
    assert texts == [*before, "Loss"]
    # Where a follower goes on: behind the steps too, which are not looked through again.
    assert (page["last_id"], page["has_more"]) == (newest["id"], False)
    texts, page = told("message", after=page["last_id"])
    assert (texts, page["last_id"]) == ([], newest["id"])
    rig.report(job_id, events=[news("message", "Saved")])
    assert told("message", after=newest["id"])[0] == ["Saved"]

    texts, page = told("metrics", limit=1)
    assert (texts, page["has_more"], page["last_id"]) == (["Step 1"], True, page["data"][0]["id"])
    assert told("metrics", limit=1, after=page["last_id"])[0] == ["Step 2"]
    # Backwards, and of all kinds, a page's last is its last.
    page = rig.get(path, type="metrics", limit=5)
    assert [event["message"] for event in page["data"]] == ["Step 2", "Step 1"]
    assert page["last_id"] == page["data"][-1]["id"]
    assert rig.get(path, type="steps", status=400)["error"]["param"] == "type"


def test_checkpoints_are_listed_once_per_step(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    for loss in (2.0, 1.5):
        rig.report(job_id, checkpoints=[{"step": 10, "path": "c/10", "train_loss": loss}])
    rig.report(job_id, checkpoints=[{"step": 20, "path": "c/20", "train_loss": 1.0, "eval_loss": 1.1}])
    listed = rig.get(f"{JOBS}/{job_id}/checkpoints")["data"]
    assert [item["step_number"] for item in listed] == [20, 10]
    assert {name: value for name, value in listed[0]["metrics"].items() if value is not None} == {
        "step": 20,
        "train_loss": 1.0,
        "full_valid_loss": 1.1,
    }
    assert listed[1]["metrics"]["train_loss"] == 1.5
    assert listed[0]["fine_tuned_model_checkpoint"] == "code@1:ckpt-step-20"


def test_a_checkpoint_has_what_was_measured_at_its_step(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)

    def tell(seq: int, kind: str, **data: Any) -> dict[str, Any]:
        return {"seq": seq, "created_at": 5.0, "message": "news", "type": kind, "data": data}

    events = [
        tell(1, "metrics", step=2, train_loss=3.0, train_mean_token_accuracy=0.1),
        tell(2, "metrics", step=4, train_loss=2.0, train_mean_token_accuracy=0.5),
        tell(3, "message", step=4, full_valid_loss=1.25, full_valid_mean_token_accuracy=0.75),
        tell(4, "message", step=4, prompt="And?", answer="Yes."),
        tell(5, "metrics", step=2, train_loss=2.5, train_mean_token_accuracy=0.2),  # repeated after a resume
    ]
    rig.report(job_id, events=events, checkpoints=[{"step": step, "path": f"c/{step}"} for step in (2, 3, 4)])
    listed = rig.get(f"{JOBS}/{job_id}/checkpoints")["data"]
    fourth = {"step": 4, "train_loss": 2.0, "train_mean_token_accuracy": 0.5}
    assert listed[0]["metrics"] == {
        **fourth,
        "full_valid_loss": 1.25,
        "full_valid_mean_token_accuracy": 0.75,
    }
    assert {value for name, value in listed[1]["metrics"].items() if name != "step"} == {None}
    assert [listed[2]["metrics"][name] for name in ("train_loss", "train_mean_token_accuracy")] == [2.5, 0.2]


def test_unknown_jobs_are_not_found(rig: Rig) -> None:
    for path in ("", "/events", "/checkpoints"):
        assert rig.get(f"{JOBS}/ftjob-no{path}", status=404)["error"]["code"] == "not_found"
    for verb in ("cancel", "pause", "resume"):
        rig.post(f"{JOBS}/ftjob-no/{verb}", status=404)
