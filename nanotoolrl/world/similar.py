"""Scenarios to compare a turn with: similar ones, and one that looks alike."""

from collections.abc import Callable, Sequence
from random import Random

from nanotoolrl.calls import Call
from nanotoolrl.env import Task, replay
from nanotoolrl.world.api import API_CLASSES, method_names, owner_of
from nanotoolrl.world.generate import SMALL, Rejected, Scenario, draw_bindings, honest, twin
from nanotoolrl.world.goals import DOMAINS, Goal, all_goals


def similar(
    task: Task, calls: list[Call], others: Sequence[Task], seed: str, count: int = 3
) -> tuple[list[Task], Task | None]:
    """Scenarios to compare a turn with (Hao et al. 2026, §4, PRS): (similar ones, one that looks alike).

    `calls` are the ground truth of a turn of `task`. The similar ones are one-turn tasks whose solution takes
    the same tools in the same order, in other worlds and with other values; the one that looks alike touches
    the same classes and takes other tools. They are made from the train pool's goals; where none of these
    fits, they are turns of `others` (tasks the run trains on), and there may be fewer of them. All of them
    replay to reward 1. A pure function of its arguments.
    """
    rng = Random(seed)
    goals = [goal for goal in all_goals() if goal.pool() == "train"]
    ours = {task.owner(call.name) for call in calls} <= API_CLASSES.keys()
    fitting = [goal for goal in goals if ours and _occurs(goal.tools(), [call.name for call in calls])]
    if not fitting:
        return _borrowed(task, calls, others, rng, count)
    goal = max(fitting, key=lambda goal: len(goal.tools()))
    fresh = [_fresh(goal, f"similar-{k}", f"similar/{seed}/{k}") for k in range(count)]
    rivals = [other for other in goals if other.apis() & goal.apis() and other.tools() != goal.tools()]
    rivals = rng.sample(rivals, len(rivals))
    rival = max(rivals, key=lambda other: _closeness(owner_of, other.tools(), goal.tools()), default=None)
    return [task for task in fresh if task], rival and _fresh(rival, "alike", f"alike/{seed}")


def _occurs(part: list[str], whole: list[str]) -> bool:
    """Whether `part` stands in `whole` without a gap."""
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def _closeness(
    owner: Callable[[str], str | None], tools: list[str], wanted: list[str]
) -> tuple[int, bool, int]:
    """Sorts tool sequences by shared tools, then same classes, then similar length."""
    same_classes = set(map(owner, tools)) == set(map(owner, wanted))
    return len(set(tools) & set(wanted)), same_classes, -abs(len(tools) - len(wanted))


def _fresh(goal: Goal, name: str, seed: str) -> Task | None:
    """An honest one-turn task for the goal, in a world of its classes; None if the dice never give one."""
    for attempt in range(100):
        rng = Random(f"{seed}/{attempt}")
        state = {api: DOMAINS[api].world(rng, SMALL) for api in sorted(goal.apis())}
        tools = [tool for api in state for tool in method_names(API_CLASSES[api])]
        try:
            drawn = draw_bindings(rng, goal, Task("", "base", state, [], []).new_world())
            task = twin(Scenario([[(goal, drawn)]], -1, tools, f"{seed}/{attempt}"), state, "base", name)
        except (Rejected, IndexError):
            continue
        if honest(task):
            return task
    return None


def _borrowed(
    task: Task, calls: list[Call], others: Sequence[Task], rng: Random, count: int
) -> tuple[list[Task], Task | None]:
    """`similar` from the turns of other tasks: the same tools, best in the same order; then the closest."""
    wanted = [call.name for call in calls]
    seen = {str(calls)}
    owner = task.owner
    classes = set(map(owner, wanted))
    same = []
    rivals = []
    for other in rng.sample(others, len(others)):
        for i, turn in enumerate(other.turns):
            tools = [call.name for call in turn.calls]
            if str(turn.calls) in seen or not set(map(other.owner, tools)) & classes:
                continue
            seen.add(str(turn.calls))  # twins share their turns
            if set(tools) == set(wanted):
                same.append((tools != wanted, other, i))
            else:
                rivals.append((_closeness(owner, tools, wanted), other, i))
    same.sort(key=lambda row: row[0])
    rival = max(rivals, key=lambda row: row[0], default=None)
    return [_alone(task, i) for _, task, i in same[:count]], rival and _alone(*rival[1:])


def wish(task: Task, i: int) -> str:
    """What the user has asked for by turn i and not got: the user messages since the last turn with calls."""
    first = max((k + 1 for k in range(i) if task.turns[k].calls), default=0)
    return " ".join(turn.user for turn in task.turns[first : i + 1])


def _alone(task: Task, i: int) -> Task:
    """Turn i of a task, with its whole wish, as a task of its own; the task itself if the world before the
    turn cannot be made anew or the turn does not replay in it."""
    try:
        alone = task.turn_alone(i, wish(task, i))
        return alone if replay(alone, [turn.calls for turn in alone.turns]) == 1 else task
    except TypeError:
        return task
