"""The tool environment: play, check and reward one task (Hao et al. 2026, §3, and the published code).

The rules that matter, collapse lives on some of them:
- A message is read leniently: every marked block is tried, text around it is ignored, an unreadable block is
  answered with an error the model can read.
- A message without a call ENDS THE TURN and brings the next user message. An opening tag and nothing else is
  therefore a legal, short, free end of a turn.
- After each turn that has ground-truth calls, the state of every API object must equal the state the ground
  truth reaches, and the results of the ground-truth calls must be contained (in any order, counted) in the
  results seen so far. The reward is 1 if every turn passes, else 0; the episode goes on after a failed turn.
- Calls in a turn without ground-truth calls are not punished, unless `strict_empty_turn`.
Two rules are ours. A tool that the task hides cannot be called until a user message offers it. Whatever a
tool does (raise, hang, give what is no JSON) is answered with an error the model can read.
"""

import copy
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from nanotoolrl.calls import FORMATS, BadCall, Call, parse_calls, render_calls
from nanotoolrl.world.api import API_CLASSES, owner_of, schema
from nanotoolrl.world.observe import FAILED, TRUTH_SECONDS, carry_out, failure, observe
from nanotoolrl.world.taskfile import read_task

MAX_MESSAGES = 30  # assistant messages per episode, as published
CUT, CAPPED, FULL = (
    "a message was cut at the token limit",
    "the cap on messages was reached",
    "the context is full",
)
MAX_CALLS = 16  # calls executed per message; the rest get one error
TOOL_SECONDS = 10.0  # that one call of a model may take
CATEGORIES = ("base", "miss_func", "miss_param", "long_context")


@dataclass(frozen=True)
class Limits:
    """What an episode may take: tokens of an assistant message, assistant messages, tokens in all, seconds of
    one tool call; and whether a call fails a turn that has no ground-truth calls."""

    max_new_tokens: int = 128
    max_messages: int = 20
    context: int = 2048
    strict_empty_turn: bool = False
    tool_seconds: float = TOOL_SECONDS


OUR_LIMITS = Limits()  # of our own tasks; no ground truth has more than 14 messages
BFCL_LIMITS = Limits(max_new_tokens=1024, max_messages=MAX_MESSAGES, context=8192)  # published


@dataclass
class Turn:
    """One user message, the calls that answer it (none: the model should ask or say what is missing), a
    fitting reply, and the tools the message offers from now on."""

    user: str
    calls: list[Call]
    reply: str
    offers: list[str] = field(default_factory=list)


@dataclass
class Task:
    """A conversation with ground truth. `state` maps API class names to the fields of the instance; `tools`
    are the tools shown from the start.

    The methods down to `turn_alone` are all that the rest of the repository knows of a world. Those of this
    class are about our own (world/), those of `BfclTask` (bfcl.py) about the benchmark's.
    """

    id: str
    category: str
    state: dict[str, dict]
    tools: list[str]
    turns: list[Turn]

    def new_world(self) -> dict[str, Any]:
        """Fresh API objects; nothing in them is shared with the task or with another episode."""
        return {name: API_CLASSES[name](**copy.deepcopy(state)) for name, state in self.state.items()}

    def owner(self, tool: str) -> str | None:
        """Name of the API class that has a tool, or None."""
        return owner_of(tool)

    def schema(self, tool: str) -> dict:
        """JSON schema of a tool, the caller's own. Raises KeyError for an unknown one."""
        return copy.deepcopy(schema(tool))

    def allows(self, tool: str, shown: list[str]) -> bool:
        """Whether a tool may be called where these are shown."""
        return tool in shown

    def execute(self, world: dict[str, Any], call: Call) -> str:
        """Make a call that is allowed; the observation. What a tool raises is for `observe` to answer."""
        return carry_out(world, call)

    def why_turn_fails(self, i: int, world: dict[str, Any], seen: list[str], calls: int) -> str:
        """Why turn i, which has ground-truth calls, fails, or "". `world` is what the episode made of it,
        `seen` are all results so far, `calls` how many calls were made in this turn."""
        truth, results = self.expected[i]
        different = [name for name in truth if _differ(truth[name], world[name])]
        if different:
            return f"state of {', '.join(different)} differs from the ground truth"
        unseen = Counter(results) - Counter(seen)
        return f"result {next(iter(unseen))[:80]} was never seen" if unseen else ""

    def message_limits(self, max_messages: int) -> tuple[float, float]:
        """Two limits: assistant messages in an episode, and calling messages in a turn.

        Exceeding either ends the episode. If the second is exceeded in the last turn, that turn is still
        judged by what was done, as in the benchmark.
        """
        return max_messages, math.inf

    def turn_alone(self, i: int, user: str) -> "Task":
        """Turn i as a task of its own, with another user message.

        Its world begins as the ground truth leaves it before that turn. Its tools are those shown by then.
        Raises TypeError if the world cannot be made anew: a class whose attributes are not its parameters.
        """
        world = self.expected[i - 1][0] if i else self.new_world()
        alone = replace(self, id=f"{self.id}/{i}", tools=self.tools_before(i))
        alone.turns = [replace(self.turns[i], user=user)]
        try:
            alone.state = {name: copy.deepcopy(vars(api)) for name, api in world.items()}
            alone.new_world()
        except Exception as error:  # a class of anybody's
            raise TypeError(f"the world before turn {i} cannot be made anew: {error}") from None
        return alone

    def tools_before(self, i: int) -> list[str]:
        """The tools shown when turn i begins."""
        return [*self.tools, *(tool for turn in self.turns[:i] for tool in turn.offers)]

    @cached_property
    def expected(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Per turn: the world after the ground truth, and the results of its calls."""
        world = self.new_world()
        turns = []
        for turn in self.turns:
            results = [observe(self.execute, world, call, TRUTH_SECONDS) for call in turn.calls]
            turns.append((copy.deepcopy(world), results))
        return turns

    def to_json(self) -> str:
        """One line of a task file; `Task.from_json` reads it back."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Task":
        """Read one line of a task file. Raises ValueError with what is wrong: a field (taskfile.py), or a
        ground truth that does not earn reward 1."""
        try:
            raw = read_task(line)
        except ValueError as error:
            raise ValueError(f"not a task: {error}") from None
        if raw["category"] not in CATEGORIES:
            raise ValueError(f"unknown category {raw['category']!r}; known: {', '.join(CATEGORIES)}")
        turns = [
            Turn(**turn | {"calls": [Call(**call) for call in turn["calls"]]}) for turn in raw.pop("turns")
        ]
        task = cls(turns=turns, **raw)
        _check_truth(task)
        return task


@dataclass(frozen=True)
class Verdict:
    """Whether a turn passed, and why not."""

    passed: bool
    reason: str = ""


def _differ(one: object, other: object) -> bool:
    """Whether two API objects differ; so do those that cannot be compared."""
    try:
        return bool(one != other)
    except Exception:  # their fields may be of anybody's class
        return True


class Episode:
    """One play of one task. Owns its API objects; answers whatever it is given and never raises.

    Attributes: `done`; `turn_verdicts`, one Verdict per finished turn; `reward`, 1.0 or 0.0 once done (0.0
    before).
    """

    def __init__(
        self,
        task: Task,
        format: str = "hermes",
        max_messages: int = MAX_MESSAGES,
        strict_empty_turn: bool = False,
        *,
        tool_seconds: float = TOOL_SECONDS,
    ) -> None:
        """tool_seconds: limit on one call (`TimeLimit` says what it does not cover), 0 for none. Raises
        ValueError for an unknown format or a limit that is none."""
        if format not in FORMATS:
            raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
        if not 0 <= tool_seconds <= 86400:
            raise ValueError(f"tool_seconds is {tool_seconds}; it must be from 0 (no limit) to 86400, a day")
        self.task, self.format, self.strict_empty_turn = task, format, strict_empty_turn
        self.max_messages, self.max_turn_messages = task.message_limits(max_messages)
        self.world = task.new_world()
        self.tool_seconds = tool_seconds
        self.tools = [*task.tools, *task.turns[0].offers]
        self.turn, self.messages, self.done = 0, 0, False
        self.turn_verdicts: list[Verdict] = []
        self._seen: list[str] = []  # results
        self._calls = self._calling = 0  # calls of this turn, messages that made them

    def prompt(self) -> tuple[list[dict], list[dict]]:
        """(messages, tools): system text and first user message, and the schemas of the tools shown."""
        system = {"role": "system", "content": FORMATS[self.format].instruction}
        return [system, self._user_message()], [self.task.schema(tool) for tool in self.task.tools]

    def step(self, text: str, overlong: bool = False) -> list[dict] | None:
        """Take one assistant message; return the messages that answer it, or None at the end.

        overlong: the message was cut at the token limit; it has no end, so the task fails here.
        """
        if self.done:
            return None
        self.messages += 1
        if overlong:
            self.abort(CUT)
            return None
        calls, stopped = parse_calls(text, self.format), False
        if calls:
            self._calling += 1
            answers = [{"role": "tool", "content": self._answer(call)} for call in calls[:MAX_CALLS]]
            if len(calls) > MAX_CALLS:
                answers.append({"role": "tool", "content": failure(f"only {MAX_CALLS} calls a message")})
            stopped = self._calling > self.max_turn_messages
            if not stopped and self.messages < self.max_messages:
                return answers
            if not stopped or self.turn + 1 < len(self.task.turns):
                self.abort(CAPPED)
                return None
        verdict = self._check_turn()
        self.turn_verdicts.append(
            replace(verdict, reason=CAPPED) if stopped and not verdict.passed else verdict
        )
        self.turn += 1
        self._calls = self._calling = 0
        if self.turn == len(self.task.turns):
            self.done = True
            return None
        self.tools += self.task.turns[self.turn].offers
        if self.messages >= self.max_messages:
            self.abort(CAPPED)
            return None
        return [self._user_message()]

    @property
    def reward(self) -> float:
        passed = len(self.turn_verdicts) == len(self.task.turns) and all(v.passed for v in self.turn_verdicts)
        return float(self.done and passed)

    @property
    def calls_left(self) -> int:
        """Ground-truth calls of the turn minus the calls made in it: whether a call should come next."""
        return 0 if self.done else max(0, len(self.task.turns[self.turn].calls) - self._calls)

    @property
    def truth(self) -> Call | str:
        """What the ground truth says next: the call that is due, else the reply of the turn."""
        turn = self.task.turns[self.turn]
        return turn.calls[self._calls] if self.calls_left else turn.reply

    def _answer(self, call: Call | BadCall) -> str:
        if isinstance(call, BadCall):
            return failure(call.reason)
        self._calls += 1
        if not self.task.allows(call.name, self.tools):
            return failure(f"no tool '{call.name[:40]}'; there is {', '.join(self.tools)}")
        self._seen.append(observe(self.task.execute, self.world, call, self.tool_seconds))
        return self._seen[-1]

    def _check_turn(self) -> Verdict:
        if not self.task.turns[self.turn].calls:
            strict = self.strict_empty_turn and self._calls > 0
            return Verdict(not strict, "called a tool where it should ask" if strict else "")
        try:
            reason = self.task.why_turn_fails(self.turn, self.world, self._seen, self._calls)
        except Exception as error:  # a world of anybody's classes may refuse to be copied, say
            reason = f"the world cannot be judged: {type(error).__name__}"
        return Verdict(not reason, reason)

    def _user_message(self) -> dict:
        turn = self.task.turns[self.turn]
        message = {"role": "user", "content": turn.user}
        return message | ({"tools": [self.task.schema(tool) for tool in turn.offers]} if turn.offers else {})

    def abort(self, reason: str) -> None:
        """End the episode here; the current turn fails with this reason."""
        self.turn_verdicts.append(Verdict(False, reason))
        self.done = True


def oracle(task: Task, format: str = "hermes") -> list[dict]:
    """The ground-truth conversation as messages: one call per assistant message (more, if there are more
    calls than an episode may have messages), then the reply of the turn.

    Assistant contents are rendered in `format`; fed to `Episode.step` in order they give reward 1.
    """
    episode = Episode(task, format, tool_seconds=TRUTH_SECONDS)
    messages = episode.prompt()[0]
    for turn, parts in zip(task.turns, _packed(task, [turn.calls for turn in task.turns]), strict=True):
        for text in [*(render_calls(part, format) for part in parts), turn.reply]:
            messages.append({"role": "assistant", "content": text})
            messages += episode.step(text) or []
    return messages


def replay(task: Task, calls: list[list[Call]], format: str = "hermes") -> float:
    """Reward of playing the given calls (one list per turn) instead of the ground truth."""
    return _played(task, calls, format).reward


def _played(task: Task, calls: list[list[Call]], format: str) -> Episode:
    episode = Episode(task, format, tool_seconds=TRUTH_SECONDS)
    for parts in _packed(task, calls):
        for part in parts:
            episode.step(render_calls(part, format))
        episode.step("done")
    return episode


def _packed(task: Task, calls: list[list[Call]]) -> list[list[list[Call]]]:
    """Per turn: its calls one by one, or in larger parts where the ground truth has too many for that."""
    fitting = (size for size in range(1, MAX_CALLS) if messages_needed(task, size) <= MAX_MESSAGES)
    size = next(fitting, MAX_CALLS)
    return [[turn[i : i + size] for i in range(0, len(turn), size)] for turn in calls]


def messages_needed(task: Task, size: int = MAX_CALLS) -> int:
    """Assistant messages of the ground truth with so many calls a message."""
    return sum(math.ceil(len(turn.calls) / size) + 1 for turn in task.turns)


def _check_truth(task: Task) -> None:
    """Raise ValueError unless the ground truth can be played, without an error, and earns reward 1."""
    if messages_needed(task) > MAX_MESSAGES:
        raise ValueError(
            f"its turns and their calls, {MAX_CALLS} a message, take more than the {MAX_MESSAGES} messages "
            "of an episode"
        )
    try:
        expected = task.expected
    except Exception as error:  # from a class's `__init__`, or from copying an object of it
        raise ValueError(f"the ground truth does not replay: {type(error).__name__}: {error}") from None
    for i, (turn, (_, results)) in enumerate(zip(task.turns, expected)):
        for j, (call, result) in enumerate(zip(turn.calls, results)):
            if result.startswith(FAILED):
                raise ValueError(f"turns[{i}].calls[{j}], {call.name}, is answered with {result[:300]}")
    verdicts = _played(task, [turn.calls for turn in task.turns], "hermes").turn_verdicts
    for i, verdict in enumerate(verdicts):
        if not verdict.passed:
            raise ValueError(f"the ground truth earns reward 0; turns[{i}] fails: {verdict.reason}")
