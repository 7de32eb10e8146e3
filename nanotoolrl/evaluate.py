"""Success of a model on tasks, by category and call format, with intervals (Hao et al. 2026, Table 1).

`python -m nanotoolrl.evaluate --model DIR` prints the table; `--help` lists the rest.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanotoolrl.chat import FORMATS, MESSAGE_STATES
from nanotoolrl.env import CATEGORIES, MAX_MESSAGES, Episode, Task
from nanotoolrl.model import BUILT_IN, ModelError, Policy, load
from nanotoolrl.sampler import Sampler, demonstration
from nanotoolrl.supervise import hint_text
from nanotoolrl.tasks import SPLITS, load_tasks, subset


@dataclass
class Scores:
    """Outcome of one evaluation: rewards by category, message states, and how long it took."""

    rewards: dict[str, list[float]] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def success(self) -> float:
        """Share of tasks solved."""
        return self.of("all")[0]

    def of(self, category: str) -> tuple[float, float, float, int]:
        """(share solved, 95 % Wilson interval low, high, number of tasks) of a category, or of "all"."""
        rewards = sum(self.rewards.values(), []) if category == "all" else self.rewards.get(category, [])
        return wilson(sum(rewards), len(rewards)) + (len(rewards),)


def wilson(solved: float, n: int) -> tuple[float, float, float]:
    """(share, low, high): the Wilson score interval at 95 %; (nan, nan, nan) for n = 0."""
    if n == 0:
        return (math.nan,) * 3
    z, share = 1.96, solved / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return share, middle - half, middle + half


def evaluate(
    policy: Policy,
    tasks: Sequence[Task],
    format: str = "hermes",
    temperature: float = 0.0,
    hints: Sequence[str] | None = None,
    seed: int = 0,
    max_messages: int = MAX_MESSAGES,
    strict_empty_turn: bool = False,
    **sampler: object,
) -> Scores:
    """Play every task once (greedily by default) and score it. `sampler` passes settings to `Sampler`.

    Tasks are played in order of the size of their world: long episodes then run beside long ones.
    """
    started = time.perf_counter()
    order = sorted(range(len(tasks)), key=lambda i: len(str(tasks[i].state)))
    player = Sampler(policy, seed=seed, **sampler)
    hints = [hints[i] for i in order] if hints else None
    episodes = [Episode(tasks[i], format, max_messages, strict_empty_turn) for i in order]
    trajectories = player.rollout(episodes, hints, temperature)
    scores = Scores()
    for trajectory in trajectories:
        scores.rewards.setdefault(trajectory.category, []).append(trajectory.reward)
        for state in trajectory.states:
            scores.states[state] = scores.states.get(state, 0) + 1
    scores.seconds = time.perf_counter() - started
    return scores


def table(columns: dict[str, Scores]) -> str:
    """Success in % with intervals, a row per category and a column per evaluation."""
    names = [c for c in CATEGORIES if any(c in scores.rewards for scores in columns.values())] + ["all"]
    lines = [f"{'success %':<14}" + "".join(f"{title:>24}" for title in columns)]
    for name in names:
        cells = []
        for scores in columns.values():
            share, low, high, n = scores.of(name)
            cells.append(f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}] n={n}")
        lines.append(f"{name:<14}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def states_table(columns: dict[str, Scores]) -> str:
    """Share of assistant messages in each state in %, a row per state and a column per evaluation."""
    lines = [f"{'messages %':<14}" + "".join(f"{title:>24}" for title in columns)]
    for state in MESSAGE_STATES:
        shares = [s.states.get(state, 0) / max(1, sum(s.states.values())) for s in columns.values()]
        lines.append(f"{state:<14}" + "".join(f"{100 * share:>24.1f}" for share in shares))
    return "\n".join(lines)


def fits(policy: Policy, task: Task, format: str, room: int, hinted: bool = False) -> bool:
    """Whether the prompt of a task has at most `room` tokens; if `hinted`, with its hint, and whether its
    ground truth has, too."""
    hint = hint_text(task, format) if hinted else ""
    if len(policy.chat.prompt_ids(*Episode(task, format).prompt(), format, hint)) > room:
        return False
    return not hinted or len(demonstration(policy.chat, task, format).tokens) <= room


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, or 2 when refused."""
    parser = argparse.ArgumentParser(
        prog="python -m nanotoolrl.evaluate", description="Score a model on tasks.", allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        default=BUILT_IN,
        help="checkpoint directory, hub name, or nano, the built-in model (default)",
    )
    parser.add_argument(
        "--tasks", default="test", help=f"{', '.join(SPLITS)} or a JSONL file (default: test)"
    )
    parser.add_argument(
        "--format", choices=(*FORMATS, "all"), default="all", help="syntax of calls (default: all)"
    )
    parser.add_argument(
        "--count", type=int, default=0, help="a fixed sample of so many tasks (default: 0, all)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--hint", action="store_true", help="put each task's hint into the system prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise (default: 0)")
    parser.add_argument("--context", type=int, default=2048, help="tokens per episode (default: 2048)")
    parser.add_argument(
        "--max-messages", type=int, default=20, help="assistant messages per episode (default: 20)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the scores there, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        if args.count < 0 or args.temperature < 0:
            raise ValueError("--count and --temperature must not be negative")
        if args.json and not Path(args.json).resolve().parent.is_dir():
            raise FileNotFoundError(f"no directory for --json {args.json}")
        policy, tasks = load(args.model), load_tasks(args.tasks)
        tasks = subset(tasks, args.count) if args.count else tasks
        columns = {}
        for format in FORMATS if args.format == "all" else [args.format]:
            hints = [hint_text(task, format) for task in tasks] if args.hint else None
            how = (args.temperature, hints, args.seed, args.max_messages)
            columns[format] = evaluate(policy, tasks, format, *how, context=args.context)
            print(f"{format}: {len(tasks)} tasks in {columns[format].seconds:.0f} s", file=sys.stderr)
    except (ModelError, FileNotFoundError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print(table(columns))
    print(states_table(columns))
    if args.json:
        arguments = {name: value for name, value in vars(args).items() if name != "json"}
        scores = {format: dataclasses.asdict(one) for format, one in columns.items()}
        with open(args.json, "w") as file:
            json.dump({"arguments": arguments, "scores": scores}, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
