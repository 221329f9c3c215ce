"""A part of the stack that does nothing: answers /healthz, or touches its sign of life, until SIGTERM.

    python tests/fakes/fake_part.py --port 8080 [--orphan FILE]
    python tests/fakes/fake_part.py --alive run/trainer.alive
    python tests/fakes/fake_part.py --alive run/trainer.alive --tell 8081 --told FILE
    python tests/fakes/fake_part.py --die "why"
`--orphan` starts a child in a session of its own that ignores SIGTERM, changes its title, as Celery's workers
and vLLM's do, and writes its pid.
`--tell` takes a second to leave, as a trainer that writes a checkpoint does, and notes whether the part on
that port still listened.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_STUBBORN = """
import os, pathlib, signal, sys, threading
from setproctitle import setproctitle
signal.signal(signal.SIGTERM, signal.SIG_IGN)
setproctitle("[stubborn]")
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
threading.Event().wait(120)
"""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        said = {"status": "ok", "service": "gateway", "stack": os.environ.get("SAGE_STACK_ID")}
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int)
    parser.add_argument("--alive", type=Path)
    parser.add_argument("--orphan", type=Path)
    parser.add_argument("--tell", type=int)
    parser.add_argument("--told", type=Path)
    parser.add_argument("--die")
    arguments = parser.parse_args()
    if arguments.die:
        sys.exit(f"fatal: {arguments.die}")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if arguments.orphan:
        subprocess.Popen([sys.executable, "-c", _STUBBORN, str(arguments.orphan)], start_new_session=True)
    if arguments.port:
        server = ThreadingHTTPServer((os.environ.get("SAGE_HOST", "127.0.0.1"), arguments.port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    while not stop.wait(0.2):
        if arguments.alive:
            arguments.alive.touch()
    if arguments.tell:
        time.sleep(1)
        arguments.told.write_text("heard" if listens(arguments.tell) else "nobody there")


if __name__ == "__main__":
    main()
