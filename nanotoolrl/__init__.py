"""nanotoolrl: multi-turn tool use by reinforcement learning, small enough to read.

Import it before torch: it decides how torch's threads wait for each other. By default they spin, which beside
any other work makes a run tens of times slower; asleep they cost an idle machine nothing worth it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
