"""Success of a model on tasks, by category, with intervals (the table of Hao et al. 2026, Table 1)."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nanotoolrl.env import CATEGORIES, Episode, Task
from nanotoolrl.model import Policy
from nanotoolrl.sampler import Sampler, Trajectory

EVAL_SLOTS = 128


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
    on_done: Callable[[list[Trajectory]], None] | None = None,
    **sampler: object,
) -> Scores:
    """Play every task once (greedily by default) and score it. `sampler` passes settings to `Sampler`."""
    started = time.perf_counter()
    player = Sampler(policy, seed=seed, **({"slots": EVAL_SLOTS} | sampler))
    trajectories = player.rollout([Episode(task, format) for task in tasks], hints, temperature)
    scores = Scores()
    for trajectory in trajectories:
        scores.rewards.setdefault(trajectory.category, []).append(trajectory.reward)
        for state in trajectory.states:
            scores.states[state] = scores.states.get(state, 0) + 1
    scores.seconds = time.perf_counter() - started
    if on_done:
        on_done(trajectories)
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


def fits(policy: Policy, task: Task, format: str, room: int) -> bool:
    """Whether the prompt of a task has at most `room` tokens."""
    return len(policy.chat.prompt_ids(*Episode(task, format).prompt(), format)) <= room
