"""What the tokens of an assistant message are: their class, and the place in the message where each stands.

A class says what a token is for, a place what stood before it. Every assistant token has one class:

    structure   a control token, or skeleton: the newline behind a tag, `name`, `": "`, `arguments`, ...
    value       a word that the caller chose: names of tools and parameters, strings, numbers
    opener      the first token of a reply
    text        the rest of a reply; its stop token is structure

A thought (`<think>` ... `</think>`, before anything is said) is text but for special tokens, and in_reply.
Behind it a message begins as it would without one.

Inside a call the line between skeleton and value is drawn by word characters: punctuation within a string
counts as skeleton. A place is found by looking back only, so it is known before the token is sampled.

Example, the built-in model's tokens of one call, with class and place:

    <tool_call>  structure  start_call (start_reply, where no call is due)
    \\n           structure  behind_tag
    {"           structure  behind_tag
    name         structure  in_call
    ": "         structure  in_call
    get_time     value      in_call
    ", "         structure  in_call
    arguments    structure  in_call
    ...
    "}}          structure  in_call
    \\n           structure  behind_body
    </tool_call> structure  behind_body
    <|im_end|>   structure  behind_call
"""

import re
from collections.abc import Sequence
from functools import cache

from nanotoolrl.calls import FORMATS, Call, render_calls, spoken
from nanotoolrl.chat import Chat, call_ends, control_tokens

WORD = re.compile("[\\w\ufffd]")  # a token may hold a part of a letter, which decodes to U+FFFD
CLASSES = ("structure", "value", "opener", "text")
STRUCTURE, VALUE, OPENER, TEXT = range(len(CLASSES))
PLACES = ("start_call", "start_reply", "behind_tag", "in_call", "behind_body", "behind_call", "in_reply")
START_CALL, START_REPLY, BEHIND_TAG, IN_CALL, BEHIND_BODY, BEHIND_CALL, IN_REPLY = range(len(PLACES))


class Structure:
    """Classes and places of the tokens of messages in one call format, as one tokenizer splits them."""

    def __init__(self, chat: Chat, format: str) -> None:
        self.format = format
        self.control = control_tokens(chat, format)  # text -> id
        self.control_ids = frozenset(self.control.values())
        self.prefix = chat.assistant_ids(FORMATS[format].prefix, format)[:-1]
        self.openers, self.closers = call_ends(chat, format)[0], body_ends(chat, format)
        self.special_ids = self.control_ids | set(chat.special_ids.values()) | set(chat.stop_ids)
        self.end_id, self.stop_ids = chat.end_id, chat.stop_ids
        self.text_of = cache(lambda token: chat.decode([token]))

    def named(self, name: str) -> frozenset[int]:
        """Ids of a set of control tokens: "control" (all), "paper" (those that Hao et al. 2026 name: what
        opens a call, what opens its body, the stop), "opener", "stop" (all that stop)."""
        sets = {
            "control": self.control_ids,
            "paper": {self.prefix[0], *self.openers, self.end_id},
            "opener": {self.prefix[0]},
            "stop": set(self.stop_ids),
        }
        return frozenset(sets[name])

    def classes(self, ids: Sequence[int]) -> list[int]:
        """The class of every token of a message, an index into CLASSES."""
        pieces = [self.text_of(token) for token in ids]
        text = "".join(pieces)
        first = thought_length(text)
        inside = self._calls(text, first)
        skeleton = [
            span
            for match in FORMATS[self.format].skeleton.finditer(text)
            for span in match.regs[1:]
            if span[0] >= 0
        ]
        found = []
        at = 0
        for token, piece in zip(ids, pieces):
            start, at = at, at + len(piece)
            if token in self.special_ids:
                found.append(STRUCTURE)
            elif any(first <= start < last for first, last in inside):
                words = [start + match.start() for match in WORD.finditer(piece)]
                free = [place for place in words if not any(a <= place < b for a, b in skeleton)]
                found.append(VALUE if free else STRUCTURE)
            elif not piece.strip() and any(last <= start for _, last in inside):
                found.append(STRUCTURE)  # between two calls
            else:
                found.append(OPENER if start <= first < at else TEXT)
        return found

    def is_word(self, token: int) -> bool:
        """Whether a token has a word character and is no special token."""
        return token not in self.special_ids and bool(WORD.search(self.text_of(token)))

    def goes_on(self, token: int, piece: Sequence[int]) -> bool:
        """Whether a value that is being written may go on with a token, where a piece follows the value: with
        a word, or with a blank that the piece does not begin with."""
        blank = not self.text_of(token).strip(" ") and not self.text_of(piece[0]).startswith(" ")
        return self.is_word(token) or blank

    def skeleton(self, ids: Sequence[int]) -> list[list[int]]:
        """The pieces of a message between which its values stand, the last with the stop token.

        Example: the pieces of a call `f(a="x")`, in hermes, are `<tool_call>\\n{"name": "`,
        `", "arguments": {"`, `": "` and `"}}\\n</tool_call>` with the stop; slots are `f`, `a` and `x`.
        Blanks between two words are part of the value.
        """
        value = [kind == VALUE for kind in self.classes(ids)]
        for i in range(1, len(ids) - 1):
            if value[i - 1] and value[i + 1] and not self.text_of(ids[i]).strip(" "):
                value[i] = True
        pieces: list[list[int]] = [[]]
        for i, token in enumerate(ids):
            if not value[i]:
                pieces[-1].append(token)
            elif i == 0 or not value[i - 1]:
                pieces.append([])
        return pieces

    def _calls(self, text: str, thought: int) -> list[tuple[int, int]]:
        """(start, end) of every block of calls behind a thought of so many characters, to the end of the text
        where none closes it."""
        spans: list[tuple[int, int]] = []
        opened = -1
        for start, end, step in FORMATS[self.format].find_tags(text):
            if start < thought:
                continue
            if step > 0 and opened < 0:
                opened = start
            elif step < 0 and opened >= 0:
                spans.append((opened, end))
                opened = -1
        return spans + [(opened, len(text))] * (opened >= 0)

    def places(self, ids: Sequence[int], due: bool) -> list[int]:
        """The place of every token of a message, an index into PLACES. due: whether the turn's ground truth
        still has a call when the message begins."""
        closing, tagged = FORMATS[self.format].closing, bool(FORMATS[self.format].tags)
        start = START_CALL if due else START_REPLY
        found = [start][: len(ids)]
        state = IN_REPLY
        since, tail = 0, ""  # tokens since the tag, the end of the text so far
        thought, said = thought_length("".join(map(self.text_of, ids))), ""
        for token in ids[:-1]:
            said += self.text_of(token)
            if len(said) <= thought:
                found.append(start if said.rstrip().endswith("</think>") else IN_REPLY)
                continue
            tail = tail[1 - len(closing) :] + self.text_of(token)
            since += 1
            if token == self.prefix[0] and state in (IN_REPLY, BEHIND_CALL):
                state, since = BEHIND_TAG, 1
            elif state in (IN_CALL, BEHIND_TAG, BEHIND_BODY) and closing in tail:
                state = BEHIND_CALL
            elif state == BEHIND_TAG and since > len(self.prefix):
                state = IN_CALL
            if tagged and state in (IN_CALL, BEHIND_TAG) and token in self.closers:
                state = BEHIND_BODY
            found.append(state)
        return found


def thought_length(text: str) -> int:
    """Characters of the thoughts that a message begins with, and of the blanks behind them."""
    reply = spoken(text)
    return len(text) - len(reply.lstrip()) if len(reply) < len(text) else 0


def body_ends(chat: Chat, format: str) -> set[int]:
    """The tokens that can close the body of a call, in a format whose calls have a tag behind it."""
    values: tuple[dict, ...] = ({}, *({"key": x} for x in (1, "a", [1], ["a"], {}, {"key": "a"}, True, None)))
    found = set()
    for arguments in values if FORMATS[format].tags else ():
        body, _, _ = render_calls([Call("name", arguments)], format).rpartition(FORMATS[format].closing)
        found.add(chat.encode(body.rstrip())[-1])
    return found
