"""`python -m sage_gateway`."""

from __future__ import annotations

from sage_gateway.main import main

if __name__ == "__main__":
    main()
