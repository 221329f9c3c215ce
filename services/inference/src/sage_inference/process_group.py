"""A child and everything it starts, as one thing that can be ended. The leader's pid is the group's id."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from pathlib import Path

from sage_contracts.home import write_whole

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_KILL_DEADLINE_S = 10.0


def alive(group: int) -> list[int]:
    """The pids in the group that still run. Zombies hold no memory and no port, and do not count."""
    if not Path("/proc/self/stat").exists():
        return _alive_without_proc(group)
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        fields = _stat_fields(int(folder.name))
        if fields is not None and int(fields[2]) == group and fields[0] not in ("Z", "X"):
            found.append(int(folder.name))
    return found


def cpu_seconds(group: int) -> float:
    """What its members, and their children that ended, have computed; 0 where the system does not say."""
    members = alive(group) if Path("/proc/self/stat").exists() else []
    fields = filter(None, map(_stat_fields, members))
    return sum(int(ticks) for found in fields for ticks in found[11:15]) / os.sysconf("SC_CLK_TCK")


async def end(group: int, grace_s: float) -> None:
    """SIGTERM, a grace, SIGKILL, to the whole group; returns when no member is alive.

    Raises: TimeoutError when members survive SIGKILL (stuck in the kernel).
    """
    _signal(group, signal.SIGTERM)
    try:
        await _gone(group, grace_s)
    except TimeoutError:
        logger.warning("group %d ignored SIGTERM for %.0f s: killing %s", group, grace_s, alive(group))
        _signal(group, signal.SIGKILL)
        await _gone(group, _KILL_DEADLINE_S)


async def _gone(group: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while alive(group):
        if time.monotonic() >= deadline:
            raise TimeoutError(f"processes {alive(group)} of group {group} are still alive")
        await asyncio.sleep(_POLL_S)


def reap_orphans(group: int) -> None:
    """Where the agent is process 1 of a container, an engine's orphans become its children to reap.

    Only after the leader was reaped: its exit code belongs to whoever started it.
    """
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _stat_fields(pid: int) -> list[str] | None:
    """/proc/<pid>/stat after the command's name: state, ppid, pgrp, …; None when the process is gone."""
    try:
        # The name may hold spaces and brackets; only the last bracket ends it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _started_ticks(pid: int) -> str | None:
    fields = _stat_fields(pid)
    return fields[19] if fields is not None else None


def _alive_without_proc(group: int) -> list[int]:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return []
    return [group]


class GroupRecord:
    """A file that remembers a group, so that an agent's successor can end what a killed agent left."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.json"

    def write(self, group: int) -> None:
        content = {"group": group, "started_ticks": _started_ticks(group), "boot": _boot_id()}
        write_whole(self._path, json.dumps(content))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


async def end_leftovers(folder: Path, grace_s: float) -> list[int]:
    """End the recorded groups of an agent that is gone; returns their ids."""
    left = leftovers(folder)
    for path, group in left.items():
        logger.warning("ending process group %d, left by an agent that was killed", group)
        await end(group, grace_s)
        path.unlink(missing_ok=True)
    return list(left.values())


def leftovers(folder: Path) -> dict[Path, int]:
    """Records whose group still lives, with it. Records of groups that are gone are removed."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        group = _recorded_group(path)
        if group is not None and alive(group):
            found[path] = group
        else:
            path.unlink(missing_ok=True)
    return found


def _recorded_group(path: Path) -> int | None:
    """The group in a record, unless the number may belong to somebody else by now."""
    try:
        record = json.loads(path.read_text())
        group, ticks, boot = int(record["group"]), record["started_ticks"], record["boot"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if boot != _boot_id() or boot is None:
        return None
    leader = _started_ticks(group)
    # Without its leader the number is not given away while a member lives: the members are the engine's.
    return group if leader is None or leader == ticks else None


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
