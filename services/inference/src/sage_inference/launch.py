"""Becomes the command it is given, after arranging that it does not outlive the agent.

`python -m sage_inference.launch COMMAND …`: the agent starts engines through this instead of a hook between
fork and exec, which may deadlock in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from sage_contracts.lifeline import die_first

_PR_SET_PDEATHSIG = 1
# The engine is the largest process around and the one that can be restarted: let the kernel choose it first.
_OOM_SCORE = 600


def main() -> None:
    parent = int(os.environ.pop("SAGE_ENGINE_PARENT", "0"))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    die_first(_OOM_SCORE)
    if parent and os.getppid() != parent:
        sys.exit("the agent that asked for this engine is gone")
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error.strerror}")


if __name__ == "__main__":
    main()
