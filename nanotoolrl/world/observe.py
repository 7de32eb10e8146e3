"""One call on a world, and its observation.

Whatever a tool does (raise, hang, give what is no JSON), the model reads an answer.
"""

import copy
import json
from collections.abc import Callable
from typing import Any

from nanotoolrl.calls import Call
from nanotoolrl.world.api import ToolError, owner_of, schema
from nanotoolrl.world.signatures import wrong
from nanotoolrl.world.timelimit import TimeLimit, TooLong

MAX_RESULT = 20_000  # characters of an observation; a longer one becomes an error
TRUTH_SECONDS = 60.0  # that a call of the ground truth may take, whatever a model is given
FAILED = ('{"error": ', "Error during execution: ")  # so begins the answer to a failed call: ours, BFCL's
JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def call_tool(world: dict[str, Any], call: Call) -> object:
    """Execute one call on the world and return its result, which shares nothing with the world; every failure
    is a result too: {"error": text}."""
    return json.loads(observe(carry_out, world, call, TRUTH_SECONDS))


def observe(
    execute: Callable[[dict[str, Any], Call], str],
    world: dict[str, Any],
    call: Call,
    seconds: float,
) -> str:
    """The observation of a call: what `Task.execute` makes of it within so many seconds (0: no limit), or an
    error. What a tool did before it failed stays done.

    A tool is anybody's code, so no list says what may come out of it: all but Ctrl-C is answered.
    """
    try:
        with TimeLimit(seconds):
            return execute(world, call)
    except TooLong:
        return failure(f"{call.name} took more than {seconds:g} s")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: a tool must not end a training run
        return failure(f"{call.name} failed: {type(error).__name__}")


def carry_out(world: dict[str, Any], call: Call) -> str:
    """Make a call; the observation. Raises whatever the tool raises, but for ToolError."""
    try:
        _check_arguments(schema(call.name)["parameters"], call.arguments)
        tool = getattr(world[owner_of(call.name)], call.name)
        result = tool(**copy.deepcopy(call.arguments))  # a tool may keep what it gets
    except ToolError as error:
        return failure(str(error))
    try:
        text = to_json(result)
        text.encode("utf-8")  # raises for half a surrogate pair
        _check_keys(result)
    except Exception as error:  # a result may be of anybody's class
        return failure(f"{call.name} gave no JSON value: {str(error)[:200]}")
    return text if len(text) <= MAX_RESULT else failure(f"{call.name} gave more than {MAX_RESULT} characters")


def _check_arguments(parameters: dict, arguments: dict) -> None:
    known, required = parameters["properties"], parameters["required"]
    wanted = f"it takes {', '.join(known) or 'no arguments'}"
    for name in arguments:
        if name not in known:
            raise ToolError(f"unknown argument '{name[:40]}'; {wanted}")
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ToolError(f"missing argument {', '.join(missing)}; {wanted}")
    for name, value in arguments.items():
        if reason := wrong(known[name], value, f"argument '{name}'"):
            raise ToolError(reason)


def _check_keys(value: object) -> None:
    """Raise TypeError for a key that is no text. `json.dumps` makes texts of numbers, even of two to the
    same."""
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise TypeError("the keys of an object must be texts")
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _check_keys(item)


def failure(text: str) -> str:
    """The observation of a failure; its text may be a tool's, of any length and content."""
    text = text if len(text) <= MAX_RESULT else text[:MAX_RESULT] + "..."
    return to_json({"error": text.encode("utf-8", "replace").decode()})


def to_json(value: object) -> str:
    """A value as the model reads it. Raises what `json` raises for one that is no JSON, NaN included."""
    return JSON.encode(value)
