"""The worlds that tasks are played in: tools, task files, and the generator of tasks."""
