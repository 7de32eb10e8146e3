"""`python -m nanotoolrl.tasks`, which is in world/tasks.py."""

import sys

from nanotoolrl.world.tasks import main

if __name__ == "__main__":
    sys.exit(main())
