"""The multi-turn half of the Berkeley Function-Calling Leaderboard as tasks of ours (Hao et al. 2026, §3).

Data, API classes and checker are those of the `bfcl-eval` package; a task of it is played, hinted, replayed
and reflected on like any other. What differs from the benchmark's own runner:
- Every episode owns its instances and all that they refer to; the package keeps them in module globals, by
  name, and lets them share and change lists, long contexts and the precision of decimal numbers.
- Model text is parsed to a name and arguments and then called; the package evaluates it.
- A tool that is not shown cannot be called, unless the task is `official`: the package lets a model call what
  it hides (`miss_func`). In one task the ground truth calls a hidden tool before it is offered; it is shown.
- A block that cannot be read is answered with an error; in the package it ends the turn.
- What would keep the machine busy is answered with an error: huge numbers and precisions, walks through a
  directory of very many entries, more than 16 calls or 50,000 characters in a message.

`python -m nanotoolrl.bfcl --check` compares verdicts with the package's.
"""

import argparse
import ast
import copy
import decimal
import importlib
import importlib.util
import inspect
import itertools
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanotoolrl.calls import FORMATS, Call
from nanotoolrl.cli import command
from nanotoolrl.env import CATEGORIES, Task, Turn, replay
from nanotoolrl.world.mutations import mutations
from nanotoolrl.world.observe import FAILED

NAME = "bfcl"
TRAINED = CATEGORIES[:3]  # as published: long_context is only tested
SPLIT_SEED = 42  # of the published split: its first 100 shuffled indices train, the others test
INDICES = 200  # tasks of a category
STEPS_A_TURN = 20  # more messages with calls in a turn end the episode, as in the benchmark
OFFER = "I have updated some more functions you can choose from. What about now?"  # the benchmark's words
EXACTNESS = ("precision", "exponent", "decimal_places")  # arguments that decide how long a number gets
LARGEST = 1000  # of them
MATH_DIGITS = 15  # what mpmath begins with
WALKS = ("find", "du")  # calls that walk through a directory
MOST_ENTRIES = 10_000  # there; a directory that is moved into its copy doubles
PACKAGE = "bfcl_eval.eval_checker.multi_turn_eval"
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
REPLIES = {
    "miss_func": "I cannot do this yet: the function that it takes is not available.",
    "miss_param": "I cannot do this yet: a value is missing. Which one shall I use?",
}


@dataclass
class BfclTask(Task):
    """A task of the benchmark. `state` holds its initial configuration of the classes in `classes`; `before`
    are calls made before the first turn; `official`: hidden tools can be called, and only the benchmark's own
    cap on messages counts."""

    classes: list[str] = field(default_factory=list)
    before: list[Call] = field(default_factory=list)
    official: bool = False

    def new_world(self) -> dict[str, object]:
        """Fresh instances of the package's classes, in the state of the task."""
        world = {name: _api_class(name)() for name in self.classes}
        for name, api in world.items():
            if hasattr(api, "_load_scenario"):
                scenario = copy.deepcopy(self.state.get(name, {}))
                api._load_scenario(scenario, long_context=self.category == "long_context")
        world = copy.deepcopy(world)  # long contexts are shared between instances, and change
        for call in self.before:
            self.execute(world, call)
        return world

    def owner(self, tool: str) -> str | None:
        """Name of the class that has a tool, or None; hidden tools have one, too."""
        return next((name for name in self.classes if tool in _documented(name)), None)

    def schema(self, tool: str) -> dict:
        """JSON schema of a tool, from the benchmark's documents."""
        return copy.deepcopy(_documented(self.owner(tool))[tool])

    def allows(self, tool: str, shown: list[str]) -> bool:
        """Whether a tool may be called where these are shown."""
        return tool in shown or (self.official and self.owner(tool) is not None)

    def execute(self, world: dict[str, Any], call: Call) -> str:
        """Make a call; the observation, worded as the benchmark words it. Never raises."""
        try:
            owner: Any = self.owner(call.name)
            digits = importlib.import_module("mpmath").workdps(MATH_DIGITS)
            _refuse_what_takes_too_long(call, world[owner])
            # Some classes keep, and later change, what they get, be it a default.
            arguments = copy.deepcopy(_defaults(owner, call.name) | call.arguments)
            # As the benchmark does, numbers are written in the precision that the call leaves behind.
            with decimal.localcontext(decimal.Context()), digits:
                result = getattr(world[owner], call.name)(**arguments)
                if isinstance(result, dict):
                    try:
                        return json.dumps(result)
                    except TypeError:  # numbers of the math classes
                        return str(result)
                return str(result)
        except Exception as error:  # whatever a class of the package raises is an observation
            return f"{FAILED[1]}{error}"

    def why_turn_fails(self, i: int, world: dict[str, Any], seen: list[str], calls: int) -> str:
        """See `Task.why_turn_fails`; the verdict is the package's."""
        checker = importlib.import_module(f"{PACKAGE}.multi_turn_checker")
        truth, results = self.expected[i]
        if not calls:
            return "nothing was called"
        try:
            found = checker.state_checker(world, truth)
        except RecursionError:  # a directory inside itself
            return "the state cannot be compared"
        if found["valid"]:
            found = checker.response_checker(seen, results, i)
        return "" if found["valid"] else found["error_message"]

    def message_limits(self, max_messages: int) -> tuple[float, float]:
        """See `Task.message_limits`."""
        return (float("inf") if self.official else max_messages), STEPS_A_TURN

    def turn_alone(self, i: int, user: str) -> "BfclTask":
        """See `Task.turn_alone`."""
        before = [*self.before, *(call for turn in self.turns[:i] for call in turn.calls)]
        turns = [replace(self.turns[i], user=user)]
        return replace(self, id=f"{self.id}/{i}", tools=self.tools_before(i), turns=turns, before=before)


def _refuse_what_takes_too_long(call: Call, api: Any) -> None:
    for name in EXACTNESS:
        value = call.arguments.get(name, 0)
        if not isinstance(value, int | float) or abs(value) > LARGEST:
            raise ValueError(f"{name} must be a number of at most {LARGEST}")
    if call.name in WALKS:
        entries = [api.root]
        for entry in entries:  # grows while it is walked through
            entries += getattr(entry, "contents", {}).values()
            if len(entries) > MOST_ENTRIES:
                raise ValueError(f"there are more than {MOST_ENTRIES} files and directories")


# ------------------------------------------------------------------------------------------------ the package
def _package() -> Path:
    """Directory of the package. Raises FileNotFoundError with the line that installs it."""
    found = importlib.util.find_spec("bfcl_eval")
    folders = found and found.submodule_search_locations
    if not folders or not importlib.util.find_spec("mpmath"):
        raise FileNotFoundError(
            "BFCL tasks need the benchmark's package: pip install --no-deps bfcl-eval mpmath"
        )
    return Path(folders[0])


@cache
def _api_class(name: str) -> type:
    paths = importlib.import_module("bfcl_eval.constants.executable_backend_config").CLASS_FILE_PATH_MAPPING
    return getattr(importlib.import_module(paths[name]), name)


@cache
def _defaults(owner: str, tool: str) -> dict[str, object]:
    """The defaults of a tool's arguments that can be changed."""
    parameters = inspect.signature(getattr(_api_class(owner), tool)).parameters
    return {name: one.default for name, one in parameters.items() if isinstance(one.default, list | dict)}


@cache
def _documented(name: str) -> dict[str, dict]:
    """JSON schema by tool name of one class, in the order of the benchmark's document."""
    files = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    document = _package() / "data" / "multi_turn_func_doc" / files.MULTI_TURN_FUNC_DOC_FILE_MAPPING[name]
    tools = [json.loads(line) for line in document.read_text(encoding="utf-8").splitlines()]
    return {
        tool["name"]: {key: _json_schema(tool[key]) for key in ("name", "description", "parameters")}
        for tool in tools
    }


def _json_schema(value: object) -> object:
    """The benchmark's types under their names in JSON schema."""
    if isinstance(value, dict):
        kind = value.get("type")
        named = {"type": JSON_TYPES.get(kind, kind)} if isinstance(kind, str) else {}
        return {key: _json_schema(item) for key, item in value.items()} | named
    return value


def _entries(category: str) -> list[tuple[dict, list[list[str]]]]:
    """(entry, ground truth by turn) of every task of a category, as the package has them."""
    name = f"BFCL_v4_multi_turn_{category}.json"
    data = _package() / "data"
    rows, answers = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (data / name, data / "possible_answer" / name)
    )
    return [(row, answer["ground_truth"]) for row, answer in zip(rows, answers, strict=True)]


def _call(classes: list[str], text: str) -> Call:
    """A ground-truth call as data, every argument under its name."""
    node: Any = ast.parse(text, mode="eval").body
    owner = next(name for name in classes if node.func.id in _documented(name))
    signature = inspect.signature(getattr(_api_class(owner), node.func.id))
    values = [ast.literal_eval(value) for value in node.args]
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    return Call(node.func.id, dict(zip(list(signature.parameters)[1:], values)) | named)


def _task(entry: dict, truth: list[list[str]], category: str, official: bool) -> BfclTask:
    classes = entry["involved_classes"]
    calls = [[_call(classes, text) for text in texts] for texts in truth]
    offered = {}  # by turn; a tool that the ground truth needs before is not hidden (one entry has such)
    for i, tools in entry.get("missed_function", {}).items():
        needed = {call.name for turn in calls[: int(i)] for call in turn}
        offered[int(i)] = [tool for tool in tools if tool not in needed]
    hidden = {tool for tools in offered.values() for tool in tools}
    tools = [tool for name in classes for tool in _documented(name) if tool not in hidden]
    turns = []
    for i, messages in enumerate(entry["question"]):
        user = "\n".join(message["content"] for message in messages) or OFFER
        reply = "Done." if calls[i] else REPLIES.get(category, "There is nothing to call here.")
        turns.append(Turn(user, calls[i], reply, offered.get(i, [])))
    state = {name: entry["initial_config"].get(name, {}) for name in classes}
    return BfclTask(entry["id"], category, state, tools, turns, classes, official=official)


# -------------------------------------------------------------------------------------------------- the tasks
def split_indices(split: str) -> list[int]:
    """The task indices of "train" or "test", or of "" (all), ascending; twins of an index stay together."""
    order = list(range(INDICES))
    random.Random(SPLIT_SEED).shuffle(order)
    half = INDICES // 2
    return sorted({"train": order[:half], "test": order[half:], "": order}[split])


def load_bfcl(name: str, official: bool = False) -> list[Task]:
    """The tasks of "bfcl[:category][:train|:test]".

    Without a category all four, in "train" the three of the paper. Raises ValueError for an unknown part of
    the name, FileNotFoundError if the package is missing.
    """
    of, *parts = name.split(":")
    category = parts.pop(0) if parts and parts[0] in CATEGORIES else ""
    split = parts.pop(0) if parts and parts[0] in ("train", "test") else ""
    if of != NAME or parts:
        raise ValueError(f"{name}: expected {NAME}[:{'|'.join(CATEGORIES)}][:train|:test]")
    categories = [category] if category else TRAINED if split == "train" else CATEGORIES
    entries = {category: _entries(category) for category in categories}
    return [
        _task(*entries[category][i], category, official)
        for i in split_indices(split)
        for category in categories
    ]


# ------------------------------------------------------------------------------------------------ the command
_played = itertools.count()  # names of instances in the package's module globals


@contextmanager
def _name_of_instances(utilities: dict[str, object]) -> Iterator[str]:
    """A name under which the package keeps its instances, in the globals of a module; they are deleted
    afterwards. What they share and changed (see above) stays as it is."""
    name = f"nanotoolrl_{next(_played)}"
    try:
        yield name
    finally:
        for instance in [key for key in utilities if key.startswith(name + "_")]:
            del utilities[instance]


def official_observations(task: BfclTask) -> list[list[str]]:
    """What the package's own executor answers to the ground truth, by turn."""
    utilities = importlib.import_module(f"{PACKAGE}.multi_turn_utils")
    how = {"long_context": task.category == "long_context"}
    with _name_of_instances(vars(utilities)) as name:
        return [
            utilities.execute_multi_turn_func_call(
                [_text(call) for call in turn.calls], task.state, task.classes, name, "", **how
            )[0]
            for turn in task.turns
        ]


def official_verdict(task: BfclTask, calls: list[list[Call]], truth: list[list[Call]]) -> bool:
    """What the package's own checker, with its own executor, says of calls by turn.

    It evaluates their text: never give it what a model wrote.
    """
    checker = importlib.import_module(f"{PACKAGE}.multi_turn_checker")
    utilities = importlib.import_module(f"{PACKAGE}.multi_turn_utils")
    texts, right = ([[_text(call) for call in turn] for turn in turns] for turns in (calls, truth))
    entry = {"id": task.id, "initial_config": task.state, "involved_classes": task.classes}
    with _name_of_instances(vars(utilities)) as name:
        return checker.multi_turn_checker([[turn] for turn in texts], right, entry, "", name)["valid"]


def _text(call: Call) -> str:
    return f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"


def differences(task: BfclTask) -> tuple[int, list[str]]:
    """(number of plays, what differs from the package). Compared are rewards, of the ground truth in every
    format and with every one call dropped and every one argument changed; and what the ground-truth calls are
    answered, before and after the package's executor has run in this process."""
    truth = [turn.calls for turn in task.turns]
    early = [results for _, results in task.expected]
    theirs = official_observations(task)
    late = [results for _, results in replace(task).expected]
    plays = [(format, truth, True) for format in FORMATS]
    changed = [*mutations(task), truth]
    plays += [("hermes", calls, official_verdict(task, calls, truth)) for calls in changed]
    wrong = [
        f"{task.id} in {format}: {_text_of(calls)}: ours {not verdict}, the package's {verdict}"
        for format, calls, verdict in plays
        if replay(task, calls, format) != verdict
    ]
    for when, ours in (("before", early), ("after", late)):
        if ours != theirs:
            wrong.append(f"{task.id}: observations {when} the package's: ours {ours}, the package's {theirs}")
    return len(plays), wrong


def _text_of(calls: list[list[Call]]) -> str:
    return " | ".join(", ".join(map(_text, turn)) for turn in calls)


@command
def main(argv: list[str] | None = None) -> int:
    """The command: 0, 1 if a verdict differs, 2 when refused."""
    parser = argparse.ArgumentParser(prog="python -m nanotoolrl.bfcl", description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", default=NAME, help=f"{NAME}[:category][:train|:test] (default: {NAME})")
    about = "compare verdicts with the package's"
    parser.add_argument("--check", action="store_true", required=True, help=about)
    args = parser.parse_args(argv)
    try:
        tasks = load_bfcl(args.tasks)
    except (OSError, ValueError) as error:
        print(f"bfcl: {error}", file=sys.stderr)
        return 2
    plays = 0
    wrong: list[str] = []
    for task in tqdm(tasks, "playing", unit="task", disable=None):
        count, different = differences(task)
        plays = plays + count
        wrong = wrong + different
    print("\n".join([*wrong[:20], f"{len(tasks)} tasks, {plays} plays, {len(wrong)} differences"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
