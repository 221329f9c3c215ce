"""What the installed `sage` runs. Ctrl-C ends it while it is imported, too, without a traceback."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; never returns normally."""
    try:
        from sage_cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
