"""The texts of supervision (Hao et al. 2026, §4): here, hints."""

from nanotoolrl.chat import Call, escaped_json, render_calls
from nanotoolrl.env import Task


def hint_text(task: Task, format: str) -> str:
    """A hint from the ground truth: the steps in words, a call example, a format reminder.

    Hao et al. 2026, §4 (hint-based guidance); the published hints are summaries of at most ~300 words. Values
    are escaped, so that the text of a task cannot put a tag into the prompt.
    """
    lines = ["Hint, how this task was solved:"]
    for number, turn in enumerate(task.turns, 1):
        steps = [_in_words(call) for call in turn.calls]
        lines.append(f"turn {number}: {'; '.join(steps) if steps else 'call nothing, ask'}")
    first = next(call for turn in task.turns for call in turn.calls)
    lines.append(f"Call like this, with nothing around it: {render_calls([first], format)}")
    return "\n".join(lines)


def _in_words(call: Call) -> str:
    values = ", ".join(f"{name} {escaped_json(value)}" for name, value in call.arguments.items())
    return f"{call.name} with {values}" if values else call.name
