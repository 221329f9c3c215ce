"""From a resolved name and the settings to the command that is run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.inference_rig import make_adapter_folder, make_base_folder
from tests.fakes.nvidia_smi import Card, install

from sage_contracts.errors import DeviceBusyError, InvalidRequestError, ModelNotFoundError
from sage_contracts.home import Home
from sage_contracts.models import ResolvedModel
from sage_inference.engine_process import Address
from sage_inference.engines import EngineFactory, choose_kind, memory_share, smallest_rank
from sage_inference.fit import Kind
from sage_inference.models import locate
from sage_inference.relay import Call
from sage_inference.settings import InferenceSettings
from sage_servicekit.machine import Device, find_device

CPU = Device("cpu", 16 * 2**30)
GPU = Device("cuda:1", 80 * 2**30)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    make_base_folder(tmp_path / "base_models/tiny")
    make_adapter_folder(tmp_path / "finetune_output/code/versions/3/lora_weights", rank=8)
    return Home(tmp_path)


CODE = ResolvedModel(
    id="code@3",
    base_model="base_models/tiny",
    adapter_path="finetune_output/code/versions/3/lora_weights",
)


def command(home: Home, kind: Kind, device: Device, **settings: Any) -> tuple[list[str], dict[str, str], int]:
    factory = EngineFactory(InferenceSettings(home_dir=home.root, **settings), kind, device)
    wanted = locate(CODE, home, "vllm")
    plan = factory.plan(wanted.base, wanted.rank)
    return plan.launch.command(Address(4321, "nonce")), plan.launch.env, plan.needed_bytes


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_vllm_on_a_cpu(home: Home) -> None:
    arguments, env, needed_bytes = command(home, "vllm", CPU)
    assert arguments[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(home.root / "base_models/tiny")]
    at = arguments.index("--served-model-name")
    assert arguments[at + 1 : at + 3] == ["base:tiny", "nonce"]
    assert option(arguments, "--port") == "4321"
    assert option(arguments, "--max-model-len") == "512"
    assert option(arguments, "--max-lora-rank") == "16"
    assert option(arguments, "--kv-cache-memory-bytes") == str(64 * 2**20)
    assert {"--enable-lora", "--enforce-eager"} <= set(arguments)
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True" and env["OMP_NUM_THREADS"].isdecimal()
    assert env["HF_HUB_OFFLINE"] == "1"
    assert needed_bytes > 64 * 2**20


def test_vllm_on_a_gpu(home: Home) -> None:
    arguments, env, needed_bytes = command(home, "vllm", GPU, vllm_command="'my vllm' --quiet")
    assert arguments[:3] == ["my vllm", "--quiet", "serve"]
    assert "--enforce-eager" not in arguments and "--kv-cache-memory-bytes" not in arguments
    assert env["CUDA_VISIBLE_DEVICES"] == "1" and "OMP_NUM_THREADS" not in env
    assert needed_bytes == int(80 * 2**30 * 0.85)


@pytest.mark.parametrize(
    ("used_mib", "setting", "share"),
    [(388, 0.85, 0.85), (3000, 0.85, 0.714), (3000, 0.6, 0.6), (None, 0.85, 0.85), (0, 1.0, 0.958)],
)
def test_vllm_takes_no_more_of_a_card_than_others_leave(
    used_mib: int | None, setting: float, share: float
) -> None:
    card, used_bytes = Device("cuda:0", 12288 << 20), None if used_mib is None else used_mib << 20
    assert memory_share(card, used_bytes, setting, least_bytes=2**30) == share


def test_a_card_that_others_fill_is_busy_and_the_error_says_by_how_much() -> None:
    card = Device("cuda:0", 12288 << 20)
    with pytest.raises(DeviceBusyError, match=r"11\.0 of the 12\.0 GiB of cuda:0 are in use") as caught:
        memory_share(card, 11 << 30, 0.85, least_bytes=2 << 30)
    assert "about 2.0 GiB" in caught.value.message
    assert "SAGE_GPU_MEMORY_UTILIZATION (0.85)" in caught.value.message
    # What is little because the user wants it so is vLLM's to judge.
    assert memory_share(card, 0, 0.1, least_bytes=2 << 30) == 0.1


def test_the_least_that_an_engine_needs_is_room_for_its_weights(home: Home) -> None:
    folder = home.root / "base_models/tiny"
    (folder / "model.safetensors").write_bytes(bytes(6000))
    factory = EngineFactory(InferenceSettings(home_dir=home.root), "vllm", GPU)
    half = factory.plan(locate(CODE, home, "vllm").base, 8).least_bytes
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert half == factory.plan(locate(CODE, home, "vllm").base, 8).least_bytes + 3000


def test_vllm_reads_calls_of_tools_where_it_is_told_how_they_are_written(home: Home) -> None:
    arguments, _, _ = command(home, "vllm", CPU, tool_call_parser="hermes")
    assert option(arguments, "--tool-call-parser") == "hermes" and "--enable-auto-tool-choice" in arguments
    without, _, _ = command(home, "vllm", CPU)
    assert {"--tool-call-parser", "--enable-auto-tool-choice"}.isdisjoint(without)
    ours, _, _ = command(home, "transformers", CPU, tool_call_parser="hermes")
    assert "--tool-call-parser" not in ours


def test_the_engine_of_our_own(home: Home) -> None:
    arguments, env, _ = command(home, "transformers", CPU, engine_threads=3, max_model_len=256)
    assert arguments[1:3] == ["-m", "sage_inference.transformers_engine"]
    assert option(arguments, "--device") == "cpu" and option(arguments, "--max-model-len") == "256"
    assert env["OMP_NUM_THREADS"] == "3"
    arguments, env, _ = command(home, "transformers", GPU)
    assert option(arguments, "--device") == "cuda:0" and env["CUDA_VISIBLE_DEVICES"] == "1"


def test_the_kind_is_what_can_be_found() -> None:
    assert choose_kind(InferenceSettings(engine="transformers", vllm_command="vllm")) == "transformers"
    assert choose_kind(InferenceSettings(vllm_command="vllm")) == "vllm"
    assert choose_kind(InferenceSettings(engine="vllm")) == "vllm"


def test_ranks_are_rounded_up_to_what_vllm_has() -> None:
    assert [smallest_rank(rank) for rank in (1, 8, 9, 48, 64, 9999)] == [8, 8, 16, 64, 64, 512]


def test_a_resolved_name_becomes_folders(home: Home) -> None:
    wanted = locate(CODE, home, "vllm")
    assert wanted.adapter is not None and wanted.adapter.rank == 8 and wanted.label == "code@3"
    assert wanted.base.max_positions == 512 and wanted.base.kv_values_per_token == 2 * 2 * 2 * 32
    absolute = locate(ResolvedModel(id="base:x", base_model=wanted.base.location), home, "vllm")
    assert absolute.base == wanted.base
    hub = locate(ResolvedModel(id="base:o/m", base_model="owner/model"), home, "vllm")
    assert (hub.base.location, hub.base.served_name) == ("owner/model", "base:owner/model")
    assert not hub.base.is_local


def test_the_largest_rank_of_an_adapter_counts(home: Home) -> None:
    path = home.resolve(CODE.adapter_path or "") / "adapter_config.json"
    path.write_text(json.dumps({"r": 8, "rank_pattern": {"q_proj": 32}}))
    assert locate(CODE, home, "vllm").rank == 32


def test_versions_tuned_in_full_are_bases_of_their_own_name(home: Home) -> None:
    for version in (1, 2):
        folder = f"finetune_output/whole/versions/{version}/full_model"
        make_base_folder(home.resolve(folder))
        wanted = locate(ResolvedModel(id=f"whole@{version}", base_model=folder), home, "vllm")
        assert (wanted.adapter, wanted.base.served_name) == (None, f"whole@{version}")
        assert wanted.base.location == str(home.resolve(folder))


def test_what_the_engine_cannot_load_is_served_merged(home: Home) -> None:
    adapter, merged = home.resolve(CODE.adapter_path or ""), "finetune_output/code/versions/3/merged_model"
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 8, "use_dora": True}))
    model = CODE.model_copy(update={"merged_path": merged})

    # Not made yet, or made and deleted again.
    for unmerged in (locate(CODE, home, "vllm"), locate(model, home, "vllm")):
        assert unmerged.label == "code@3" and "DoRA" in (unmerged.merge_reason or "")
    make_base_folder(home.resolve(merged))
    wanted = locate(model, home, "vllm")
    assert (wanted.adapter, wanted.merge_reason, wanted.label) == (None, None, "code@3")
    assert wanted.base.location == str(home.resolve(merged)) and wanted.base.served_name == "code@3"
    # The other engine takes it as it is, merged or not.
    direct = locate(model, home, "transformers")
    assert direct.adapter is not None and direct.base.served_name == "base:tiny"


@pytest.mark.parametrize(
    "model",
    [
        ResolvedModel(id="base:gone", base_model="base_models/gone"),
        ResolvedModel(id="base:gone", base_model="/nowhere/gone"),
        CODE.model_copy(update={"adapter_path": "finetune_output/gone"}),
    ],
)
def test_what_is_not_there_is_said_with_its_path(home: Home, model: ResolvedModel) -> None:
    with pytest.raises(ModelNotFoundError, match="gone"):
        locate(model, home, "vllm")


@pytest.mark.parametrize(
    ("setting", "visible", "name", "shown"),
    [
        ("auto", "1", "cuda:1", "1"),
        ("auto", "1,0", "cuda:1", "1"),
        ("auto", "GPU-aa", "cuda:0", "0"),
        ("cuda:1", "0,1", "cuda:1", "1"),
        ("auto", "", "cpu", ""),
        ("cpu", "0", "cpu", ""),
    ],
)
def test_an_engine_gets_the_card_that_its_lease_names_and_no_hidden_one(
    home: Home, monkeypatch: pytest.MonkeyPatch, setting: str, visible: str, name: str, shown: str
) -> None:
    install(home.root, Card("GPU-aa", 12288), Card("GPU-bb", 8192))
    monkeypatch.setenv("PATH", f"{home.root}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = find_device(setting)
    _, env, _ = command(home, "vllm", device)
    assert (device.name, env["CUDA_VISIBLE_DEVICES"]) == (name, shown)
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_only_the_models_name_is_rewritten() -> None:
    call = Call.parse(b'{"model": "finetune/code", "stream": true, "x": {"y": [1, "\xc3\xa9"]}}')
    assert (call.model, call.is_stream) == ("code", True)
    assert json.loads(call.for_engine("code@3")) == {"model": "code@3", "stream": True, "x": {"y": [1, "é"]}}


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, {"stop_token_ids": [2, 5]}),
        ({"stop_token_ids": None}, {"stop_token_ids": [2, 5]}),
        ({"stop_token_ids": [7, 5]}, {"stop_token_ids": [7, 5, 2]}),
        ({"stop_token_ids": "wrong"}, {"stop_token_ids": "wrong"}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
    ],
)
def test_the_engine_is_told_where_the_models_answers_end(asked: dict[str, Any], sent: dict[str, Any]) -> None:
    call = Call.parse(json.dumps({"model": "code", **asked}).encode())
    assert json.loads(call.for_engine("code@3", (2, 5))) == {"model": "code@3", **sent}
    assert json.loads(call.for_engine("code@3")) == {"model": "code@3", **asked}


def test_where_a_versions_answers_end_goes_wherever_it_is_served(home: Home) -> None:
    adapter, merged = home.resolve(CODE.adapter_path or ""), "finetune_output/code/versions/3/merged_model"
    model = CODE.model_copy(update={"turn_end_ids": [2], "merged_path": merged})
    assert locate(model, home, "vllm").turn_end_ids == (2,)
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 8, "use_dora": True}))
    make_base_folder(home.resolve(merged))
    served_merged = locate(model, home, "vllm")
    assert (served_merged.adapter, served_merged.turn_end_ids) == (None, (2,))
    assert locate(CODE, home, "transformers").turn_end_ids == ()


@pytest.mark.parametrize("body", [b"", b"[]", b'"text"', b"{}", b'{"model": 3}', b'{"model": ""}', b"\xff"])
def test_bodies_that_are_none(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        Call.parse(body)
