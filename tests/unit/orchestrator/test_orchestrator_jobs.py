"""OpenAI's fine-tuning API over HTTP."""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import zstandard
from tests.fakes.orchestrator_rig import Rig, rows

from sage_contracts.config import Task
from sage_contracts.errors import (
    InvalidDataError,
)
from sage_contracts.home import Home
from sage_orchestrator.jobs.datafile import check_data

JOBS = "/v1/fine_tuning/jobs"


def config(**fields: Any) -> dict[str, Any]:
    return {"sage": {"task": "code", "config": fields}}


def test_a_new_job_says_how_it_was_resolved(rig: Rig) -> None:
    file_id = rig.upload(rows())
    job = rig.post(
        JOBS,
        {
            "model": "smollm2-135m",
            "training_file": file_id,
            "suffix": "sums",
            "hyperparameters": {"n_epochs": 2},
            "metadata": {"team": "a"},
            "sage": {"preset": "cpu"},
        },
    )
    assert job["object"] == "fine_tuning.job"
    assert job["status"] == "queued"
    assert job["training_file"] == file_id
    assert job["hyperparameters"]["n_epochs"] == 2
    assert job["metadata"] == {"team": "a"}
    assert job["finished_at"] is None and job["fine_tuned_model"] is None and job["error"] is None
    info = job["sage"]
    assert (info["name"], info["task"], info["preset"]) == ("sums", "custom", "cpu")
    assert info["config"]["num_train_epochs"] == 2
    assert info["output_dir"] == "finetune_output/sums"
    assert rig.job(job["id"]) == job
    assert rig.sweep() == [job["id"]]


def test_own_data_needs_no_file(rig: Rig) -> None:
    job = rig.create_job()
    assert (job["training_file"], job["sage"]["name"]) == ("builtin:code", "code")


def test_bad_rows_are_named_and_nothing_is_queued(rig: Rig) -> None:
    file_id = rig.upload(rows(2) + b'\n{"messages": [{"role": "user", "content": "and?"}]}')
    error = rig.post(JOBS, {"model": "smollm2-135m", "training_file": file_id}, status=400)["error"]
    assert error["code"] == "invalid_training_file"
    assert error["param"] == "training_file"
    assert "row 3" in error["message"] and "messages" in error["message"]
    assert rig.get(JOBS)["data"] == []
    assert rig.sweep() == []


PAIR = b'{"prompt": "2+2?", "chosen": "4", "rejected": "5"}'
RATED = b'{"prompt": "2+2?", "completion": "4", "label": true}'
BOTH_KINDS = RATED + b"\n" + RATED.replace(b"true", b"false")


@pytest.mark.parametrize(("kind", "row"), [("dpo", PAIR), ("orpo", PAIR), ("kto", PAIR), ("kto", BOTH_KINDS)])
def test_preferences_are_for_preference_methods(rig: Rig, kind: str, row: bytes) -> None:
    body = {"model": "smollm2-135m", "training_file": rig.upload(row), "method": {"type": kind}}
    job = rig.post(JOBS, body)
    assert (job["status"], job["method"]["type"], job["sage"]["config"]["method"]) == ("queued", kind, kind)
    assert job["method"][kind]["hyperparameters"]["beta"] == 0.1


@pytest.mark.parametrize(
    ("method", "row", "said"),
    [
        ("supervised", PAIR, "use method=dpo"),
        ("dpo", b'{"question": "2+2?", "answer": "4"}', "use method=sft"),
        ("kto", b'{"question": "2+2?", "answer": "4"}', "use method=sft"),
        ("orpo", RATED, "use method=kto"),
    ],
)
def test_rows_of_another_method_are_named(rig: Rig, method: str, row: bytes, said: str) -> None:
    body = {"model": "smollm2-135m", "training_file": rig.upload(row), "method": {"type": method}}
    error = rig.post(JOBS, body, status=400)["error"]
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "row 1" in error["message"] and said in error["message"]


def test_rated_answers_of_one_kind_are_refused_before_anything_is_queued(rig: Rig) -> None:
    body = {"model": "smollm2-135m", "method": {"type": "kto"}}
    one_kind, both = rig.upload(RATED), rig.upload(BOTH_KINDS)
    error = rig.post(JOBS, {**body, "training_file": one_kind}, status=400)["error"]
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "There is no unwanted answer among the rows" in error["message"]
    assert rig.get(JOBS)["data"] == []
    # What is held out is only looked at.
    job = rig.post(JOBS, {**body, "training_file": both, "validation_file": one_kind})
    assert job["status"] == "queued"


def test_preference_methods_need_no_file(rig: Rig) -> None:
    job = rig.post(JOBS, {"model": "smollm2-135m", "method": {"type": "dpo"}})
    assert (job["training_file"], job["sage"]["task"]) == ("builtin:preferences", "custom")
    assert rig.job(job["id"])["method"]["type"] == "dpo"


CSV = "question,answer\n什么是网关？,入口\n".encode()


@pytest.mark.parametrize(
    ("content", "filename"),
    [
        (CSV, "rows.csv"),
        (CSV.replace(b",", b"\t"), "rows.tsv"),
        (CSV.decode().encode("utf-16"), "excel.csv"),
        (gzip.compress(CSV, mtime=0), "rows.csv.gz"),
        (zstandard.compress(rows(2)), "rows.jsonl.zst"),
    ],
)
def test_tables_and_compressed_files_are_read_here_too(rig: Rig, content: bytes, filename: str) -> None:
    file_id = rig.upload(content, filename=filename)
    job = rig.post(JOBS, {"model": "smollm2-135m", "training_file": file_id})
    assert job["status"] == "queued"
    assert rig.claim(job["id"])["training_path"].endswith(filename.partition(".")[2])


def test_parquet_is_refused_where_it_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # the orchestrator's image has none
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    with pytest.raises(
        InvalidDataError, match="Convert it to JSON Lines, or use `sage finetune start --data`"
    ):
        check_data(path, path.name, Task.CUSTOM, "sft", "smollm2-135m", Home(tmp_path))


def test_rows_that_the_base_cannot_learn_from_are_named_before_anything_is_queued(rig: Rig) -> None:
    base = rig.home / "base_models" / "no-system"
    base.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (base / name).write_text("{}")
    (base / "tokenizer.json").write_text('{"added_tokens": [{"id": 1, "content": "<end>", "special": true}]}')
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
        "{{ m.role }}:{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    bad = (
        b'\n{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"},'
        b' {"role": "assistant", "content": "A"}]}'
    )
    body = {"model": "no-system", "training_file": rig.upload(rows(3) + bad, "talks.jsonl")}
    error = rig.post(JOBS, body, status=400)["error"]
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "talks.jsonl: 1 of 4 rows cannot be used: row 4" in error["message"]
    assert "cannot be learned by" in error["message"] and "(No system)" in error["message"]
    (base / "chat_template.jinja").write_text("{% what %}")  # nothing to go by: training will tell
    assert rig.post(JOBS, body)["status"] == "queued"


def test_the_validation_file_is_checked_too(rig: Rig) -> None:
    good, bad = rig.upload(rows()), rig.upload(b'{"what": 1}')
    body = {"model": "smollm2-135m", "training_file": good, "validation_file": bad}
    assert rig.post(JOBS, body, status=400)["error"]["param"] == "validation_file"


def test_an_integration_says_where_the_figures_go(rig: Rig) -> None:
    wandb = {"project": "support", "name": "first try", "tags": ["small"]}
    job = rig.create_job(integrations=[{"type": "wandb", "wandb": wandb}])
    assert job["integrations"] == [{"type": "wandb", "wandb": wandb}]
    config = job["sage"]["config"]
    assert config["report_to"] == ["tensorboard", "wandb"]
    told = [config[f"wandb_{field}"] for field in ("project", "run_name", "tags", "entity")]
    assert told == ["support", "first try", ["small"], None]
    assert rig.create_job()["integrations"] is None


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "smollm2-135m"}, 400, "training_file"),
        ({"model": "smollm2-135m", "training_file": "file-no"}, 404, "file-no"),
        ({"model": "smolm2", "sage": {"task": "code"}}, 404, "There are: smollm2-135m"),
        ({"model": "/no/such/model", "sage": {"task": "code"}}, 404, "/no/such/model"),
        ({"model": "code@1", "sage": {"task": "code"}}, 404, "no base model 'code@1'"),
        ({"model": "auto", "sage": {"task": "code", "preset": "rtx_9090"}}, 400, "rtx_4090"),
        ({"model": "auto", "suffix": "a/b", "sage": {"task": "code"}}, 400, "suffix"),
        ({"model": "auto", "sage": {"task": "code"}, "method": {"type": "grpo"}}, 400, "supervised"),
        ({"model": "auto", "sage": {"task": "code"}, "integrations": [{"type": "x"}]}, 400, "wandb"),
        (
            {
                "model": "auto",
                "sage": {"task": "code"},
                "integrations": [{"type": "wandb", "wandb": {"x": 1}}],
            },
            400,
            "integrations",
        ),
    ],
)
def test_a_wrong_request_is_explained(rig: Rig, body: dict[str, Any], status: int, said: str) -> None:
    assert said in rig.post(JOBS, body, status=status)["error"]["message"]
    assert rig.get(JOBS)["data"] == []


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs", 'or "auto" (given: 1.5)'),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size", "greater than or equal to 1"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": -1}}}},
            "method.dpo.hyperparameters.beta",
            'greater than 0, or "auto" (given: -1)',
        ),
        ({"sage": {"task": "code", "config": {"oom_ladder": 3}}}, "sage.config", "a valid list, or"),
        (
            {"suffix": "a b"},
            "suffix",
            "'a b' cannot be a model's name: use up to 64 Latin letters (a-z, A-Z), digits",
        ),
        ({"suffix": "mock"}, "suffix", "go to the backend that needs no model"),
        ({"sage": {"task": "code", "name": "default"}}, "sage.name", "go to the gateway's default model"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0.wandb", "required"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations.0.wandb.project", "required"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**32}, "seed", "less than or equal to 4294967295"),
        ({"sage": {"task": "code", "config": {"seed": -1}}}, "sage.config", "sage.config.seed: Input should"),
    ],
)
def test_a_wrong_value_is_explained_at_its_field(
    rig: Rig, fields: dict[str, Any], param: str, said: str
) -> None:
    body = {"model": "smollm2-135m", "sage": {"task": "code"}} | fields
    error = rig.post(JOBS, body, status=400)["error"]
    assert error["param"] == param
    assert said in error["message"] and "[" not in error["message"]
    assert rig.get(JOBS)["data"] == []


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        (
            config(sample_prompts=["a"] * 65),
            "sage.config",
            "sage.config.sample_prompts: List should have at most 64",
        ),
        (
            config(sample_prompts=["a" * 20_000]),
            "sage.config",
            "sample_prompts.0: String should have at most 16384",
        ),
        (
            config(lora={"target_modules": ["q"] * 2000}),
            "sage.config",
            "lora.target_modules: List should have",
        ),
        (config(lora={"target_modules": ["q" * 300]}), "sage.config", "lora.target_modules.0: String should"),
        (config(code_kinds=["fill_middle"] * 65), "sage.config", "sage.config.code_kinds: List should"),
        (config(oom_ladder=["halve_batch"] * 65), "sage.config", "sage.config.oom_ladder: List should"),
        (config(report_to=["wandb"] * 65), "sage.config", "sage.config.report_to: List should"),
        (config(trainer="a" * 300), "sage.config", "sage.config.trainer: String should have at most 256"),
        (config(wandb_run_name="a" * 300), "sage.config", "sage.config.wandb_run_name: String should"),
        (config(wandb_tags=["a" * 300]), "sage.config", "sage.config.wandb_tags.0: String should"),
        (config(sample_prompts=["字" * 6000] * 20), "sage.config", "bytes, more than 262144: shorten"),
        ({"training_file": "a" * 300}, "training_file", "at most 256 characters"),
        ({"suffix": "a" * 2**20}, "suffix", "aaa…' cannot be a model's name"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "a" * 300}}]},
            "integrations.0.wandb.project",
            "at most 256 characters",
        ),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "a"}}] * 9},
            "integrations",
            "at most 8 items",
        ),
    ],
)
def test_what_is_kept_of_a_request_is_bounded(
    rig: Rig, fields: dict[str, Any], param: str, said: str
) -> None:
    error = rig.post(JOBS, {"model": "smollm2-135m", "sage": {"task": "code"}} | fields, status=400)["error"]
    assert error["param"] == param
    assert said in error["message"] and len(error["message"]) < 400
    assert rig.get(JOBS)["data"] == []


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_seed_that_every_generator_takes_is_kept(rig: Rig, seed: int) -> None:
    assert rig.job(rig.create_job(seed=seed)["id"])["seed"] == seed


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 300, "a\0b", "~nobody/x", "~no-such-user/x"])
def test_what_cannot_be_a_models_name_is_not_found(rig: Rig, name: str) -> None:
    body = {"model": name, "sage": {"task": "qa"}}
    assert rig.post(JOBS, body, status=404)["error"]["code"] == "model_not_found"
    assert rig.get(f"/v1/models/base:{quote(name)}", status=404)["error"]["code"] == "model_not_found"


def test_a_file_whose_bytes_went_while_a_job_is_made_of_it_is_not_found(rig: Rig) -> None:
    file_id = rig.upload(rows(20))
    next((rig.home / "files").glob(f"{file_id}*")).unlink()
    for param in ("training_file", "validation_file"):
        answer = rig.post(JOBS, {"model": "smollm2-135m", "sage": {"task": "qa"}, param: file_id}, status=404)
        assert (answer["error"]["code"], answer["error"]["param"]) == ("not_found", param)
        assert file_id in answer["error"]["message"]


def test_a_name_longer_than_any_path_is_refused(rig: Rig) -> None:
    assert rig.post(JOBS, {"model": "x" * 5000}, status=400)["error"]["param"] == "model"


def test_base_models_can_be_named_in_every_way(rig: Rig) -> None:
    for folder in (rig.home / "base_models" / "Org--Tiny", rig.home / "mine"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    for model in ("Org/Tiny", "base:Org/Tiny", str(rig.home / "mine"), "Other/NotYetHere", "auto"):
        rig.create_job(model=model)
    models = [job["model"] for job in rig.get(JOBS)["data"]]
    assert models == ["smollm2-135m", "Other/NotYetHere", str(rig.home / "mine"), "Org/Tiny", "Org/Tiny"]


def test_auto_fits_the_machine_of_the_trainer(rig: Rig) -> None:
    beat = {"worker_id": "t", "kind": "trainer", "device": "cuda:0", "device_total_bytes": 24 * 2**30}
    rig.http.post("/internal/workers/beat", json=beat)
    job = rig.create_job(model="auto")
    assert job["model"] == "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    assert job["sage"]["preset"] == "rtx_4090"


def archive_zip(names: list[str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, "def f():\n    return 1\n")
    return stream.getvalue()


def archive_tar(names: list[str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


@pytest.mark.parametrize(("make", "name"), [(archive_zip, "src.zip"), (archive_tar, "src.tar.gz")])
def test_a_source_tree_may_come_as_an_archive(rig: Rig, make: Any, name: str) -> None:
    body = {"model": "smollm2-135m", "sage": {"task": "code"}}
    good = rig.upload(make(["pkg/a.py", "README"]), filename=name)
    job = rig.post(JOBS, {**body, "training_file": good})
    assert rig.claim(job["id"])["training_path"].endswith(name.removeprefix("src"))
    for names, said in ((["README"], "no source file"), (["../../a.py"], "outside")):
        bad = rig.upload(make(names), filename=name)
        error = rig.post(JOBS, {**body, "training_file": bad}, status=400)["error"]
        assert said in error["message"]
    broken = rig.upload(make(["a.py"])[:40], filename=name)
    error = rig.post(JOBS, {**body, "training_file": broken}, status=400)["error"]
    assert "cannot be read as an archive" in error["message"]
    error = rig.post(JOBS, {"model": "smollm2-135m", "training_file": good}, status=400)["error"]
    assert "task `code`" in error["message"]


def test_a_preset_that_was_chosen_is_explained(rig: Rig) -> None:
    chosen = rig.post(JOBS, {"model": "smollm2-135m", "sage": {"task": "qa"}})
    told = [text for text in rig.messages(chosen["id"]) if text.startswith("Preset ")]
    assert len(told) == 1
    assert told[0].startswith(f"Preset {chosen['sage']['preset']}: ")
    named = rig.post(JOBS, {"model": "smollm2-135m", "sage": {"task": "qa", "preset": "a100"}})
    assert not [text for text in rig.messages(named["id"]) if text.startswith("Preset ")]
