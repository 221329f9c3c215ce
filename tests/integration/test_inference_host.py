"""The whole inference host over HTTP, with fake engines as its children."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.fakes.fake_engine import WORDS
from tests.fakes.inference_rig import Rig, make_registry, question, running, said
from tests.fakes.nvidia_smi import Card, install

from sage_contracts.inference import EngineState
from sage_inference import process_group


def starts(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_cold_stream_is_parked_with_comments_and_then_answered(tmp_path: Path) -> None:
    with running(tmp_path, "--start-s", 0.7) as rig:
        lines = rig.stream("code")
        assert lines[0].startswith(": starting engine (")
        assert any(line.startswith(": starting engine (loading weights)") for line in lines)
        assert said(lines) and lines[-1] == "data: [DONE]"
        engine = rig.engines()[0]
        assert (engine.state, engine.adapters, engine.base_model) == ("ready", ["code@1"], "base:tiny")


def test_warm_answers_have_no_comments_and_name_the_version(tmp_path: Path) -> None:
    with running(tmp_path) as rig:
        whole = rig.ask("finetune/code").json()
        assert whole["model"] == "code@1"
        lines = rig.stream("code")
        assert not any(line.startswith(":") for line in lines)
        assert said(lines) == whole["choices"][0]["message"]["content"]


def test_a_version_stops_where_its_run_taught_it_to(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    with running(tmp_path, registry=registry) as rig:
        words = said(rig.stream("code@1")).split()
        taught = registry.models["code@1"].model_copy(update={"turn_end_ids": [WORDS.index(words[2])]})
    registry.models["code@1"] = taught
    with running(tmp_path, registry=registry) as rig:
        answer = rig.ask("code@1").json()["choices"][0]
        assert answer["finish_reason"] == "stop"
        assert words[2] not in answer["message"]["content"] and words[0] in answer["message"]["content"]


def test_concurrent_cold_requests_join_one_start(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    names = ["code", "code@2", "base:tiny", "code", "code@2"]
    with running(tmp_path, "--start-s", 0.5, "--starts", log) as rig, ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(rig.ask, names))
        assert [answer.status_code for answer in answers] == [200] * len(names)
        said_by = {answer.json()["model"]: answer.json()["choices"][0]["message"] for answer in answers}
        assert len({json.dumps(message) for message in said_by.values()}) == 3
        assert starts(log) == 1


def test_a_request_that_waits_too_long_is_told_to_try_again_and_the_start_goes_on(tmp_path: Path) -> None:
    log, held = tmp_path / "starts", tmp_path / "held"
    held.touch()
    slow = ("--start-while", held, "--starts", log)
    with running(tmp_path, *slow, request_start_timeout_s=0.2) as rig:
        early = rig.ask("code")
        assert early.status_code == 503 and int(early.headers["retry-after"]) > 0
        assert early.json()["error"]["code"] == "engine_starting"
        # Who asks again hears how long the engine has been under way, not only how long they waited.
        rig.wait_for(lambda: "is not ready after 0 s" not in rig.ask("code").json()["error"]["message"])
        held.unlink()
        rig.wait_for(lambda: rig.engines()[0].state == EngineState.READY)
        # The same short patience holds for loading the adapter, which a busy machine may exceed once.
        rig.wait_for(lambda: rig.ask("code").status_code == 200)
        assert starts(log) == 1


def test_a_start_that_fails_says_why_and_can_be_tried_again(tmp_path: Path) -> None:
    broken, log = tmp_path / "broken", tmp_path / "starts"
    broken.touch()
    with running(tmp_path, "--crash-while", broken, "--starts", log) as rig:
        first = rig.ask("code")
        assert first.status_code == 502
        error = first.json()["error"]
        assert error["code"] == "engine_failed" and "ValueError: the weights are damaged" in error["message"]
        assert rig.engines()[0].state == EngineState.FAILED
        broken.unlink()
        assert rig.ask("code").status_code == 200
        assert starts(log) == 2


def test_crash_at_a_slow_start_reaches_a_stream_as_an_event(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    with running(tmp_path, "--start-s", 2, "--crash-while", broken) as rig:
        lines = rig.stream("code")
        assert lines[0].startswith(": starting engine")
        body = json.loads(lines[-2].removeprefix("data: "))
        assert "the weights are damaged" in body["error"]["message"] and body["source"] == "inference"
        assert lines[-1] == "data: [DONE]"


def test_an_engine_that_lingers_after_a_failed_start_is_not_waited_for(tmp_path: Path) -> None:
    with running(tmp_path, "--linger") as rig:
        answer = rig.ask("code")
        assert answer.status_code == 502
        assert "ValueError: the weights are damaged" in answer.json()["error"]["message"]


def test_crash_in_the_middle_of_a_stream_is_an_error_event_and_the_next_request_restarts(
    tmp_path: Path,
) -> None:
    log = tmp_path / "starts"
    with running(tmp_path, "--crash-mid-stream", "--starts", log) as rig:
        lines = rig.stream("code")
        assert said(lines)
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert lines[-1] == "data: [DONE]"
        assert rig.ask("code").status_code == 200
        assert starts(log) == 2


def test_a_port_lost_to_another_program_is_tried_again(tmp_path: Path) -> None:
    with running(tmp_path, "--port-taken-once", tmp_path / "taken") as rig:
        assert rig.ask("code").status_code == 200


def test_somebody_elses_server_on_our_port_is_never_trusted(tmp_path: Path) -> None:
    with running(tmp_path, "--foreign", engine_start_deadline_s=1) as rig:
        answer = rig.ask("code")
        assert answer.status_code == 502 and "was not ready after 1 s" in answer.json()["error"]["message"]


def test_a_busy_device_refuses_before_any_event(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    registry.busy_with = "training code"
    with running(tmp_path, registry=registry) as rig:
        answer = rig.http.post("/v1/chat/completions", json=question("code", stream=True))
        assert answer.status_code == 503 and answer.headers["retry-after"] == "30"
        assert answer.json()["error"]["message"] == "device busy: training code, about 12 min"
        registry.busy_with = ""
        assert rig.ask("code").status_code == 200


@pytest.mark.parametrize(("used_mib", "share"), [(388, "0.85"), (3000, "0.714")])
def test_an_engine_on_a_card_is_told_to_take_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used_mib: int, share: str
) -> None:
    install(tmp_path, Card("GPU-aa", 12288, used_mib))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with running(tmp_path, device="auto") as rig:
        assert rig.ask("code").status_code == 200
        arguments = Path(f"/proc/{rig.engines()[0].pid}/cmdline").read_text().split("\0")
        assert arguments[arguments.index("--gpu-memory-utilization") + 1] == share


def test_a_card_that_other_programs_fill_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, Card("GPU-aa", 12288, 12000))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with running(tmp_path, device="auto") as rig:
        refused = rig.ask("code")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "device_busy")
        assert "11.7 of the 12.0 GiB of cuda:0 are in use" in refused.json()["error"]["message"]
        assert not rig.engines()


def test_an_idle_engine_of_ours_makes_room_for_another(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    registry.capacity = 1
    with running(tmp_path, registry=registry) as rig:
        assert rig.ask("code").status_code == 200
        assert rig.ask("base:other").status_code == 200
        assert [engine.base_model for engine in rig.engines()] == ["base:other"]
        assert len(registry.leases) == 1


def test_more_base_models_than_engines_takes_turns(tmp_path: Path) -> None:
    with running(tmp_path, "--token-s", 0.05, max_engines=1) as rig, ThreadPoolExecutor(4) as pool:
        names = ["code", "base:other", "code", "base:other"]
        assert [answer.status_code for answer in pool.map(rig.ask, names)] == [200] * 4
        assert len(rig.engines()) == 1


def test_a_client_that_leaves_ends_the_generation(tmp_path: Path) -> None:
    with running(tmp_path, "--token-s", 0.02) as rig:
        assert rig.ask("code", max_tokens=1).status_code == 200
        body = question("code", stream=True, max_tokens=400)
        with rig.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()  # kept: its end would close the response
            next(lines)
            assert rig.engines()[0].busy_requests == 1
        rig.wait_for(lambda: rig.engines()[0].busy_requests == 0)
        rig.wait_for(lambda: "request aborted" in rig.log())


def test_a_waiting_client_that_leaves_does_not_end_the_start(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    with running(tmp_path, "--start-s", 0.6, "--starts", log) as rig:
        body = question("code", stream=True)
        with rig.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert next(response.iter_lines()).startswith(":")
        assert rig.ask("code").status_code == 200
        assert starts(log) == 1


def test_idle_engines_stop_and_give_their_lease_back(tmp_path: Path) -> None:
    with running(tmp_path, keep_alive_s=0) as rig:
        assert rig.ask("code").status_code == 200
        rig.wait_for(lambda: not rig.engines() and not rig.registry.leases)


def test_an_order_to_yield_stops_an_idle_engine(tmp_path: Path) -> None:
    with running(tmp_path) as rig:
        assert rig.ask("code").status_code == 200
        assert rig.registry.leases
        rig.registry.orders_yield = True
        rig.wait_for(lambda: not rig.engines() and not rig.registry.leases)


def test_leaving_a_chat_stops_the_engine_unless_somebody_else_uses_it(tmp_path: Path) -> None:
    with running(tmp_path) as rig:

        def leave(session: str, keep_alive_s: float = 0) -> bool:
            body = {"model": "code", "session": session, "keep_alive_s": keep_alive_s}
            return bool(rig.http.post("/v1/sage/release", json=body).json()["stopped"])

        for session in ("anna", "ben", "carl"):
            headers = {"X-Sage-Session": session}
            rig.http.post("/v1/chat/completions", json=question("code"), headers=headers).raise_for_status()
        assert not leave("carl", keep_alive_s=60)
        assert not leave("anna")
        assert leave("ben")
        rig.wait_for(lambda: not rig.engines())


def test_adapters_above_the_limit_push_out_the_one_used_longest_ago(tmp_path: Path) -> None:
    with running(tmp_path, max_cpu_loras=1) as rig:
        for name in ("code@1", "code@2", "code@1"):
            assert rig.ask(name).json()["model"] == name
        assert rig.engines()[0].adapters == ["code@1"]
        assert "unloaded code@1" in rig.log() and "unloaded code@2" in rig.log()


def test_an_adapter_that_was_loaded_after_nobody_waited_any_more_is_used(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.touch()
    with running(tmp_path, "--load-while", held, upstream_silence_s=1) as rig:
        late = rig.ask("code")
        assert late.status_code == 502 and "load_lora_adapter" in late.json()["error"]["message"]
        assert rig.engines()[0].adapters == []
        held.unlink()
        rig.wait_for(lambda: "loaded code@1" in rig.log())
        assert rig.ask("code").json()["model"] == "code@1"
        assert rig.engines()[0].adapters == ["code@1"]


def test_an_engine_that_is_silent_for_too_long_is_not_asked_again(tmp_path: Path) -> None:
    with running(tmp_path, "--token-s", "60", upstream_silence_s=1) as rig:
        late = rig.ask("code")
        assert late.status_code == 504, late.text
        error = late.json()["error"]
        assert error["code"] == "upstream_timeout" and "sent nothing for too long" in error["message"]


def test_an_adapter_of_a_larger_rank_restarts_the_engine(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    with running(tmp_path, "--starts", log) as rig:
        assert rig.ask("code").status_code == 200
        assert rig.ask("big@1").json()["model"] == "big@1"
        assert rig.ask("code").status_code == 200
        assert starts(log) == 2


def test_requests_that_cannot_be_answered_say_why(tmp_path: Path) -> None:
    with running(tmp_path) as rig:
        unknown = rig.ask("coed")
        assert unknown.status_code == 404 and "code@2" in unknown.json()["error"]["message"]
        assert rig.http.post("/v1/chat/completions", content=b"{").status_code == 400
        assert (
            rig.http.post("/v1/chat/completions", json={"messages": []}).json()["error"]["param"] == "model"
        )
        too_long = rig.ask("code", max_tokens=10_000)
        assert too_long.status_code == 400
        assert too_long.json() | {"error": {}} == {"source": "engine", "error": {}}
        assert too_long.json()["error"]["code"] == "invalid_request"
        rig.registry.add("lost@1", "base_models/tiny", tmp_path / "nowhere")
        lost = rig.ask("lost@1")
        assert lost.status_code == 404 and "adapter_config.json is missing" in lost.json()["error"]["message"]


def test_tools_need_a_parser_and_are_refused_before_an_engine_starts(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with running(tmp_path) as rig:
        for more in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}):
            refused = rig.ask("code", tools=tools, **more)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
            assert "SAGE_TOOL_CALL_PARSER" in refused.json()["error"]["message"]
        assert rig.engines() == []
        assert rig.ask("code", tools=tools, tool_choice="none").status_code == 200
    with running(tmp_path, tool_call_parser="hermes") as rig:
        assert rig.ask("code", tools=tools).status_code == 200


def test_models_and_beats(tmp_path: Path) -> None:
    with running(tmp_path) as rig:
        listed = rig.http.get("/v1/models").json()["data"]
        assert "code@2" in [card["id"] for card in listed]
        assert rig.wait_for(lambda: rig.registry.beats)[0].kind == "inference"


def test_shutdown_ends_an_engine_that_ignores_sigterm_and_its_children(tmp_path: Path) -> None:
    with running(tmp_path, "--ignore-sigterm", "--grandchild", engine_stop_grace_s=0.2) as rig:
        assert rig.ask("code").status_code == 200
        group = rig.engines()[0].pid
        assert group is not None and len(process_group.alive(group)) == 2
    assert process_group.alive(group) == []
    assert list((tmp_path / "run/engines").glob("*")) == []


@pytest.mark.parametrize("is_stream", [True, False])
def test_killing_the_engine_from_outside_is_explained_and_healed(tmp_path: Path, is_stream: bool) -> None:
    with running(tmp_path, "--token-s", 0.05, "--grandchild") as rig:
        assert rig.ask("code", max_tokens=1).status_code == 200
        group = rig.engines()[0].pid
        assert group is not None
        if is_stream:
            body = question("code", stream=True, max_tokens=200)
            with rig.http.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                os.kill(group, 9)
                event = [line for line in lines if line][-2]
            message = json.loads(event.removeprefix("data: "))["error"]["message"]
        else:
            killer = threading.Thread(target=_kill_when_busy, args=(rig, group))
            killer.start()
            answer = rig.ask("code", max_tokens=200)
            assert answer.status_code == 502
            message = answer.json()["error"]["message"]
            killer.join()
        assert "ended by signal 9" in message
        assert rig.ask("code", max_tokens=1).status_code == 200
        assert process_group.alive(group) == []


def _kill_when_busy(rig: Rig, pid: int) -> None:
    rig.wait_for(lambda: rig.engines()[0].busy_requests > 0)
    os.kill(pid, 9)
