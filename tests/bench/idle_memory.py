"""Memory of the idle stack, process by process: proportional set size (PSS), where shared pages count once.

python tests/bench/idle_memory.py            # the embedded stack under SAGE_HOME (default ~/.sage)
python tests/bench/idle_memory.py --compose  # the containers of this folder's compose project
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

MIB = 1024 * 1024


def pss_bytes(pid: int) -> int:
    """Source: Linux Documentation/filesystems/proc.rst, smaps_rollup."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def descendants(root: int) -> list[int]:
    """`root` and everything below it, from the parent pids in /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # ended meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, pending = [], [root]
    while pending:
        pid = pending.pop()
        found.append(pid)
        pending.extend(children.get(pid, []))
    return found


def embedded_pids() -> list[int]:
    home = Path(os.environ.get("SAGE_HOME") or "~/.sage").expanduser()
    pid_file = home / "run" / "supervisord.pid"
    if not pid_file.exists():
        raise SystemExit(f"{pid_file} is not there: start the stack with `sage up --embedded`")
    return descendants(int(pid_file.read_text()))


def compose_pids() -> list[int]:
    ids = subprocess.run(
        ["docker", "compose", "ps", "-q"], check=True, capture_output=True, text=True
    ).stdout.split()
    pids: list[int] = []
    for container in ids:
        inspected = subprocess.run(
            ["docker", "inspect", "-f", "{{.State.Pid}}", container],
            check=True,
            capture_output=True,
            text=True,
        )
        pids.extend(descendants(int(inspected.stdout)))
    return pids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compose", action="store_true")
    arguments = parser.parse_args()
    total = 0
    for pid in compose_pids() if arguments.compose else embedded_pids():
        size = pss_bytes(pid)
        total += size
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        print(f"{size / MIB:8.1f} MiB  {pid:>7}  {command[:90]}")
    print(f"{total / MIB:8.1f} MiB  in all")


if __name__ == "__main__":
    main()
