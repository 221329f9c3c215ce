import sys

from sage_merger.main import main

sys.exit(main())
