"""A method's signature and docstring as the JSON schema of a tool; and values checked against a schema.

| annotation | schema |
|---|---|
| `str`, `int`, `float`, `bool` | string, integer, number, boolean |
| `Literal[...]` of texts, of integers or of booleans | that type, with `enum` |
| `list[X]`, or `list` | array of X, or of anything |
| `dict[str, X]`, or `dict` | object whose values are X, or anything |
| `X \\| None`, `Optional[X]`, or X with the default `None` | X, `nullable` |

Anything else is refused. A tuple is: JSON has none, so the tool would get a list.
"""

import inspect
import json
import math
import types
import typing
from collections.abc import Callable
from typing import Literal

BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
MAX_INT = 2**53  # larger integers are refused: other JSON readers would round them
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
PYTHON_TYPES = {name: kind for kind, name in JSON_TYPES.items()} | {"number": (int, float)}
ALLOWED = (
    "allowed are str, int, float, bool, list, list[X], dict, dict[str, X], X | None, "
    "and Literal of texts, of integers or of booleans"
)


def tool_schema(owner: str, name: str, method: Callable) -> dict:
    """The schema of a class's method under its name (`api.schema` shows one). Raises TypeError, with class,
    tool and parameter, for what no schema can say and for a docstring that does not fit."""
    where = f"{owner}.{name}"
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        raise TypeError(f"{where} is async; a tool is a plain method")
    if inspect.isgeneratorfunction(method):
        raise TypeError(f"{where} is a generator; a tool returns its result")
    parameters = list(inspect.signature(method).parameters.values())
    if not parameters or parameters[0].kind not in BY_POSITION:
        raise TypeError(f"{where}: its first parameter must be self")
    del parameters[0]
    description, about = _documented(method, where, [parameter.name for parameter in parameters])
    hints = _hints(method, where)
    properties = {}
    required = []
    for parameter in parameters:
        key = parameter.name
        place = f"{where}, parameter {parameter.name!r}"
        if parameter.kind not in BY_NAME:
            raise TypeError(f"{place}: {parameter} takes no argument by its name, as a call gives it")
        if key not in hints:
            raise TypeError(f"{place} has no annotation; {ALLOWED}")
        properties[key] = kind = type_schema(hints[key], place)
        if parameter.default is None:
            kind["nullable"] = True
        if key in about:
            kind["description"] = about[key]
        if parameter.default is parameter.empty:
            required.append(key)
        else:
            kind["default"] = _default(kind, parameter.default, place)
    takes = {"type": "object", "properties": properties, "required": required}
    made = {"name": name, "description": description, "parameters": takes}
    try:
        json.dumps(made, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise TypeError(f"{where}: a text in its signature or docstring is no valid Unicode") from None
    return made


def type_schema(annotation: object, where: str) -> dict:
    """The schema of one annotation. Raises TypeError, with `where` in front, for one that has none."""
    kind = typing.get_origin(annotation) or annotation
    parts = typing.get_args(annotation)
    if kind in (typing.Union, types.UnionType):
        others = [part for part in parts if part is not types.NoneType]
        if len(others) == 1:
            return type_schema(others[0], where) | {"nullable": True}
    elif kind is Literal:
        choices = [part for part in parts if part is not None]
        of = {type(choice) for choice in choices}
        if of in ({str}, {bool}) or (of == {int} and max(map(abs, choices)) <= MAX_INT):
            enum = {"type": JSON_TYPES[of.pop()], "enum": choices}
            return enum | ({"nullable": True} if None in parts else {})
    elif kind is list and len(parts) == 1:
        return {"type": "array", "items": type_schema(parts[0], where)}
    elif kind is dict and len(parts) == 2 and parts[0] is str:
        return {"type": "object", "additionalProperties": type_schema(parts[1], where)}
    elif not parts and isinstance(kind, type) and kind in JSON_TYPES:
        return {"type": JSON_TYPES[kind]}
    raise TypeError(f"{where}: the annotation {inspect.formatannotation(annotation)} is unknown; {ALLOWED}")


def wrong(kind: dict, value: object, name: str) -> str:
    """What is wrong with a JSON value of a schema made here, as a sentence about `name`; "" if nothing is.

    A boolean is no number here, though Python says that True == 1.
    """
    type_name = kind["type"]
    if value is None and kind.get("nullable"):
        return ""
    right = isinstance(value, PYTHON_TYPES[type_name]) and isinstance(value, bool) == (type_name == "boolean")
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        return f"{name} must be of type {type_name}" + (" or null" if kind.get("nullable") else "")
    if isinstance(value, int) and abs(value) > MAX_INT:
        return f"{name} is too large"
    if "enum" in kind and value not in kind["enum"]:
        choices = (choice if isinstance(choice, str) else json.dumps(choice) for choice in kind["enum"])
        return f"{name} must be one of {', '.join(choices)}"
    if "items" in kind:
        reasons = (wrong(kind["items"], item, f"{name}[{i}]") for i, item in enumerate(value))
        return next(filter(None, reasons), "")
    if "additionalProperties" in kind:
        inner = kind["additionalProperties"]
        reasons = (wrong(inner, item, f"{name}[{key[:40]!r}]") for key, item in value.items())
        return next(filter(None, reasons), "")
    return ""


def _default(kind: dict, value: object, place: str) -> object:
    if type(value) not in (str, int, float, bool, types.NoneType):
        raise TypeError(f"{place}: its default must be a text, a number, True, False or None, not {value!r}")
    if reason := wrong(kind, value, "its default"):
        raise TypeError(f"{place}: {reason}")
    return value


def _documented(method: Callable, where: str, parameters: list[str]) -> tuple[str, dict[str, str]]:
    """(description, {parameter: text}) from a docstring."""
    lines = [line.strip() for line in (method.__doc__ or "").splitlines() if line.strip()]
    if not lines:
        raise TypeError(f"{where} has no docstring; its first line is what the model reads of the tool")
    about = {}
    for line in lines[1:]:
        name, colon, text = line.partition(": ")
        if not colon or name not in parameters or name in about:
            known = ", ".join(parameters) or "none"
            raise TypeError(
                f"{where}: docstring line {line!r} must read 'parameter: text', once for a parameter; "
                f"its parameters: {known}"
            )
        about[name] = text
    return lines[0], about


def _hints(method: Callable, where: str) -> dict[str, object]:
    """The annotations of the parameters, resolved. That of the result says nothing to a model, and often
    names the class that is being defined."""
    source = inspect.unwrap(method)

    def parameters_only() -> None: ...

    parameters_only.__annotations__ = {n: a for n, a in source.__annotations__.items() if n != "return"}
    try:
        return typing.get_type_hints(parameters_only, source.__globals__)
    except Exception as error:  # an annotation may be any expression
        raise TypeError(f"{where}: an annotation cannot be resolved: {error}") from None
