"""`python -m sage.tools.finetune.distributed FD`: one rank, started by `ranks.py`, never by hand."""

import os
import sys

from sage.tools.finetune.distributed.rank import main

code = main()
sys.stderr.flush()
# Not `sys.exit`: a rank that lost the others would wait for their connections.
os._exit(code)
