"""Tables on terminals of every width: no column is ever missing, and names can be read whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sage_cli import render

HEADERS = ["JOB", "NAME", "STATE", "PROGRESS", "CREATED"]
LONG_NAME = "customer-support-assistant-v2"
ROWS = [
    ["ftjob-0001", "code", "succeeded", "code@1  2.391 → 1.898", "12 s ago"],
    ["ftjob-0002", LONG_NAME, "failed", "The loss became NaN at step 4. " * 3, "3 min ago"],
]


def shown(width: int, headers: list[str], rows: list[list[str]], flexible: int) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    render.table(console, headers, rows, flexible)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_the_flexible_column_is_cut_and_no_other_is_missing(width: int) -> None:
    lines = shown(width, HEADERS, ROWS, 3)
    assert max(map(len, lines)) <= width
    assert all(cell in lines[1] for cell in ("ftjob-0001", "code", "succeeded", "code@", "12 s ago"))
    assert ("…" in lines[2]) == (width < 200)


def test_a_name_that_does_not_fit_goes_over_several_lines() -> None:
    lines = shown(60, HEADERS, ROWS, 3)
    start = lines[0].index("NAME")
    name = "".join(line[start : lines[0].index("STATE")].strip() for line in lines[2:])
    assert name == LONG_NAME


def test_what_names_a_row_is_the_last_to_be_broken() -> None:
    job_id = "ftjob-d1b05b8cc561f0e0d19d65f3"
    lines = shown(80, HEADERS, [[job_id, LONG_NAME, "succeeded", "step 3/40  loss 2.25", "12 min ago"]], 3)
    assert job_id in lines[1] and "succeeded" in lines[1] and "12 min ago" in lines[1]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [30, 40, 59])
def test_on_a_narrow_terminal_each_row_is_a_block_under_its_name(width: int) -> None:
    job_id = "ftjob-d1b05b8cc561f0e0d19d65f3"
    row = [job_id, "code", "cancelled", "step 3/40", "12 min ago"]
    assert [line.rstrip() for line in shown(width, HEADERS, [row, row], 3)] == [
        job_id,
        "  name      code",
        "  state     cancelled",
        "  progress  step 3/40",
        "  created   12 min ago",
    ] * 2


def test_nothing_is_cut_in_a_block_and_what_is_empty_is_left_out() -> None:
    rows = [["gateway", "up", "url http://127.0.0.1:8080  backends 5"], ["trainer", "down", ""]]
    lines = [line.rstrip() for line in shown(40, ["PART", "STATE", ""], rows, 2)]
    assert lines == [
        "gateway",
        "  state  up",
        "         url http://127.0.0.1:8080",
        "         backends 5",
        "trainer",
        "  state  down",
    ]


def test_a_narrow_terminal_with_room_for_all_cells_shows_a_table() -> None:
    lines = shown(40, ["PART", "STATE", ""], [["gateway", "up", "all is well"]], 2)
    assert [line.split("  ")[0] for line in lines] == ["PART", "gateway"]


def test_a_long_header_gives_way_to_cells() -> None:
    header = "A_VERY_LONG_HEADER" + "_INDEED" * 4
    lines = shown(60, ["PART", header, ""], [["gateway", "running", "everything is well"]], 2)
    assert lines[1].split() == ["gateway", "running", "everyth…"]
    assert lines[0].split()[1].endswith("…")


@pytest.mark.parametrize("width", [1, 8, 20])
def test_a_hopeless_width_is_no_error(width: int) -> None:
    assert shown(width, HEADERS, ROWS, 3)


def test_a_wide_terminal_shows_everything() -> None:
    assert [line.split() for line in shown(200, HEADERS, ROWS, 3)] == [
        line.split() for line in [" ".join(HEADERS), *(" ".join(row) for row in ROWS)]
    ]
