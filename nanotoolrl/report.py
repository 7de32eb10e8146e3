"""`python -m nanotoolrl.report`, which is in look/report.py."""

import sys

from nanotoolrl.look.report import main

if __name__ == "__main__":
    sys.exit(main())
