"""What assistants said in anybody's logged conversations.

`conversations` reads a file: one JSON value after the other (JSON lines, or one value over many lines), each
a conversation or an array of them; also gzip, and UTF-8 or UTF-16 with a byte order mark. A conversation is

- a list of messages, or an object that holds one as `messages`, `conversations` or `conversation`. A message
  has `role` and `content` (OpenAI, Anthropic) or `from` and `value` (ShareGPT);
- `prompt` and `completion` (TRL, verifiers), each a text or a list of messages, or `input` and `output`
  (verl), two texts. Only the completion is judged: the prompt was given;
- `text` in the layout of ChatML or Llama 3, as in our own rollouts.jsonl.

A text in one of these layouts is split at its tokens. verl logs ChatML without them, as lines that are
nothing but a role: there the text is split at those lines. What is none of this is refused, with file, line
and the keys that were found; it is never counted as an empty message.
"""

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanotoolrl.calls import BROKEN_TEXT_STATES, MESSAGE_STATES, Call, message_state, render_calls
from nanotoolrl.chat import LAYOUTS

# Who speaks: the assistant, the assistant in a call that is JSON text, or somebody else.
SPEAKERS = (
    dict.fromkeys(("assistant", "gpt"), "assistant")
    | dict.fromkeys(("function_call", "tool_call"), "call")
    | dict.fromkeys(("system", "developer", "user", "human"), "other")
    | dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "other")
)
LISTS = ("messages", "conversations", "conversation")  # keys of a conversation that hold its messages
PAIRS = (("prompt", "completion"), ("input", "output"))
EXPECTED = (
    f"expected a list of messages, or an object with {', '.join(LISTS)}, prompt and completion, input and "
    f"output, or text in the layout of {' or '.join(layout.name for layout in LAYOUTS)}"
)
MESSAGE = "expected a message, an object with role and content or with from and value"
ARGUMENTS = ("arguments", "parameters", "input")  # keys of a call that hold its arguments
ABOUT = {"name", "id", "call_id", "type", "index"}  # keys of a call that hold none
THOUGHTS = ("thinking", "redacted_thinking", "reasoning")  # parts of a content that are not said
STOPS = tuple(token for layout in LAYOUTS for token in (layout.end, *layout.stops)) + ("</s>",)

_ROLE = "(system|developer|user|assistant|tool|function|observation|ipython)"
_HEADERS = {
    layout.begin: re.compile(re.escape(layout.begin) + _ROLE + re.escape(layout.middle)) for layout in LAYOUTS
}
# ChatML's headers without their tokens.
_STRIPPED = re.compile(r"(?:\A|(?<=\n))(system|user|assistant|tool)\n")
_BLANK = re.compile(r"[ \t\n\r]*")
_MOST_KEYS = 8  # that an error names


@dataclass(frozen=True)
class Said:
    """One message of an assistant: its text without stop tokens, calls written in the format that was asked
    for, and one of `chat.MESSAGE_STATES`."""

    text: str
    state: str


def conversations(path: Path, format: str) -> Iterator[tuple[str, list[Said]]]:
    """(place in the file, what the assistant said) of every conversation. Structured calls are read as calls
    of the format.

    Raises ValueError, with file and line, on what cannot be read and what is no conversation.
    """
    for line, value in _values(path):
        many = isinstance(value, list) and bool(value) and not _is_message(value[0])
        for number, one in enumerate(value if many else [value], 1):
            place = f"line {line}" + (f", conversation {number}" if many else "")
            try:
                said = _conversation(one, format)
            except ValueError as error:
                raise ValueError(f"{path}, {place}: {error}") from None
            yield place, said


# --------------------------------------------------------------------------------------------------- the file
def _values(path: Path) -> Iterator[tuple[int, object]]:
    """(line on which it begins, value) of one JSON value after the other."""
    text = _text(path)
    decoder = json.JSONDecoder()
    line = 1
    end = 0
    while (start := _BLANK.match(text, end).end()) < len(text):
        line += text.count("\n", end, start)
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            begun = f"; the value begins on line {line}" if error.lineno != line else ""
            raise ValueError(f"{path}, {where}: no JSON: {error.msg}{begun}") from None
        except RecursionError:
            raise ValueError(f"{path}, line {line}: the JSON is nested too deeply") from None
        except ValueError as error:  # an integer of too many digits
            raise ValueError(f"{path}, line {line}: {error}") from None
        yield line, value
        line += text.count("\n", start, end)


def _text(path: Path) -> str:
    """The whole file. Its first bytes tell gzip and UTF-16; bytes that are no text become U+FFFD."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return data.decode(encoding, errors="replace")


# ---------------------------------------------------------------------------------------------- conversations
def _is_message(value: object) -> bool:
    return isinstance(value, dict) and not value.keys().isdisjoint(("role", "from", "content", "value"))


def _conversation(value: object, format: str) -> list[Said]:
    if isinstance(value, list):
        return _messages(value, format)
    fields = value if isinstance(value, dict) else {}
    for key in LISTS:
        if key in fields:
            return _messages(fields[key], format)
    for given, completed in PAIRS:
        if given in fields and completed in fields:
            return _completion(fields[given], fields[completed], completed, format)
    text = fields.get("text")
    if isinstance(text, str) and (header := _header(text)) and header.search(text):
        return _rendered(text, header, fields.get("states"), format)
    raise ValueError(f"{EXPECTED}; found {_found(value)}")


def _messages(value: object, format: str) -> list[Said]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list of messages; found {_found(value)}")
    said = []
    for number, message in enumerate(value, 1):
        try:
            said += _message(message, format)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return said


def _completion(given: object, completed: object, key: str, format: str) -> list[Said]:
    """What was said in a completion. What a prompt has written of its first message belongs to it."""
    if not isinstance(given, str | list) or not isinstance(completed, str | list):
        both = f"{_found(given)} and {_found(completed)}"
        raise ValueError(f"expected two texts or lists of messages, up to and from {key}; found {both}")
    if isinstance(completed, list):
        return _messages(completed, format)
    given = given if isinstance(given, str) else ""
    header = _header(given + completed)
    if header is None and _turns(given, _STRIPPED)[-1][0] == "assistant":
        header = _STRIPPED
    if header is None:
        return [_of_text(completed, format)]
    role, begun = _turns(given, header)[-1]
    opened = role == "assistant" and _without_stops(begun) == begun
    (_, first), *turns = _turns(completed, header)
    if opened or first.strip() or not turns:
        turns = [("assistant", (begun if opened else "") + first), *turns]
    return _assistant(turns, format)


def _rendered(text: str, header: re.Pattern, states: object, format: str) -> list[Said]:
    """What was said in a whole conversation as text. states: our own logs say which messages were cut."""
    said = _assistant(_turns(text, header), format)
    if isinstance(states, list) and states and all(state in MESSAGE_STATES for state in states):
        return [Said(one.text, "overlong") if s == "overlong" else one for one, s in zip(said, states)]
    return said


def _header(text: str) -> re.Pattern | None:
    """The pattern of the layout that a text is written in."""
    return next((pattern for begin, pattern in _HEADERS.items() if begin in text), None)


def _turns(text: str, header: re.Pattern) -> list[tuple[str, str]]:
    """(role, text) of every message, the first one what stands before any header, without a role. A token
    that begins no header is text: a model sampled it."""
    pieces = ["", *header.split(text)]
    return list(zip(pieces[::2], pieces[1::2]))


def _assistant(turns: list[tuple[str, str]], format: str) -> list[Said]:
    """The assistant's messages. A last one that is only opened was never said."""
    if len(turns) > 1 and turns[-1] == ("assistant", ""):
        turns = turns[:-1]
    return [_of_text(text, format) for role, text in turns if role == "assistant"]


# --------------------------------------------------------------------------------------------------- messages
def _of_text(text: str, format: str) -> Said:
    text = _bare(text)
    return Said(text, message_state(text, format))


def _bare(text: str) -> str:
    """A text without the layout's tokens around it."""
    for header in _HEADERS.values():
        opened = header.match(text)
        text = text[opened.end() :] if opened and opened[1] == "assistant" else text
    return _without_stops(text)


def _without_stops(text: str) -> str:
    """A text without stop tokens at its end, and without the blanks around them."""
    end = len(text)
    while True:
        last = end
        while last and text[last - 1].isspace():
            last -= 1
        stop = next((token for token in STOPS if text.endswith(token, 0, last)), None)
        if stop is None:
            return text[:end]
        end = last - len(stop)


def _message(message: object, format: str) -> list[Said]:
    """What a message says, if an assistant speaks."""
    who = next((key for key in ("role", "from") if isinstance(message, dict) and key in message), None)
    if who is None:
        raise ValueError(f"{MESSAGE}; found {_found(message)}")
    role = message[who]
    speaker = SPEAKERS.get(role) if isinstance(role, str) else None
    if speaker is None:
        raise ValueError(f"unknown {who} {reprlib.repr(role)}; known are {', '.join(SPEAKERS)}")
    calls = _listed(message.get("tool_calls")) or _listed(message.get("function_call"))
    body = next((key for key in ("content", "value") if key in message), None)
    if body is None and not (calls and speaker == "assistant"):
        raise ValueError(f"{MESSAGE}; found {_found(message)}")
    if speaker == "other":
        return []
    if speaker == "call":
        calls = _listed(message[body], texts=True)
        text = ""
    else:
        content = message.get(body)
        text, used = _content(message.get("refusal") if content is None else content)
        calls = used + calls
    if message.get("finish_reason") == "length" or message.get("stop_reason") == "max_tokens":
        return [Said(text, "overlong")]
    said = _of_text(text, format)
    return [said if not calls or said.state in BROKEN_TEXT_STATES else _calling(calls, format)]


def _content(content: object) -> tuple[str, list]:
    """(text, structured calls) of the content of an assistant's message."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise ValueError(f"expected a text or a list of parts; found {_found(content)}")
    texts = []
    calls = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
        if kind == "tool_use":
            calls.append(part)
        elif kind in THOUGHTS:
            continue
        elif isinstance(text, str):
            texts.append(text)
        else:
            kinds = f"{_found(part)}, of type {reprlib.repr(kind)}"
            raise ValueError(f"expected parts of type text or tool_use; found {kinds}")
    return "".join(texts), calls


def _listed(value: object, texts: bool = False) -> list:
    """Structured calls as a list, also from JSON text. texts: a text that is none is a call, one that cannot
    be read; else it is refused, as everything else is."""
    calls = _loaded(value)
    if calls in (None, "", {}):
        return []
    if isinstance(calls, list | dict):
        return calls if isinstance(calls, list) else [calls]
    if texts and isinstance(value, str):
        return [value]
    raise ValueError(f"expected a list of calls; found {_found(value)}")


def _loaded(value: object) -> object:
    """What a JSON text holds; a value that is none as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        return value


def _calling(calls: list, format: str) -> Said:
    """A message of structured calls. One that cannot be read stands as it is, and makes it malformed."""
    texts = []
    readable = True
    for call in calls:
        name, arguments = _call(_loaded(call))
        try:
            if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
                raise ValueError
            texts.append(render_calls([Call(name, arguments)], format))
        except (ValueError, TypeError, RecursionError):
            readable = False
            texts.append(" ".join(x if isinstance(x, str) else reprlib.repr(x) for x in (name, arguments)))
    text = "\n".join(texts)
    return Said(text, message_state(text, format) if readable else "malformed")


def _call(call: object) -> tuple[object, object]:
    """(name, arguments) of a structured call. No text and null are no arguments; a call without them must not
    hold anything that could be meant as such."""
    if not isinstance(call, dict):
        return None, call
    function = call.get("function")
    fields = {key: value for key, value in call.items() if key != "function"}
    fields |= function if isinstance(function, dict) else {}
    key = next((key for key in ARGUMENTS if fields.get(key) is not None), None)
    others = {name for name, value in fields.items() if value is not None} - ABOUT
    if key is None and others and "name" in fields:
        raise ValueError(f"expected a call with name and arguments; found {_found(fields)}")
    arguments = _loaded(fields.get(key))
    empty = arguments is None or (isinstance(arguments, str) and not arguments.strip())
    return fields.get("name"), {} if empty else arguments


def _found(value: object) -> str:
    """What a value is, for people; text of the log comes escaped."""
    if isinstance(value, dict):
        keys = ", ".join(reprlib.repr(key) for key in list(value)[:_MOST_KEYS])
        more = f" and {len(value) - _MOST_KEYS} more" if len(value) > _MOST_KEYS else ""
        return f"an object with the keys {keys}{more}" if value else "an object without keys"
    kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
