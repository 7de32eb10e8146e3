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
One rule is ours: a tool that the task hides cannot be called until a user message offers it.
"""

import copy
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property

from nanotoolrl.chat import FORMATS, BadCall, Call, parse_calls, render_calls
from nanotoolrl.tools import API, API_CLASSES, ToolError, owner_of, schema

MAX_MESSAGES = 30  # assistant messages per episode, as published
MAX_CALLS = 16  # calls executed per message; the rest get one error
MAX_INT = 2**53  # larger integers are refused: other JSON readers would round them
TOOL_FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
CATEGORIES = ("base", "miss_func", "miss_param", "long_context")


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
    are the tools shown from the start."""

    id: str
    category: str
    state: dict[str, dict]
    tools: list[str]
    turns: list[Turn]

    def new_world(self) -> dict[str, API]:
        """Fresh API objects; nothing in them is shared with the task or with another episode."""
        return {name: API_CLASSES[name](**copy.deepcopy(state)) for name, state in self.state.items()}

    @cached_property
    def expected(self) -> list[tuple[dict[str, API], list[str]]]:
        """Per turn: the world after the ground truth, and the results of its calls as JSON."""
        world, turns = self.new_world(), []
        for turn in self.turns:
            results = [to_json(call_tool(world, call)) for call in turn.calls]
            turns.append((copy.deepcopy(world), results))
        return turns

    def to_json(self) -> str:
        """One line of a task file; `Task.from_json` reads it back."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Task":
        """Read one line of a task file. Raises ValueError with what is wrong."""
        try:
            raw = json.loads(line)
            turns = [Turn(**turn) for turn in raw.pop("turns")]
            for turn in turns:
                turn.calls = [Call(**call) for call in turn.calls]
            task = cls(turns=turns, **raw)
            offered = [tool for turn in turns for tool in turn.offers]
            used = [call.name for turn in turns for call in turn.calls]
            lost = [tool for tool in [*task.tools, *offered, *used] if owner_of(tool) not in task.state]
            known = task.category in CATEGORIES
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a task: {type(error).__name__}: {error}") from None
        if not known:
            raise ValueError(f"unknown category {task.category!r}; known: {', '.join(CATEGORIES)}")
        if lost:
            raise ValueError(f"tool {lost[0]!r} has no API object in the task's state")
        if not turns or not used:
            raise ValueError("a task needs at least one turn and one ground-truth call")
        try:
            _ = task.expected  # replays the ground truth
        except (TypeError, *TOOL_FAULTS) as error:
            raise ValueError(f"the ground truth does not replay: {error}") from None
        return task


@dataclass(frozen=True)
class Verdict:
    """Whether a turn passed, and why not."""

    passed: bool
    reason: str = ""


def to_json(result: object) -> str:
    """An observation as the model reads it."""
    return json.dumps(result, ensure_ascii=False)


def call_tool(world: dict[str, API], call: Call) -> object:
    """Execute one call on the world and return its result; every failure is a result too: {"error": text}."""
    try:
        _check_arguments(schema(call.name)["parameters"], call.arguments)
        return getattr(world[owner_of(call.name)], call.name)(**call.arguments)
    except ToolError as error:
        return {"error": str(error)}
    except TOOL_FAULTS as error:  # a bug in a tool class must not end a training run; the model sees its name
        return {"error": f"{call.name} failed: {type(error).__name__}"}


def _check_arguments(parameters: dict, arguments: dict) -> None:
    known, required = parameters["properties"], parameters["required"]
    wanted = f"it takes {', '.join(known) or 'no arguments'}"
    for name in arguments:
        if name not in known:
            raise ToolError(f"unknown argument '{name[:40]}'; {wanted}")
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ToolError(f"missing argument {', '.join(missing)}; {wanted}")
    for name, value in arguments.items():
        _check_value(name, known[name], value)


def _check_value(name: str, kind: dict, value: object) -> None:
    types = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "array": list,
        "object": dict,
    }
    right = isinstance(value, types[kind["type"]]) and (
        kind["type"] == "boolean" or not isinstance(value, bool)
    )
    if not right:
        raise ToolError(f"argument '{name}' must be of type {kind['type']}")
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise ToolError(f"argument '{name}' is too large")
    if "enum" in kind and value not in kind["enum"]:
        raise ToolError(f"argument '{name}' must be one of {', '.join(kind['enum'])}")
    for item in value if isinstance(value, list) else ():
        _check_value(name, kind["items"], item)


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
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
        self.task, self.format = task, format
        self.max_messages, self.strict_empty_turn = max_messages, strict_empty_turn
        self.world = task.new_world()
        self.tools = [*task.tools, *task.turns[0].offers]
        self.turn, self.messages, self.done = 0, 0, False
        self.turn_verdicts: list[Verdict] = []
        self._seen: Counter[str] = Counter()
        self._calls = 0

    def prompt(self) -> tuple[list[dict], list[dict]]:
        """(messages, tools): system text and first user message, and the schemas of the tools shown."""
        system = {"role": "system", "content": FORMATS[self.format].instruction}
        return [system, self._user_message()], [schema(tool) for tool in self.task.tools]

    def step(self, text: str, overlong: bool = False) -> list[dict] | None:
        """Take one assistant message; return the messages that answer it, or None at the end.

        overlong: the message was cut at the token limit; it has no end, so the task fails here.
        """
        if self.done:
            return None
        self.messages += 1
        if overlong:
            return self.abort("a message was cut at the token limit")
        calls = parse_calls(text, self.format)
        if calls:
            answers = [{"role": "tool", "content": to_json(self._answer(call))} for call in calls[:MAX_CALLS]]
            if len(calls) > MAX_CALLS:
                answers.append(
                    {"role": "tool", "content": to_json(_error(f"only {MAX_CALLS} calls a message"))}
                )
            return (
                answers
                if self.messages < self.max_messages
                else self.abort("the cap on messages was reached")
            )
        self.turn_verdicts.append(self._check_turn())
        self.turn += 1
        self._calls = 0
        if self.turn == len(self.task.turns):
            self.done = True
            return None
        self.tools += self.task.turns[self.turn].offers
        if self.messages >= self.max_messages:
            return self.abort("the cap on messages was reached")
        return [self._user_message()]

    @property
    def reward(self) -> float:
        passed = len(self.turn_verdicts) == len(self.task.turns) and all(v.passed for v in self.turn_verdicts)
        return float(self.done and passed)

    @property
    def calls_left(self) -> int:
        """Ground-truth calls of the turn minus the calls made in it: whether a call should come next."""
        return 0 if self.done else max(0, len(self.task.turns[self.turn].calls) - self._calls)

    def _answer(self, call: Call | BadCall) -> object:
        if isinstance(call, BadCall):
            return _error(call.reason)
        self._calls += 1
        if call.name not in self.tools:
            return _error(f"no tool '{call.name[:40]}'; there is {', '.join(self.tools)}")
        result = call_tool(self.world, call)
        self._seen[to_json(result)] += 1
        return result

    def _check_turn(self) -> Verdict:
        world, results = self.task.expected[self.turn]
        if not self.task.turns[self.turn].calls:
            strict = self.strict_empty_turn and self._calls > 0
            return Verdict(not strict, "called a tool where it should ask" if strict else "")
        wrong = [name for name in world if world[name] != self.world[name]]
        if wrong:
            return Verdict(False, f"state of {', '.join(wrong)} differs from the ground truth")
        unseen = Counter(results) - self._seen
        if unseen:
            return Verdict(False, f"result {next(iter(unseen))[:80]} was never seen")
        return Verdict(True)

    def _user_message(self) -> dict:
        turn = self.task.turns[self.turn]
        message = {"role": "user", "content": turn.user}
        return message | ({"tools": [schema(tool) for tool in turn.offers]} if turn.offers else {})

    def abort(self, reason: str) -> None:
        """End the episode here; the current turn fails with this reason."""
        self.turn_verdicts.append(Verdict(False, reason))
        self.done = True


def _error(text: str) -> dict:
    return {"error": text}


def oracle(task: Task, format: str = "hermes") -> list[dict]:
    """The ground-truth conversation as messages: one call per assistant message, then the reply of the turn.

    Assistant contents are rendered in `format`; fed to `Episode.step` in order they give reward 1.
    """
    episode = Episode(task, format)
    messages = episode.prompt()[0]
    for turn in task.turns:
        for text in [*(render_calls([call], format) for call in turn.calls), turn.reply]:
            messages.append({"role": "assistant", "content": text})
            messages += episode.step(text) or []
    return messages


def replay(task: Task, calls: list[list[Call]], format: str = "hermes") -> float:
    """Reward of playing the given calls (one list per turn) instead of the ground truth."""
    episode = Episode(task, format)
    for turn in calls:
        for call in turn:
            episode.step(render_calls([call], format))
        episode.step("done")
    return episode.reward
