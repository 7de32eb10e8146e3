"""`python -m bench`: every performance row beside its peers."""

import sys

from bench.rows import main

sys.exit(main())
