"""The texts of supervision (Hao et al. 2026, §4): hints, and reflections on failed rollouts.

A reflection is a pair for SFT: its prompt holds the log of a failed rollout and the ground truth, its target
says what went wrong. In the paper a language model writes the targets. Here the environment does (`review`),
or, if there is one, a judge (nanotoolrl/judge.py).
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nanotoolrl.calls import (
    FORMATS,
    UNREADABLE_STATES,
    Call,
    escaped_json,
    message_state,
    parse_calls,
    render_calls,
    spoken,
)
from nanotoolrl.chat import Chat
from nanotoolrl.env import Episode, Task
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.world.observe import FAILED, to_json
from nanotoolrl.world.similar import similar, wish

LINE = 200  # characters of one text in a log or a review
MAX_TEXT = 600  # characters of one text that somebody else wrote

# mistake: (cause, fix). {got} is the tool of the offending call, {due} the call that was due.
ADVICE = {
    "no call": ("nothing was called", "call before answering: {due}"),
    "wrong tool": ("{got} is not the tool for this", "call {due}"),
    "wrong argument": ("{got} did not get the right values", "take every value from user and results: {due}"),
    "missing step": ("a step was left out or came too late", "keep the order: {due}"),
    "extra step": ("more was done than the user asked", "do every step once, without this {got}"),
    "malformed": ("a call that cannot be read does nothing", "write the call in its format, and only it"),
    "premature end": ("the turn ended before all was done", "go on: {due}"),
    "called when it should ask": ("{got} was called while a tool or value was missing", "call nothing, ask"),
}
MISTAKES = tuple(ADVICE)


# ------------------------------------------------------------------------------------------------------ hints
def hint_text(task: Task, format: str) -> str:
    """A hint from the ground truth: the steps in words, a call example, a format reminder.

    Hao et al. 2026, §4 (hint-based guidance); the published hints are summaries of at most ~300 words. Values
    are escaped, so that the text of a task cannot put a tag into the prompt.
    """
    first = next(call for turn in task.turns for call in turn.calls)
    example = f"Call like this, with nothing around it: {render_calls([first], format)}"
    return "\n".join(["Hint, how this task was solved:", *_steps(task), example])


def _steps(task: Task) -> list[str]:
    """The ground truth in words, one line per turn."""
    steps = ["; ".join(_in_words(call) for call in turn.calls) for turn in task.turns]
    return [f"turn {number}: {words or 'call nothing, ask'}" for number, words in enumerate(steps, 1)]


def _in_words(call: Call) -> str:
    values = ", ".join(f"{name} {escaped_json(value)}" for name, value in call.arguments.items())
    return f"{call.name} with {values}" if values else call.name


# ---------------------------------------------------------------------------------------------------- reviews
@dataclass(frozen=True)
class TurnReview:
    """One turn: what the user wanted, one of MISTAKES ("" for none), its evidence, the right calls."""

    intent: str
    mistake: str
    evidence: str
    calls: list[Call]


@dataclass(frozen=True)
class Review:
    """A failed rollout, turn by turn. `error_turn` is the index of the first failed turn; cause and fix are
    about it. Texts are as users, tools, models and judges wrote them: `reflections` escapes them."""

    turns: list[TurnReview]
    error_turn: int
    cause: str
    fix: str


@dataclass(frozen=True)
class Attempt:
    """A call, or what should have been one (None), the message it stands in, and the tool's answer."""

    call: Call | None
    said: str
    answer: str

    @property
    def tool(self) -> str:
        """Name of what it calls, or ""."""
        return self.call.name if self.call else ""

    @property
    def refused(self) -> bool:
        return self.answer.startswith(FAILED)

    def __str__(self) -> str:
        what = _short(_in_words(self.call)) if self.call else f"it wrote {_short(self.said)}"
        return f"{what} gave {_short(self.answer)}" if self.answer else what


@dataclass
class Played:
    """One turn as it went: (role, text) of its messages, and what was attempted in it."""

    log: list[tuple[str, str]]
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def calls(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.call]


@dataclass(frozen=True)
class _Finding:
    """What `review` says about a turn."""

    mistake: str = ""
    evidence: str = ""
    cause: str = ""
    fix: str = ""


def review(task: Task, trajectory: Trajectory, chat: Chat) -> Review:
    """The checker's own reflection on a failed rollout of the task (Hao et al. 2026, §4; there a judge's).

    The mistake of a failed turn is that of the first line that fits. "Left out" are ground-truth calls made
    nowhere in the turn; "others" are calls beyond the ground truth, but for refused ones that were then put
    right. The evidence is the attempt in brackets and its answer, else the last message and the verdict.

    | ground-truth calls | what happened | mistake |
    |---|---|---|
    | none | calls were made, even if the turn passed | called when it should ask [the first] |
    | none, or some left out | the last attempt cannot be read | malformed [it] |
    | none, or some left out | the rollout was cut before the turn | premature end |
    | some left out | no call was made | no call |
    | some left out | others to the first tool left out | wrong argument [the first] |
    | some left out | the first of the others is to a tool due later | missing step [it] |
    | some left out | others | wrong tool [the first] |
    | the last left out | no others | premature end |
    | earlier ones left out | no others | missing step |
    | all made | others that were not refused | extra step [the first] |
    | all made | an earlier turn has a mistake: the world was wrong already | that one [the same] |
    | all made | in another order | missing step [the first that came too early] |
    | all made | the last attempt cannot be read | malformed [it] |
    | all made | the rollout was cut | premature end |

    Attempts that cannot be read are blocks that do not parse, and messages in an UNREADABLE state. A turn
    that was not reached has no mistake and the evidence "not reached". Raises ValueError if no turn failed.
    """
    failed = [i for i, verdict in enumerate(trajectory.verdicts) if not verdict.passed]
    if not failed:
        raise ValueError(f"task {task.id}: no turn of this rollout failed")
    played = play_again(task, trajectory.messages(chat), trajectory.format)
    findings: list[_Finding] = []
    for turn, now, verdict in zip(task.turns, played, trajectory.verdicts):
        wrong = not verdict.passed or (now.calls and not turn.calls)
        earlier = next((finding for finding in findings if finding.mistake), None)
        findings.append(_find(task, turn.calls, now, verdict.reason, earlier) if wrong else _Finding())
    findings += [_Finding(evidence="not reached")] * (len(task.turns) - len(findings))
    turns = [
        TurnReview(_short(wish(task, i)), finding.mistake, finding.evidence, task.turns[i].calls)
        for i, finding in enumerate(findings)
    ]
    return Review(turns, failed[0], findings[failed[0]].cause, findings[failed[0]].fix)


def play_again(task: Task, messages: list[tuple[str, bool]], format: str) -> list[Played]:
    """Play assistant messages (text, whether it ended) once more and note what happens, turn by turn."""
    episode = Episode(task, format, max_messages=len(messages) + 1)
    played = [Played([("user", " ".join([turn.user, *turn.offers]))]) for turn in task.turns]
    for text, ended in messages:
        now = played[episode.turn]
        now.log.append(("assistant", spoken(text)))
        calls = parse_calls(text, format) if ended else []
        answers = [message["content"] for message in episode.step(text, overlong=not ended) or ()]
        for call, answer in zip(calls, answers):
            now.log.append(("tool", answer))
            now.attempts.append(Attempt(call if isinstance(call, Call) else None, text, answer))
        if not calls and message_state(text, format, overlong=not ended) in UNREADABLE_STATES:
            now.attempts.append(Attempt(None, text, ""))
    return played


def _find(task: Task, truth: list[Call], now: Played, reason: str, earlier: _Finding | None) -> _Finding:
    mistake, attempt, due = _diagnose(task, truth, now, earlier is not None)
    if not mistake and earlier:
        return replace(earlier, evidence=f"its calls are right, but before: {earlier.evidence}")
    role, text = now.log[-1]
    said = f'it said "{_short(text)}"; ' if role == "assistant" else ""
    got = attempt.tool if attempt else ""
    words = {"got": got, "due": _in_words(due) if due else "answer the user"}
    cause, fix = (text.format(**words) for text in ADVICE[mistake])
    return _Finding(mistake, str(attempt) if attempt else said + reason, cause, fix)


def _diagnose(
    task: Task, truth: list[Call], now: Played, blamed: bool
) -> tuple[str, Attempt | None, Call | None]:
    """(mistake, attempt at fault, call that was due) of a turn, by the table of `review`. blamed: an earlier
    turn has a mistake; the mistake "" is that one."""
    others, left_out = now.calls, []
    for call in truth:
        same = next((attempt for attempt in others if _key(task, attempt.call) == _key(task, call)), None)
        if same:
            others.remove(same)
        else:
            left_out.append(call)
    due = [call.name for call in left_out]
    settled = {call.name for call in truth} - set(due)
    others = [attempt for attempt in others if not (attempt.refused and attempt.tool in settled)]
    unread = now.attempts[-1] if now.attempts and not now.attempts[-1].call else None
    first = left_out[0] if left_out else None
    if now.calls and not truth:
        return "called when it should ask", now.calls[0], None
    if left_out or not truth:
        if unread:
            return "malformed", unread, first
        if len(now.log) == 1:
            return "premature end", None, first
        if not now.calls:
            return "no call", None, first
        at_fault = next((attempt for attempt in others if attempt.tool == due[0]), None)
        if at_fault:
            return "wrong argument", at_fault, first
        if others:
            return "missing step" if others[0].tool in due else "wrong tool", others[0], first
        return "premature end" if truth[-len(due) :] == left_out else "missing step", None, first
    done = [attempt for attempt in now.calls if not attempt.refused]
    extra = next((attempt for attempt in others if not attempt.refused), None)
    if extra:
        return "extra step", extra, None
    if blamed:
        return "", None, None
    for attempt, call in zip(done, truth):
        if _key(task, attempt.call) != _key(task, call):
            return "missing step", attempt, call
    return "malformed" if unread else "premature end", unread, None


def _key(task: Task, call: Call | None) -> tuple[str, str]:
    """Equal for calls that do the same: defaults filled in, arguments in any order."""
    if call is None:
        return "", ""
    known = task.schema(call.name)["parameters"]["properties"] if task.owner(call.name) else {}
    defaults = {name: kind["default"] for name, kind in known.items() if "default" in kind}
    return call.name, to_json(sorted((defaults | call.arguments).items()))


def _short(text: str, limit: int = LINE) -> str:
    """The text on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "..."


# ------------------------------------------------------------------------------------------------ reflections
def reflections(
    task: Task,
    trajectory: Trajectory,
    chat: Chat,
    others: Sequence[Task],
    context: int,
    judge: Callable[[Task, str, int, str], Review | None] | None = None,
) -> tuple[list[Trajectory], bool]:
    """(SFT pairs on a failed rollout, whether a judge was asked and could not be used).

    Two pairs, as in Hao et al. 2026, §4 (PRS): every turn's intent, mistake, evidence and right calls; and
    the error turn's cause, evidence, fix and right calls, three similar scenarios and one that looks alike
    (`tasks.similar`; `others` are the tasks the run trains on). Each is a Trajectory of source "reflection"
    and at most `context` tokens: the log in its prompt loses what is farthest from the error turn, and a pair
    that still does not fit is left out. Its loss_mask is True exactly on the target, stop token included.
    Results stand among the calls of a scenario, so that no value in it comes from nowhere. Only the calls
    are written with the format's control tokens. Deterministic but for the judge. Raises ValueError if no
    turn of the rollout failed.
    """
    format = trajectory.format
    written = review(task, trajectory, chat)
    error = written.error_turn
    system = {"role": "system", "content": FORMATS[format].instruction}
    played = play_again(task, trajectory.messages(chat), format)
    log = [
        (i, f"turn {i + 1} {role}: {_short(text) or '(nothing)'}")
        for i, now in enumerate(played[: len(trajectory.verdicts)])
        for role, text in now.log
    ]

    def pair(request: str, target: str) -> Trajectory | None:
        answer = chat.assistant_ids(target, format)

        def prompt(count: int) -> list[int]:
            user = request_text(task, _nearest(log, error, count)) + "\n" + request
            return chat.prompt_ids([system, {"role": "user", "content": user}], [], format)

        room = context - len(answer)
        ids = prompt(bisect(range(1, len(log) + 1), room, key=lambda count: len(prompt(count))))
        if len(ids) > room:
            return None
        row = Trajectory(task.id, task.category, format, [], [], [], len(ids), source="reflection")
        row.append(ids, sampled=False)
        row.append(answer, sampled=True)
        return row

    judged = judge(task, format, error, request_text(task, [line for _, line in log])) if judge else None
    written = judged or written
    calls = next(turn.calls for turn in [*task.turns[error:], *task.turns] if turn.calls)
    scenarios = similar(task, calls, others, f"{task.id}/{trajectory.tokens[trajectory.prompt_length :]}")
    pairs = [
        pair("Say for every turn: intent, mistake, evidence, right calls.", _turns_text(written, format)),
        pair(
            f"Turn {error + 1} failed. Say cause, evidence, fix, similar tasks, and one that looks alike.",
            _error_text(written, format, *scenarios),
        ),
    ]
    return [row for row in pairs if row], judge is not None and judged is None


def request_text(task: Task, log: list[str]) -> str:
    """A log and the ground truth, as whoever reflects on them reads it."""
    return "\n".join(["This rollout failed:", *log, "The right calls:", *_steps(task)])


def _nearest(log: list[tuple[int, str]], turn: int, count: int) -> list[str]:
    """The `count` lines of the log that are nearest to a turn, in order; "..." stands for the others."""
    away = [number - turn for number, _ in log]
    kept = sorted(range(len(log)), key=lambda i: (abs(away[i]), -i if away[i] < 0 else i))[:count]
    lines = [line if i in kept else "..." for i, (_, line) in enumerate(log)]
    return [line for i, line in enumerate(lines) if line != "..." or lines[i - 1 : i] != ["..."]]


def _turns_text(written: Review, format: str) -> str:
    lines = []
    for number, turn in enumerate(written.turns, 1):
        lines += [f"turn {number}", f"intent: {_plain(turn.intent)}", f"mistake: {turn.mistake or 'none'}"]
        lines += [f"evidence: {_plain(turn.evidence)}"] if turn.evidence else []
        lines += _calls_text(turn.calls, format)
    return "\n".join(lines)


def _error_text(written: Review, format: str, alike: list[Task], other: Task | None) -> str:
    turn = written.turns[written.error_turn]
    lines = [f"turn {written.error_turn + 1}", f"mistake: {turn.mistake}", f"cause: {_plain(written.cause)}"]
    lines += [f"evidence: {_plain(turn.evidence)}", f"fix: {_plain(written.fix)}"]
    lines += _calls_text(turn.calls, format)
    for number, task in enumerate(alike, 1):
        lines += [f"similar {number}", *_scenario_text(task, format)]
    lines += ["looks alike, is solved otherwise", *_scenario_text(other, format)] if other else []
    return "\n".join(lines)


def _scenario_text(task: Task, format: str) -> list[str]:
    lines = []
    for turn, (_, results) in zip(task.turns, task.expected):
        lines.append(f"user: {_plain(_short(turn.user))}")
        for call, result in zip(turn.calls, results):
            lines += [render_calls([call], format), f"result: {_plain(_short(result))}"]
        lines += [] if turn.calls else _calls_text([], format)
    return lines[:-1] if task.turns[-1].calls else lines


def _calls_text(calls: list[Call], format: str) -> list[str]:
    return ["calls:", render_calls(calls, format)] if calls else ["calls: none, ask"]


def _plain(text: str) -> str:
    """One line of a text that others wrote, in which no tag and no call of any format can stand."""
    return FORMATS["python"].opener.sub(r"\\u005b", _short(text, MAX_TEXT).replace("<", r"\u003c"))
