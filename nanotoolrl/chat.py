"""A conversation as token ids, laid out as the model's own chat template does it (Qwen2.5, Qwen3, Llama 3).

Ids are only ever appended to: nothing that a model sampled is decoded and encoded again.
"""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import TemplateError

from nanotoolrl.calls import FORMATS, Call, render_calls


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
    end: str  # the special token that a message stops with
    after: str
    stops: tuple[str, ...]  # other special tokens that stop, where the tokenizer has them
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

    Trusted text (the template's own and rendered calls) may hold special tokens; text from users, tools and
    models goes through `guard` first, and can then spell a special token but never become its id.

    What is written is what the checkpoint's own chat template writes (`_check` compares ids, and raises
    ValueError with the first that differs), with one exception: Qwen3's template opens a message that shall
    not think with an empty `<think>` block and takes it away once the message is history. Here it stays, so
    that what a model saw is always a prefix of what it sees next.

    thinking: no such block is written; what the model thinks is part of its message, is trained, and stays.
    Raises ValueError for a template that knows no thinking then, and for one that opens every message within
    a thought.
    """

    MARK = "\ufdd0"  # a Unicode noncharacter: a place where `encode` must not join
    DATE = "26 Jul 2024"  # templates write today's into the prompt, unless they are told one

    def __init__(self, tokenizer, thinking: bool = False) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking
        self.special_ids = dict(sorted(tokenizer.get_added_vocab().items()))
        layouts = [layout for layout in LAYOUTS if {layout.begin, layout.end} <= self.special_ids.keys()]
        if not layouts:
            known = " or ".join(f"{layout.begin} and {layout.end} ({layout.name})" for layout in LAYOUTS)
            raise ValueError(f"the tokenizer has no {known}: no other layout of conversations is supported")
        self.layout = layouts[0]
        # One character cannot be pulled apart, and the tokenizer finds it by itself.
        longest_first = sorted((name for name in self.special_ids if len(name) > 1), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.end_id = self.special_ids[self.layout.end]
        stops = {self.special_ids[name] for name in self.layout.stops if name in self.special_ids}
        self.stop_ids = sorted(stops | {self.end_id} | ({tokenizer.eos_token_id} - {None}))
        if self.decode(self.encode(SAMPLE)) != SAMPLE:
            raise ValueError(f"the tokenizer cannot write {SAMPLE!r}: its vocabulary is not there")
        self.after_ids = self.encode(self.layout.after)
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: --chat-template gives it one")
        self.opening = self._opening(thinking)
        if thinking and self.opening == self._opening(False):
            raise ValueError("its chat template knows no thinking: leave --thinking out")
        if self.opening.count("<think>") > self.opening.count("</think>"):
            raise ValueError("its chat template opens every message within a thought")
        self._check()

    def _template(self, messages: list[dict], **settings: object) -> str:
        """What the checkpoint's own chat template writes. Raises ValueError if it refuses."""
        how = {"enable_thinking": self.thinking, "date_string": self.DATE} | settings
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **how)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a conversation: {error}") from None

    def _opening(self, thinking: bool) -> str:
        """What opens an assistant's message."""
        hello = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        how = {"enable_thinking": thinking}
        whole, before = (self._template(hello, add_generation_prompt=end, **how) for end in (True, False))
        return whole.removeprefix(before)

    def _check(self) -> None:
        """Compare a conversation of every kind of message with the checkpoint's own template."""
        call = Call("look", {"where": "x", "n": 2})
        hermes = "hermes"
        parameters = {"type": "object", "properties": {}, "required": []}
        tools = [{"name": call.name, "description": "Look.", "parameters": parameters}]
        results = [{"role": "tool", "content": text} for text in ('{"found": 1}', "[]")]
        exchanges: list[tuple[str, list[dict]]] = [
            (render_calls([call], hermes), results),
            ("There is one.\n\nShall I go on?", [{"role": "user", "content": " Yes, please.\n"}]),
            ("Done.", [{"role": "user", "content": "Thanks."}]),
        ]
        asked = [{"role": "system", "content": "You use tools."}, {"role": "user", "content": "Look there."}]
        ours = self.prompt_ids(asked, tools, hermes)
        said = []
        for text, answers in exchanges:
            ours += self.assistant_ids(text, hermes) + self.extend_ids(answers, self.end_id)
            said += [{"role": "assistant", "content": text}, *answers]
        listed: list[dict] | None = [{"type": "function", "function": tool} for tool in tools]
        if not self._lists_tools(hermes):
            asked[0]["content"] = self._with_tools(asked[0]["content"], tools)
            listed = None
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
                f"{here} here, {there} there. --chat-template takes another"
            )

    def pieces(self, text: str) -> list[str]:
        """`text` split at special strings, which stand at the odd places."""
        return self._split.split(text)

    def guard(self, text: str, keep: tuple[str, ...] = ()) -> str:
        """`text` with a mark inside every special string but those of `keep`: `encode` then reads text."""
        text = text.encode("utf-8", "replace").decode().replace(self.MARK, "")
        while True:  # breaking one string can leave another that overlaps it
            broken = self._split.sub(lambda m: m[0] if m[0] in keep else m[0][0] + self.MARK + m[0][1:], text)
            if broken == text:
                return text
            text = broken

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text; special strings become their ids, guarded ones do not."""
        ids = []
        for i, piece in enumerate(self.pieces(text)):
            if i % 2:
                ids.append(self.special_ids[piece])
                continue
            for part in piece.split(self.MARK):
                ids += self.tokenizer.encode(part, add_special_tokens=False) if part else []
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
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
        wrapped: list[dict] | None = [{"type": "function", "function": tool} for tool in tools]
        if not self._lists_tools(format):
            content = self._with_tools(content, tools)
            wrapped = None
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
    kept = []
    i = 0
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
    ids = {chat.special_ids[name] for name in structure if name in chat.special_ids}
    ids = ids.union(*call_ends(chat, format))
    return {chat.decode([i]): i for i in sorted(ids)}


def call_ends(chat: Chat, format: str) -> tuple[set[int], set[int]]:
    """(tokens that open, tokens that close the body of a rendered call), as this tokenizer splits it."""
    openers, closers = set(), set()
    for value in (1, "a"):
        text = render_calls([Call("name", {"key": value})], format)
        body = [piece for piece in chat.pieces(text) if piece not in chat.special_ids and piece.strip()][0]
        written = [i for i in chat.encode(body) if chat.decode([i]).strip()]
        openers.add(written[0])
        closers.add(written[-1])
    return openers, closers


ROLE_COLORS = {"system": "90", "user": "36", "assistant": "32", "tool": "33"}


def readable(text: str, color: bool = False) -> str:
    """A conversation for people: one line per message, special tokens of the layout left out, those a
    model misplaced left in. The system message is cut to its first line."""
    lines = []
    layout = next((layout for layout in LAYOUTS if layout.begin in text), LAYOUTS[0])
    for part in text.split(layout.begin):
        role, _, body = part.partition(layout.middle)
        body = body.rstrip("\n").removesuffix(layout.end)
        if role == "ipython" or (role == "user" and body.startswith("<tool_response>")):
            role = "tool"
            body = body.replace("<tool_response>\n", "").replace("\n</tool_response>", "")
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
