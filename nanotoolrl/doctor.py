"""What is wrong with a model, or with logged conversations, in one page of text.

Pure functions of measured numbers; `python -m nanotoolrl.evaluate --doctor` gathers them. A run that
collapsed can have lost its skill, or only the way to express it (Hao et al. 2026, §5): the page says which,
and from what numbers.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nanotoolrl.chat import FORMATS, MESSAGE_STATES, UNHEALTHY_STATES, Call, message_state, render_calls
from nanotoolrl.probes import growth

BROKEN = 0.2  # share of unhealthy messages from which on the structure counts as broken
COLLAPSED = 0.25  # of the reference's success
INTACT = 0.5  # of the reference's success, in another format or with the prefix forced
BROKEN_TEXT = ("bare", "malformed", "polluted", "foreign")  # beside structured calls
FORCED = "forced prefix"
EXCERPT = 60  # characters shown of a broken message

Share = tuple[float, float, float, int]  # success, 95 % interval low and high, number of tasks


@dataclass
class Checkup:
    """What is known of one model: success by call format and with the prefix forced, message states in the
    trained format, and per control token the numbers of `probes.Measurement`."""

    name: str
    format: str
    success: dict[str, Share]
    states: dict[str, int]
    tokens: dict[str, dict[str, float]]

    @property
    def unhealthy(self) -> float:
        """Share of messages in an unhealthy state."""
        return sum(self.states.get(s, 0) for s in UNHEALTHY_STATES) / max(1, sum(self.states.values()))


def verdict(model: Checkup, reference: Checkup | None) -> str:
    """One sentence: healthy, or what broke and whether the skill is intact, with the numbers it rests on.

    Without a reference only structure can be judged. "Below" means beyond both 95 % intervals; collapsed is
    below a quarter of the reference's success, broken is 20 % of unhealthy messages or more.
    """
    now = model.success[model.format]
    broken = model.unhealthy >= BROKEN
    structure = f"{model.unhealthy:.1%} of messages are broken{_breakage(model) if broken else ''}"
    if reference is None:
        if not broken:
            return f"structure is healthy in {model.format}: {structure}; {_shown(now)} solved"
        return f"structure is broken in {model.format}: {structure}; {_shown(now)} solved; {_others(model)}"
    before = reference.success[reference.format]
    if now[2] >= before[1]:
        return f"no collapse in {model.format}: {_shown(now)} solved, {_shown(before)} before; {structure}"
    word = "collapsed" if now[0] < COLLAPSED * before[0] else "worse"
    head = f"{word} in {model.format}: {_shown(now)} solved, {_shown(before)} before; {structure}"
    kept = [
        (name, share)
        for name, share in model.success.items()
        if name != model.format and share[0] >= INTACT * reference.success[name][0] > 0
    ]
    if not kept:
        return f"{head}; the skill went with it: {_others(model, reference)}"
    name, share = max(kept, key=lambda item: item[1][0] / reference.success[item[0]][0])
    return f"{head}; skill intact: {_shown(share)} with {name}, {_shown(reference.success[name])} before"


def _breakage(model: Checkup) -> str:
    """The commonest broken state, and the token that stands where the body of a call should begin."""
    worst = max(UNHEALTHY_STATES, key=lambda state: model.states.get(state, 0))
    said = f", most of them {worst}"
    after = {token: values["after_prefix"] for token, values in model.tokens.items()}
    due = max(model.tokens, key=lambda token: model.tokens[token]["due_after_prefix"])
    likely = max(after, key=after.get)
    if model.tokens[due]["due_after_prefix"] > 0.5 and likely != due:
        prefix = FORMATS[model.format].prefix.strip()
        said += (
            f": `{prefix}` is followed by `{likely}` (p {after[likely]:.2f}), not `{due}` ({after[due]:.2f})"
        )
    return said


def _others(model: Checkup, reference: Checkup | None = None) -> str:
    parts = []
    for name, share in model.success.items():
        if name != model.format:
            before = f" ({_shown(reference.success[name])} before)" if reference else ""
            parts.append(f"{_shown(share)} with {name}{before}")
    return ", ".join(parts)


def _shown(share: Share) -> str:
    return f"{100 * share[0]:.1f} % [{100 * share[1]:.1f}, {100 * share[2]:.1f}]"


def page(model: Checkup, reference: Checkup | None) -> str:
    """The whole page: verdict, success, message states, control tokens."""
    both = [model] + ([reference] if reference else [])
    lines = [f"verdict: {verdict(model, reference)}", ""]
    lines.append(f"{'success %':<24}" + "".join(f"{one.name[-26:]:>28}" for one in both))
    for name, share in model.success.items():
        shares = [one.success[name] for one in both]
        label = f"{name} (trained)" if name == model.format else name
        lines.append(f"{label:<24}" + "".join(f"{_shown(share) + f' n={share[3]}':>28}" for share in shares))
    lines += ["", f"{'messages %':<24}" + "".join(f"{one.name[-26:]:>28}" for one in both)]
    for state in MESSAGE_STATES:
        shares = [one.states.get(state, 0) / max(1, sum(one.states.values())) for one in both]
        lines.append(f"{state:<24}" + "".join(f"{100 * share:>26.1f}" for share in shares))
    names = ("required", "spurious", "growth", "start_call", "start_reply", "after_prefix")
    names = names if reference else [name for name in names if name != "growth"]
    lines += ["", f"{'control token':<18}" + "".join(f"{name:>14}" for name in names)]
    for token, values in model.tokens.items():
        row = dict(values)
        if reference:
            row["growth"] = growth(values["spurious"], reference.tokens[token]["spurious"])
        cells = ["-" if math.isnan(row[name]) else f"{row[name]:.3g}" for name in names]
        lines.append(f"{token!r:<18}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append("probabilities: where it is next; where it is certainly wrong (and times the reference's);")
    lines.append("at the start of a message that should call, that should answer; after the canonical prefix")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- logged conversations
@dataclass
class Transcripts:
    """What was found in a file of conversations."""

    conversations: int = 0
    states: Counter = field(default_factory=Counter)
    first_broken: str = ""  # the first one, with its place
    breakages: Counter = field(default_factory=Counter)  # (state, beginning of the text) -> how often
    broken_at: Counter = field(default_factory=Counter)  # index of the first broken message -> conversations


def read_transcripts(path: Path, format: str) -> Transcripts:
    """Message states of anybody's logged conversations: JSONL, one conversation a line, a list of messages
    with `role` and `content`, or an object with `messages`.

    OpenAI-style `tool_calls` are read as calls of the format, unless the text beside them is broken itself;
    `finish_reason` "length" as overlong. Raises ValueError, with the line, on what is no conversation, and
    where no assistant speaks.
    """
    found = Transcripts()
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            messages = _messages(line, f"{path}, line {number}", format)
            found.conversations += 1
            said = [message for message in messages if message["role"] == "assistant"]
            first = None
            for i, message in enumerate(said):
                text = message["content"]
                state = message_state(text, format, overlong=message["overlong"])
                found.states[state] += 1
                if state in UNHEALTHY_STATES:
                    found.breakages[state, " ".join(text.split())[:EXCERPT]] += 1
                    first = i if first is None else first
                    place = f"line {number}, assistant message {i + 1}: {state}: {text[:EXCERPT]!r}"
                    found.first_broken = found.first_broken or place
            if first is not None:
                found.broken_at[first + 1] += 1
    if not found.states:
        raise ValueError(f"{path} holds no message of role assistant")
    return found


def _messages(line: str, place: str, format: str) -> list[dict]:
    """The messages of one line: role, content as text, overlong."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {error}") from None
    value = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(m, dict) and "role" in m for m in value):
        raise ValueError(f"{place}: expected a list of messages with role and content")
    return [
        {
            "role": message["role"],
            "content": _content(message, format),
            "overlong": message.get("finish_reason") == "length",
        }
        for message in value
    ]


def _content(message: dict, format: str) -> str:
    """Text of a message; structured calls are written in the format, unreadable ones as they stand."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    calls = message.get("tool_calls") or message.get("function_call")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls or message_state(str(content), format) in BROKEN_TEXT:
        return str(content)
    written = []
    for call in calls:
        call = call if isinstance(call, dict) else {}
        function = call["function"] if isinstance(call.get("function"), dict) else call
        name, arguments = function.get("name"), function.get("arguments", {})
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise ValueError
            written.append(render_calls([Call(name, arguments)], format))
        except (ValueError, TypeError, RecursionError):
            written.append(f"{FORMATS[format].prefix}{name} {function.get('arguments')}")
    return "\n".join(written)


def transcripts_page(found: Transcripts, most: int = 8) -> str:
    """One page about logged conversations: states, the first broken message, the commonest breakages."""
    total = sum(found.states.values())
    broken = sum(found.states[state] for state in UNHEALTHY_STATES)
    word = "broken" if broken >= BROKEN * max(1, total) else "healthy"
    lines = [
        f"verdict: structure is {word}: {broken} of {total} assistant messages in {found.conversations} "
        f"conversations are broken ({broken / max(1, total):.1%})",
        "",
        f"{'state':<12}{'messages':>10}{'%':>8}",
    ]
    for state in MESSAGE_STATES:
        share = 100 * found.states[state] / max(1, total)
        lines.append(f"{state:<12}{found.states[state]:>10}{share:>8.1f}")
    if broken:
        lines += ["", f"first broken: {found.first_broken}", "", "first broken message of a conversation:"]
        for place, count in sorted(found.broken_at.items())[:most]:
            lines.append(f"{count:>6} x message {place}")
        lines += ["", "most frequent:"]
        for (state, text), count in found.breakages.most_common(most):
            lines.append(f"{count:>6} x {state}: {text!r}")
    return "\n".join(lines)
