"""Settings from the environment: what cannot be used is told by its variable, in one line."""

from __future__ import annotations

import pytest

from sage_merger.settings import MergerSettings
from sage_servicekit.settings import from_env


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SAGE_REPORT_INTERVAL_S": "abc"}, "SAGE_REPORT_INTERVAL_S='abc': Input should be a valid number"),
        ({"SAGE_MERGE_THREADS": "0"}, "SAGE_MERGE_THREADS='0': Input should be greater than or equal to 1"),
        ({"SAGE_LOG_LEVEL": "loud"}, "SAGE_LOG_LEVEL='loud': Input should be one of CRITICAL"),
        ({"SAGE_MERGE_CHILD_COMMAND": "a b"}, '"merge_child_command"'),
        ({"SAGE_REPORT_INTERVAL_S": "a", "SAGE_MERGE_THREADS": "b"}, "; SAGE_MERGE_THREADS='b': "),
    ],
)
def test_a_wrong_value_ends_the_process_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], told: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        from_env(MergerSettings)
    assert ended.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith("Wrong setting: ")
    assert written.count("\n") == 1
    assert told in written


def test_values_that_can_be_used_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_REPORT_INTERVAL_S", "2.5")
    monkeypatch.setenv("SAGE_LOG_LEVEL", "debug")
    assert from_env(MergerSettings).report_interval_s == 2.5
