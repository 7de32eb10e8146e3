"""Tool calls as text: three formats, written and read; and the state of a message.

The states are those of Hao et al. 2026, as we read its transcripts. Nothing that is read is evaluated.
"""

import ast
import itertools
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_CHARS = 50_000  # a longer message is answered, not parsed
MAX_BITS = 2048  # of an integer argument; Python refuses to write those of more than 4300 digits
# The states of a message, in the order in which `message_state` looks for them, and what counts them as what.
#   unhealthy: what a working model does not write; the alarm and the report count these.
#   void: neither a call nor an answer; the scheme of that name drops such rollouts.
#   broken tag: a tag without a call behind it; --tag-penalty punishes these.
#   unreadable: it tries to call and holds no call; reviews of failed rollouts ask for these.
#   broken text: beside calls that a log holds as structures, such a text says that they are broken, too.
_KINDS: dict[str, tuple[str, ...]] = {
    "overlong": ("unhealthy", "unreadable"),
    "empty": ("unhealthy", "void"),
    "bare": ("unhealthy", "void", "broken tag", "unreadable", "broken text"),
    "malformed": ("unhealthy", "void", "broken tag", "unreadable", "broken text"),
    "polluted": ("unhealthy", "broken text"),
    "call": (),
    "foreign": ("unhealthy", "unreadable", "broken text"),
    "reply": (),
}


def _states(kind: str) -> tuple[str, ...]:
    return tuple(state for state, kinds in _KINDS.items() if kind in kinds)


MESSAGE_STATES = tuple(_KINDS)
UNHEALTHY_STATES, VOID_STATES = _states("unhealthy"), _states("void")
BROKEN_TAG_STATES, UNREADABLE_STATES = _states("broken tag"), _states("unreadable")
BROKEN_TEXT_STATES = _states("broken text")


@dataclass(frozen=True)
class Call:
    """One tool call as data: nothing in it has been evaluated."""

    name: str
    arguments: dict


@dataclass(frozen=True)
class BadCall:
    """A block that is marked as a call and cannot be read; `salvaged` if a call stands inside other text."""

    reason: str
    salvaged: bool = False


Tag = tuple[int, int, int]  # start, end, and +1 if it opens a block of calls, -1 if it closes one
Block = tuple[int, int, list[Call | BadCall]]  # start, end, what it calls


@dataclass(frozen=True)
class CallFormat:
    """A syntax for tool calls. All formats are read with the same leniency: every block from an opening tag
    to the next closing one is tried, text around blocks is ignored, and a message without a closing tag holds
    no call (Hao et al. 2026, published environment). In hermes and xml a tag counts inside a string as well,
    as published; which brackets are tags in python, `_python_tags` says."""

    prefix: str  # the canonical start of a message that calls
    closing: str  # what a block of calls ends with
    opener: re.Pattern
    find_tags: Callable[[str], list[Tag]]  # all of them, in order
    tags: tuple[str, ...]  # control tokens of the format, where the tokenizer has them
    instruction: str
    render: Callable[[list[Call]], str]
    read: Callable[[str], list[Call]]  # body of a block -> calls; raises ValueError
    salvage: Callable[[str], bool]  # whether a readable call hides in the body
    words: tuple[str, ...] = ()  # that every call has
    skeleton: re.Pattern = re.compile("(?!)")  # where they stand as such: its groups


def render_calls(calls: list[Call], format: str) -> str:
    """Text of an assistant message that makes these calls; no parser can cut inside their strings.

    Example: `render_calls([Call("read_file", {"name": "a"})], "python")` is `[read_file(name="a")]`.
    """
    return FORMATS[format].render(calls)


_THOUGHTS = re.compile(r"(?:\s*<think>.*?(?:</think>|\Z))*+", re.DOTALL)


def spoken(text: str) -> str:
    """A message without the thoughts it begins with: `<think>` blocks, blanks between them. A thought that
    does not end is all there is. A block further on is text like any other.

    Example: `spoken("<think>Hm.</think>Done.")` is `Done.`
    """
    thoughts = _THOUGHTS.match(text)
    return text[thoughts.end() :] if thoughts else text


def parse_calls(text: str, format: str) -> list[Call | BadCall]:
    """Every call a message makes, in order; an empty list means that the message ends the turn.

    Unreadable blocks are BadCall, so is a closing tag without a block. What is not `spoken` makes no call.
    Never raises, whatever the text.
    """
    form = FORMATS[format]
    text = spoken(text)
    tags = form.find_tags(text)
    if all(step > 0 for _, _, step in tags):
        return []
    if len(text) > MAX_CHARS:
        return [BadCall(f"the message is longer than {MAX_CHARS} characters")]
    calls = [call for _, _, calls in _blocks(form, text, tags) for call in calls]
    return calls or [BadCall("there is a closing tag but no call")]


def message_state(text: str, format: str, overlong: bool = False) -> str:
    """The first of MESSAGE_STATES that fits what is `spoken` in an assistant message (no stop token).

    overlong: the message was cut at the token limit. empty: nothing (but thoughts). bare: a tag and nothing
    to call. malformed: a tag with an unreadable body, or unbalanced tags. polluted: a readable call with
    other text around or inside it. call: only readable calls. foreign: a call in another syntax than
    `format`. reply: text.
    """
    form = FORMATS[format]
    text = spoken(text)
    if overlong:
        return "overlong"
    if not text.strip():
        return "empty"
    if tags := form.find_tags(text):
        if not re.search(r"\w", _outside(text, tags)):
            return "bare"
        blocks = _blocks(form, text, tags) if len(text) <= MAX_CHARS else []
        bad = [call for _, _, calls in blocks for call in calls if isinstance(call, BadCall)]
        if not blocks or any(not call.salvaged for call in bad) or not _balanced(tags, blocks):
            return "malformed"
        return "polluted" if bad or _outside(text, blocks).strip() else "call"
    others = (parse_calls(text, other) for other in FORMATS if other != format)
    if any(isinstance(call, Call) for found in others for call in found):
        return "foreign"
    return "foreign" if _salvage_json(text) or _succeeds(_read_python, text.strip()) else "reply"


def _blocks(form: CallFormat, text: str, tags: list[Tag]) -> list[Block]:
    """Every block, read: from an opening tag to the next closing one."""
    blocks = []
    opened = None
    for start, end, step in tags:
        if step > 0:
            opened = opened or (start, end)
        elif opened:
            blocks.append((opened[0], end, _read(form, text[opened[1] : start])))
            opened = None
    return blocks


def _read(form: CallFormat, body: str) -> list[Call | BadCall]:
    """The calls of a block, or one BadCall."""
    try:
        return [*form.read(body)]
    except ValueError as error:
        return [BadCall(str(error), _succeeds(form.salvage, body))]
    except (RecursionError, MemoryError):
        return [BadCall("nested too deeply")]


def _outside(text: str, parts: list[Tag] | list[Block]) -> str:
    """The text without some parts."""
    starts = [*(start for start, _, _ in parts), len(text)]
    ends = [0, *(end for _, end, _ in parts)]
    return "".join(text[end:start] for end, start in zip(ends, starts, strict=True))


def _balanced(tags: list[Tag], blocks: list[Block]) -> bool:
    """Whether, outside readable blocks, every tag that opens closes later, and the other way round."""
    readable = {start: end for start, end, calls in blocks if isinstance(calls[0], Call)}
    depth = block_end = 0
    for start, _, step in tags:
        block_end = readable.get(start, block_end)
        depth += step if start >= block_end else 0
        if depth < 0:
            return False
    return depth == 0


def _succeeds(read: Callable[[str], object], body: str) -> bool:
    """Whether `read` finds something in a body."""
    try:
        return len(body) <= MAX_CHARS and bool(read(body))
    except (ValueError, RecursionError, MemoryError):
        return False


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _loads(text: str) -> Any:
    """JSON without NaN and infinities, with lone surrogates replaced; raises ValueError."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        fault = error.msg.removesuffix(" at")
        raise ValueError(f"bad JSON: {fault} at character {error.pos}") from None
    return _clean(value)


def _clean(value: Any) -> Any:
    """Text that UTF-8 can hold, lists for tuples, finite floats; ValueError for what is not JSON."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("the keys of an object must be strings")
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("an integer is too large")
    if (
        value is None
        or isinstance(value, bool | int)
        or (isinstance(value, float) and abs(value) < float("inf"))
    ):
        return value
    raise ValueError(f"{str(value)[:40]} is no JSON value")


def escaped_json(value: object) -> str:
    """JSON that can hold no tag: `<` is written as an escape."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _call_of(value: object) -> Call:
    """The call that a JSON object makes; raises ValueError. Llama's `parameters` are arguments, OpenAI's
    `null` and `""` are none. Any other key is refused, `id` and `type` of OpenAI's logs as well: what is not
    read must not pass for a call without arguments."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('a call is a JSON object with "name" and "arguments"')
    unknown = [key for key in value if key not in ("name", "arguments", "parameters")]
    if unknown:
        other = json.dumps(unknown[0][:40], ensure_ascii=False)
        raise ValueError(f'a call has "name" and "arguments", not {other}')
    if len(value) > 2:
        raise ValueError('a call has "arguments" or "parameters", not both')
    key = "parameters" if "parameters" in value else "arguments"
    arguments = value.get(key)
    if arguments is None or arguments == "":
        return Call(value["name"], {})
    if not isinstance(arguments, dict):
        hint = ", not a string" if isinstance(arguments, str) else ""
        raise ValueError(f'"{key}" must be a JSON object{hint}')
    return Call(value["name"], arguments)


def _render_hermes(calls: list[Call]) -> str:
    bodies = (escaped_json({"name": call.name, "arguments": call.arguments}) for call in calls)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def _read_hermes(body: str) -> list[Call]:
    return [_call_of(_loads(body))]


_JSON_CALL = re.compile(r'\{\s*+"(?:name|arguments|parameters)"')


def _salvage_json(text: str) -> bool:
    """Whether a JSON call stands somewhere in the text. One of a name alone may be any object."""
    text = text[:MAX_CHARS]
    decoder = json.JSONDecoder(parse_constant=_refuse)
    for match in itertools.islice(_JSON_CALL.finditer(text), 20):
        try:
            value, _ = decoder.raw_decode(text, match.start())
            _call_of(_clean(value))
        except (ValueError, RecursionError):
            continue
        if len(value) == 2:
            return True
    return False


def _literal(value: object) -> str:
    """A Python literal whose strings cannot hold the begin or the end of a call list."""
    if isinstance(value, str):
        return escaped_json(value).replace("[", "\\u005b").replace("]", "\\u005d")
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _render_python(calls: list[Call]) -> str:
    bodies = (
        ", ".join(f"{key}={_literal(value)}" for key, value in call.arguments.items()) for call in calls
    )
    return "[" + ", ".join(f"{call.name}({body})" for call, body in zip(calls, bodies, strict=True)) + "]"


def _read_python(body: str) -> list[Call]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes inside strings warn
        try:
            tree = ast.parse(f"[{body}]", mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"bad Python: {error.msg}") from None
    calls = []
    for node in tree.elts if isinstance(tree, ast.List) else [tree]:  # "[...] for x in y" is no list
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError("only calls like name(parameter=value) may stand in the list")
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError(f"{node.func.id}: give every argument as parameter=value")
        try:
            arguments = {keyword.arg: _clean(ast.literal_eval(keyword.value)) for keyword in node.keywords}
        except (ValueError, TypeError, SyntaxError):
            raise ValueError(f"{node.func.id}: arguments must be plain values") from None
        calls.append(Call(node.func.id, arguments))
    return calls


_NAMED = re.compile(r"(?<!\w)(?:(?![A-Za-z_])\w)*+([A-Za-z_]\w*+\()")


def _salvage_python(text: str) -> bool:
    """Whether what goes from the first name with a parenthesis to the last parenthesis is calls."""
    end = text.rfind(")") + 1
    match = _NAMED.search(text, 0, end)
    return bool(match and _read_python(text[match.start(1) : end]))


_NAME = r"[A-Za-z_]\w*+"
_WORDS = r'[^()\[\]{}="]*+'
# `[items (two`: a blank before the parenthesis, and neither `parameter=` nor nothing in it.
_ASIDE = rf"\[{_WORDS}(?<=\s)\((?!\s*+(?:\)|{_NAME}\s*+=(?!=)))"
_OPENER = re.compile(rf"(?!{_ASIDE})\[(?=\s*+{_NAME}\s*+\()")
_CLOSER = re.compile(r"\)\s*+\]")
_OUTSIDE = re.compile(rf"{_OPENER.pattern}|{_ASIDE}[^\[\]]*+\]|{_CLOSER.pattern}")
# No letter stands beside a literal: the quote of "don't", or one that misses its partner, begins none.
_STRING = (
    r"(?<!\w)(?i:[bfru]{0,2})"
    r"""(?:('{3}|"{3})(?:\\.|(?!\1)[^\\])*+\1|(['"])(?:\\.|(?!\2)[^\\\n])*+\2)(?!\w)"""
)
# An escaped quote begins no string either: else each could be followed to the end of the message.
_INSIDE = re.compile(rf"""{_STRING}|\\[\\'"]|{_CLOSER.pattern}|[\[\]]""", re.DOTALL)
# A message that tries to call begins with `[` and no call, or a letter; `[Note] more` does not try.
_BEGIN = re.compile(rf"\s*+(?!{_ASIDE}|\[\s*+\w{_WORDS}\](?!\w)\s*+\S)\[\s*+(?:[A-Za-z_]|\]|\Z)")


def _python_tags(text: str) -> list[Tag]:
    """The brackets around lists of calls.

    A list opens with `[name(`. With a blank before the parenthesis, `parameter=` or nothing must be in it:
    `[items (two)]` is part of a sentence. A list closes with `)]`, outside strings, where no bracket inside
    it is open. If that is nowhere, it closes with the next `)]`, as published, and so do those after it: else
    each would be searched to the end of the message. A sentence may hold `)]`, too: in a message that opens
    no list it counts if the message begins like one, or if a call stands before it.
    """
    tags, at, sound = [], 0, True
    while found := _OUTSIDE.search(text, at):
        at = found.end()
        if found[0] == "[":
            tags.append((found.start(), at, 1))
            found = _list_end(text, at) if sound else None
            if not found:
                sound, found = False, _CLOSER.search(text, at)
            if not found:
                break
            at = found.end()
        if found[0][0] == ")":
            tags.append((found.start() + 1, at, -1))
    if any(step > 0 for _, _, step in tags):
        return tags
    if _BEGIN.match(text):
        start = text.index("[")
        return [(start, start + 1, 1), *tags]
    return tags if _succeeds(_salvage_python, text) else []


def _list_end(text: str, at: int) -> re.Match | None:
    """The `)]` that closes a list which opens before `at`."""
    depth = 1
    for token in _INSIDE.finditer(text, at):
        depth += (token[0] == "[") - (token[0][-1] == "]")
        if token[0][0] == ")" and depth <= 0:
            return token
    return None


def _render_xml(calls: list[Call]) -> str:
    def one(call: Call) -> str:
        lines = [
            f"<parameter={key}>{escaped_json(value)}</parameter>" for key, value in call.arguments.items()
        ]
        return "\n".join([f"<function={call.name}>", *lines, "</function>"])

    return "\n".join(one(call) for call in calls)


_PARAMETER = re.compile(r"<parameter=([^<>\n]*)>(.*?)</parameter>", re.DOTALL)


def _read_xml(body: str) -> list[Call]:
    name, closed, rest = body.partition(">")
    if not closed or not name.strip() or "<" in name:
        raise ValueError("a call begins with <function=name>")
    rest, tag, after = rest.rpartition("</parameter>")  # the pattern finds an end for every parameter
    if (_PARAMETER.sub("", rest + tag) + after).strip():
        raise ValueError("only <parameter=name>value</parameter> may stand in a call")
    arguments = {match[1].strip(): _loads(match[2]) for match in _PARAMETER.finditer(rest + tag)}
    return [Call(_clean(name.strip()), _clean(arguments))]


def _salvage_xml(body: str) -> bool:
    name, _, rest = body.partition(">")
    rest, tag, _ = rest.rpartition("</parameter>")
    parameters = "".join(match.group() for match in _PARAMETER.finditer(rest + tag))
    return bool(parameters and _read_xml(f"{name}>{parameters}"))


def _tag_finder(opener: str, closer: str) -> Callable[[str], list[Tag]]:
    either = re.compile(f"{opener}|{closer}")
    return lambda text: [(m.start(), m.end(), 1 if m[0] == opener else -1) for m in either.finditer(text)]


FORMATS: dict[str, CallFormat] = {
    "hermes": CallFormat(
        "<tool_call>\n",
        "</tool_call>",
        re.compile("<tool_call>"),
        _tag_finder("<tool_call>", "</tool_call>"),
        ("<tool_call>", "</tool_call>"),
        'Call tools as <tool_call> {"name": ..., "arguments": ...} </tool_call>',
        _render_hermes,
        _read_hermes,
        _salvage_json,
        ("name", "arguments"),
        re.compile(r'<tool_call>\s*\{\s*"(name)"(?:\s*:\s*"[^"]*"\s*,\s*"(arguments)")?'),
    ),
    "python": CallFormat(
        "[",
        ")]",
        _OPENER,
        _python_tags,
        (),
        "Call tools as [name(parameter=value)]",
        _render_python,
        _read_python,
        lambda body: False,  # nothing else has room in a list
    ),
    "xml": CallFormat(
        "<function=",
        "</function>",
        re.compile("<function="),
        _tag_finder("<function=", "</function>"),
        (),
        "Call tools as <function=name> <parameter=name>value</parameter> </function>",
        _render_xml,
        _read_xml,
        _salvage_xml,
        ("function", "parameter"),
        re.compile("</?(function|parameter)(?=[=>])"),
    ),
}
