"""What people are told where there is no room. The disk is really full."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet, table

MOUNT = 'mount -t tmpfs -o size=64k tmpfs "$TMPDIR" && exec "$@"'
VALIDATE = "import sys, pathlib; from sage.tools.finetune.data import validate_file as run"
PACK = (
    "import sys, pathlib; from sage_cli.jobs.data import packed\n"
    "def run(path):\n with packed(path, 'qa'): pass"
)
HOME = (
    "import sys, pathlib; from sage_contracts.home import Home\n"
    "from sage_cli.stack.updown import require_home\n"
    "def run(path): require_home(Home(path))\n"
)
USED = "pathlib.Path(sys.argv[1], 'state').mkdir(parents=True)"
TRY = "\nfrom sage_contracts.errors import StorageFullError\n" + (
    "try: run(pathlib.Path(sys.argv[1]))\nexcept StorageFullError as error: print(error.message)"
)


def said_on_a_full_disk(folder: Path, program: str, data: Path) -> str:
    folder.mkdir()
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh"]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        subprocess.run([*command, "true"], env=environment, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs Linux that lets a user mount a file system of its own")
    command += [sys.executable, "-c", program + TRY, str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("work", [VALIDATE, PACK])
def test_a_full_temporary_folder_is_named_with_the_variable_that_moves_it(tmp_path: Path, work: str) -> None:
    rows = [os.urandom(500).hex() for _ in range(400)]
    if work == VALIDATE:
        path, data = tmp_path / "rows.parquet", tmp_path / "rows.parquet.gz"
        parquet.write_table(table({"question": rows, "answer": rows}), path)
        data.write_bytes(gzip.compress(path.read_bytes(), 1))
    else:
        data = tmp_path / "rows"
        data.mkdir()
        (data / "a.jsonl").write_text("\n".join(json.dumps({"question": r, "answer": r}) for r in rows))
    full = tmp_path / "full"
    assert said_on_a_full_disk(full, work, data) == (
        f"The disk is full: {full} could not be written. Free some space, or set TMPDIR to another disk.\n"
    )


def test_a_home_without_room_is_begun_nowhere_and_one_that_is_used_is_not_shut(tmp_path: Path) -> None:
    """What takes the room is deleted through its stack."""
    home = tmp_path / "full" / "home"
    told = said_on_a_full_disk(tmp_path / "full", HOME, home)
    assert told.startswith(f"Only 0 MiB are free at {home}; a stack needs 256 MiB")
    (tmp_path / "full").rmdir()
    assert said_on_a_full_disk(tmp_path / "full", HOME + USED, home) == ""
