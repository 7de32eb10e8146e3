"""Tasks by name: `load_tasks`, samples and epochs of them; and their export for other trainers.

`python -m nanotoolrl.tasks --export FILE` writes them.
"""

import argparse
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nanotoolrl.bfcl import NAME as BFCL
from nanotoolrl.bfcl import load_bfcl
from nanotoolrl.calls import FORMATS
from nanotoolrl.cli import command
from nanotoolrl.env import Episode, Task
from nanotoolrl.world.observe import to_json
from nanotoolrl.world.taskfile import read_lines, write_lines

TASK_DIR = Path(__file__).resolve().parents[2] / "data" / "tasks"
SPLITS = ("train", "val", "test", "foreign", "ood")
TASK_NAMES = f"{', '.join(SPLITS)}, {BFCL}[:CATEGORY][:train|:test] or a JSONL file"


def is_bfcl(name: str) -> bool:
    """Whether a name of tasks is one of the benchmark's."""
    return name.partition(":")[0] == BFCL


def load_tasks(name_or_path: str, official: bool = False) -> list[Task]:
    """Tasks of a committed split (`train`, `val`, `test`, `foreign`, `ood`), of the BFCL benchmark
    (`bfcl[:category][:train|:test]`; official: under its own rules, see `BfclTask`) or of a JSONL file.

    Raises FileNotFoundError with the path and the known names, ValueError with file and line for a malformed
    line or a task whose ground truth does not earn reward 1.
    """
    if is_bfcl(name_or_path):
        return load_bfcl(name_or_path, official)
    if official:
        raise ValueError(f"--bfcl-official says nothing about {name_or_path}")
    path = TASK_DIR / f"{name_or_path}.jsonl" if name_or_path in SPLITS else Path(name_or_path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no task file {path}; give one of {TASK_NAMES}")
    tasks: dict[str, Task] = {}
    for number, line in read_lines(path):
        try:
            task = Task.from_json(line)
            if task.id in tasks:
                raise ValueError(f"two tasks share an id, {task.id!r}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        tasks[task.id] = task
    if not tasks:
        raise ValueError(f"{path} holds no task")
    return list(tasks.values())


def subset(tasks: list[Task], count: int) -> list[Task]:
    """A fixed random sample of `count` tasks in their order; all of them if there are no more."""
    chosen = random.Random(0).sample(range(len(tasks)), min(count, len(tasks)))
    return [tasks[i] for i in sorted(chosen)]


def in_epochs(tasks: Sequence[Task], seed: str, places: range) -> list[Task]:
    """The tasks at some places of an endless sequence: one seeded shuffle of all tasks after another."""
    chosen = []
    order = []
    shuffled = None
    for place in places:
        epoch, index = divmod(place, len(tasks))
        if epoch != shuffled:
            order = list(range(len(tasks)))
            shuffled = epoch
            random.Random(f"{seed}/{epoch}").shuffle(order)
        chosen.append(tasks[order[index]])
    return chosen


def save_tasks(tasks: list[Task], path: Path) -> None:
    """Write tasks as JSONL; `load_tasks(path)` gives them back. Raises OSError with the path."""
    write_lines(path, (task.to_json() for task in tasks))


def export(tasks: Sequence[Task], path: Path, format: str = "hermes") -> str:
    """Write tasks as the rows that other trainers read; returns what to say about it.

    A row has `prompt` (messages), `data_source` (the category), `ability`, `reward_model` (style and ground
    truth: calls by turn) and `extra_info` (id, tools, user messages by turn, initial state): the columns of
    verl, of which TRL takes `prompt` and hands the others to its reward functions. What differs in shape from
    row to row is a JSON string, so that a row fits into a parquet file.
    """
    lines = []
    for i, task in enumerate(tasks):
        messages, tools = Episode(task, format).prompt()
        truth = [[asdict(call) for call in turn.calls] for turn in task.turns]
        users = [{"user": turn.user, "offers": turn.offers} for turn in task.turns]
        free = {"tools": tools, "turns": users, "state": task.state}
        info = {"index": i, "id": task.id} | {name: to_json(value) for name, value in free.items()}
        row = {"data_source": task.category, "prompt": messages, "ability": "multi-turn tool use"}
        row["reward_model"] = {"style": "rule", "ground_truth": to_json(truth)}
        lines.append(to_json(row | {"extra_info": info}))
    write_lines(path, lines)
    return f"{len(lines)} tasks in {path}"


@command
def main(argv: list[str] | None = None) -> int:
    """The command: 0, or 2 when refused."""
    about = "Write tasks as JSONL rows that other trainers read (verl, TRL)."
    parser = argparse.ArgumentParser(prog="python -m nanotoolrl.tasks", description=about)
    parser.add_argument("--export", metavar="FILE", required=True, help="where to")
    parser.add_argument("--tasks", default="train", help=f"{TASK_NAMES} (default: train)")
    parser.add_argument(
        "--format", default="hermes", choices=tuple(FORMATS), help="syntax of calls (default: hermes)"
    )
    args = parser.parse_args(argv)
    try:
        print(export(load_tasks(args.tasks), Path(args.export), args.format))
    except (OSError, ValueError) as error:
        print(f"tasks: {error}", file=sys.stderr)
        return 2
    return 0
