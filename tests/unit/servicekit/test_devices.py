"""Which device a process computes on, and what its children are shown: the same card by every name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.fakes.nvidia_smi import Card, install

from sage_contracts.errors import InvalidRequestError
from sage_servicekit.machine import Device, find_device, look_again, total_memory_bytes

SMALL, LARGE, EQUAL = Card("GPU-aa11", 24564, 564), Card("GPU-bb22", 81559, 559), Card("GPU-cc33", 81559)
CUT_UP = Card("GPU-dd44", 40960, slices=(("1g.5gb", "MIG-e5"), ("3g.20gb+me", "MIG-f6")))


@pytest.fixture(autouse=True)
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{install(tmp_path, SMALL, LARGE, EQUAL, CUT_UP)}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("wanted", "visible", "name"),
    [
        # CUDA's own choice would be the fastest: no card that is there for the screen alone.
        ("auto", None, "cuda:1"),
        ("auto", "0,1", "cuda:0"),
        ("auto", "2, 0", "cuda:2"),
        ("auto", "GPU-cc33,GPU-aa11", "cuda:2"),
        ("auto", "GPU-a", "cuda:0"),
        ("auto", "MIG-f6", "MIG-f6"),
        ("auto", "3", "MIG-e5"),
        ("auto", "", "cpu"),
        ("auto", "-1", "cpu"),
        ("auto", "NoDevFiles", "cpu"),
        ("auto", "7", "cpu"),
        ("cpu", "1", "cpu"),
        ("cuda", "0", "cuda:0"),
        ("cuda:0", None, "cuda:0"),
        ("cuda:1", "0,1", "cuda:1"),
        ("cuda:1", "1", "cuda:1"),
        ("GPU-bb22", "0,1", "cuda:1"),
        ("MIG-e5", None, "MIG-e5"),
    ],
)
def test_the_device_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, wanted: str, visible: str | None, name: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_device(wanted).name == name


@pytest.mark.parametrize(
    ("wanted", "visible", "there"),
    [
        ("cuda:5", None, "cpu, cuda:1, cuda:2, cuda:0, MIG-f6, MIG-e5"),
        ("GPU-nobody", None, "cpu, cuda:1"),
        ("cuda:0", "1", r"cpu, cuda:1 \(numbers are nvidia-smi's, and CUDA_VISIBLE_DEVICES is '1'\)"),
        ("cuda:1", "0,7,1", "cpu, cuda:0 "),
        ("cuda", "", "cpu "),
        ("gpu", None, "cpu, cuda:1"),
    ],
)
def test_a_named_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, wanted: str, visible: str | None, there: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InvalidRequestError, match=rf"no device '{wanted}' here\. There are: {there}"):
        find_device(wanted)


def test_a_device_tells_its_memory_now() -> None:
    small, part = find_device("cuda:0"), find_device("MIG-f6")
    assert (small.total_bytes, small.free_bytes) == (24564 << 20, 24000 << 20)
    assert look_again(small) == small
    assert part.free_bytes is None and part.total_bytes == 20 * 10**9
    assert find_device("cpu").total_bytes == total_memory_bytes()
    assert look_again(find_device("cpu")) is None and look_again(Device("cuda:9", 1)) is None


@pytest.mark.parametrize(("name", "shown"), [("cuda:1", "1"), ("MIG-f6", "MIG-f6"), ("cpu", "")])
def test_a_child_is_shown_its_device_alone_and_counts_as_nvidia_smi_does(name: str, shown: str) -> None:
    assert find_device(name).env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": shown}


@pytest.mark.parametrize("has_program", [True, False])
def test_where_no_card_answers_there_is_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_program: bool
) -> None:
    (folder := tmp_path / "other").mkdir()
    monkeypatch.setenv("PATH", str(install(folder) if has_program else folder))
    assert find_device().name == "cpu"
    with pytest.raises(InvalidRequestError, match=r"There are: cpu\."):
        find_device("cuda:0")
