"""`python -m nanotoolrl.evaluate`, which is in look/evaluate.py."""

import sys

from nanotoolrl.look.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
