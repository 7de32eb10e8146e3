"""Ground truths changed in one place: none of them may earn the reward."""

from dataclasses import replace

from nanotoolrl.calls import Call
from nanotoolrl.env import Task


def mutations(task: Task) -> list[list[list[Call]]]:
    """The ground truth with every one call dropped, and with every one argument altered."""
    truth = [turn.calls for turn in task.turns]
    changed = []
    for i, turn in enumerate(truth):
        for j, call in enumerate(turn):
            variants = [[], *([alter(task, call, argument)] for argument in call.arguments)]
            changed += [
                [*truth[:i], [*turn[:j], *variant, *turn[j + 1 :]], *truth[i + 1 :]] for variant in variants
            ]
    return changed


def alter(task: Task, call: Call, argument: str) -> Call:
    """The call with one argument changed to another value of its type; of a choice of one there is none."""
    kind = task.schema(call.name)["parameters"]["properties"].get(argument, {})
    return replace(call, arguments=call.arguments | {argument: _another(kind, call.arguments[argument])})


def _another(kind: dict, value: object) -> object:
    if value is None:
        return _example(kind)
    if "enum" in kind:
        return kind["enum"][kind["enum"].index(value) - 1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "s"
    if isinstance(value, list):
        return [] if value else [_example(kind.get("items", {}))]
    return {} if value else {"s": _example(kind.get("additionalProperties", {}))}


def _example(kind: dict) -> object:
    """Some value of a type."""
    if "enum" in kind:
        return kind["enum"][0]
    examples = {"string": "s", "integer": 1, "number": 1, "boolean": True, "array": [], "object": {}}
    return examples[kind.get("type", "string")]
