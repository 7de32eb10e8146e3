"""Tasks whose ground truth holds a sentence that nothing shows: what passes them is luck, or a look that the
ground truth does not take.

The benchmark has some (github.com/ShishirPatil/gorilla, issue 1367): a tweet or a ticket has to be word for
word what no user, tool or document has said. They are found here, not listed: every string argument of the
ground truth, of `SENTENCE` words or more, is looked for in what the ground truth's own conversation has shown
by then. One that is not there counts if another wording fails the task. Single words do not count: an airport
has a known code.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from nanotoolrl.env import Task, replay
from nanotoolrl.world.mutations import alter

SENTENCE = 4  # words from which on nobody hits a wording by chance
RUN = 3  # words in a row that have to be shown


def unshown(task: Task) -> list[str]:
    """The sentences of a task's ground truth that are not shown before they are needed, and are needed word
    for word."""
    truth = [turn.calls for turn in task.turns]
    shown = [told([task.schema(tool) for tool in task.tools])]
    found = []
    for i, turn in enumerate(task.turns):
        shown += [words(turn.user), told([task.schema(tool) for tool in turn.offers])]
        for j, (call, result) in enumerate(zip(turn.calls, task.expected[i][1], strict=True)):
            for name, value in call.arguments.items():
                new = [text for text in strings(value) if is_new(text, shown)]
                others = [*turn.calls[:j], alter(task, call, name), *turn.calls[j + 1 :]]
                if new and not replay(task, [*truth[:i], others, *truth[i + 1 :]]):
                    found += new
            with contextlib.suppress(ValueError, RecursionError):  # a result may be no JSON
                shown.append(told(json.loads(result)))
            shown.append(words(result))
    return found


def told(value: Any) -> str:
    """`words` of a nested value, without the escapes of JSON."""
    return words(json.dumps(value, ensure_ascii=False))


def is_new(text: str, shown: list[str]) -> bool:
    """Whether a text is a sentence, and a part of it stands in none of these: a number, or three words in a
    row without one. So a form that a user gives, filled in with numbers that a tool gave, is not new. Nor
    is a text that differs in blanks and signs only."""
    wanted = words(text).split()
    if any("".join(wanted) in one.replace(" ", "") for one in shown):
        return False
    runs = [f" {' '.join(wanted[i : i + RUN])} " for i in range(len(wanted) - RUN + 1)]
    parts = [run for run in runs if not re.search(r"\d", run)]
    parts += [f" {word} " for word in wanted if word.isdecimal()]
    known = parts and all(any(part in one for one in shown) for part in parts)
    return len(wanted) >= SENTENCE and not known


def words(text: str) -> str:
    """The words and numbers of a text in lower case, a blank before and behind each: of a text within another
    they are a part. JSON's line ends are no letters.

    Example: `Sort "report.txt"!` becomes ` sort report txt `.
    """
    found = re.findall(r"[^\W_]+", re.sub(r"\\[ntr]", " ", text).lower())
    return f" {' '.join(found)} "


def strings(value: Any) -> Iterator[str]:
    """The strings in a nested value."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)
