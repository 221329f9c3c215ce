"""A succeeded job's result file: the steps as CSV, downloadable like any file."""

from __future__ import annotations

import csv
import io
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.orchestrator_rig import Rig
from tests.fakes.small_disk import no_room_below

from sage_contracts.jobs import JobMetrics
from sage_orchestrator.jobs.results import step_metrics_csv

HEADERS = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]


def step(number: int, **figures: Any) -> dict[str, Any]:
    data = {"step": number, "total_steps": 2} | figures
    return {"created_at": 1.0, "message": f"Step {number}/2", "type": "metrics", "data": data}


def test_a_succeeded_job_has_its_steps_as_a_file(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    assert rig.job(job_id)["result_files"] == []
    rig.claim(job_id)
    held_out = {"created_at": 1.0, "message": "Held-out loss", "data": {"step": 0, "full_valid_loss": 2.5}}
    accuracy = {"train_mean_token_accuracy": 0.5}
    rig.report(
        job_id, events=[held_out, step(1, train_loss=2.25, learning_rate=1e-4), step(2, train_loss=2.0)]
    )
    rig.report(job_id, events=[step(2, train_loss=1.75, **accuracy)])
    job = rig.finish(job_id, metrics={"eval_loss": 1.5})

    [file_id] = job["result_files"]
    content = rig.http.get(f"/v1/files/{file_id}/content").text
    assert content.splitlines() == [",".join(HEADERS), "0,,,2.5,", "1,2.25,,,", "2,1.75,0.5,1.5,"]
    file = rig.get(f"/v1/files/{file_id}")
    assert (file["purpose"], file["filename"]) == ("fine-tune-results", "step_metrics.csv")
    assert file["bytes"] == len(content)
    assert [each["id"] for each in rig.get("/v1/files", purpose="fine-tune-results")["data"]] == [file_id]
    # Said twice, written once.
    assert rig.finish(job_id, metrics={"eval_loss": 1.5})["result_files"] == [file_id]
    assert [path.name for path in (rig.home / "files").iterdir()] == [f"{file_id}.csv"]


def test_the_steps_are_read_before_the_end_is_written_so_that_nobody_waits_to_write(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.report(job_id, events=[step(1, train_loss=2.0)], metrics={"base_eval_loss": 2.5})
    for outcome, is_read in (("succeeded", True), ("succeeded", False)):
        with rig.statements() as asked:
            job = rig.finish(job_id, outcome)
        assert any("FROM job_events" in statement for statement in asked) is is_read
    content = rig.http.get(f"/v1/files/{job['result_files'][0]}/content").text
    assert content.splitlines()[1:] == ["0,,,2.5,", "1,2,,,"]


def test_a_job_that_did_not_succeed_has_none(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.report(job_id, events=[step(1, train_loss=2.0)])
    assert rig.finish(job_id, "failed")["result_files"] == []
    assert rig.get("/v1/files")["data"] == []


def test_a_success_outlives_a_disk_that_is_too_full_for_its_steps(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.report(job_id, events=[step(1, train_loss=2.0)])
    with no_room_below(rig.home / "files"):
        job = rig.finish(job_id)
    assert (job["status"], job["fine_tuned_model"], job["result_files"]) == ("succeeded", "code@1", [])
    [warning] = [
        event
        for event in rig.get(f"/v1/fine_tuning/jobs/{job_id}/events")["data"]
        if event["level"] == "warn"
    ]
    assert "step_metrics.csv" in warning["message"]
    assert "disk is full" in warning["message"]
    assert rig.messages(job_id)[-1] == "New fine-tuned model created: code@1"


def test_what_was_measured_stays_with_its_step() -> None:
    """The last step was worse than the one before, whose weights and loss became the job's."""
    events = [
        {"step": 0, "full_valid_loss": 2.0, "full_valid_mean_token_accuracy": 0.25},
        {"step": 1, "train_loss": 1.5},
        {"step": 1, "full_valid_loss": 1.0, "full_valid_mean_token_accuracy": 0.75},
        {"step": 2, "train_loss": 1.25},
    ]
    rows = step_metrics_csv(events, JobMetrics(base_eval_loss=2.0, eval_loss=1.0)).splitlines()[1:]
    assert rows == ["0,,,2,0.25", "1,1.5,,1,0.75", "2,1.25,,,"]


def test_results_cannot_be_uploaded(rig: Rig) -> None:
    data, files = {"purpose": "fine-tune-results"}, {"file": ("x.csv", b"step\n")}
    response = rig.http.post("/v1/files", files=files, data=data)
    assert response.status_code == 400
    assert "but for fine-tune, assistants" in response.json()["error"]["message"]


@given(
    events=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "step": st.integers(0, 5),
                "train_loss": st.none() | st.floats(0, 10),
                "full_valid_loss": st.floats(0, 10),
                "note": st.text(),
            },
        )
    ),
    metrics=st.builds(JobMetrics, base_eval_loss=st.none() | st.floats(0, 10)),
)
def test_every_row_is_a_step_with_figures(events: list[dict[str, Any]], metrics: JobMetrics) -> None:
    headers, *rows = csv.reader(io.StringIO(step_metrics_csv(events, metrics)))
    assert headers == HEADERS
    steps = [int(row[0]) for row in rows]
    assert steps == sorted(set(steps))
    assert all(len(row) == len(HEADERS) and any(row[1:]) for row in rows)
    with_loss = {event["step"] for event in events if "step" in event and event.get("train_loss") is not None}
    assert with_loss == {int(row[0]) for row in rows if row[1]}
