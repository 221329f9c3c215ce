"""`python -m sage_orchestrator`."""

from sage_orchestrator.main import main

if __name__ == "__main__":
    main()
