"""What a log says about a start and about an end."""

from __future__ import annotations

import pytest

from sage_inference.engine_log import EngineLog

CHAINED = """\
(EngineCore pid=86) ERROR 11-24 09:14:06 [core.py:866] Traceback (most recent call last):
(EngineCore pid=86) ERROR 11-24 09:14:06 [core.py:866]   File "loader.py", line 7, in load
(EngineCore pid=86) ERROR 11-24 09:14:06 [core.py:866] ValueError: the weights are damaged
(APIServer pid=76) Traceback (most recent call last):
(APIServer pid=76) RuntimeError: Engine core initialization failed. See root cause above."""


def read(text: str) -> EngineLog:
    log = EngineLog()
    for line in text.splitlines():
        log.add(line)
    return log


def test_the_first_error_of_a_chain_is_the_cause() -> None:
    log = read(CHAINED)
    assert log.root_cause(1) == "ValueError: the weights are damaged"
    assert log.is_fatal


@pytest.mark.parametrize(
    ("text", "exit_code", "cause"),
    [
        ("vllm serve: error: argument --port: invalid int value: 'x'", 2, "argument --port: invalid int"),
        ("Failed to import from vllm._C with ImportError('libnuma.so')\nAttributeError: x", 1, "libnuma"),
        ("all fine", -9, "signal 9; the machine may be out of memory"),
        ("all fine", -15, "signal 15"),
        ("one\ntwo", 3, "exit code 3; last line: two"),
        ("", None, "nothing was logged"),
        ("Traceback (most recent call last):\nKeyboardInterrupt", 1, "KeyboardInterrupt"),
    ],
)  # fmt: skip
def test_root_causes(text: str, exit_code: int | None, cause: str) -> None:
    assert cause in read(text).root_cause(exit_code)


def test_an_error_that_was_survived_does_not_explain_a_later_death() -> None:
    now = 0.0
    log = EngineLog(clock=lambda: now)
    log.add("ImportWarning: something was missing")
    log.start_serving()
    log.add("ValueError: no such adapter")
    assert log.root_cause(1) == "ValueError: no such adapter"
    assert "signal 9" in log.root_cause(-9)
    now = 60
    assert log.root_cause(1) == "exit code 1; last line: ValueError: no such adapter"
    for line in ("RuntimeError: the core is broken", "EngineDeadError: see above"):
        log.add(line)
    assert log.root_cause(1) == "RuntimeError: the core is broken"


def test_phases_follow_the_log() -> None:
    log = EngineLog()
    seen = [log.phase]
    for line in (
        "(APIServer pid=1) INFO 11-24 09:14:06 [api_utils.py:286] non-default args: {}",
        "(EngineCore pid=2) INFO 11-24 09:14:39 [cpu_model_runner.py:68] Starting to load model /m...",
        "a line about nothing",
        "INFO:     Application startup complete.",
    ):
        log.add(line)
        seen.append(log.phase)
    assert seen == [
        "importing libraries",
        "reading the configuration",
        "loading weights",
        "loading weights",
        "opening its port",
    ]


def test_the_tail_is_bounded_and_without_decoration() -> None:
    log = EngineLog()
    for number in range(1000):
        log.add(f"(EngineCore pid=2) INFO 11-24 09:14:39 [core.py:68] line {number}\n")
    assert len(log.tail) == 400 and log.tail[-1] == "line 999"


def test_a_taken_port_is_recognised() -> None:
    assert read("OSError: [Errno 98] Address already in use").is_port_taken
