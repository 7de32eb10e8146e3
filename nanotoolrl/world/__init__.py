"""The worlds that tasks are played in: tools, task files, and the generator of tasks."""

import nanotoolrl.world.domains  # noqa: F401  (every class is known to whoever imports anything from here)
