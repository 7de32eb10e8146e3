"""The environment: every rule of its docstring, the reward, and that no message can break or leave it."""

import builtins
import copy
import datetime
import functools
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nanotoolrl import env
from nanotoolrl.calls import FORMATS, MAX_CHARS, Call, parse_calls, render_calls
from nanotoolrl.env import MAX_CALLS, MAX_MESSAGES, Episode, Task, Turn, oracle, replay
from nanotoolrl.world.api import API, API_CLASSES, ToolError, method_names, schema
from nanotoolrl.world.domains import ORDER
from nanotoolrl.world.mutations import alter, mutations
from nanotoolrl.world.observe import MAX_RESULT, call_tool
from nanotoolrl.world.signatures import MAX_INT
from nanotoolrl.world.tasks import SPLITS, load_tasks

ALL_TASKS = {split: load_tasks(split) for split in SPLITS}
FILES = {"folders": {"docs": {"a.txt": "one", "b.txt": "two"}, "work": {}}}
HOME = {"rooms": {"hall": {"degrees": 20, "light": False}}, "doors": {"front": "open"}}
BARE = {"hermes": "<tool_call>\n", "python": "[", "xml": "<function="}


def call(tool: str, /, **arguments) -> Call:
    return Call(tool, arguments)


READ_A, READ_B = (call("read_file", folder="docs", name=name) for name in ("a.txt", "b.txt"))
LIGHT = call("set_light", room="hall", on=True)
DELETE_A = call("delete_file", folder="docs", name="a.txt")


def make_task(*turns: Turn, tools: list[str] | None = None) -> Task:
    """A task in a house with files; all tools of both classes are shown, unless `tools` says which."""
    every = [tool for name in ("Files", "Home") for tool in method_names(API_CLASSES[name])]
    state = {"Files": copy.deepcopy(FILES), "Home": copy.deepcopy(HOME)}
    return Task("t", "base", state, every if tools is None else tools, list(turns))


def say(*calls: Call, format: str = "hermes") -> str:
    return render_calls(list(calls), format)


def observed(answers: list[dict]) -> list:
    """The observations in a list of answers, decoded."""
    assert {answer["role"] for answer in answers} == {"tool"}
    return [json.loads(answer["content"]) for answer in answers]


def error_of(name: str, arguments: dict, format: str = "hermes") -> str:
    """What a model reads when it calls a tool like this."""
    (result,) = observed(
        Episode(make_task(Turn("?", [], "!")), format).step(say(Call(name, arguments), format=format))
    )
    assert set(result) == {"error"}
    return result["error"]


# ---------------------------------------------------------------------------------------- reading messages


@pytest.mark.parametrize("format", FORMATS)
def test_text_around_calls_is_ignored_and_every_block_is_tried(format):
    episode = Episode(make_task(Turn("?", [READ_A, LIGHT], "!")), format)
    text = f"First {say(READ_A, format=format)}, then {say(LIGHT, format=format)}. Done."
    assert observed(episode.step(text)) == [{"text": "one"}, "switched"]
    assert episode.step("!") is None
    assert episode.reward == 1


@pytest.mark.parametrize(
    ("format", "bad"),
    [
        ("hermes", '<tool_call>\n{"name": "read_file", "arguments": {"folder": "docs"\n</tool_call>'),
        ("python", "[read_file('docs', 'a.txt')]"),
        ("xml", "<function=read_file>\ndocs\n</function>"),
    ],
)
def test_an_unreadable_block_is_answered_with_an_error_and_costs_nothing_else(format, bad):
    episode = Episode(make_task(Turn("?", [READ_A], "!")), format)
    (first, second) = observed(episode.step(f"{bad}\n{say(READ_A, format=format)}"))
    assert set(first) == {"error"} and first["error"]
    assert second == {"text": "one"}
    assert not episode.done
    assert episode.step("!") is None
    assert episode.reward == 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ending", ["text", "empty", "bare", "raw json"])
def test_a_message_without_a_call_ends_the_turn(format, ending):
    """Also an opening tag alone: a legal, short, free end of a turn, and the way into collapse."""
    text = {
        "text": "Done.",
        "empty": "",
        "bare": BARE[format],
        "raw json": '{"name": "read_file", "arguments": {}}',
    }
    episode = Episode(make_task(Turn("one?", [], "!"), Turn("two?", [READ_A], "!")), format)
    assert episode.step(text[ending]) == [{"role": "user", "content": "two?"}]
    assert (episode.turn, len(episode.turn_verdicts)) == (1, 1)
    assert episode.step(text[ending]) is None
    assert episode.done


def test_a_call_in_another_format_ends_the_turn():
    for format in FORMATS:
        for other in set(FORMATS) - {format}:
            episode = Episode(make_task(Turn("?", [], "!"), Turn("next", [LIGHT], "!")), format)
            assert episode.step(say(LIGHT, format=other)) == [{"role": "user", "content": "next"}]
            assert episode.world["Home"].rooms["hall"]["light"] is False


def test_the_prompt_states_the_format_and_shows_the_tools():
    task = make_task(Turn("Please.", [LIGHT], "!"), tools=["set_light", "read_file"])
    for format, form in FORMATS.items():
        messages, tools = Episode(task, format).prompt()
        assert messages == [
            {"role": "system", "content": form.instruction},
            {"role": "user", "content": "Please."},
        ]
        assert tools == [schema("set_light"), schema("read_file")]
    with pytest.raises(ValueError, match="unknown format 'yaml'; known: hermes, python, xml"):
        Episode(task, "yaml")


# --------------------------------------------------------------------------------------------- the reward


@pytest.mark.parametrize("format", FORMATS)
def test_state_must_equal_the_ground_truth(format):
    task = make_task(Turn("?", [LIGHT], "!"))
    assert replay(task, [[LIGHT]], format) == 1
    assert replay(task, [[]], format) == 0
    assert replay(task, [[replace(LIGHT, arguments={"room": "hall", "on": False})]], format) == 0
    assert replay(task, [[LIGHT, DELETE_A]], format) == 0


def test_a_wrong_state_is_named():
    episode = Episode(make_task(Turn("?", [LIGHT], "!")))
    episode.step(say(DELETE_A))
    episode.step("!")
    (verdict,) = episode.turn_verdicts
    assert not verdict.passed
    assert "Files" in verdict.reason and "Home" in verdict.reason


def test_only_the_state_counts_not_the_way_to_it():
    """Undone mistakes and needless looks are not punished."""
    detour = [
        call("set_light", room="hall", on=True),
        call("set_light", room="hall", on=False),
        READ_A,
        LIGHT,
    ]
    assert replay(make_task(Turn("?", [LIGHT], "!")), [detour]) == 1


def test_results_must_have_been_seen_in_any_order():
    task = make_task(Turn("?", [READ_A, READ_B], "!"))
    assert replay(task, [[READ_B, READ_A]]) == 1
    assert replay(task, [[READ_B, LIGHT]]) == 0
    assert replay(task, [[READ_A]]) == 0


def test_results_are_counted():
    """The same result twice in the ground truth must be seen twice: a multiset, not a set."""
    task = make_task(Turn("?", [READ_A, READ_A], "!"))
    assert replay(task, [[READ_A]]) == 0
    assert replay(task, [[READ_A, READ_A]]) == 1
    assert replay(task, [[READ_A, READ_A, READ_A]]) == 1


def test_an_unseen_result_is_named():
    episode = Episode(make_task(Turn("?", [READ_A], "!")))
    episode.step("I will not look.")
    (verdict,) = episode.turn_verdicts
    assert not verdict.passed
    assert '{"text": "one"}' in verdict.reason


def test_results_of_earlier_turns_count_and_later_ones_come_too_late():
    """`Contained in the results seen so far`: looking ahead is fine, catching up is not."""
    task = make_task(Turn("?", [READ_A], "!"), Turn("?", [READ_B], "!"))
    assert replay(task, [[READ_A, READ_B], []]) == 1
    assert replay(task, [[], [READ_A, READ_B]]) == 0


def test_the_episode_goes_on_after_a_failed_turn():
    task = make_task(Turn("one?", [LIGHT], "!"), Turn("two?", [READ_A], "!"))
    episode = Episode(task)
    assert episode.step("No.") == [{"role": "user", "content": "two?"}]
    assert not episode.done
    assert observed(episode.step(say(LIGHT, READ_A))) == ["switched", {"text": "one"}]
    assert episode.step("!") is None
    assert [verdict.passed for verdict in episode.turn_verdicts] == [False, True]
    assert episode.reward == 0


def test_reward_comes_only_at_the_end():
    task = make_task(Turn("?", [LIGHT], "!"), Turn("?", [READ_A], "!"))
    episode = Episode(task)
    for text in (say(LIGHT), "!", say(READ_A)):
        episode.step(text)
        assert (episode.done, episode.reward) == (False, 0)
    assert episode.step("!") is None
    assert (episode.done, episode.reward) == (True, 1)
    assert all(verdict.passed and not verdict.reason for verdict in episode.turn_verdicts)


def test_a_finished_episode_answers_nothing_and_changes_nothing():
    episode = Episode(make_task(Turn("?", [LIGHT], "!")))
    episode.step(say(LIGHT))
    episode.step("!")
    assert episode.step(say(DELETE_A)) is None
    assert episode.step("x", overlong=True) is None
    assert (episode.messages, episode.reward, len(episode.turn_verdicts)) == (2, 1, 1)
    assert "a.txt" in episode.world["Files"].folders["docs"]


def test_calls_in_a_turn_without_ground_truth_calls_are_not_punished():
    task = make_task(Turn("?", [], "Which?"), Turn("That.", [LIGHT], "!"))
    assert replay(task, [[READ_A], [LIGHT]]) == 1
    assert replay(task, [[DELETE_A], [LIGHT]]) == 0, "but the state stays wrong, and a later turn checks it"


@pytest.mark.parametrize(("strict", "reward"), [(False, 1), (True, 0)])
def test_strict_empty_turn(strict, reward):
    task = make_task(Turn("?", [], "Which?"), Turn("That.", [LIGHT], "!"))
    episode = Episode(task, strict_empty_turn=strict)
    for text in (say(READ_A), "Which?", say(LIGHT), "!"):
        episode.step(text)
    assert [verdict.passed for verdict in episode.turn_verdicts] == [not strict, True]
    assert ("should ask" in episode.turn_verdicts[0].reason) == strict
    assert episode.reward == reward


def test_strict_empty_turn_lets_a_model_ask():
    task = make_task(Turn("?", [], "Which?"), Turn("That.", [LIGHT], "!"))
    episode = Episode(task, strict_empty_turn=True)
    for text in ("Which?", say(LIGHT), "!"):
        episode.step(text)
    assert episode.reward == 1


def test_strict_empty_turn_leaves_other_turns_alone():
    episode = Episode(make_task(Turn("?", [LIGHT], "!")), strict_empty_turn=True)
    for text in (say(READ_A), say(LIGHT), "!"):
        episode.step(text)
    assert episode.reward == 1


# ------------------------------------------------------------------------------------------ hidden tools


@pytest.mark.parametrize("format", FORMATS)
def test_a_hidden_tool_is_refused_until_it_is_offered(format):
    """Ours: in the published environment a hidden tool works all the same."""
    task = make_task(
        Turn("?", [], "I have no tool."), Turn("Here.", [LIGHT], "!", ["set_light"]), tools=["read_file"]
    )
    episode = Episode(task, format)
    assert [tool["name"] for tool in episode.prompt()[1]] == ["read_file"]
    (refusal,) = observed(episode.step(say(LIGHT, format=format)))
    assert "set_light" in refusal["error"] and "read_file" in refusal["error"]
    assert episode.world["Home"].rooms["hall"]["light"] is False
    (offer,) = episode.step("I have no tool.")
    assert offer == {"role": "user", "content": "Here.", "tools": [schema("set_light")]}
    assert observed(episode.step(say(LIGHT, format=format))) == ["switched"]
    assert episode.step("!") is None
    assert episode.reward == 1


def test_a_tool_offered_by_the_first_message_works_at_once():
    task = make_task(Turn("Here.", [LIGHT], "!", ["set_light"]), tools=[])
    messages, tools = Episode(task).prompt()
    assert tools == []
    assert messages[-1]["tools"] == [schema("set_light")]
    assert replay(task, [[LIGHT]]) == 1


@pytest.mark.parametrize("name", ["transfer", "no_such_tool", "_room", "__class__", "step", "rooms", ""])
def test_what_is_not_shown_cannot_be_called(name):
    """A tool of a class the task lacks, a private name, an attribute: all the same unknown."""
    assert error_of(name, {}).startswith(f"no tool '{name}'; there is list_files, read_file")


def test_a_refusal_of_a_hidden_tool_is_no_result():
    """Else an error could stand in for a result that the ground truth expects."""
    hidden = Turn("?", [call("read_file", folder="docs", name="gone")], "!")
    assert replay(make_task(hidden), [[READ_A, *hidden.calls]]) == 1
    assert replay(make_task(hidden, tools=[]), [hidden.calls]) == 0


# ------------------------------------------------------------------------------------------------- limits


def test_the_cap_on_messages():
    task = make_task(Turn("?", [READ_A], "!"))
    episode = Episode(task, max_messages=3)
    assert episode.step(say(READ_A)) is not None
    assert episode.step(say(READ_B)) is not None
    assert episode.step(say(READ_B)) is None
    assert (episode.done, episode.reward, episode.messages) == (True, 0, 3)
    assert "cap on messages" in episode.turn_verdicts[-1].reason


def test_the_last_allowed_message_may_end_the_task():
    episode = Episode(make_task(Turn("?", [READ_A], "!")), max_messages=2)
    episode.step(say(READ_A))
    assert episode.step("!") is None
    assert episode.reward == 1


def test_the_cap_on_messages_counts_ends_of_turns():
    task = make_task(Turn("?", [READ_A], "!"), Turn("?", [READ_A], "!"))
    episode = Episode(task, max_messages=2)
    episode.step(say(READ_A))
    assert episode.step("!") is None
    assert (episode.done, episode.reward) == (True, 0)
    assert [verdict.passed for verdict in episode.turn_verdicts] == [True, False]


def test_the_default_cap_is_the_published_one():
    assert MAX_MESSAGES == 30
    episode = Episode(make_task(Turn("?", [READ_A], "!")))
    answers = [episode.step(say(READ_A)) for _ in range(31)]
    assert [answer is None for answer in answers] == [False] * 29 + [True, True]


@pytest.mark.parametrize("format", FORMATS)
def test_the_cap_on_calls_per_message(format):
    write = [call("write_file", folder="work", name=f"{i}", text="x") for i in range(MAX_CALLS + 5)]
    episode = Episode(make_task(Turn("?", [], "!")), format)
    results = observed(episode.step(say(*write, format=format)))
    assert results[:-1] == ["written"] * MAX_CALLS
    assert results[-1] == {"error": f"only {MAX_CALLS} calls a message"}
    assert len(episode.world["Files"].folders["work"]) == MAX_CALLS
    exact = observed(
        Episode(make_task(Turn("?", [], "!")), format).step(say(*write[:MAX_CALLS], format=format))
    )
    assert exact == ["written"] * MAX_CALLS


def test_unreadable_blocks_count_toward_the_cap():
    episode = Episode(make_task(Turn("?", [], "!")))
    results = observed(episode.step("<tool_call>x</tool_call>" * 1000))
    assert len(results) == MAX_CALLS + 1


@pytest.mark.parametrize("text", ["I will, I will,", say(LIGHT), ""])
def test_an_overlong_message_fails_the_task(text):
    """It has no end, so it is neither a call nor the end of a turn: nothing in it is executed."""
    episode = Episode(make_task(Turn("?", [LIGHT], "!"), Turn("?", [], "!")))
    assert episode.step(text, overlong=True) is None
    assert (episode.done, episode.reward) == (True, 0)
    assert "token limit" in episode.turn_verdicts[-1].reason
    assert episode.world == episode.task.new_world()


def test_abort():
    episode = Episode(make_task(Turn("?", [LIGHT], "!")))
    episode.step(say(LIGHT))
    assert episode.abort("the sequence is full") is None
    assert (episode.done, episode.reward) == (True, 0)
    assert episode.turn_verdicts[-1].reason == "the sequence is full"


def test_calls_left():
    episode = Episode(
        make_task(Turn("?", [READ_A, READ_B], "!"), Turn("?", [], "!"), Turn("?", [LIGHT], "!"))
    )
    seen = [episode.calls_left]
    for text in (say(READ_A), say(READ_B, READ_B), "!", "!", "<tool_call>x</tool_call>", say(LIGHT), "!"):
        episode.step(text)
        seen.append(episode.calls_left)
    assert seen == [2, 1, 0, 0, 1, 1, 0, 0]


# ---------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("read_file", {"folder": "docs"}, ["missing", "name", "it takes folder, name"]),
        ("read_file", {}, ["missing", "folder, name"]),
        ("read_file", {"folder": "docs", "name": "a.txt", "mode": "r"}, ["unknown", "mode", "folder, name"]),
        ("read_file", {"folder": "docs", "name": "a.txt", "self": 1}, ["unknown", "self"]),
        ("read_file", {"folder": "docs", "name": 1}, ["name", "string"]),
        ("read_file", {"folder": None, "name": "a.txt"}, ["folder", "string"]),
        ("read_file", {"folder": ["docs"], "name": "a.txt"}, ["folder", "string"]),
        ("read_file", {"folder": {}, "name": "a.txt"}, ["folder", "string"]),
        ("read_file", {"folder": True, "name": "a.txt"}, ["folder", "string"]),
        ("set_heating", {"room": "hall", "degrees": True}, ["degrees", "integer"]),
        ("set_heating", {"room": "hall", "degrees": 21.0}, ["degrees", "integer"]),
        ("set_heating", {"room": "hall", "degrees": "21"}, ["degrees", "integer"]),
        ("set_heating", {"room": "hall", "degrees": None}, ["degrees", "integer"]),
        ("set_heating", {"room": "hall", "degrees": MAX_INT + 1}, ["degrees", "too large"]),
        ("set_heating", {"room": "hall", "degrees": -MAX_INT - 1}, ["degrees", "too large"]),
        ("set_heating", {"room": "hall", "degrees": 10**400}, ["degrees", "too large"]),
        ("set_heating", {"room": "hall", "degrees": MAX_INT}, ["5 to 30", str(MAX_INT)]),
        ("set_light", {"room": "hall", "on": 1}, ["on", "boolean"]),
        ("set_light", {"room": "hall", "on": 0}, ["on", "boolean"]),
        ("set_light", {"room": "hall", "on": "true"}, ["on", "boolean"]),
        ("set_door", {"door": "front", "state": "ajar"}, ["state", "locked, open"]),
        ("set_door", {"door": "front", "state": "Open"}, ["state", "locked, open"]),
        ("set_door", {"door": "front", "state": ["open"]}, ["state", "string"]),
    ],
)
def test_a_wrong_argument_is_refused_and_named(format, name, arguments, named):
    text = error_of(name, arguments, format)
    assert [word for word in named if word not in text] == []


def test_a_refused_argument_changes_nothing():
    world = make_task(Turn("?", [], "!")).new_world()
    before = copy.deepcopy(world)
    assert "error" in call_tool(world, call("set_light", room="hall", on=1))
    assert world == before


def test_right_arguments_pass():
    """Whatever the order; optional ones may be left out."""
    task = Task("t", "base", {"Shop": {"items": [{"id": 12, "name": "kettle", "price": 3}]}}, [], [])
    world = task.new_world()
    assert call_tool(world, call("add_to_cart", quantity=2, item_id=12)) == "in cart"
    assert call_tool(world, call("add_to_cart", item_id=12)) == "in cart"
    assert world["Shop"].cart == [{"item_id": 12, "quantity": 2}, {"item_id": 12, "quantity": 1}]


def test_lists_floats_and_a_bug_in_a_tool(classes):
    """Only a reader's own class has these; a tool with a bug answers with an error, and training goes on."""

    class Kiln(API):
        """A kiln."""

        pool = "ood"

        def fire(self, pots: list[int], hours: float) -> dict:
            """Fire pots."""
            return {"share": hours / len(pots)}

    world = {"Kiln": Kiln()}
    assert call_tool(world, call("fire", pots=[1, 2], hours=3)) == {"share": 1.5}
    assert call_tool(world, call("fire", pots=[1, 2], hours=1.5)) == {"share": 0.75}
    for pots, hours, wrong in (
        ([1, True], 1, "'pots'[1]"),
        ([1, "2"], 1, "'pots'[1]"),
        ("12", 1, "'pots'"),
        ([1], True, "'hours'"),
        ([1], float("nan"), "'hours'"),
        ([1], float("inf"), "'hours'"),
    ):
        assert f"{wrong} must be" in call_tool(world, call("fire", pots=pots, hours=hours))["error"]
    assert call_tool(world, call("fire", pots=[], hours=1)) == {"error": "fire failed: ZeroDivisionError"}


def test_the_values_of_every_kind_of_parameter(classes):
    class Shed(API):
        """A shed."""

        pool = "ood"

        def put(
            self,
            note: str | None,
            sizes: dict[str, list[int]],
            level: Literal[1, 2] = 1,
            sure: Literal[True] = True,
            bag: list = None,
            box: dict = None,
        ) -> list:
            """Put something."""
            return [note, sizes, level, sure, bag, box]

    world, right = {"Shed": Shed()}, {"note": None, "sizes": {"a": [1]}}
    assert call_tool(world, Call("put", right)) == [None, {"a": [1]}, 1, True, None, None]
    assert call_tool(world, Call("put", right | {"bag": [1, [None]], "box": {"b": {}}, "level": 2}))[2] == 2
    for wrong, said in (
        ({"note": 1}, "argument 'note' must be of type string or null"),
        ({"sizes": None}, "argument 'sizes' must be of type object"),
        ({"sizes": {"a": 1}}, "argument 'sizes'['a'] must be of type array"),
        ({"sizes": {"a": [1, "2"]}}, "argument 'sizes'['a'][1] must be of type integer"),
        ({"sizes": {"a": [MAX_INT + 1]}}, "argument 'sizes'['a'][0] is too large"),
        ({"level": 3}, "argument 'level' must be one of 1, 2"),
        ({"level": True}, "argument 'level' must be of type integer"),
        ({"level": 1.0}, "argument 'level' must be of type integer"),
        ({"level": None}, "argument 'level' must be of type integer"),
        ({"sure": False}, "argument 'sure' must be one of true"),
        ({"sure": 1}, "argument 'sure' must be of type boolean"),
        ({"bag": {}}, "argument 'bag' must be of type array or null"),
        ({"box": []}, "argument 'box' must be of type object or null"),
    ):
        assert call_tool(world, Call("put", right | wrong)) == {"error": said}


# ------------------------------------------------------------------------------- whatever a tool does


@pytest.fixture
def odd(classes):
    """Makes a task whose only tool, `do`, calls a function; the class has no state."""

    def make(act: Callable[[], object]) -> Task:
        @dataclass
        class Odd(API):
            """Does what it is told."""

            pool = "ood"

            def do(self) -> object:
                """Do it."""
                return act()

        return Task("t", "base", {"Odd": {}}, ["do"], [Turn("?", [call("do")], "!")])

    return make


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> object:
        raise error

    return act


def endless_recursion() -> object:
    return [endless_recursion()]


class Unspeakable(ToolError):
    def __str__(self) -> str:
        raise OSError


class Departure(BaseException):
    pass


RAISED = [
    FileNotFoundError("gone"),
    *(OSError(), PermissionError(), TimeoutError(), AssertionError(), NotImplementedError(), RuntimeError()),
    *(StopIteration(), ImportError(), MemoryError(), BufferError(), EOFError(), KeyError("x"), Exception()),
    *(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"), ExceptionGroup("two", [OSError(), ValueError()])),
    *(SystemExit(), SystemExit(1), GeneratorExit(), Departure(), BaseExceptionGroup("x", [Departure()])),
]


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_whatever_a_tool_raises_is_an_observation(error, odd):
    task = odd(raising(error))
    assert observed(Episode(task).step(say(call("do")))) == [{"error": f"do failed: {type(error).__name__}"}]
    assert call_tool(task.new_world(), call("do")) == {"error": f"do failed: {type(error).__name__}"}


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (endless_recursion, "do failed: RecursionError"),
        (raising(Unspeakable()), "do failed: OSError"),
        (raising(ToolError("no 'x'; there is y")), "no 'x'; there is y"),
        (raising(ToolError("half \ud800")), "half ?"),
        (raising(ToolError("x" * 10**7)), "x" * MAX_RESULT + "..."),
    ],
)
def test_errors_can_always_be_read(act, said, odd):
    assert observed(Episode(odd(act)).step(say(call("do")))) == [{"error": said}]


def test_ctrl_c_in_a_tool_is_the_users(odd):
    with pytest.raises(KeyboardInterrupt):
        Episode(odd(raising(KeyboardInterrupt()))).step(say(call("do")))


class Torn(dict):
    """A dict that cannot be read."""

    def items(self) -> object:
        raise OSError("torn")


def in_circles() -> dict:
    circle = {}
    circle["self"] = [circle]
    return circle


NO_JSON = {
    "set": lambda: {1},
    "date": lambda: {"day": datetime.date(2026, 1, 1)},
    "nan": lambda: float("nan"),
    "inside": lambda: [{"x": [float("-inf")]}],
    "circle": in_circles,
    "number keys": lambda: [{1: "a", "1": "b"}],
    "none key": lambda: {None: 1},
    "tuple keys": lambda: {(1, 2): 3},
    "surrogate": lambda: "\ud800",
    "surrogate key": lambda: {"\udfff": 1},
    "bytes": lambda: b"x",
    "huge": lambda: 10**5000,
    "object": object,
    "complex": lambda: 1j,
    "function": lambda: print,
    "generator": lambda: (i for i in "ab"),
    "deep": lambda: functools.reduce(lambda inner, _: [inner], range(10**5), []),
    "torn": lambda: Torn(a=1),
}


@pytest.mark.parametrize("act", NO_JSON.values(), ids=NO_JSON)
def test_a_result_that_is_no_json_is_an_error(act, odd):
    (result,) = observed(Episode(odd(act)).step(say(call("do"))))
    assert set(result) == {"error"} and result["error"].startswith("do gave no JSON value: ")


@pytest.mark.parametrize(
    ("result", "seen"),
    [
        (None, None),
        ((1, (2,)), [1, [2]]),
        ("\U0001f642\u2028\x00", "\U0001f642\u2028\x00"),
        (2**64, 2**64),
        ({"a": {"b": [True, 0.5]}}, {"a": {"b": [True, 0.5]}}),
        ("x" * (MAX_RESULT - 2), "x" * (MAX_RESULT - 2)),
        ("x" * (MAX_RESULT - 1), {"error": f"do gave more than {MAX_RESULT} characters"}),
        ("x" * 10**7, {"error": f"do gave more than {MAX_RESULT} characters"}),
    ],
    ids=range(8),
)
def test_other_results_are_seen_as_they_are_up_to_a_length(result, seen, odd):
    assert observed(Episode(odd(lambda: result)).step(say(call("do")))) == [seen]


def swallowing_exceptions() -> None:
    while True:
        with suppress(Exception):
            time.sleep(60)


def swallowing_once() -> str:
    try:
        time.sleep(60)
    except BaseException:
        return "done"


def raising_at_the_end() -> None:
    try:
        time.sleep(60)
    finally:
        raise ValueError


def busy() -> None:
    while True:
        pass


HANGS = (busy, swallowing_exceptions, swallowing_once, raising_at_the_end)


@pytest.mark.parametrize("act", HANGS)
def test_a_tool_that_hangs_is_stopped(act, odd):
    episode = Episode(odd(act), tool_seconds=0.05)
    assert observed(episode.step(say(call("do")))) == [{"error": "do took more than 0.05 s"}]


def test_a_tool_that_hangs_is_stopped_in_another_thread(odd):
    """Reflections replay there."""
    episode = Episode(odd(busy), tool_seconds=0.05)
    with ThreadPoolExecutor(1) as threads:
        answers = [threads.submit(episode.step, say(call("do"))).result() for _ in range(2)]
    assert [observed(answer) for answer in answers] == [[{"error": "do took more than 0.05 s"}]] * 2


def test_a_limit_leaves_nothing_behind(odd):
    """A thread that was in time is not hit later; handler and timer of others stay theirs."""
    rung, quick = [], odd(lambda: "done")
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 1000, 500)
    try:
        for seconds in (0, 0.05, 1000):
            episode = Episode(quick, tool_seconds=seconds)
            assert observed(episode.step(say(call("do")))) == ["done"]
            with ThreadPoolExecutor(1) as threads:
                assert observed(threads.submit(episode.step, say(call("do"))).result()) == ["done"]
                threads.submit(time.sleep, 0.1).result()
        left, again = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left < 1000 and again == 500
        os.kill(os.getpid(), signal.SIGALRM)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 10**6])
def test_a_limit_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match="tool_seconds is .*; it must be from 0"):
        Episode(make_task(Turn("?", [LIGHT], "!")), tool_seconds=seconds)


def test_worlds_of_another_kind_are_guarded_as_well():
    """`BfclTask` executes calls in its own way."""

    @dataclass
    class Foreign(Task):
        act: Callable[[], object] = busy

        def execute(self, world: dict[str, object], call: Call) -> str:
            return self.act()

    task = make_task(Turn("?", [LIGHT], "!"))
    for act, said in ((busy, "took more than 0.05 s"), (raising(SystemExit()), "failed: SystemExit")):
        episode = Episode(Foreign(**vars(task), act=act), tool_seconds=0.05)
        assert observed(episode.step(say(LIGHT))) == [{"error": f"set_light {said}"}]


def test_a_ground_truth_that_hangs_is_refused(odd, monkeypatch):
    monkeypatch.setattr(env, "TRUTH_SECONDS", 0.05)
    line = odd(busy).to_json()
    with pytest.raises(ValueError, match="calls.0., do, is answered with .* took more than 0.05 s"):
        Task.from_json(line)


class Ambiguous:
    """As an array compares: with as many truths as it has elements."""

    def __eq__(self, other: object) -> "Ambiguous":
        return self

    def __bool__(self) -> bool:
        raise ValueError

    __ne__, __hash__ = __eq__, None


class Lonely:
    def __deepcopy__(self, memo: dict) -> None:
        raise OSError


@dataclass
class Circle:
    """Equal to another only if its own other is."""

    other: object = None


def in_a_circle() -> Circle:
    circle = Circle()
    circle.other = circle
    return circle


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (Ambiguous, "state of Keeper differs from the ground truth"),
        (in_a_circle, "state of Keeper differs from the ground truth"),
        (object, "state of Keeper differs from the ground truth"),
        (Lonely, "the world cannot be judged: OSError"),
    ],
)
def test_a_world_that_cannot_be_compared_differs(kept, reason, classes):
    @dataclass
    class Keeper(API):
        """Keeps something that is no JSON."""

        pool = "ood"
        things: list = field(default_factory=list)

        def keep(self) -> str:
            """Keep it."""
            self.things.append(kept())
            return "kept"

    task = Task("t", "base", {"Keeper": {}}, ["keep"], [Turn("?", [call("keep")], "!")])
    episode = Episode(task)
    assert observed(episode.step(say(call("keep")))) == ["kept"]
    assert episode.step("!") is None
    assert (episode.reward, [verdict.reason for verdict in episode.turn_verdicts]) == (0, [reason])
    with pytest.raises(ValueError, match="does not replay: OSError" if kept is Lonely else reason):
        Task.from_json(task.to_json())


# ------------------------------------------------------------------------------- ground truth, mutations


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_oracle_earns_reward_1_on_every_task(split, format):
    """Through the text of its own transcript, as a perfect model would play."""
    failed = []
    for task in ALL_TASKS[split]:
        episode = Episode(task, format)
        messages = oracle(task, format)
        answers = [episode.step(m["content"]) for m in messages if m["role"] == "assistant"]
        if episode.reward != 1 or answers[-1] is not None:
            failed.append(task.id)
    assert failed == []


def test_the_oracle_transcript():
    task = make_task(Turn("one?", [READ_A, LIGHT], "First."), Turn("two?", [], "Second."))
    messages = oracle(task)
    assert [m["role"] for m in messages] == [
        *("system", "user", "assistant", "tool", "assistant", "tool", "assistant", "user", "assistant")
    ]
    assert [m["content"] for m in messages[2:7]] == [
        say(READ_A),
        '{"text": "one"}',
        say(LIGHT),
        '"switched"',
        "First.",
    ]


@pytest.mark.parametrize(
    "counts", [[24] * 1, [1] * 15, [3] * 11, [5] * 9, [16] * 15, [1] + [0] * 28, [90, 1]]
)
def test_a_ground_truth_of_many_calls_is_played_in_larger_parts(counts):
    turns = [Turn("?", [READ_A] * count, "!") for count in counts]
    task = make_task(*turns)
    assert replay(task, [turn.calls for turn in turns]) == 1
    assert len([m for m in oracle(task) if m["role"] == "assistant"]) <= MAX_MESSAGES
    assert Task.from_json(task.to_json()) == task


@pytest.mark.parametrize("counts", [[16] * 16, [500], [1] + [0] * 30, [0] * 40 + [1]])
def test_a_ground_truth_that_no_episode_can_hold_is_refused(counts):
    turns = [Turn("?", [READ_A] * count, "!") for count in counts]
    assert replay(make_task(*turns), [turn.calls for turn in turns]) == 0
    with pytest.raises(ValueError, match="16 a message, take more than the 30 messages of an episode"):
        Task.from_json(make_task(*turns).to_json())


def test_an_altered_argument_of_every_kind_is_another_right_value(classes):
    class Loft(API):
        """A loft."""

        pool = "ood"

        def put(
            self,
            note: str | None,
            level: Literal[1, 2] | None,
            many: list[int],
            bare: list,
            sizes: dict[str, int],
            box: dict,
        ) -> str:
            """Put something."""
            return "put"

    task = Task("t", "base", {"Loft": {}}, ["put"], [])
    full = {"note": "a", "level": 2, "many": [1], "bare": [None], "sizes": {"a": 1}, "box": {"a": []}}
    empty = {"note": None, "level": None, "many": [], "bare": [], "sizes": {}, "box": {}}
    for arguments in (full, empty):
        for name in arguments:
            altered = alter(task, Call("put", arguments), name)
            assert [key for key in arguments if altered.arguments[key] != arguments[key]] == [name]
            assert call_tool(task.new_world(), altered) == "put"


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_every_altered_argument_and_every_missing_call_earns_0(split):
    """The reward sees every value of every call; otherwise it would pay for something else than the task."""
    for task in ALL_TASKS[split]:
        changed = mutations(task)
        truth = [turn.calls for turn in task.turns]
        calls = sum(truth, [])
        arguments = sum(len(one.arguments) for one in calls)
        assert len(changed) == len(calls) + arguments >= 2
        assert all(calls != truth for calls in changed)
        assert [calls for calls in changed if replay(task, calls) != 0] == [], task.id


def extra_call(api: API) -> Call | None:
    """A call that works in the present state of the object and changes it, whatever the task did before."""
    name = type(api).__name__
    if name == "Bank":
        rich, poor = sorted(api.accounts, key=api.accounts.get)[:-3:-1]
        return call("transfer", source=rich, target=poor, amount=1)
    if name == "Home":
        room, now = next(iter(api.rooms.items()))
        return call("set_heating", room=room, degrees=5 if now["degrees"] != 5 else 6)
    if name == "Library":
        book = api.books[0]
        free = book["member"] == "nobody"
        return (
            call("lend_book", book_id=book["id"], member="Zoe")
            if free
            else call("return_book", book_id=book["id"])
        )
    return {
        "Files": lambda: call("write_file", folder=next(iter(api.folders)), name="extra.zip", text="x"),
        "Contacts": lambda: call("add_contact", person="Zoe", phone="1-1"),
        "Tickets": lambda: call("open_ticket", title="an extra ticket"),
        "Calendar": lambda: call("add_event", day="Monday", hour=3, title="an extra event"),
        "Shop": lambda: call("add_to_cart", item_id=api.items[0]["id"]),
        "Travel": lambda: call("book_flight", flight_id=api.flights[0]["id"], passenger="Zoe"),
        "Garage": lambda: call("set_route", car=next(iter(api.cars)), city="Nowhere"),
        "Music": lambda: call("make_playlist", playlist="an extra playlist"),
        "Clinic": lambda: call("book_visit", doctor_id=api.doctors[0]["id"], patient="Zoe", day="Monday"),
    }.get(name, lambda: None)()


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_an_extra_change_of_any_object_earns_0(split):
    """Also of an object the request does not touch, with every tool allowed, right before the last reply."""
    for task in ALL_TASKS[split]:
        truth = [turn.calls for turn in task.turns]
        for name, api in task.expected[-1][0].items():
            extra = extra_call(api)
            if extra is None:  # of a domain that somebody added
                continue
            assert "error" not in call_tool(copy.deepcopy(task.expected[-1][0]), extra), (task.id, extra)
            allowed = replace(task, tools=[*task.tools, extra.name])  # a new Task: `expected` is not copied
            assert replay(allowed, truth) == 1, task.id
            assert replay(allowed, [*truth[:-1], [*truth[-1], extra]]) == 0, (task.id, name)


def test_the_tasks_of_the_extra_change_test_cover_every_class():
    """Of the domains whose tasks are committed; each has an extra call."""
    committed = {name for name, cls in API_CLASSES.items() if cls.__module__.rpartition(".")[2] in ORDER}
    assert {name for tasks in ALL_TASKS.values() for task in tasks for name in task.state} == committed
    worlds = (task.expected[-1][0] for tasks in ALL_TASKS.values() for task in tasks[:60])
    assert all(extra_call(api) for world in worlds for api in world.values())


@pytest.mark.parametrize("split", SPLITS)
def test_saying_nothing_or_a_bare_tag_earns_0(split):
    """The loophole ends turns, it does not earn anything."""
    for task in ALL_TASKS[split]:
        for text in ("", BARE["hermes"]):
            episode = Episode(task)
            while not episode.done:
                episode.step(text)
            assert episode.reward == 0, task.id


# --------------------------------------------------------------------------------------------- isolation


def test_two_episodes_of_a_task_share_no_state():
    """The published environment let a rollout inherit another's state."""
    task = make_task(
        Turn("?", [LIGHT], "!"), Turn("Here.", [DELETE_A], "!", ["delete_file"]), tools=["set_light"]
    )
    before = task.to_json()
    first, second = Episode(task), Episode(task)
    for text in (say(LIGHT), "!", say(DELETE_A)):
        first.step(text)
    assert second.world == task.new_world()
    assert second.tools == ["set_light"]
    assert second._seen == [] and second.turn_verdicts == []
    for text in (say(LIGHT), "!", say(DELETE_A), "!"):
        second.step(text)
    assert second.reward == 1
    assert task.to_json() == before


def test_a_bad_rollout_leaves_the_ground_truth_alone():
    task = make_task(Turn("?", [LIGHT], "!"))
    expected = copy.deepcopy(task.expected)
    world = Episode(task).world
    world["Files"].folders.clear()
    world["Home"].rooms["hall"]["degrees"] = -1
    assert task.expected == expected
    assert replay(task, [[LIGHT]]) == 1
    assert task.state == {"Files": FILES, "Home": HOME}


def test_a_tool_may_keep_what_it_gets_and_give_what_it_keeps(classes):
    @dataclass
    class Choir(API):
        """A choir."""

        pool = "ood"
        names: list[str] = field(default_factory=list)

        def set_names(self, names: list[str]) -> list[str]:
            """Set the names."""
            self.names = names
            return names

        def add_name(self, name: str) -> list[str]:
            """Add a name."""
            self.names.append(name)
            return self.names

    calls = [call("set_names", names=["Ida"]), call("add_name", name="Max")]
    task = Task("t", "base", {"Choir": {}}, ["set_names", "add_name"], [Turn("?", calls, "!")])
    before = task.to_json()
    for _ in range(2):
        episode = Episode(task)
        assert observed(episode.step(say(*calls))) == [["Ida"], ["Ida", "Max"]]
        assert replay(task, [calls]) == 1
    assert task.to_json() == before == Task.from_json(before).to_json()
    world = task.new_world()
    for one in calls:
        call_tool(world, one).append("stranger")
    assert world["Choir"].names == ["Ida", "Max"] and task.to_json() == before


def test_what_a_task_hands_out_is_the_callers():
    task = make_task(
        Turn("?", [LIGHT], "!"), Turn("Here.", [DELETE_A], "!", ["delete_file"]), tools=["set_light"]
    )
    schemas, expected = copy.deepcopy(list(map(schema, task.tools))), copy.deepcopy(task.expected)
    alone = task.turn_alone(1, "?")
    alone.state["Home"]["rooms"].clear()
    alone.tools.clear()
    assert task.expected == expected
    episode = Episode(task)
    for shown in (episode.prompt()[1], episode.step("!")[0]["tools"], [task.schema("set_light")]):
        shown[0]["parameters"]["properties"].clear()
    assert list(map(schema, task.tools)) == schemas == episode.prompt()[1]
    assert schema("delete_file")["parameters"]["properties"]


def test_a_turn_alone_needs_a_world_that_can_be_made_anew(classes):
    class Sealed(API):
        """Its attribute is no parameter."""

        pool = "ood"

        def __init__(self) -> None:
            self.count = 0

        def seal(self) -> str:
            """Seal."""
            return "sealed"

    task = Task("t", "base", {"Sealed": {}}, ["seal"], [Turn("?", [call("seal")], "!")] * 2)
    with pytest.raises(TypeError, match="the world before turn 1 cannot be made anew"):
        task.turn_alone(1, "?")


def reachable(value: object) -> set[int]:
    """Identities of all the mutable containers within a value."""
    if isinstance(value, API):
        return reachable(vars(value))
    if isinstance(value, dict):
        return {id(value)}.union(*map(reachable, value.values()))
    return {id(value)}.union(*map(reachable, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("split", SPLITS)
def test_worlds_share_no_object(split):
    for task in ALL_TASKS[split][:40]:
        first, second = task.new_world(), task.new_world()
        worlds = [first, second, task.state, *(world for world, _ in task.expected)]
        sizes = [len(reachable(world)) for world in worlds]
        assert len(set().union(*map(reachable, worlds))) == sum(sizes)


# ----------------------------------------------------------------------------------------- nothing breaks it

FUZZED = [tasks[i] for tasks in ALL_TASKS.values() for i in (0, 1, 2)]
WRONG = [
    *(None, True, False, 0, -1, 1.5, 10**400, 2**63, "", "docs", "\ud800", "\x00", "\u2028", "<|im_end|>"),
    *(
        [],
        {},
        [[]],
        {"a": []},
        "</tool_call>",
        ")]",
        "</function>",
        "<tool_response>",
        "{}",
        "self",
        "x" * 5000,
    ),
]
VALUES = st.sampled_from(WRONG) | st.text(st.characters(), max_size=8)
TOOL_NAMES = st.sampled_from(sorted(tool for cls in API_CLASSES.values() for tool in method_names(cls)))
NAMES = TOOL_NAMES | st.sampled_from(["", "_folder", "__init__", "__class__", "\ud800", "f", "x" * 5000])
KEYS = st.sampled_from(
    [
        "folder",
        "name",
        "source",
        "self",
        "ticket_id",
        "day",
        "event_id",
        "title",
        "hour",
        "",
        "\ud800",
        "__class__",
    ]
)
OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES | VALUES,
        "arguments": st.dictionaries(KEYS, VALUES, max_size=3) | VALUES,
        "x": VALUES,
    },
)


def as_hermes(value: object) -> str:
    return f"<tool_call>\n{json.dumps(value)}\n</tool_call>"


def as_python(value: object) -> str:
    arguments = value.get("arguments")
    arguments = arguments if isinstance(arguments, dict) else {"x": arguments}
    body = ", ".join(f"{key}={item!r}" for key, item in arguments.items())
    return f"[{value.get('name', 'f')}({body})]"


def as_xml(value: object) -> str:
    arguments = value.get("arguments")
    arguments = arguments if isinstance(arguments, dict) else {"x": arguments}
    body = "".join(f"<parameter={key}>{json.dumps(item)}</parameter>" for key, item in arguments.items())
    return f"<function={value.get('name', 'f')}>{body}</function>"


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<function=",
        "</function>",
        "<parameter=",
        "</parameter>",
        "[",
        ")]",
        "(",
        "]",
    ]
    + [
        '{"name": "',
        '", "arguments": {',
        "}}",
        "list_files",
        "find_tickets()",
        "=",
        ",",
        '"',
        "'",
        "\n",
        "\ud800",
    ]
    + ["<|im_end|>", "<|im_start|>", "<tool_response>", "Done.", "for x in y", " or ", "lambda: 0", "#", ":="]
)
MESSAGES = (
    st.text(st.characters(), max_size=30)
    | st.lists(PIECES | TOOL_NAMES, max_size=12).map("".join)
    | OBJECTS.map(as_hermes)
    | OBJECTS.map(as_python)
    | OBJECTS.map(as_xml)
    | st.lists(OBJECTS.map(as_hermes), max_size=4).map(" ".join)
)


def check_step(episode: Episode, text: str) -> None:
    """One step, and everything that must hold after it."""
    before = episode.messages
    answers = episode.step(text)
    assert episode.messages == before + 1
    assert episode.reward in (0.0, 1.0)
    assert (answers is None) == episode.done
    for answer in answers or []:
        assert type(answer) is dict
        assert answer["role"] in ("user", "tool")
        answer["content"].encode("utf-8")
        if answer["role"] == "tool":
            json.dumps(json.loads(answer["content"]), allow_nan=False)
    if parse_calls(text, episode.format) and answers:
        assert {answer["role"] for answer in answers} == {"tool"}
        assert 1 <= len(answers) <= MAX_CALLS + 1
    for api in episode.world.values():
        json.dumps(vars(api), allow_nan=False, ensure_ascii=False).encode("utf-8")


@given(
    task=st.sampled_from(FUZZED),
    format=st.sampled_from(list(FORMATS)),
    texts=st.lists(MESSAGES, min_size=1, max_size=6),
    strict=st.booleans(),
)
@example(FUZZED[0], "python", ["[f(x=1) for x in (1, 2)]"], False)
@example(FUZZED[0], "python", ["[f(x=1), 2] or [f(x=3)]"], False)
@example(FUZZED[0], "xml", ["<function=\ud800></function>"], False)
@example(FUZZED[0], "xml", ["<function=list_events><parameter=\ud800>1</parameter></function>"], False)
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_no_text_breaks_an_episode(task, format, texts, strict):
    episode, other = Episode(task, format, strict_empty_turn=strict), Episode(task, format)
    for text in texts:
        if not episode.done:
            check_step(episode, text)
    assert other.world == task.new_world()
    assert replay(task, [turn.calls for turn in task.turns], format) == 1


LISTING = '<tool_call>{"name": "list_files", "arguments": {}}</tool_call>'
HEAD, TAIL = '<tool_call>{"name": "list_files", "arguments": {"folder": ', "}}</tool_call>"
DEEP = {
    "deep list": HEAD + "[" * 5000 + "]" * 5000 + TAIL,
    "deep object": HEAD + '{"folder": ' * 4000 + "1" + "}" * 4000 + TAIL,
    "less deep": HEAD + "[" * 400 + "]" * 400 + TAIL,
    "never closed": "<tool_call>" + "[" * 20_000 + "</tool_call>",
    "huge integer": HEAD + "9" * 20_000 + TAIL,
    "a long string": HEAD + '"' + "x" * 40_000 + '"' + TAIL,
    "thousand calls": LISTING * 800,
    "too long": LISTING * 3000,
    "tags": "<tool_call>" * 3000 + "</tool_call>" * 3000,
    "closing tags": "</tool_call>" * 4000,
    "a long name": '<tool_call>{"name": "' + "x" * 40_000 + '", "arguments": {}}</tool_call>',
    "python deep list": "[list_files(folder=" + "[" * 5000 + "]" * 5000 + ")]",
    "python deep call": "[" + "f(x=" * 5000 + ")" * 5000 + "]",
    "python minus": "[list_files(folder=" + "-" * 40_000 + "1)]",
    "python sum": "[list_files(folder=" + "1+" * 20_000 + "1)]",
    "python attributes": "[f(x=a" + ".b" * 20_000 + ")]",
    "python hexadecimal": "[get_ticket(ticket_id=0x" + "f" * 40_000 + ")]",
    "python thousand calls": "[" + "find_tickets(), " * 2900 + "f()]",
    "python brackets": "[" * 49_000 + "f()]",
    "xml deep": "<function=list_files><parameter=folder>" + "[" * 20_000 + "</parameter></function>",
    "xml thousand calls": "<function=f></function>" * 2000,
    "xml parameters": "<function=f>" + "<parameter=x>1</parameter>" * 1800 + "</function>",
    "xml openers": "<function=" * 4000 + "</function>",
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_nesting_and_mass_do_not_break_an_episode(text, format):
    """A collapsing model repeats itself; recursion and size must end in an observation."""
    task = ALL_TASKS["train"][0]
    episode = Episode(task, format)
    check_step(episode, text)
    if not episode.done:
        check_step(episode, text)
    assert len(text) <= MAX_CHARS or not any(type(one) is Call for one in parse_calls(text, format))


EVIL = [
    "[read_file(folder=__import__('os').system('touch /tmp/x'), name='a')]",
    "[read_file(folder=open('x').read(), name='a')]",
    "[read_file(folder=f'{open(0)}', name='a')]",
    "[read_file(folder=(lambda: open('x'))(), name='a')]",
    "[read_file(folder=[open(x) for x in 'ab'], name='a')]",
    "[read_file(folder='docs', name=(x := open('x')))]",
    "[read_file(folder='docs', name='a' * 10**9)]",
    "[exec(x='open(0)')]",
    "[eval(x='open(0)')]",
    "[open(file='x', mode='w')]",
    "[print(sep='x')]",
    "[__import__(name='os')]",
    "[__import__('os').system('true')]",
    "[f(x=1), __import__('os').system('true')]",
    "[f(x=1) for x in (open('x'),)]",
    "[f(x=1)] + [open(file='x')]",
    "[f(x=1), exit()]",
    "[f(**open('x'))]",
    "[f(*open('x'))]",
    "[f(x=`open(0)`)]",
    "[f(x=1)\nimport os\nos.system(x='true')]",
    "<tool_call>\n__import__('os').system('true')\n</tool_call>",
    '<tool_call>\n{"name": "eval", "arguments": {"source": "open(0)"}}\n</tool_call>',
    '<tool_call>\n{"name": "__import__", "arguments": {"name": "os"}}\n</tool_call>',
    '<tool_call>\n{"name": "read_file", "arguments": {"folder": open("x"), "name": "a"}}\n</tool_call>',
    '<function=open><parameter=file>"x"</parameter></function>',
    "<function=read_file><parameter=folder>open('x')</parameter></function>",
    "<function=__import__('os').system('true')></function>",
]


@contextmanager
def watched():
    """A list of the built-in functions that are called meanwhile; none of them does anything."""
    reached = []
    names = ("open", "eval", "exec", "__import__", "print", "input")
    spies = {name: lambda *a, _name=name, **k: reached.append(_name) for name in names}
    originals = {name: getattr(builtins, name) for name in names}
    vars(builtins).update(spies)
    try:
        yield reached
    finally:
        vars(builtins).update(originals)


def test_the_watch_sees_a_call():
    with watched() as reached:
        print("x")
        __import__("os")
    assert reached == ["print", "__import__"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", EVIL)
def test_nothing_a_model_writes_is_evaluated(text, format, monkeypatch):
    """Text becomes data: an expression is an unreadable block or plain text, never code."""
    episode = Episode(make_task(Turn("?", [], "!"), Turn("?", [LIGHT], "!")), format)
    world = copy.deepcopy(episode.world)
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    with watched() as reached:
        answers = episode.step(text)
    assert (reached, ran) == ([], [])
    assert episode.world == world
    if answers[0]["role"] == "tool":
        assert all(set(result) == {"error"} for result in observed(answers))
    else:
        assert answers == [{"role": "user", "content": "?"}]


# ------------------------------------------------------------------------------------------- task files


def raw_task(**changes) -> dict:
    task = make_task(Turn("?", [READ_A], "!", ["set_light"]), tools=["read_file"])
    return json.loads(task.to_json()) | changes


def raw_turn(**changes) -> dict:
    return raw_task()["turns"][0] | changes


@pytest.mark.parametrize("split", SPLITS)
def test_tasks_survive_their_file_format(split):
    for task in ALL_TASKS[split][:40]:
        assert Task.from_json(task.to_json()) == task


def test_awkward_texts_survive_the_file_format():
    text = '\U0001f642 "quoted" \\ \n </tool_call> <|im_end|> \u2028 \x85'
    task = make_task(Turn(text, [call("write_file", folder="docs", name=text, text=text)], text))
    assert Task.from_json(task.to_json()) == task
    assert replay(task, [task.turns[0].calls]) == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "not a task"),
        ("{", "not a task"),
        ("[]", "not a task"),
        ("null", "not a task"),
        ('"text"', "not a task"),
        ("{}", "turns"),
        (json.dumps(raw_task(turns=None)), "not a task"),
        (json.dumps(raw_task(turns=["text"])), "not a task"),
        (json.dumps(raw_task(turns=[raw_turn(calls=None)])), "not a task"),
        (json.dumps(raw_task(turns=[raw_turn(calls=["read_file"])])), "not a task"),
        (json.dumps(raw_task(turns=[raw_turn(calls=[{"name": "read_file"}])])), "arguments"),
        (json.dumps(raw_task(turns=[{"user": "?", "calls": []}])), "reply"),
        (json.dumps(raw_task(extra=1)), "extra"),
        (json.dumps({key: value for key, value in raw_task().items() if key != "state"}), "state"),
        (json.dumps(raw_task(category="easy")), "unknown category 'easy'; known: base, miss_func"),
        (json.dumps(raw_task(tools=["fly"])), "tool 'fly' has no API object"),
        (json.dumps(raw_task(tools=["transfer"])), "tool 'transfer' has no API object"),
        (json.dumps(raw_task(turns=[raw_turn(offers=["transfer"])])), "tool 'transfer' has no API object"),
        (json.dumps(raw_task(turns=[raw_turn(calls=[{"name": "fly", "arguments": {}}])])), "tool 'fly'"),
        (json.dumps(raw_task(turns=[])), "at least one turn"),
        (json.dumps(raw_task(turns=[raw_turn(calls=[])])), "one ground-truth call"),
        (json.dumps(raw_task(state={"Files": {"drawers": {}}, "Home": {}})), "Files: no field 'drawers'"),
        (json.dumps(raw_task(state={"Files": {}, "Home": {}, "Moon": {}})), "unknown class 'Moon'"),
        (json.dumps(raw_task(state={"Files": [], "Home": {}})), "state.Files must be an object"),
        (json.dumps(raw_task(state=None)), ""),
        (json.dumps(raw_task(tools=None)), ""),
        (json.dumps(raw_task(tools=[{"name": "read_file"}])), ""),
        (json.dumps(raw_task(turns=[raw_turn(offers=None)])), ""),
        (json.dumps(raw_task(category=["base"])), ""),
    ],
)
def test_a_malformed_task_is_refused_with_a_reason(line, named):
    """`Raises ValueError with what is wrong`, whatever is wrong: `load_tasks` adds file and line to it."""
    with pytest.raises(ValueError, match=".") as refused:
        Task.from_json(line)
    assert named in str(refused.value)


def test_the_raw_task_of_these_tests_is_right():
    assert Task.from_json(json.dumps(raw_task())).turns[0].calls == [READ_A]


def test_the_ground_truth_may_take_longer_than_a_call_usually_may(monkeypatch):
    """A slow tool of somebody: its task loads, and is solved where a run gives it the time."""
    task = load_tasks("train")[0]
    carry_out = env.carry_out
    monkeypatch.setattr(env, "carry_out", lambda *what: (time.sleep(0.05), carry_out(*what))[1])
    monkeypatch.setattr(env, "TOOL_SECONDS", 0.01)
    again = Task.from_json(task.to_json())
    for seconds, reward in ((5.0, 1.0), (0.01, 0.0)):
        episode = Episode(again, tool_seconds=seconds)
        for message in env.oracle(again):
            if message["role"] == "assistant":
                episode.step(message["content"])
        assert episode.reward == reward
