import sys

from sage_trainer.main import main

sys.exit(main())
