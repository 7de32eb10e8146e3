"""Task files: UTF-8, one JSON object a line (data/tasks/README.md shows one).

`read_task` looks at every field of a line before anything is made of it. What it returns has the types that
the rest relies on; its texts can be written as UTF-8, and its numbers mean the same to every reader of JSON.
Whether the ground truth solves the task is for the environment to say (`Task.from_json`).
"""

import inspect
import json
import typing
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from nanotoolrl.calls import FORMATS, Call, parse_calls
from nanotoolrl.world import api
from nanotoolrl.world.signatures import JSON_TYPES, MAX_INT, type_schema, wrong

# The keys of each object and the type of their values; `offers` may be left out.
TASK = {"id": str, "category": str, "state": dict, "tools": list, "turns": list}
TURN = {"user": str, "calls": list, "reply": str, "offers": list}
CALL = {"name": str, "arguments": dict}
LEFT_OUT = ("offers",)
TYPE_NAMES = JSON_TYPES | {type(None): "null"}


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a task file that are not blank, with their numbers from 1. A byte order mark and CRLF are
    accepted. Raises FileNotFoundError if it cannot be read, ValueError if it is no UTF-8."""
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise FileNotFoundError(f"the task file {path} cannot be read: {error.strerror}") from None
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines as UTF-8. Raises OSError with the path, FileNotFoundError if its directory is missing."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")


def read_task(line: str) -> dict:
    """The fields of one line. Raises ValueError with the field, what it holds and what is expected."""
    try:
        task = json.loads(line, object_pairs_hook=_object)
        _check_plain(task, "")
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON: {error.msg.removesuffix(' at')} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_fields(task, "the task", TASK)
    if not task["id"].strip():
        raise ValueError("id must be a text that is not empty")
    for name, state in task["state"].items():
        _check_state(name, state)
    _check_tools(task["tools"], "tools", [], task["state"])
    shown = list(task["tools"])
    for i, turn in enumerate(task["turns"]):
        _check_turn(turn, f"turns[{i}]", shown, task["state"])
        shown += turn.setdefault("offers", [])
    if not any(turn["calls"] for turn in task["turns"]):
        raise ValueError("a task needs at least one turn and one ground-truth call")
    return task


def _object(pairs: list[tuple[str, object]]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return made


def _check_plain(value: object, where: str) -> None:
    """Raise ValueError for a number or a text that not every reader of JSON reads alike."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{where or 'the line'} holds half a surrogate pair, which is no text") from None
    elif isinstance(value, int | float):
        if not abs(value) <= MAX_INT:  # NaN compares as false
            raise ValueError(f"{where or 'the line'} must be a number from -2**53 to 2**53")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where or 'the task'}")
            _check_plain(item, f"{where}.{key}" if where else key)


def _check_fields(value: object, where: str, fields: dict[str, type]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, not {_named(value)}")
    for problem, keys in (
        ("lacks", [key for key in fields if key not in value and key not in LEFT_OUT]),
        ("has an unknown", [key for key in value if key not in fields]),
    ):
        if keys:
            raise ValueError(f"{where} {problem} {', '.join(keys)}; its keys are {', '.join(fields)}")
    for key, kind in fields.items():
        if key in value and not isinstance(value[key], kind):
            place = key if fields is TASK else f"{where}.{key}"
            raise ValueError(f"{place} must be of type {JSON_TYPES[kind]}, not {_named(value[key])}")


def _named(value: object) -> str:
    """The type of a JSON value, as JSON calls it."""
    return TYPE_NAMES[type(value)]


def _check_state(name: str, state: object) -> None:
    if name not in api.API_CLASSES:
        raise ValueError(f"state: unknown class {name!r}; known: {', '.join(api.API_CLASSES)}")
    if not isinstance(state, dict):
        raise ValueError(f"state.{name} must be an object, not {_named(state)}")
    fields = _fields(api.API_CLASSES[name])
    for key, value in state.items():
        if key not in fields:
            raise ValueError(f"state.{name}: no field {key!r}; it has {', '.join(fields) or 'none'}")
        if reason := fields[key] and wrong(fields[key], value, f"state.{name}.{key}"):
            raise ValueError(reason)


@cache
def _fields(cls: type) -> dict[str, dict | None]:
    """The fields of an API class and their schemas; None where an annotation has none."""
    schemas: dict[str, dict | None] = {}
    for name in inspect.signature(cls).parameters:
        try:
            schemas[name] = type_schema(typing.get_type_hints(cls.__init__)[name], name)
        except (KeyError, NameError, TypeError):
            schemas[name] = None
    return schemas


def _check_tools(names: list, where: str, shown: list[str], state: dict) -> None:
    for i, name in enumerate(names):
        place = f"{where}[{i}]"
        if not isinstance(name, str):
            raise ValueError(f"{place} must be of type string, not {_named(name)}")
        _check_owner(name, place, state)
        if name in shown or name in names[:i]:
            raise ValueError(f"{place}: the tool {name!r} is shown already")


def _check_owner(name: str, where: str, state: dict) -> None:
    if api.owner_of(name) not in state:
        raise ValueError(f"{where}: tool {name!r} has no API object in the task's state")


def _check_turn(turn: object, where: str, shown: list[str], state: dict) -> None:
    _check_fields(turn, where, TURN)
    for format in FORMATS:
        if any(isinstance(call, Call) for call in parse_calls(turn["reply"], format)):
            raise ValueError(f"{where}.reply makes a call, in {format}; a reply ends the turn")
    offers = turn.get("offers", [])
    _check_tools(offers, f"{where}.offers", shown, state)
    for i, call in enumerate(turn["calls"]):
        place = f"{where}.calls[{i}]"
        _check_fields(call, place, CALL)
        _check_owner(call["name"], place, state)
        if call["name"] not in [*shown, *offers]:
            raise ValueError(f"{place}: no tools or offers show {call['name']!r} by then")
