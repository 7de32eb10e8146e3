"""The seeded generator of tasks, which wrote the committed ones.

A scenario is one to three turns of goals (goals.py) played on a random world. Its twins are the four
categories of Hao et al. 2026 (after BFCL-v3 multi-turn): `base`; `miss_func`, a needed tool is hidden until a
later message offers it; `miss_param`, the request lacks a value and the user must be asked; `long_context`,
the world is many times larger.
"""

import copy
from dataclasses import dataclass
from random import Random

from nanotoolrl.calls import Call
from nanotoolrl.env import Task, Turn, replay
from nanotoolrl.world.api import API_CLASSES, method_names, owner_of
from nanotoolrl.world.goals import DOMAINS, Domain, Goal, all_goals
from nanotoolrl.world.mutations import mutations
from nanotoolrl.world.observe import call_tool
from nanotoolrl.world.words import a_title

SMALL, LARGE = 4, 45  # records per kind in an ordinary and in a long_context world
MAX_TURN_CALLS, MAX_TOOLS = 5, 8
OPENINGS = ("", "", "", "Please help: ", "Hello! ", "One thing: ")
JOINTS = (" Then: ", " Also: ", " And: ")
NO_TOOL = ("I have no tool for that.", "A tool for that is missing.")
OFFERS = ("You can use this tool now:", "Here is a tool for it:")


@dataclass
class Scenario:
    """What all twins of one index share: the goals per turn with their bindings, the turn that twins tamper
    with, the tools shown, and the seed of every choice of words."""

    goals: list[list[tuple[Goal, dict]]]
    missing: int
    tools: list[str]
    seed: str


class Rejected(Exception):
    """The dice gave no valid scenario; draw again."""


def make_split(split: str) -> list[Task]:
    """The tasks of a committed split, in file order; train, val and test are 100 indices each of one pool."""
    pool = split if split in ("foreign", "ood") else "train"
    wanted = ("base", "miss_func", "miss_param", "long_context")
    wanted = wanted[:3] if split in ("train", "foreign") else wanted
    families = [generate(pool, f"{split}-{i:03d}") for i in range(100)]
    return [family[category] for family in families for category in wanted]


def generate(pool: str, name: str) -> dict[str, Task]:
    """The four twins of one index, {category: Task}: a pure function of (pool, name).

    Every twin is honest: its ground truth earns reward 1, and 0 with any one call dropped or altered.
    """
    for attempt in range(1000):
        seed = f"{pool}/{name}/{attempt}"
        rng = Random(seed)
        apis = [api for api, domain in DOMAINS.items() if domain.api.pool == pool]
        chosen = rng.sample(apis, min(len(apis), rng.choice([1, 2, 2, 3])))
        state = {api: DOMAINS[api].world(rng, SMALL) for api in chosen}
        large = {api: DOMAINS[api].world(rng, LARGE) for api in chosen}
        try:
            scenario = _scenario(rng, state, seed)
            tasks = {
                category: twin(scenario, state, category, name)
                for category in ("base", "miss_func", "miss_param")
            }
            wide = {api: _enlarge(state[api], large[api], DOMAINS[api]) for api in state}
            tasks["long_context"] = twin(scenario, wide, "long_context", name)
        except (Rejected, IndexError):  # IndexError: nothing to choose from, e.g. every bill is paid
            continue
        if all(honest(task) for task in tasks.values()):
            return tasks
    raise RuntimeError(f"no valid scenario for {pool}/{name}")


def honest(task: Task) -> bool:
    """Whether the ground truth earns reward 1, and 0 with any one call dropped or altered."""
    return replay(task, [turn.calls for turn in task.turns]) == 1 and not any(
        replay(task, calls) for calls in mutations(task)
    )


def _scenario(rng: Random, state: dict, seed: str) -> Scenario:
    """A scenario in which some turn can lack a value or a tool, and something is listed, which `long_context`
    makes long."""
    world = Task("", "base", state, [], []).new_world()
    fitting = [goal for goal in all_goals() if goal.apis() <= set(world)]
    turns = []
    listed = False
    for _ in range(rng.choices([1, 2, 3], [5, 2, 1])[0]):
        goals = []
        for goal in rng.sample(fitting, min(len(fitting), rng.choices([1, 2], [4, 1])[0])):
            if sum(len(g.tools()) for g, _ in goals) + len(goal.tools()) <= MAX_TURN_CALLS:
                goals.append((goal, draw_bindings(rng, goal, world)))
                _, results, _ = play(goal, goals[-1][1], world)
                listed = listed or any(isinstance(result, list) for result in results)
        turns.append(goals)
    tools = [[tool for goal, _ in goals for tool in goal.tools()] for goals in turns]
    used = list(dict.fromkeys(sum(tools, [])))
    able = [
        i
        for i, goals in enumerate(turns)
        if any(goal.vague for goal, _ in goals) and tools[i][-1] not in sum(tools[:i], [])
    ]
    if not able or len(used) > MAX_TOOLS or not listed:
        raise Rejected
    others = [tool for api in world for tool in method_names(API_CLASSES[api]) if tool not in used]
    wanted = max(0, rng.randint(4, 7) - len(used))
    shown = used + rng.sample(others, min(wanted, len(others)))
    rng.shuffle(shown)
    return Scenario(turns, rng.choice(able), shown, seed)


def draw_bindings(rng: Random, goal: Goal, world: dict) -> dict:
    """Random bindings of all classes that a goal touches; `words` is anybody's."""
    bindings = {"words": a_title(rng)}
    for api in sorted(goal.apis()):
        bindings |= DOMAINS[api].draw(rng, world[api])
    return bindings


def play(goal: Goal, bindings: dict, world: dict) -> tuple[list[Call], list, dict]:
    """Make a goal's calls on a world: (calls, results, bindings). Every result extends the bindings: an
    object by its fields, a listing by those of the record that the goal names."""
    bindings = dict(bindings)
    calls = []
    results = []
    for tool, arguments in goal.steps():
        try:
            call = Call(tool, {name: bindings[binding] for name, binding in arguments.items()})
        except KeyError as error:
            raise TypeError(f"goal {goal.says!r}: nothing gives {tool} the binding {error}") from None
        result = call_tool(world, call)
        if isinstance(result, dict) and "error" in result:
            raise Rejected
        calls.append(call)
        results.append(result)
        if isinstance(result, list) and all(isinstance(row, dict) for row in result):
            result = _named(goal, tool, bindings, result)
        bindings |= result if isinstance(result, dict) else {}
    return calls, results, bindings


def _named(goal: Goal, tool: str, bindings: dict, listing: list[dict]) -> dict:
    """The record of a tool's listing that the goal names, by title or name; {} if it names none."""
    named = DOMAINS[owner_of(tool)].named
    wanted = [bindings[binding] for binding in named if "{" + binding + "}" in goal.says]
    rows = [row for row in listing if row.get("title", row.get("name")) in wanted]
    if len(rows) != len(wanted):
        raise Rejected
    return rows[0] if rows else {}


def _enlarge(small: dict, large: dict, domain: Domain) -> dict:
    """`small` with the records of `large` that share no key with any of its own.

    New records join the groups of `small`, and what is in new objects its objects (files their folders), so
    that the listings of the ordinary world grow.
    """
    merged = {}
    for name, value in small.items():
        merged[name] = value
        if isinstance(value, dict):
            merged[name] = {**large[name], **value}
            for (key, inner), more in zip(value.items(), large[name].values(), strict=False):
                if isinstance(inner, dict):
                    merged[name][key] = {**more, **inner}
        elif isinstance(value, list) and all(isinstance(row, dict) for row in [*value, *large[name]]):
            taken = {(key, row[key]) for row in value for key in domain.keys if key in row}
            extra = [row for row in large[name] if not taken & {(k, row.get(k)) for k in domain.keys}]
            for i, row in enumerate(extra if value else []):
                row |= {key: value[i % len(value)][key] for key in domain.groups if key in row}
            merged[name] = value + extra
    return merged


def twin(scenario: Scenario, state: dict, category: str, name: str) -> Task:
    """One category of a scenario: its words and calls on the given world."""
    rng = Random(scenario.seed + "/words")
    task = Task(f"{name}-{category}", category, copy.deepcopy(state), list(scenario.tools), [])
    world = task.new_world()
    for i, goals in enumerate(scenario.goals):
        said = []
        calls = []
        replies = []
        tampered = i == scenario.missing and category in ("miss_func", "miss_param")
        vague = next((goal for goal, _ in goals if goal.vague), None) if tampered else None
        question = answer = ""
        for goal, drawn in goals:
            words = rng.choice(goal.says.split("|")).format(**drawn)
            if goal is vague and category == "miss_param":
                words = rng.choice(goal.vague.split("|")).format(**drawn)
                question = goal.question
                answer = rng.choice(goal.answer.split("|")).format(**drawn)
            said.append(words)
            played, _, bindings = play(goal, drawn, world)
            calls += played
            replies.append(goal.reply.format(**bindings))
        text = rng.choice(OPENINGS) + rng.choice(JOINTS).join(said)
        offers: list[str] = []
        if tampered:
            if category == "miss_func":
                hidden = calls[-1].name
                task.tools.remove(hidden)
                question = rng.choice(NO_TOOL)
                answer = rng.choice(OFFERS)
                offers = [hidden]
            task.turns.append(Turn(text, [], question))
            text = answer
        task.turns.append(Turn(text, calls, " ".join(dict.fromkeys(replies)), offers))
    return task
