"""Conversations as token ids, and tool calls as text.

Two halves. The first writes and reads tool calls in three formats and names the state of a message (Hao et
al. 2026 and our reading of its transcripts). The second, `Chat`, lays a conversation out as the model's own
chat template does (Qwen2.5, Qwen3, Llama 3), as ids that are only ever appended to: nothing a model sampled
is decoded and encoded again.
"""

import ast
import itertools
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import TemplateError

MAX_CHARS = 50_000  # a longer message is answered, not parsed
MAX_BITS = 2048  # of an integer argument; Python refuses to write those of more than 4300 digits
MESSAGE_STATES = ("overlong", "empty", "bare", "malformed", "polluted", "call", "foreign", "reply")
UNHEALTHY_STATES = ("overlong", "empty", "bare", "malformed", "polluted", "foreign")


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
    opener: re.Pattern
    find_tags: Callable[[str], list[Tag]]  # all of them, in order
    tags: tuple[str, ...]  # control tokens of the format, where the tokenizer has them
    instruction: str
    render: Callable[[list[Call]], str]
    read: Callable[[str], list[Call]]  # body of a block -> calls; raises ValueError
    salvage: Callable[[str], bool]  # whether a readable call hides in the body


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
    return text[_THOUGHTS.match(text).end() :]


def parse_calls(text: str, format: str) -> list[Call | BadCall]:
    """Every call a message makes, in order; an empty list means that the message ends the turn.

    Unreadable blocks are BadCall, so is a closing tag without a block. What is not `spoken` makes no call.
    Never raises, whatever the text.
    """
    form, text = FORMATS[format], spoken(text)
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
    form, text = FORMATS[format], spoken(text)
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
    blocks, opened = [], None
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
        return form.read(body)
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


def _loads(text: str) -> object:
    """JSON without NaN and infinities, with lone surrogates replaced; raises ValueError."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        fault = error.msg.removesuffix(" at")
        raise ValueError(f"bad JSON: {fault} at character {error.pos}") from None
    return _clean(value)


def _clean(value: object) -> object:
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
    text, decoder = text[:MAX_CHARS], json.JSONDecoder(parse_constant=_refuse)
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
        re.compile("<tool_call>"),
        _tag_finder("<tool_call>", "</tool_call>"),
        ("<tool_call>", "</tool_call>"),
        'Call tools as <tool_call> {"name": ..., "arguments": ...} </tool_call>',
        _render_hermes,
        _read_hermes,
        _salvage_json,
    ),
    "python": CallFormat(
        "[",
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
        re.compile("<function="),
        _tag_finder("<function=", "</function>"),
        (),
        "Call tools as <function=name> <parameter=name>value</parameter> </function>",
        _render_xml,
        _read_xml,
        _salvage_xml,
    ),
}


def signature(tool: dict) -> str:
    """One line for one tool schema, as the built-in model's chat template writes it.

    Example: `find_tickets(status: open|closed = "open"): List the tickets with a status.`
    """
    parameters = tool["parameters"]["properties"]
    parts = []
    for name, kind in parameters.items():
        choices = [x if isinstance(x, str) else json.dumps(x) for x in kind.get("enum", [kind["type"]])]
        text = f"{name}: {'|'.join(choices + ['null'] * kind.get('nullable', False))}"
        parts.append(text + (f" = {json.dumps(kind['default'])}" if "default" in kind else ""))
    return f"{tool['name']}({', '.join(parts)}): {tool['description']}"


@dataclass(frozen=True)
class Layout:
    """How a model family writes a conversation: begin, role, middle, text, end, after."""

    name: str
    begin: str
    middle: str
    end: str  # the control token that a message stops with
    after: str
    stops: tuple[str, ...]  # other control tokens that stop, where the tokenizer has them
    trims: bool  # whether the blanks around a text are left out
    tool_role: str
    results: Callable[[list[str]], list[str]]  # guarded results in a row -> texts of the messages with them

    def message(self, role: str, text: str) -> str:
        """A whole message."""
        return f"{self.begin}{role}{self.middle}{text}{self.end}{self.after}"


def _one_message(results: list[str]) -> list[str]:
    return ["\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)]


def _json_messages(results: list[str]) -> list[str]:
    return [json.dumps(result, ensure_ascii=False) for result in results]


LAYOUTS = (
    Layout(
        "ChatML",
        "<|im_start|>",
        "\n",
        "<|im_end|>",
        "\n",
        ("<|endoftext|>",),
        False,
        "user",
        _one_message,
    ),
    Layout(
        "Llama 3",
        "<|start_header_id|>",
        "<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
        ("<|eom_id|>", "<|end_of_text|>"),
        True,
        "ipython",
        _json_messages,
    ),
)


SAMPLE = 'Text {"a": 1}'  # any tokenizer gives it back


class Chat:
    """A conversation in the layout of one tokenizer: messages to ids, by appending only.

    Trusted text (the template's own and rendered calls) may hold control tokens; text from users, tools and
    models goes through `guard` first, and can then spell a control token but never become its id.

    What is written is what the checkpoint's own chat template writes (`_check` compares ids, and raises
    ValueError with the first that differs), with one exception: Qwen3's template opens a message that shall
    not think with an empty `<think>` block and takes it away once the message is history. Here it stays, so
    that what a model saw is always a prefix of what it sees next.
    """

    MARK = "\ufdd0"  # a Unicode noncharacter: a place where `encode` must not join
    # Templates know of these: no thinking, and no date of today in the prompt.
    SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.control = dict(sorted(tokenizer.get_added_vocab().items()))
        layouts = [layout for layout in LAYOUTS if {layout.begin, layout.end} <= self.control.keys()]
        if not layouts:
            known = " or ".join(f"{layout.begin} and {layout.end} ({layout.name})" for layout in LAYOUTS)
            raise ValueError(f"the tokenizer has no {known}: no other layout of conversations is supported")
        self.layout = layouts[0]
        # One character cannot be pulled apart, and the tokenizer finds it by itself.
        longest_first = sorted((name for name in self.control if len(name) > 1), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.end_id = self.control[self.layout.end]
        stops = {self.control[name] for name in self.layout.stops if name in self.control}
        self.stop_ids = sorted(stops | {self.end_id} | ({tokenizer.eos_token_id} - {None}))
        if self.decode(self.encode(SAMPLE)) != SAMPLE:
            raise ValueError(f"the tokenizer cannot write {SAMPLE!r}: its vocabulary is not there")
        self.after_ids = self.encode(self.layout.after)
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        hello = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        self.opening = self._template(hello, add_generation_prompt=True).removeprefix(self._template(hello))
        self._check()

    def _template(self, messages: list[dict], **settings: object) -> str:
        """What the checkpoint's own chat template writes. Raises ValueError if it refuses."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **self.SETTINGS | settings)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a conversation: {error}") from None

    def _check(self) -> None:
        """Compare a conversation of every kind of message with the checkpoint's own template."""
        call, hermes = Call("look", {"where": "x", "n": 2}), "hermes"
        parameters = {"type": "object", "properties": {}, "required": []}
        tools = [{"name": call.name, "description": "Look.", "parameters": parameters}]
        results = [{"role": "tool", "content": text} for text in ('{"found": 1}', "[]")]
        exchanges = [
            (render_calls([call], hermes), results),
            ("There is one.\n\nShall I go on?", [{"role": "user", "content": " Yes, please.\n"}]),
            ("Done.", [{"role": "user", "content": "Thanks."}]),
        ]
        asked = [{"role": "system", "content": "You use tools."}, {"role": "user", "content": "Look there."}]
        ours, said = self.prompt_ids(asked, tools, hermes), []
        for text, answers in exchanges:
            ours += self.assistant_ids(text, hermes) + self.extend_ids(answers, self.end_id)
            said += [{"role": "assistant", "content": text}, *answers]
        listed = [{"type": "function", "function": tool} for tool in tools]
        if not self._lists_tools(hermes):
            asked[0]["content"], listed = self._with_tools(asked[0]["content"], tools), None
        self._compare(ours, [*asked, *said], listed)
        if self._teaches_hermes() and "tool_calls" in self.tokenizer.chat_template:
            made = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            said[0] = {"role": "assistant", "content": "", "tool_calls": [made]}
            self._compare(ours, [*asked, *said], listed)

    def _compare(self, ours: list[int], messages: list[dict], tools: list[dict] | None) -> None:
        thought = self.encode(self.opening.partition(self.layout.middle)[2])  # the empty block of Qwen3
        theirs = self.encode(self._template(messages, tools=tools, add_generation_prompt=True))
        ours, theirs = _without(ours, thought), _without(theirs, thought)
        if ours != theirs:
            pairs = enumerate(itertools.zip_longest(ours, theirs))
            at = next(place for place, (a, b) in pairs if a != b)
            here, there = (repr(self.decode(ids[max(0, at - 3) : at + 3])) for ids in (ours, theirs))
            raise ValueError(
                f"the {self.layout.name} layout differs from the model's own chat template at token {at}: "
                f"{here} here, {there} there"
            )

    def guard(self, text: str, keep: tuple[str, ...] = ()) -> str:
        """`text` with a mark inside every control string but those of `keep`: `encode` then reads text."""
        text = text.encode("utf-8", "replace").decode().replace(self.MARK, "")
        while True:  # breaking one string can leave another that overlaps it
            broken = self._split.sub(lambda m: m[0] if m[0] in keep else m[0][0] + self.MARK + m[0][1:], text)
            if broken == text:
                return text
            text = broken

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text; control strings become their ids, guarded ones do not."""
        ids = []
        for i, piece in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self.control[piece])
                continue
            for part in piece.split(self.MARK):
                ids += self.tokenizer.encode(part, add_special_tokens=False) if part else []
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def prompt_ids(self, messages: list[dict], tools: list[dict], format: str, hint: str = "") -> list[int]:
        """Ids up to and including the opening of the first assistant message.

        The system block is written by the checkpoint's own chat template, with `hint` at the end of its text.
        A template that teaches a format of its own (Qwen's that of hermes, Llama's a JSON object) does not
        get the tools of another format: they are listed here.
        """
        system, rest = messages[0], messages[1:]
        content = "\n\n".join(filter(None, [system["content"], hint]))
        content = self.guard(content, keep=FORMATS[format].tags)
        wrapped = [{"type": "function", "function": tool} for tool in tools]
        if not self._lists_tools(format):
            content, wrapped = self._with_tools(content, tools), None
        head = self._template([{"role": "system", "content": content}], tools=wrapped)
        return self.encode(head) + self._messages_ids(rest)

    def extend_ids(self, messages: list[dict], stop_id: int | None) -> list[int]:
        """Ids after an assistant message that ended with `stop_id`: new messages, the next opening.

        Any stop token but the layout's (or none at all) is followed by one, so that it stays the layout.
        """
        closing = [] if stop_id == self.end_id else [self.end_id]
        return closing + self.after_ids + self._messages_ids(messages)

    def assistant_ids(self, text: str, format: str) -> list[int]:
        """Ids of a whole assistant message as a model would sample it, its stop token included."""
        return self.encode(self.guard(text, keep=FORMATS[format].tags)) + [self.end_id]

    def _messages_ids(self, messages: list[dict]) -> list[int]:
        parts = []
        for is_tool, group in itertools.groupby(messages, key=lambda message: message["role"] == "tool"):
            group = list(group)
            if is_tool:
                texts = self.layout.results([self.guard(message["content"]) for message in group])
                parts += [self.layout.message(self.layout.tool_role, text) for text in texts]
                continue
            for message in group:
                lines = [message["content"], *map(self._tool_line, message.get("tools", ()))]  # miss_func
                text = "\n".join(map(self.guard, lines))
                text = text.strip() if self.layout.trims else text
                parts.append(self.layout.message(message["role"], text))
        return self.encode("".join(parts) + self.opening)

    def _teaches_hermes(self) -> bool:
        return "<tool_call>" in self.tokenizer.chat_template

    def _writes_signatures(self) -> bool:
        """Whether the template lists tools and teaches no format for calls: the built-in model's."""
        return not self._teaches_hermes() and self.layout is LAYOUTS[0]

    def _lists_tools(self, format: str) -> bool:
        """Whether the template is to list the tools, rather than `_with_tools`."""
        return self._writes_signatures() or (self._teaches_hermes() and format == "hermes")

    def _with_tools(self, content: str, tools: list[dict]) -> str:
        return "\n".join([content, "", "# Tools", *map(signature, tools)]) if tools else content

    def _tool_line(self, tool: dict) -> str:
        if self._teaches_hermes():
            return json.dumps({"type": "function", "function": tool}, ensure_ascii=False)
        return signature(tool)


def _without(ids: list[int], part: list[int]) -> list[int]:
    """The ids without every occurrence of a part."""
    kept, i = [], 0
    while i < len(ids):
        found = part and ids[i : i + len(part)] == part
        kept += [] if found else [ids[i]]
        i += len(part) if found else 1
    return kept


def control_tokens(chat: Chat, format: str) -> dict[str, int]:
    """The tokens that carry call structure, text -> id, found from tokenizer and format.

    They are the added tokens of the layout and of tools, and those that open and close the body of a rendered
    call (`{"`, `}}` and `"}}` in hermes), as this tokenizer splits it. Hao et al. 2026 name `<tool_call>`,
    `{"`, `<|im_end|>`.
    """
    structure = (
        chat.layout.begin,
        chat.layout.end,
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
    )
    ids = {chat.control[name] for name in structure if name in chat.control}
    ids = ids.union(*call_ends(chat, format))
    return {chat.decode([i]): i for i in sorted(ids)}


def call_ends(chat: Chat, format: str) -> tuple[set[int], set[int]]:
    """(tokens that open, tokens that close the body of a rendered call), as this tokenizer splits it."""
    openers, closers = set(), set()
    for value in (1, "a"):
        text = render_calls([Call("name", {"key": value})], format)
        body = [piece for piece in chat._split.split(text) if piece not in chat.control and piece.strip()][0]
        written = [i for i in chat.encode(body) if chat.decode([i]).strip()]
        openers.add(written[0])
        closers.add(written[-1])
    return openers, closers


ROLE_COLORS = {"system": "90", "user": "36", "assistant": "32", "tool": "33"}


def readable(text: str, color: bool = False) -> str:
    """A conversation for people: one line per message, control tokens of the layout left out, those a
    model misplaced left in. The system message is cut to its first line."""
    lines = []
    layout = next((layout for layout in LAYOUTS if layout.begin in text), LAYOUTS[0])
    for part in text.split(layout.begin):
        role, _, body = part.partition(layout.middle)
        body = body.rstrip("\n").removesuffix(layout.end)
        if role == "ipython" or (role == "user" and body.startswith("<tool_response>")):
            role, body = "tool", body.replace("<tool_response>\n", "").replace("\n</tool_response>", "")
        if role == "system":
            body = body.partition("\n")[0] + " ..."
        if role not in ROLE_COLORS:
            if part:
                lines.append(part)
            continue
        lines += [f"{role if i == 0 else '':>9} | {line}" for i, line in enumerate(body.split("\n"))]
        if color:
            first = len(lines) - body.count("\n") - 1
            lines[first:] = [f"\x1b[{ROLE_COLORS[role]}m{line}\x1b[0m" for line in lines[first:]]
    return "\n".join(lines)
