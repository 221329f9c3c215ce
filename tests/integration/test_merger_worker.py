"""The merger as a process: real broker, real Celery worker, a real merge of a tiny random model."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fakes.tiny_llama import make_adapter, make_model
from tests.fakes.worker_rig import Rig, is_alive, rig, wait_until

from sage_contracts.workers import MERGE_TASK, MergeClaim
from sage_merger.child import merge
from sage_merger.messages import ChildSpec

MERGING_S = 120.0
# Says one phase and hangs, as a merge of a large model does.
SLOW_CHILD = """
import sys, time
from sage_servicekit.children import end_with_parent, take_stdout
end_with_parent()
out = take_stdout()
import os
out.write('{"kind": "phase", "text": "pid %d"}\\n' % os.getpid())
time.sleep(600)
"""


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.redis), "folders"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with rig(request.param, tmp_path) as made:
        made.env["SAGE_MERGE_CHILD_COMMAND"] = json.dumps([sys.executable, str(tmp_path / "slow.py")])
        (tmp_path / "slow.py").write_text(SLOW_CHILD)
        yield made


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Rig]:
    with rig("folders", tmp_path) as made:
        made.env["SAGE_MERGE_THREADS"] = "1"
        yield made


def running_child(stack: Rig) -> int:
    """Starts a merge that hangs, and returns its child's process id once the orchestrator knows its phase."""
    merge = stack.records.add_merge("merge-1", "code", "base_models/tiny", "nowhere")
    stack.ring("merge-1", MERGE_TASK)
    phase = stack.records.wait_for(
        lambda: next((report.phase for report in merge.reports if report.phase.startswith("pid")), None)
    )
    return int(phase.split()[1])


def test_a_merge_that_is_not_ours_any_more_is_killed(stack: Rig) -> None:
    stack.start_worker("sage_merger")
    pid = running_child(stack)

    stack.records.requeue("merge-1")

    wait_until(lambda: not is_alive(pid), "the stale child is killed")
    assert not stack.records.works["merge-1"].finishes


def test_a_merger_that_is_told_to_stop_releases_its_merge(stack: Rig) -> None:
    worker = stack.start_worker("sage_merger")
    pid = running_child(stack)

    worker.send_signal(signal.SIGTERM)

    assert worker.wait(timeout=20) == 0
    assert [finish.outcome for finish in stack.records.works["merge-1"].finishes] == ["released"]
    assert not is_alive(pid)


def test_an_adapter_is_merged_and_a_missing_one_is_named(folders: Rig) -> None:
    base = make_model(folders.home / "base_models/tiny", context=256)
    output = folders.home / "finetune_output/code"
    make_adapter(output / "versions/1/lora_weights", base)
    adapter = "finetune_output/code/versions/1/lora_weights"
    merge = folders.records.add_merge("merge-1", "code", "base_models/tiny", adapter, dtype="fp32")
    lost = folders.records.add_merge("merge-2", "lost", "base_models/tiny", "finetune_output/lost")
    export = folders.records.add_merge("merge-3", "code", "base_models/tiny", adapter, format="ollama")
    # A model tuned in full has no adapter: its own folder is what is written elsewhere.
    own = make_model(folders.home / "finetune_output/whole/versions/1/full_model", context=64)
    whole = folders.records.add_merge(
        "merge-4", "whole", str(own.relative_to(folders.home)), "", format="zip"
    )
    folders.start_worker("sage_merger")
    folders.ring("merge-1", MERGE_TASK)
    folders.ring("merge-2", MERGE_TASK)
    folders.ring("merge-3", MERGE_TASK)
    folders.ring("merge-4", MERGE_TASK)
    works = (merge, lost, export, whole)

    folders.records.wait_for(lambda: all(work.finishes for work in works), MERGING_S)

    finish = merge.finishes[0]
    assert finish.outcome == "succeeded", finish.error_message
    assert finish.merged_path == "finetune_output/code/merged_model"
    assert (output / "merged_model/model.safetensors").is_file()
    assert finish.meta["parity"]["same"] == finish.meta["parity"]["probes"]
    written = export.finishes[0]
    assert written.merged_path == "finetune_output/code/exports/ollama", written.error_message
    names = sorted(path.name for path in (output / "exports/ollama").iterdir())
    assert names == ["Modelfile", "code-1-q8_0.gguf", "sage_export.json"]
    assert written.meta["parity"]["dtype"] == "q8_0"
    zipped = whole.finishes[0]
    assert zipped.merged_path == "finetune_output/whole/exports/zip-merged/whole-1-merged.zip", zipped
    assert lost.finishes[0].error_code == "model_not_found"
    assert "finetune_output/lost" in lost.finishes[0].error_message


class Meanwhile(io.StringIO):
    """Hears the first phase of a merge, and makes a folder then."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def write(self, text: str) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        return super().write(text)


@pytest.mark.parametrize(("made", "is_linked"), [("versions/3", False), ("exports", True)])
def test_the_top_keeps_to_a_version_that_is_trained_while_an_older_one_is_merged(
    tmp_path: Path, made: str, is_linked: bool
) -> None:
    base = make_model(tmp_path / "base_models/tiny", context=256)
    output = tmp_path / "finetune_output/code"
    make_adapter(output / "versions/1/lora_weights", base)
    (output / "versions/2").mkdir()  # forgotten by its owner: its files stay
    claim = MergeClaim(
        merge_id="merge-1", attempt=1, lease_s=60, name="code", version=1, base_model="base_models/tiny",
        adapter_path="finetune_output/code/versions/1/lora_weights", dtype="fp32",
        output_dir="finetune_output/code/versions/1", link_path="finetune_output/code/merged_model",
    )  # fmt: skip
    done = merge(ChildSpec(home=str(tmp_path), claim=claim), Meanwhile(output / made))
    assert (tmp_path / done.merged_path / "model.safetensors").is_file()
    assert (output / "merged_model").is_symlink() is is_linked
