"""Exit codes and the error screen."""

from __future__ import annotations

import errno

import pytest

from sage_cli.failures import describe, exit_code_of
from sage_contracts import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidDataError("x"), 2),
        (errors.ModelNotFoundError("x"), 2),
        (errors.ConflictError("x"), 2),
        (errors.StorageFullError("x"), 2),
        (errors.OutOfMemoryError("x"), 3),
        (errors.ServiceUnavailableError("x"), 4),
        (errors.EngineFailedError("x"), 4),
        (ValueError("x"), 2),
        (RuntimeError("x"), 1),
        (PermissionError(13, "x"), 1),
        (OSError(errno.ENOSPC, "x"), 2),
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert exit_code_of(error) == code


def test_every_error_of_the_tree_has_an_exit_code() -> None:
    assert {exit_code_of(cls("x")) for cls in errors.all_errors().values()} <= {2, 3, 4}


def test_the_screen_says_what_where_and_what_to_do() -> None:
    error = errors.EngineFailedError("The engine died.", param="model", source="inference")
    text = "\n".join(describe(error))
    assert "The engine died." in text
    assert "in model" in text
    assert "inference" in text
    assert "sage status" in text


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, "SAGE_API_KEY"),
        ("gateway", "SAGE_API_KEY"),
        ("openai", " OPENAI_API_KEY"),
        ("orchestrator", ""),
    ],
)
def test_a_refused_key_is_named_as_the_one_who_refuses_it_knows_it(source: str | None, told: str) -> None:
    lines = describe(errors.AuthenticationError("Incorrect API key provided.", source=source))
    advice = [line for line in lines if "API_KEY" in line]
    assert [told in line for line in advice] == ([True] if told else [])


def test_a_retry_time_is_passed_on() -> None:
    assert "Try again in 12 s." in describe(errors.DeviceBusyError("Busy.", retry_after_s=12))


def test_a_fault_of_ours_says_so() -> None:
    assert "SAGE_DEBUG=1" in "\n".join(describe(KeyError("x")))


def test_a_place_in_the_request_is_told_as_the_option_that_said_it() -> None:
    error = errors.InvalidDataError("It holds no rows.", param="training_file", source="orchestrator")
    assert "Where: in --data, said by orchestrator." in describe(error)


def test_a_full_disk_is_told_with_its_file_and_what_to_do() -> None:
    screen = " ".join(describe(OSError(errno.ENOSPC, "No space left on device", "/small/file")))
    assert "The disk is full" in screen
    assert "/small/file" in screen
    assert "Free some space" in screen
