"""TensorBoard, which on a loopback address answers to this machine's names alone, as our own services do.

It takes TensorBoard's options: `python -m sage_servicekit.tensorboard --logdir FOLDER`. By itself TensorBoard
would show the curves, and the model's answers among them, to a page whose name leads here (DNS rebinding).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from sage_servicekit.names import is_loopback, is_of_this_machine

WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def for_this_machine(app: WSGIApp) -> WSGIApp:
    """The app, which answers 403 to a name that somebody else could own."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST")
        if host is None or is_of_this_machine(host):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"This TensorBoard is for its own machine: call it 127.0.0.1 or localhost.\n"]

    return answer


def main() -> None:
    from absl import app as absl_app
    from tensorboard import default, main_lib, program
    from tensorboard.plugins import base_plugin

    def make_server(app: WSGIApp, flags: Any) -> Any:
        listens_on = "0.0.0.0" if flags.bind_all else flags.host or "localhost"
        if is_loopback(os.environ.get("SAGE_PUBLISHED_ON") or listens_on):
            app = for_this_machine(app)
        return program.create_port_scanning_werkzeug_server(app, flags)

    main_lib.global_init()
    board = program.TensorBoard(plugins=default.get_plugins(), server_class=make_server)
    try:
        absl_app.run(board.main, flags_parser=board.configure)
    except base_plugin.FlagsError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
