"""`python -m bench`: every performance row beside its peers."""

import sys

from bench.command import main

sys.exit(main())
