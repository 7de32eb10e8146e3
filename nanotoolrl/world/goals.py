"""What the generator needs of a class: a random world, bindings drawn from it, and goals of users."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from nanotoolrl.world.api import API, API_CLASSES, owner_of, schema

KEYS = ("id", "title", "name")  # fields that tell the records of any domain apart


@dataclass(frozen=True)
class Goal:
    """One thing a user may want. `calls` reads "tool argument argument=binding; tool ...": an argument takes
    the binding of its own name unless another is named. Bindings are values by name: drawn from the world,
    and extended by every result.

    `says` are paraphrases divided by `|`. `vague`, `question` and `answer` serve miss_param: a request that
    lacks a value, so that the user must be asked. They are empty where every value can be looked up.
    """

    says: str
    calls: str
    reply: str = "Done."
    vague: str = ""
    question: str = ""
    answer: str = ""

    def steps(self) -> list[tuple[str, dict[str, str]]]:
        """[(tool, {argument: binding})]"""
        parsed = []
        for step in self.calls.split(";"):
            tool, *arguments = step.split()
            parsed.append((tool, dict((a.split("=") if "=" in a else (a, a)) for a in arguments)))
        return parsed

    def tools(self) -> list[str]:
        """Names of the tools it calls, in order."""
        return [tool for tool, _ in self.steps()]

    def apis(self) -> set[str]:
        """Names of the classes it touches."""
        return {owner_of(tool) for tool in self.tools()}

    def pool(self) -> str:
        """The pool of its classes."""
        return API_CLASSES[owner_of(self.tools()[0])].pool


@dataclass(frozen=True)
class Domain:
    """What `register` was given."""

    api: type[API]
    world: Callable[[Random, int], dict]
    draw: Callable[[Random, API], dict]
    goals: Sequence[Goal]
    named: Sequence[str]
    keys: Sequence[str]
    groups: Sequence[str]


DOMAINS: dict[str, Domain] = {}


def register(
    api: type[API],
    world: Callable[[Random, int], dict] | None = None,
    draw: Callable[[Random, API], dict] | None = None,
    goals: Sequence[Goal] = (),
    *,
    named: Sequence[str] = (),
    keys: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> None:
    """Let the generator make tasks of a class. A class that is not registered is for task files only.

    world(rng, size): the fields of a random instance, about `size` records of a kind.
    draw(rng, instance): random bindings; an IndexError says that there is nothing to choose from.
    goals: of the tools of this class and of those registered before.
    named: bindings that are the title or name of a record in a listing; the goal goes on with that record.
    keys: fields that tell records apart, beside id, title and name.
    groups: fields that listings select by; when a world is enlarged, new records join the groups there are.

    Raises TypeError with the class, and what is missing or wrong.
    """
    parts = {"world": world, "draw": draw, "goals": goals}
    if missing := [part for part, given in parts.items() if not given]:
        raise TypeError(f"{api.__name__} is registered without {', '.join(missing)}")
    for goal in goals:
        if wrong := _wrong(goal, api):
            raise TypeError(f"{api.__name__}, goal {goal.says.split('|')[0]!r}: {wrong}")
    DOMAINS[api.__name__] = Domain(api, world, draw, goals, named, (*KEYS, *keys), groups)


def _wrong(goal: Goal, api: type[API]) -> str:
    """What is wrong with a goal of a class, or ""."""
    for tool, arguments in goal.steps():
        owner = owner_of(tool)
        if owner not in (api.__name__, *DOMAINS):
            return f"no class that is registered by now has the tool {tool!r}"
        if API_CLASSES[owner].pool != api.pool:
            return f"{tool!r} is of another pool, {API_CLASSES[owner].pool!r}"
        takes = schema(tool)["parameters"]
        if not set(takes["required"]) <= set(arguments) <= set(takes["properties"]):
            return f"{tool!r} takes {', '.join(takes['properties']) or 'no arguments'}"
    if len({bool(text) for text in (goal.vague, goal.question, goal.answer)}) > 1:
        return "vague, question and answer must be given together"
    return ""


def all_goals() -> list[Goal]:
    """The goals of all domains, in their order."""
    return [goal for domain in DOMAINS.values() for goal in domain.goals]
