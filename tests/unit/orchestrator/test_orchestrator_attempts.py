"""Claims, reports and ends: one attempt at a time, and the database has the last word."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.orchestrator_rig import Rig, open_rig, rows

JOBS = "/v1/fine_tuning/jobs"


def test_a_claim_carries_all_that_the_attempt_needs(rig: Rig) -> None:
    training, validation = rig.upload(rows(), "train.json"), rig.upload(rows(), "to check.jsonl")
    job = rig.create_job(training_file=training, validation_file=validation, suffix="mine")
    claim = rig.claim(job["id"])
    assert (claim["attempt"], claim["name"], claim["version"]) == (1, "mine", 1)
    assert claim["training_path"] == f"files/{training}.json"
    assert (rig.home / claim["validation_path"]).read_bytes() == rows()
    assert (claim["training_filename"], claim["validation_filename"]) == ("train.json", "to check.jsonl")
    assert claim["config"] == job["sage"]["config"]
    assert claim["output_dir"] == "finetune_output/mine"
    running = rig.job(job["id"])
    assert (running["status"], running["sage"]["worker_id"]) == ("running", "w1")


def test_a_claim_tells_which_other_jobs_have_begun_and_not_ended(rig: Rig) -> None:
    paused, cancelled, lost = (rig.create_job()["id"] for _ in range(3))
    rig.train()
    for job_id in (paused, cancelled, lost):
        rig.claim(job_id)
        rig.post(f"{JOBS}/{job_id}/pause")
        rig.finish(job_id, "paused")
    rig.post(f"{JOBS}/{cancelled}/cancel")
    rig.post(f"{JOBS}/{lost}/resume")  # queued, with an attempt behind it
    rig.create_job()  # has not begun
    claim = rig.claim(rig.create_job()["id"])
    assert sorted(claim["unfinished_jobs"]) == sorted([paused, lost])


def test_a_second_worker_goes_home(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    assert rig.claim(job_id, "w2", status=409)["error"]["code"] == "not_yours"
    rig.claim("ftjob-no", status=404)


def test_a_claim_whose_reply_was_lost_is_answered_again(rig: Rig) -> None:
    job = rig.create_job()
    first = rig.claim(job["id"], claim_id="one wish")
    assert rig.claim(job["id"], claim_id="one wish") == first
    assert rig.claim(job["id"], status=409)["error"]["code"] == "not_yours"
    assert rig.claim(job["id"], claim_id="another", status=409)["error"]["code"] == "not_yours"
    assert len([text for text in rig.messages(job["id"]) if text.startswith("Started on")]) == 1
    rig.finish(job["id"])
    rig.claim(job["id"], claim_id="one wish", status=409)


def test_a_claim_of_a_merge_whose_reply_was_lost_is_answered_again(rig: Rig) -> None:
    rig.train()
    path = f"/internal/merges/{rig.post('/v1/sage/models/code/merge')['id']}/claim"
    first = rig.post(path, {"worker_id": "m1", "claim_id": "one wish"})
    assert rig.post(path, {"worker_id": "m1", "claim_id": "one wish"}) == first
    rig.post(path, {"worker_id": "m1", "claim_id": "another"}, status=409)


def test_success_registers_a_version_and_moves_the_name(rig: Rig) -> None:
    job = rig.train()
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", "code@1")
    assert job["finished_at"] == int(rig.clock.now)
    assert rig.train()["fine_tuned_model"] == "code@2"
    assert rig.get("/internal/models/resolve", name="code")["id"] == "code@2"


def test_metrics_add_up_and_tokens_are_told_at_the_end(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.report(job_id, metrics={"base_eval_loss": 2.5, "step": 1, "eta_s": 60})
    running = rig.job(job_id)
    assert running["estimated_finish"] == int(rig.clock.now + 60)
    assert running["trained_tokens"] is None
    done = rig.finish(job_id, metrics={"eval_loss": 1.9, "trained_tokens": 123})
    metrics = done["sage"]["metrics"]
    assert (metrics["base_eval_loss"], metrics["eval_loss"], metrics["eta_s"]) == (2.5, 1.9, None)
    assert done["trained_tokens"] == 123
    assert rig.get("/v1/models/code@1")["sage"]["base_eval_loss"] == 2.5


def heard(*numbers: int) -> list[dict[str, object]]:
    return [{"created_at": 1.0, "message": f"news {number}", "seq": number} for number in numbers]


def test_what_is_told_twice_is_written_down_once(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.report(job_id, events=heard(1, 2))
    # The answer was lost; meanwhile there is more to tell.
    rig.report(job_id, events=heard(1, 2, 3))
    rig.report(job_id, events=heard(1, 2, 3))
    rig.report(job_id, events=heard(4))
    news = [text for text in rig.messages(job_id) if text.startswith("news")]
    assert news == ["news 1", "news 2", "news 3", "news 4"]


def test_every_attempt_counts_from_one_again(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.report(job_id, events=heard(1, 2))
    rig.finish(job_id, "released")
    rig.claim(job_id)
    rig.report(job_id, 2, events=heard(1))
    assert [text for text in rig.messages(job_id) if text.startswith("news")] == [
        "news 1",
        "news 2",
        "news 1",
    ]


def test_a_claim_says_which_steps_have_been_told(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    assert rig.claim(job_id)["told_step"] == 0
    events = [
        {"created_at": 1.0, "message": f"step {step}", "type": "metrics", "data": {"step": step}}
        for step in (2, 4)
    ]
    # Its news may be further than the events that one report has room for.
    rig.report(job_id, events=events, metrics={"step": 7})
    rig.finish(job_id, "released")
    assert rig.claim(job_id)["told_step"] == 4


def test_events_without_a_number_are_always_taken(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    for _ in range(2):
        rig.report(job_id, events=[{"created_at": 1.0, "message": "from an older trainer"}])
    assert rig.messages(job_id).count("from an older trainer") == 2


def test_a_claim_says_what_the_name_means_so_far(rig: Rig) -> None:
    first, second = rig.create_job()["id"], rig.create_job()["id"]
    assert rig.claim(first)["named_version"] is None
    rig.finish(first)
    assert rig.claim(second)["named_version"] == 1
    rig.finish(second)
    rig.http.delete("/v1/models/code@2").raise_for_status()
    assert rig.claim(rig.create_job()["id"])["named_version"] == 1


def test_a_run_that_was_done_before_its_cancellation_counts(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.post(f"{JOBS}/{job_id}/cancel")
    assert rig.finish(job_id)["fine_tuned_model"] == "code@1"


def test_a_failure_keeps_its_reason(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    job = rig.finish(job_id, "failed", error_code="out_of_memory", error_message="no room")
    assert job["status"] == "failed"
    assert job["error"] == {"code": "out_of_memory", "message": "no room", "param": None}
    assert rig.get("/v1/models")["data"] == []
    assert rig.messages(job_id)[-1] == "no room"


def test_a_success_without_an_adapter_is_refused(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.finish(job_id, adapter_path=None, status=400)
    assert rig.job(job_id)["status"] == "running"


def test_the_end_told_twice_counts_once(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    assert rig.finish(job_id) == rig.finish(job_id)
    assert len(rig.get("/v1/models")["data"]) == 2
    assert rig.messages(job_id).count("New fine-tuned model created: code@1") == 1


def test_two_jobs_of_one_name_do_not_write_its_folder_at_once(rig: Rig) -> None:
    first, second = rig.create_job()["id"], rig.create_job()["id"]
    rig.sweep()
    rig.claim(first)
    assert "named code" in rig.claim(second, "w2", status=409)["error"]["message"]
    rig.finish(first)
    # Its worker went home: it is called again.
    assert rig.sweep() == [second]
    assert rig.claim(second, "w2")["version"] == 2


def test_a_new_database_does_not_write_over_old_versions(rig: Rig) -> None:
    (rig.home / "finetune_output" / "code" / "versions" / "7").mkdir(parents=True)
    assert rig.claim(rig.create_job()["id"])["version"] == 8


def test_internal_routes_want_the_token_where_one_is_set(home: Path) -> None:
    with open_rig(home, internal_token="secret") as rig:
        job_id = rig.create_job()["id"]
        assert rig.claim(job_id, status=401)["error"]["type"] == "authentication_error"
        rig.get("/internal/workers", status=401)
        rig.get("/internal/models/resolve", status=401, name="x")
        rig.http.headers["X-Sage-Internal-Token"] = "secret"
        rig.claim(job_id)
