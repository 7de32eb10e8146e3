"""Write the committed task files from their seeds: `python data/make_tasks.py` (ten seconds)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanotoolrl.world.generate import make_split  # noqa: E402
from nanotoolrl.world.tasks import SPLITS, TASK_DIR, save_tasks  # noqa: E402

if __name__ == "__main__":
    TASK_DIR.mkdir(exist_ok=True)
    for split in SPLITS:
        tasks = make_split(split)
        save_tasks(tasks, TASK_DIR / f"{split}.jsonl")
        print(f"{split}: {len(tasks)} tasks")
