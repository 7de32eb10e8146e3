"""What is wrong with a model, or with logged conversations, in one page of text.

Pure functions of measured numbers; `python -m nanotoolrl.evaluate --doctor` gathers them. A run that
collapsed can have lost its skill, or only the way to express it (Hao et al. 2026, §5): the page says which,
and from what numbers.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nanotoolrl.calls import FORMATS, MESSAGE_STATES, UNHEALTHY_STATES
from nanotoolrl.look.intervals import Share
from nanotoolrl.look.transcripts import conversations
from nanotoolrl.probes import growth

BROKEN = 0.2  # share of unhealthy messages from which on the structure counts as broken
FEWER = 0.5  # of the reference's share of replies: from here on the model calls where it should reply
COLLAPSED = 0.25  # of the reference's success
INTACT = 2 / 3  # of the reference's success, in a way of playing that goes around the broken structure
TELLING = 0.5  # of the reference's success in its own format: a way that solves less proves nothing
FORCED, SKELETON = "forced prefix", "forced skeleton"
OWN_STRUCTURE, OWN_VALUES = "its structure", "its values"  # the rest of a message is the reference's
SWAPS = (OWN_STRUCTURE, OWN_VALUES)
EXCERPT = 56  # characters shown of a broken message


@dataclass
class Checkup:
    """What is known of one model: success by way of playing (call formats, prefix or skeleton forced, one
    class of tokens from the reference), message states in the trained format, and per control token the
    numbers of `probes.Measurement`."""

    name: str
    format: str
    success: dict[str, Share]
    states: dict[str, int]
    tokens: dict[str, dict[str, float]]

    @property
    def unhealthy(self) -> float:
        """Share of messages in an unhealthy state."""
        return sum(self.states.get(s, 0) for s in UNHEALTHY_STATES) / max(1, sum(self.states.values()))

    @property
    def replies(self) -> float:
        """Share of messages that are replies."""
        return self.states.get("reply", 0) / max(1, sum(self.states.values()))


def verdict(model: Checkup, reference: Checkup | None) -> str:
    """One sentence: whether success collapsed, whether structure is broken, whether the skill is intact, each
    judged by itself, with the numbers it rests on. What looks collapsed on too few tasks is not judged.

    Without a reference only structure can be judged. "Below" means beyond both 95 % intervals; collapsed is
    below a quarter of the reference's success. Broken is 20 % of unhealthy messages or more, or less than
    half of the reference's share of replies: a turn that never ends is broken, too. The skill is intact if a
    foreign format or a forced skeleton or prefix keeps two thirds of the reference's success in it, where the
    reference solves at least half as much in that way as in its own format.
    """
    now = model.success[model.format]
    endless = reference is not None and model.replies < FEWER * reference.replies
    broken = model.unhealthy >= BROKEN or endless
    structure = f"{model.unhealthy:.1%} of messages are broken{_breakage(model) if broken else ''}"
    if endless and reference:
        structure += f"; {model.replies:.1%} are replies, {reference.replies:.1%} before"
    structure = f"structure is {'broken' if broken else 'healthy'} in {model.format}: {structure}"
    if reference is None:
        alone = f"{structure}; {_shown(now)} solved, and no model to compare that with (--compare)"
        return alone + (f"; {_others(model)}" if broken else "")
    before = reference.success[reference.format]
    solved = f"{_shown(now)} solved, {_shown(before)} before"
    if now[2] >= before[1]:
        word = "success holds" if broken else "no collapse"
        if now[0] < COLLAPSED * before[0]:
            word = "too few tasks to tell"
        return f"{word} in {model.format}: {solved}; {structure}"
    word = "collapsed" if now[0] < COLLAPSED * before[0] else "worse"
    head = f"{word} in {model.format}: {solved}; {structure}"
    kept = [
        (name, share)
        for name, share in model.success.items()
        if name not in (model.format, *SWAPS) and share[0] >= INTACT * _telling(reference, name) > 0
    ]
    if not kept:
        return f"{head}; the skill went with it: {_others(model, reference)}{_swaps(model, reference)}"
    name, share = max(kept, key=lambda item: item[1][0] / reference.success[item[0]][0])
    said = f"skill intact: {_shown(share)} with {name}, {_shown(reference.success[name])} before"
    return f"{head}; {said}{_swaps(model, reference)}"


def _telling(reference: Checkup, name: str) -> float:
    """What the reference solves in a way of playing; 0 if that is too little to prove anything."""
    share = reference.success[name][0] if name in reference.success else 0.0
    return share if share >= TELLING * reference.success[reference.format][0] else 0.0


def left_of(model: Checkup, reference: Checkup) -> dict[str, float]:
    """The share of the reference's success that is left where only the structure, or only the values, of a
    message are the model's; nothing where that was not measured."""
    before = reference.success[reference.format][0]
    return {way: model.success[way][0] / before for way in SWAPS if way in model.success and before > 0}


def lost_of(model: Checkup, reference: Checkup) -> str:
    """What a model lost: "structure" or "values" if one keeps less than a quarter and the other two thirds,
    "both" if neither keeps two thirds, "nothing" if both do, else "part". "" where it was not measured."""
    left = left_of(model, reference)
    if len(left) < 2:
        return ""
    structure, values = left[OWN_STRUCTURE], left[OWN_VALUES]
    if min(structure, values) >= INTACT:
        return "nothing"
    if max(structure, values) < INTACT:
        return "both"
    if min(structure, values) >= COLLAPSED:
        return "part"
    return "structure" if structure < values else "values"


def _swaps(model: Checkup, reference: Checkup) -> str:
    left = left_of(model, reference)
    if len(left) < 2:
        return ""
    structure, values = (f"{100 * left[way]:.0f} %" for way in SWAPS)
    return f"; with the rest from before, its structure solves {structure} of that, its values {values}"


def _breakage(model: Checkup) -> str:
    """The commonest broken state, and the token that stands where the body of a call should begin."""
    worst = max(UNHEALTHY_STATES, key=lambda state: model.states.get(state, 0))
    said = f", most of them {worst}"
    known = {
        token: row
        for token, row in model.tokens.items()
        if not math.isnan(row["after_prefix"] + row["due_after_prefix"])
    }
    due = max(known, key=lambda token: known[token]["due_after_prefix"], default=None)
    likely = max(known, key=lambda token: known[token]["after_prefix"], default=None)
    if known and known[due]["due_after_prefix"] > 0.5 and likely != due:
        prefix = FORMATS[model.format].prefix.strip()
        said += (
            f": `{prefix}` is followed by `{printable(likely)}` (p {known[likely]['after_prefix']:.2f}), "
            f"not `{printable(due)}` ({known[due]['after_prefix']:.2f})"
        )
    return said


def _others(model: Checkup, reference: Checkup | None = None) -> str:
    parts = []
    for name, share in model.success.items():
        if name not in (model.format, *SWAPS):
            before = f" ({_shown(reference.success[name])} before)" if reference else ""
            parts.append(f"{_shown(share)} with {name}{before}")
    return ", ".join(parts)


def _shown(share: Share) -> str:
    return f"{100 * share[0]:.1f} % [{100 * share[1]:.1f}, {100 * share[2]:.1f}]"


def printable(text: str) -> str:
    """A text on one line, with escapes for what a terminal would obey or not show."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def page(model: Checkup, reference: Checkup | None) -> str:
    """The whole page: the verdict, a sentence; success, message states and control tokens, tables that are 80
    columns wide."""
    both = [model] + ([reference] if reference else [])
    heads = "".join(f"{printable(one.name)[-28:]:>30}" for one in both)
    lines = [f"verdict: {verdict(model, reference)}", "", f"{'success %':<18}{heads}"]
    for name, share in model.success.items():
        label = f"{name} (trained)" if name == model.format else name
        shares = [one.success.get(name) for one in both]
        cells = [f"{_shown(share)} n={share[3]}" if share else "" for share in shares]
        lines.append((f"{label:<18}" + "".join(f"{cell:>30}" for cell in cells)).rstrip())
    lines += ["", f"{'messages %':<18}{heads}"]
    for state in MESSAGE_STATES:
        shares = [one.states.get(state, 0) / max(1, sum(one.states.values())) for one in both]
        lines.append(f"{state:<18}" + "".join(f"{100 * share:>30.1f}" for share in shares))
    names = ("required", "spurious", "growth", "start_call", "start_reply", "after_prefix")
    names = names if reference else [name for name in names if name != "growth"]
    widths = {name: max(8, len(name) + 1) for name in names}
    lines += ["", f"{'control token':<18}" + "".join(f"{name:>{widths[name]}}" for name in names)]
    for token, values in model.tokens.items():
        row = dict(values)
        if reference:
            row["growth"] = growth(values["spurious"], reference.tokens[token]["spurious"])
        lines.append(f"{token!r:<18}" + "".join(f"{_cell(row[name]):>{widths[name]}}" for name in names))
    lines.append("probabilities: where it is next; where it is certainly wrong; at the start of a")
    lines.append("message that should call, that should answer; after the canonical prefix")
    if any(way in model.success for way in SWAPS):
        lines.append("its structure, its values: the rest of a message is the reference's")
    if reference:
        lines.append("growth: where it is certainly wrong, in multiples of the reference's")
    return "\n".join(lines)


def _cell(value: float) -> str:
    """Three digits, two where the exponent takes their place; "-" for what was not measured."""
    if math.isnan(value):
        return "-"
    return min(f"{value:.3g}", f"{value:.1e}", key=len)


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
    """Message states of anybody's logged conversations, in the ways that transcripts.py can read.

    Structured calls are read as calls of the format, unless the text beside them is broken itself;
    `finish_reason` "length" as overlong. Raises ValueError, with file and line, on what is no conversation,
    and where no assistant speaks.
    """
    found = Transcripts()
    for place, said in conversations(path, format):
        found.conversations += 1
        broken = [(i, one) for i, one in enumerate(said, 1) if one.state in UNHEALTHY_STATES]
        found.states.update(one.state for one in said)
        found.breakages.update((one.state, " ".join(one.text.split())[:EXCERPT]) for _, one in broken)
        for number, one in broken[:1]:
            found.broken_at[number] += 1
            what = f"{place}, assistant message {number}: {one.state}: {_excerpt(one.text)}"
            found.first_broken = found.first_broken or what
    if not found.states:
        raise ValueError(f"{path} holds no message of role assistant")
    return found


def _excerpt(text: str) -> str:
    """The beginning of a text, quoted, with what does not print as escapes."""
    shown = repr(text[:EXCERPT])
    return shown if len(shown) <= EXCERPT + 2 else shown[:EXCERPT] + "..."


def transcripts_page(found: Transcripts, most: int = 8) -> str:
    """One page about logged conversations: states, the first broken message, the commonest breakages."""
    total = sum(found.states.values())
    broken = sum(found.states[state] for state in UNHEALTHY_STATES)
    word = "broken" if broken >= BROKEN * max(1, total) else "healthy"
    lines = [
        f"verdict: structure is {word}: {broken} of {_counted(total, 'assistant message')} in "
        f"{_counted(found.conversations, 'conversation')} {'is' if broken == 1 else 'are'} broken "
        f"({broken / max(1, total):.1%})",
        "",
        f"{'state':<12}{'messages':>10}{'%':>8}",
    ]
    for state in MESSAGE_STATES:
        share = 100 * found.states[state] / max(1, total)
        lines.append(f"{state:<12}{found.states[state]:>10}{share:>8.1f}")
    if broken:
        where, _, what = found.first_broken.partition(": ")
        lines += ["", f"first broken: {where}", f"  {what}"]
        lines += ["", "first broken message of a conversation:"]
        for place, count in sorted(found.broken_at.items())[:most]:
            lines.append(f"{count:>6} x message {place}")
        lines += ["", "most frequent:"]
        for (state, text), count in found.breakages.most_common(most):
            lines.append(f"{count:>6} x {state}: {_excerpt(text)}")
    return "\n".join(lines)


def _counted(count: int, what: str) -> str:
    """Example: "1 conversation", "2 conversations"."""
    return f"{count} {what}" + "s" * (count != 1)
