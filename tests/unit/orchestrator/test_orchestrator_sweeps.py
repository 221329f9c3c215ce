"""Sweeps: the grid is looked at whole, its jobs are ordinary, the best one gets the name."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.orchestrator_rig import Rig, rows

SWEEPS = "/v1/sage/sweeps"
GRID = {"learning_rate": [1e-4, 2e-4], "lora.r": [4, 8]}


def create(rig: Rig, status: int = 200, **fields: Any) -> Any:
    body = {"model": "smollm2-135m", "sage": {"task": "code"}, "grid": GRID} | fields
    return rig.post(SWEEPS, body, status=status)


def refusal(rig: Rig, **fields: Any) -> tuple[str, str]:
    error = create(rig, status=400, **fields)["error"]
    assert rig.get("/v1/fine_tuning/jobs")["data"] == []
    assert rig.get(SWEEPS)["data"] == []
    return error["param"], error["message"]


def end_all(rig: Rig, sweep: Any, losses: list[float | None]) -> Any:
    """Each job in turn with this held-out loss; None fails it."""
    for child, loss in zip(sweep["children"], losses, strict=True):
        rig.claim(child["job_id"])
        if loss is None:
            rig.finish(child["job_id"], "failed", error_message="no room")
        else:
            rig.finish(child["job_id"], metrics={"base_eval_loss": 2.0, "eval_loss": loss})
    rig.sweep()
    return rig.get(f"{SWEEPS}/{sweep['id']}")


def test_every_point_is_a_job_of_its_own(rig: Rig) -> None:
    sweep = create(rig, sage={"task": "code", "config": {"max_steps": 2, "lora": {"lora_alpha": 32}}})
    assert (sweep["status"], sweep["name"], sweep["best_job_id"]) == ("running", "code", None)
    assert [child["point"] for child in sweep["children"]] == [
        {"learning_rate": rate, "lora.r": rank} for rate in (1e-4, 2e-4) for rank in (4, 8)
    ]
    assert [child["name"] for child in sweep["children"]] == [f"code-s{number}" for number in (1, 2, 3, 4)]
    third = rig.job(sweep["children"][2]["job_id"])
    config = third["sage"]["config"]
    assert (config["learning_rate"], config["max_steps"]) == (2e-4, 2)
    # Naming a rank forgets neither the request's alpha nor the other defaults.
    assert (config["lora"]["r"], config["lora"]["lora_alpha"], config["lora"]["lora_dropout"]) == (
        4,
        32,
        0.05,
    )
    assert third["metadata"] == {"sweep": sweep["id"], "sweep.learning_rate": "0.0002", "sweep.lora.r": "4"}
    found = rig.get("/v1/fine_tuning/jobs", **{"metadata[sweep]": sweep["id"]})["data"]
    assert len(found) == 4
    # All wait at once; whoever trains takes them one after another.
    assert rig.sweep() == [child["job_id"] for child in sweep["children"]]


def test_the_best_job_gets_the_name(rig: Rig) -> None:
    rig.train()
    ended = end_all(rig, create(rig), [1.9, None, 1.5, 1.5])
    assert ended["status"] == "succeeded"
    assert ended["best_job_id"] == ended["children"][2]["job_id"]
    assert ended["fine_tuned_model"] == "code@2"
    assert ended["children"][1]["error"]["message"] == "no room"
    served = rig.get("/internal/models/resolve", name="code")
    assert served["id"] == "code@2"
    assert served["adapter_path"] == f"adapters/{ended['best_job_id']}"
    card = rig.get("/v1/models/code")["sage"]
    assert (card["alias_of"], card["eval_loss"], card["meta"]["same_as"]) == ("code@2", 1.5, "code-s3@1")
    link = rig.home / "finetune_output/code/versions/2"
    assert str(link.readlink()) == "../../code-s3/versions/1"
    # Its job can be looked at as any, and the next version gets the next number.
    assert rig.train()["fine_tuned_model"] == "code@3"


def test_the_end_is_told_once(rig: Rig) -> None:
    ended = end_all(rig, create(rig, grid={"lora.r": [4, 8]}), [1.0, 2.0])
    rig.clock.advance(60)
    rig.sweep()
    assert rig.get(f"{SWEEPS}/{ended['id']}") == ended
    assert [card["id"] for card in rig.get("/v1/models")["data"]].count("code@1") == 1


def test_the_best_so_far_is_known_while_it_runs(rig: Rig) -> None:
    sweep = create(rig, grid={"lora.r": [4, 8]})
    first, second = (child["job_id"] for child in sweep["children"])
    rig.claim(first)
    rig.finish(first, metrics={"eval_loss": 1.9})
    rig.claim(second)
    rig.report(second, metrics={"step": 3, "total_steps": 40, "loss": 2.2})
    rig.sweep()
    seen = rig.get(f"{SWEEPS}/{sweep['id']}")
    assert (seen["status"], seen["best_job_id"], seen["fine_tuned_model"]) == ("running", first, None)
    assert (seen["children"][1]["step"], seen["children"][1]["loss"]) == (3, 2.2)


def test_a_sweep_whose_jobs_all_fail_has_failed(rig: Rig) -> None:
    ended = end_all(rig, create(rig, grid={"lora.r": [4, 8]}), [None, None])
    assert (ended["status"], ended["best_job_id"]) == ("failed", None)
    assert rig.get("/v1/models")["data"] == []
    rig.post(f"{SWEEPS}/{ended['id']}/cancel", status=409)


def test_jobs_without_held_out_rows_have_no_best(rig: Rig) -> None:
    sweep = create(rig, grid={"lora.r": [4]})
    rig.claim(sweep["children"][0]["job_id"])
    rig.finish(sweep["children"][0]["job_id"])
    rig.sweep()
    ended = rig.get(f"{SWEEPS}/{sweep['id']}")
    assert (ended["status"], ended["best_job_id"], ended["fine_tuned_model"]) == ("succeeded", None, None)


def test_a_best_version_that_was_deleted_meanwhile_is_not_revived(rig: Rig) -> None:
    sweep = create(rig, grid={"lora.r": [4]})
    rig.claim(sweep["children"][0]["job_id"])
    rig.finish(sweep["children"][0]["job_id"], metrics={"eval_loss": 1.0})
    rig.http.delete("/v1/models/code-s1@1")
    rig.sweep()
    assert rig.get(f"{SWEEPS}/{sweep['id']}")["fine_tuned_model"] is None
    assert rig.get("/v1/models")["data"] == []


def test_cancel_stops_what_runs_and_forgets_what_waits(rig: Rig) -> None:
    sweep = create(rig)
    done, running, *waiting = (child["job_id"] for child in sweep["children"])
    rig.claim(done)
    rig.finish(done, metrics={"eval_loss": 1.0})
    rig.claim(running)
    seen = rig.post(f"{SWEEPS}/{sweep['id']}/cancel")
    assert (seen["status"], seen["is_cancelling"]) == ("running", True)
    assert [rig.job(job_id)["status"] for job_id in waiting] == ["cancelled", "cancelled"]
    assert rig.report(running)["order"] == "cancel"
    rig.finish(running, "cancelled")
    rig.sweep()
    ended = rig.post(f"{SWEEPS}/{sweep['id']}/cancel")
    # What was trained stays under its own name; the sweep's name does not move.
    assert (ended["status"], ended["fine_tuned_model"]) == ("cancelled", None)
    assert ended["best_job_id"] == done
    assert {card["id"] for card in rig.get("/v1/models")["data"]} == {"code-s1", "code-s1@1"}


def test_a_sweep_of_which_nothing_has_begun_is_cancelled_at_once(rig: Rig) -> None:
    sweep = create(rig)
    assert rig.post(f"{SWEEPS}/{sweep['id']}/cancel")["status"] == "cancelled"
    assert rig.sweep() == []


@pytest.mark.parametrize(
    ("grid", "param", "told"),
    [
        ({}, "grid", "is empty"),
        ({"learning_rat": [1e-4]}, "grid.learning_rat", "Did you mean 'learning_rate'"),
        ({"lr": [1e-4]}, "grid.lr", "Did you mean 'learning_rate'"),
        ({"lora": [{"r": 4}]}, "grid.lora", "lora"),
        ({"learning_rate": [1e-4, -1]}, "grid.learning_rate", "-1: Input should be greater than 0"),
        ({"lora.r": [4, "many"]}, "grid.lora.r", "many: Input should be a valid integer"),
        ({"lora.r": []}, "grid.lora.r", "no values"),
        ({"lora.r": [4, 8, 4]}, "grid.lora.r", "4 twice"),
        ({"model_name": ["a"]}, "grid.model_name", "`model` of the request"),
        ({"seed": [1, 2]}, "grid.seed", "same held-out rows"),
        ({"code_kinds": [["fill_middle"], []]}, "grid.code_kinds", "same held-out rows"),
        ({"method": ["sft", "dpo"]}, "grid.method", "changes the rows or the loss"),
        ({"preference_beta": [0.1, 0.2]}, "grid.preference_beta", "changes the rows or the loss"),
        (
            {"lora.r": [1, 2, 3, 4, 5], "max_steps": [1, 2, 3, 4]},
            "grid",
            "20 points (lora.r 5 × max_steps 4)",
        ),
        (
            {"load_in_8bit": [True, False], "load_in_4bit": [False, True]},
            "grid",
            "load_in_8bit=true, load_in_4bit=true: ",
        ),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_queued(
    rig: Rig, grid: dict[str, Any], param: str, told: str
) -> None:
    refused_param, message = refusal(rig, grid=grid)
    assert refused_param == param
    assert told in message


def test_a_grid_of_long_texts_is_refused(rig: Rig) -> None:
    param, message = refusal(rig, grid={"sample_prompts": [["a" * 16_000], ["b" * 16_000], ["c" * 16_000]]})
    assert param == "grid"
    assert message.startswith("grid: has 480") and "more than 32768: shorten its values" in message


def test_patience_is_tried_where_there_are_evaluations_to_count(rig: Rig) -> None:
    grid = {"early_stopping_patience": [0, 2, 4]}
    sage = {"task": "code", "config": {"eval_steps": 5}}
    assert "set eval_steps too" in refusal(rig, grid=grid)[1]
    assert (
        refusal(rig, grid={"early_stopping_patience": [-1]}, sage=sage)[0] == "grid.early_stopping_patience"
    )
    assert len(create(rig, grid=grid, sage=sage)["children"]) == 3
    assert len(create(rig, grid={**grid, "eval_steps": [5]}, max_jobs=3)["children"]) == 3


def test_what_is_said_twice_or_cannot_be_named_is_refused(rig: Rig) -> None:
    sage = {"task": "code", "config": {"lora": {"r": 16}}}
    assert "in sage.config and in the grid" in refusal(rig, sage=sage)[1]
    assert refusal(rig, sage={"task": "code", "config": {"max_steps": "no"}})[0] == "sage.config"
    assert "at most 61 characters" in refusal(rig, sage={"task": "code", "name": "n" * 62})[1]
    assert refusal(rig, sage={})[0] == "training_file"


def test_a_bad_file_refuses_the_whole_sweep(rig: Rig) -> None:
    bad = rig.upload(b'{"question": "Is it?"}\n')
    param, message = refusal(rig, training_file=bad, sage={"task": "qa"})
    assert param == "training_file"
    assert "answer" in message


def test_own_data_is_shared_by_the_jobs(rig: Rig) -> None:
    file_id = rig.upload(rows())
    sweep = create(rig, training_file=file_id, sage={"task": "qa", "name": "mine"})
    jobs = [rig.job(child["job_id"]) for child in sweep["children"]]
    assert {job["training_file"] for job in jobs} == {file_id}
    assert [job["sage"]["name"] for job in jobs] == ["mine-s1", "mine-s2", "mine-s3", "mine-s4"]
    assert rig.http.delete(f"/v1/files/{file_id}").status_code == 409


def test_sweeps_are_listed_newest_first(rig: Rig) -> None:
    ids = [create(rig, grid={"lora.r": [4]})["id"] for _ in range(3)]
    page = rig.get(SWEEPS, limit=2)
    assert [sweep["id"] for sweep in page["data"]] == ids[:0:-1]
    assert page["has_more"]
    other = create(rig, sage={"task": "code", "name": "other"}, grid={"lora.r": [4]})
    assert [sweep["id"] for sweep in rig.get(SWEEPS, name="code", limit=1)["data"]] == [ids[2]]
    assert [sweep["id"] for sweep in rig.get(SWEEPS, name="other")["data"]] == [other["id"]]
    assert rig.get(SWEEPS, name="nobody")["data"] == []
    assert rig.get(f"{SWEEPS}/sweep-no", status=404)["error"]["code"] == "not_found"


def test_a_list_of_sweeps_asks_as_often_as_one_of_them_and_of_jobs_only_what_it_tells(rig: Rig) -> None:
    told = []
    for rank in (4, 8, 16):
        create(rig, grid={"lora.r": [rank, rank + 1]})
        with rig.statements() as asked:
            listed = rig.get(SWEEPS)["data"]
        told.append(len(asked))
        assert not any("hyperparameters" in statement for statement in asked)
    assert told[0] == told[2]
    assert [[child["point"]["lora.r"] for child in sweep["children"]] for sweep in listed] == [
        [16, 17], [8, 9], [4, 5],
    ]  # fmt: skip
    assert listed[0] == rig.get(f"{SWEEPS}/{listed[0]['id']}")
