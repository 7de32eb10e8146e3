"""The API classes a model may call: what a class must be, and how it is found by name.

A class is plain typed Python. Its public methods are the tools: the signature gives name, types, required
parameters, choices (`Literal`) and defaults (signatures.py lists the types); the docstring's first line is
the description, and every following line `parameter: text` describes one parameter. Its dataclass fields are
its state: JSON-like values, comparable with `==`, copied with `copy.deepcopy`. A method answers with a
JSON-like value, or raises `ToolError` with a sentence that helps the model to correct itself. What is not so
is refused with a TypeError when the class is defined. The classes are in domains/, one file a subject; a new
file there is all that a new class takes (docs/6-add-your-own.md).

Classes live in three disjoint pools: `train` (reinforcement learning sees them), `foreign` (supervised data
from another domain) and `ood` (held out).
"""

import inspect
from collections.abc import Callable
from functools import cache

from nanotoolrl.world.signatures import tool_schema

API_CLASSES: dict[str, type["API"]] = {}
POOLS = ("train", "foreign", "ood")


class ToolError(Exception):
    """A call failed for a reason the model should read; the text is the observation."""


class API:
    """Base of the tool classes: subclasses register themselves under their name, in one of `POOLS`."""

    pool = ""

    def __init_subclass__(cls) -> None:
        if cls.pool not in POOLS:
            raise TypeError(f"{cls.__name__}.pool is {cls.pool!r}; it must be one of {', '.join(POOLS)}")
        _check_members(cls)
        _check_names(cls)
        for name, method in _tools(cls).items():
            tool_schema(cls.__name__, name, method)
        API_CLASSES[cls.__name__] = cls
        owner_of.cache_clear()
        schema.cache_clear()


def _check_members(cls: type[API]) -> None:
    """Raise TypeError for a public member that looks like a tool and is none."""
    for base in cls.__mro__:
        fields = inspect.get_annotations(base)
        for name, value in vars(base).items() if base not in (API, object) else ():
            place = f"{cls.__name__}.{name}"
            if name.startswith("_"):
                continue
            if inspect.isfunction(value):
                if base is not cls:
                    raise TypeError(f"{place} is inherited from {base.__name__}; a class has its own tools")
                if name in fields or not name.isascii():
                    raise TypeError(f"{place}: the name of a tool must be ASCII, and no field's")
            elif name not in fields and (callable(value) or hasattr(value, "__get__")):
                kind = type(value).__name__
                raise TypeError(f"{place} is a {kind}; a tool is a plain method, other names begin with _")


def _check_names(cls: type[API]) -> None:
    """Raise TypeError if another class has the name of this one or of one of its tools."""
    ours = _tools(cls)
    for name, other in API_CLASSES.items():
        theirs = _tools(other)
        if name == cls.__name__:
            if theirs != ours:  # `@dataclass(slots=True)` makes the class anew, with the same tools
                raise TypeError(f"there is a class {name} already (del API_CLASSES[{name!r}] forgets it)")
        elif shared := ours.keys() & theirs.keys():
            raise TypeError(f"{cls.__name__}.{min(shared)}: {name} has a tool of this name already")


def _tools(cls: type[API]) -> dict[str, Callable]:
    return {
        name: value
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def method_names(cls: type[API]) -> list[str]:
    """Names of the tools a class offers, in the order of its source."""
    return list(_tools(cls))


@cache
def owner_of(tool: str) -> str | None:
    """Name of the class that has the tool, or None. Tool names are unique over all classes."""
    return next((name for name, cls in API_CLASSES.items() if tool in method_names(cls)), None)


@cache
def schema(tool: str) -> dict:
    """JSON schema of one tool, in the layout of OpenAI and Qwen tool lists. It is everybody's: copy it before
    you change it.

    Example: `schema("delete_file")` has name "delete_file", a description, and parameters of type "object"
    with properties folder and name, both required. Raises KeyError for an unknown tool.
    """
    owner = owner_of(tool)
    if owner is None:
        raise KeyError(f"no class has a tool {tool!r}")
    return tool_schema(owner, tool, _tools(API_CLASSES[owner])[tool])


def check_known(kind: str, key: object, names: list | dict, place: str = "") -> None:
    """Raise ToolError unless `key` is among `names`, saying what there is."""
    if key not in names:
        shown = ", ".join(str(name) for name in list(names)[:6]) + (", ..." if len(names) > 6 else "")
        raise ToolError(f"no {kind} '{key}'{place}; there is {shown or 'none'}")


def record(records: list[dict], kind: str, key: object, by: str = "id") -> dict:
    """The record whose field `by` equals `key`; raises ToolError with the known keys."""
    check_known(kind, key, [row[by] for row in records])
    return next(row for row in records if row[by] == key)


def new_id(records: list[dict]) -> int:
    """An id that no record has: the next."""
    return max((row["id"] for row in records), default=10) + 1
