"""One log format for all processes: a line a record, to standard error."""

from __future__ import annotations

import logging
import sys


def configure(service: str, level: str = "INFO") -> None:
    """Set up the root logger of this process. Call once, from the composition root."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {service} %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # One line per outgoing call drowns the lines that people look for.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
