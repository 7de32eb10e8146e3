"""`python -m nanotoolrl.study`, which is in look/study.py."""

import sys

from nanotoolrl.look.study import main

if __name__ == "__main__":
    sys.exit(main())
