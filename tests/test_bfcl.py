"""BFCL as tasks: its verdicts, its traps, and schemes that do not know which world they are in."""

import decimal
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanotoolrl import bfcl
from nanotoolrl.calls import FORMATS, Call, render_calls
from nanotoolrl.commandline import parse
from nanotoolrl.env import CAPPED, CATEGORIES, MAX_MESSAGES, Episode, oracle, replay
from nanotoolrl.look import evaluate
from nanotoolrl.sampler import Sampler
from nanotoolrl.supervise import hint_text, play_again, reflections, review
from nanotoolrl.trajectory import demonstration
from nanotoolrl.world.mutations import mutations
from nanotoolrl.world.similar import similar
from nanotoolrl.world.tasks import load_tasks
from nanotoolrl.world.tasks import main as tasks_command

LINE = "pip install --no-deps bfcl-eval mpmath"


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(bfcl.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=LINE):
        load_tasks("bfcl")
    assert evaluate.main(["--tasks", "bfcl"]) == 2 and bfcl.main(["--check"]) == 2
    assert capsys.readouterr().err.count(LINE) == 2


pytest.importorskip("bfcl_eval", reason=LINE)


@pytest.fixture(scope="module")
def tasks():
    return {task.id: task for task in load_tasks("bfcl")}


def a_task(tasks, category, i):
    return tasks[f"multi_turn_{category}_{i}"]


# ----------------------------------------------------------------------------------------- names and splits
def test_the_split_is_the_published_one():
    order = list(range(200))
    random.seed(42)
    random.shuffle(order)  # as the published code does
    assert bfcl.split_indices("train") == sorted(order[:100])
    assert bfcl.split_indices("test") == sorted(order[100:])
    assert bfcl.split_indices("train")[:5] == [0, 2, 3, 5, 10]
    assert bfcl.split_indices("test")[:5] == [1, 4, 6, 7, 8]


@pytest.mark.slow
def test_ground_truth_that_needs_the_benchmarks_limits(policy):
    """Calls of up to 304 tokens: nobody can make them under our own limits."""
    tasks, chat = load_tasks("bfcl:train"), policy.chat

    def found(limits):
        why = [evaluate.obstacle(chat, task, "hermes", limits, 10**6) for task in tasks]
        return [one for one in why if one]

    ours, theirs = found(evaluate.OUR_LIMITS), found(evaluate.BFCL_LIMITS)
    assert len(ours) > len(theirs) == 0
    assert any("a ground-truth call has" in one and "may have 128" in one for one in ours)


def test_what_the_built_in_models_context_holds(policy):
    """As a run with the default limits of these tasks counts them."""
    tasks, config = load_tasks("bfcl:train"), parse(["--tasks", "bfcl"])[0]
    room = min(config.context, policy.context) - 1
    hints = [hint_text(task, config.format) for task in tasks]
    why = [
        evaluate.obstacle(policy.chat, task, config.format, config.limits(), room, hint)
        for task, hint in zip(tasks, hints, strict=True)
    ]
    page = Path("docs/real-models.md").read_text(encoding="utf-8")
    assert f"holds {why.count('')} of the 300 tasks of `bfcl:train`" in page


@pytest.mark.parametrize(
    "name, count, categories",
    [
        ("bfcl", 800, CATEGORIES),
        ("bfcl:train", 300, CATEGORIES[:3]),
        ("bfcl:test", 400, CATEGORIES),
        ("bfcl:long_context", 200, ["long_context"]),
        ("bfcl:miss_func:train", 100, ["miss_func"]),
    ],
)
def test_names(name, count, categories):
    found = load_tasks(name)
    assert len(found) == len({task.id for task in found}) == count
    assert {task.category for task in found} == set(categories)


def test_train_and_test_share_no_index():
    halves = [
        {task.id.rpartition("_")[2] for task in load_tasks(f"bfcl:{half}")} for half in ("train", "test")
    ]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 200


@pytest.mark.parametrize("name", ["bfcl:bases", "bfcl:base:dev", "bfcl:train:base", "bfcl:", "base:test"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"expected bfcl\[:base"):
        bfcl.load_bfcl(name)


def test_official_says_nothing_about_other_tasks():
    with pytest.raises(ValueError, match="--bfcl-official says nothing about train"):
        load_tasks("train", official=True)


# ---------------------------------------------------------------------------------------------- verdicts
@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_verdicts_are_the_packages(category):
    """40 tasks of each: the ground truth in every format, every call dropped, every argument changed. All of
    them: `python -m nanotoolrl.bfcl --check`."""
    plays = 0
    for task in load_tasks(f"bfcl:{category}")[::5]:
        count, wrong = bfcl.differences(task)
        assert not wrong
        plays += count
    assert plays > 600


@pytest.mark.slow
def test_the_check_finds_a_wrong_verdict(monkeypatch, capsys):
    monkeypatch.setattr(bfcl.BfclTask, "why_turn_fails", lambda *_: "")
    assert bfcl.main(["--check", "--tasks", "bfcl:base:test"]) == 1
    assert "ours True, the package's False" in capsys.readouterr().out


def test_numbers_read_as_the_benchmark_writes_them_whatever_ran_before():
    """The package's executor leaves its precision behind, for the whole process."""
    task = next(task for task in load_tasks("bfcl:miss_func") if task.id == "multi_turn_miss_func_59")
    truth = [turn.calls for turn in task.turns]
    before = replay(task, truth)
    assert task.expected[-1][1] == ["{'result': mpf('2.299121531134')}"]
    assert bfcl.official_verdict(task, truth, truth)
    assert before == replay(task, truth) == 1
    again = replace(task)
    assert [results for _, results in again.expected] == [results for _, results in task.expected]


def test_the_check_finds_an_observation_that_differs(monkeypatch, capsys):
    execute = bfcl.BfclTask.execute
    changed = lambda *arguments: execute(*arguments).replace("2.299121531134", "2.2991215311340056")  # noqa: E731
    monkeypatch.setattr(bfcl.BfclTask, "execute", changed)
    task = next(task for task in load_tasks("bfcl:miss_func") if task.id == "multi_turn_miss_func_59")
    _, wrong = bfcl.differences(task)
    assert any("observations before the package's" in line for line in wrong)


def test_a_right_rollout_after_a_wrong_one_still_passes(tasks):
    """200 of 200: nothing is left of a rollout, in the module globals of the package or elsewhere."""
    utils = sys.modules["bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils"]
    before = set(vars(utils))
    for i in range(200):
        task = a_task(tasks, "base", i)
        truth = [turn.calls for turn in task.turns]
        for calls in mutations(task)[-2:]:
            replay(task, calls)
        assert replay(task, truth) == 1, task.id
        assert bfcl.official_verdict(task, truth, truth)
    assert set(vars(utils)) == before


def played(task, *calls, format="hermes"):
    """The answers to calls, a message each."""
    episode = Episode(task, format)
    return [episode.step(render_calls([call], format))[0]["content"] for call in calls]


def test_a_default_that_a_class_keeps_stays_as_it_is(tasks):
    """`post_tweet` keeps its default list of mentions, `mention` extends it."""
    tweeting = [task for task in tasks.values() if "TwitterAPI" in task.classes]
    account = tweeting[0].state["TwitterAPI"]
    answers = played(
        tweeting[0],
        Call("authenticate_twitter", {name: account[name] for name in ("username", "password")}),
        Call("post_tweet", {"content": "hi"}),
        Call("mention", {"tweet_id": account["tweet_counter"], "mentioned_usernames": ["@else"]}),
    )
    assert "mentioned successfully" in answers[-1]
    assert all(replay(task, [turn.calls for turn in task.turns]) == 1 for task in tweeting)


def test_long_contexts_are_not_shared(tasks):
    """Booking with a card of the long context lowers its balance, in this episode."""
    long = [task for task in tasks.values() if task.category == "long_context"]
    travelling = [task for task in long if "TravelAPI" in task.classes]
    task = next(task for task in travelling if task.state["TravelAPI"].get("access_token"))
    state, cards = task.state["TravelAPI"], task.new_world()["TravelAPI"].credit_card_list
    token = {"access_token": state["access_token"]}
    flight = {"travel_from": "SFO", "travel_to": "LAX", "travel_date": "2024-11-11"}
    flight |= {"card_id": next(iter(cards.keys() - state["credit_card_list"])), "travel_class": "economy"}
    answers = played(
        task,
        Call("set_budget_limit", token | {"budget_limit": 0}),
        Call("book_flight", token | flight),
    )
    assert '"booking_status": true' in answers[-1]
    assert task.new_world()["TravelAPI"].credit_card_list == cards
    assert all(replay(one, [turn.calls for turn in one.turns]) == 1 for one in travelling)


def test_a_precision_stays_with_its_call(tasks):
    task = next(task for task in tasks.values() if "MathAPI" in task.classes)
    root = Call("square_root", {"number": 2, "precision": 3})
    log = Call("logarithm", {"value": 3, "base": 10, "precision": 40})
    answers = played(task, root, log, root, log)
    assert answers[:2] == answers[2:] and decimal.getcontext().prec == 28


def test_episodes_share_no_state(tasks):
    task = a_task(tasks, "base", 0)
    first, second = Episode(task), Episode(task)
    first.step(
        render_calls([Call("cd", {"folder": "document"}), Call("mkdir", {"dir_name": "temp"})], "hermes")
    )
    assert first.world["GorillaFileSystem"].root != second.world["GorillaFileSystem"].root
    assert second.step(render_calls([Call("pwd", {})], "hermes"))[0]["content"] == (
        '{"current_working_directory": "/workspace"}'
    )


def test_arguments_that_a_class_keeps_stay_as_they_are(tasks):
    """`mention` extends a list that `post_tweet` got as its argument."""
    task = a_task(tasks, "base", 147)
    before = str(task.turns)
    assert replay(task, [turn.calls for turn in task.turns]) == 1 and str(task.turns) == before


def test_a_turn_without_a_call_fails_where_there_is_ground_truth(tasks):
    task = a_task(tasks, "base", 0)
    assert task.why_turn_fails(0, task.expected[0][0], task.expected[0][1], calls=0) == "nothing was called"
    assert task.why_turn_fails(0, task.expected[0][0], task.expected[0][1], calls=1) == ""


# --------------------------------------------------------------------------------------------- hostile text
def test_model_text_is_never_evaluated(tasks, tmp_path):
    """The package's executor would run these."""
    task, trap = a_task(tasks, "base", 0), tmp_path / "trap"
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    texts = [
        f"[cd(folder={code})]",
        f'<tool_call>{{"name": "{code}", "arguments": {{}}}}</tool_call>',
        render_calls([Call("cd", {"folder": code})], "hermes"),
        '<tool_call>{"name": "_load_scenario", "arguments": {"scenario": {}}}</tool_call>',
        '<tool_call>{"name": "__init__", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "root", "arguments": {}}</tool_call>',
    ]
    for format in FORMATS:
        for official in (False, True):
            task.official = official
            episode = Episode(task, format)
            for text in texts:
                episode.step(text)
    task.official = False
    assert not trap.exists()


@pytest.mark.parametrize(
    "call",
    [
        Call("power", {"base": 10, "exponent": 10**9}),
        Call("logarithm", {"value": 2, "base": 10, "precision": 10**9}),
        Call("square_root", {"number": 2, "precision": 10**9}),
        Call("round_number", {"number": 2.5, "decimal_places": -(10**9)}),
        Call("power", {"base": 10**15, "exponent": 999}),
        Call("power", {"base": 2**2000, "exponent": 1000}),
        Call("logarithm", {"value": 3, "base": 10, "precision": "1000000"}),
        Call("power", {"base": "x", "exponent": None}),
        Call("mean", {"numbers": "abc"}),
        Call("mean", {"number": 1}),
        Call("cat", {"file_name": ["a"]}),
        Call("cat", {}),
        Call("wc", {"file_name": {"a": 1}, "mode": 7}),
    ],
    ids=str,
)
def test_no_call_raises_or_keeps_the_machine_busy(tasks, call):
    task = next(t for t in tasks.values() if {"MathAPI", "GorillaFileSystem"} <= set(t.classes))
    (answer,) = Episode(task).step(render_calls([call], "hermes"))
    assert "rror" in answer["content"] and len(answer["content"]) < 20_000


def test_a_directory_that_doubles_is_not_walked_through(tasks):
    """Copies share what they hold: forty pairs of calls make more entries than any memory could list."""
    task = next(task for task in tasks.values() if {"cp", "mv"} <= set(task.tools))
    episode = Episode(task, max_messages=100)
    episode.step(render_calls([Call("mkdir", {"dir_name": "d0"})], "hermes"))
    for i in range(0, 40, 4):
        steps = [{"source": f"d{k}", "destination": f"d{k + 1}"} for k in range(i, i + 4)]
        episode.step(render_calls([Call(name, step) for step in steps for name in ("cp", "mv")], "hermes"))
    answers = episode.step(render_calls([Call("find", {}), Call("du", {})], "hermes"))
    assert all("more than 10000 files and directories" in answer["content"] for answer in answers)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "9" * 4000])
def test_a_huge_integer_is_no_argument(tasks, format, number):
    text = {
        "python": "[lockDoors(unlock=True, door=[N])]",
        "xml": "<function=lockDoors><parameter=door>[N]</parameter></function>",
        "hermes": '<tool_call>{"name": "lockDoors", "arguments": {"unlock": true, "door": [N]}}</tool_call>',
    }[format]
    task = next(task for task in tasks.values() if "lockDoors" in task.tools)
    (answer,) = Episode(task, format).step(text.replace("N", number))
    assert "rror" in answer["content"]


def test_a_directory_inside_itself_is_a_wrong_state(tasks):
    task = next(t for t in tasks.values() if "cp" in t.tools and t.category == "base")
    episode = Episode(task)
    calls = [
        Call("mkdir", {"dir_name": "a"}),
        Call("cp", {"source": "a", "destination": "a"}),
        Call("find", {}),
    ]
    episode.step(render_calls(calls, "hermes"))
    for _ in task.turns:
        episode.step("Done.")
    assert episode.done and episode.reward == 0


# ------------------------------------------------------------------------------------ the benchmark's rules
def test_a_hidden_tool_can_be_called_only_by_the_official_rules(tasks):
    task = a_task(tasks, "miss_func", 0)
    assert task.turns[3].offers == ["sort"] and "sort" not in task.tools
    call = render_calls([Call("sort", {"file_name": "final_report.pdf"})], "hermes")
    assert "no tool 'sort'" in Episode(task).step(call)[0]["content"]
    official = next(t for t in load_tasks("bfcl:miss_func", official=True) if t.id == task.id)
    assert "no tool" not in Episode(official).step(call)[0]["content"]
    assert "no tool" in Episode(official).step(render_calls([Call("post", {})], "hermes"))[0]["content"]


def test_an_offer_lists_the_tool_in_the_benchmarks_words(tasks, policy):
    task = a_task(tasks, "miss_func", 0)
    offers = [message for message in oracle(task) if "tools" in message]
    assert [message["content"] for message in offers] == [bfcl.OFFER]
    assert [tool["name"] for tool in offers[0]["tools"]] == ["sort"]
    shown = policy.chat.decode(policy.chat.prompt_ids(*Episode(task).prompt(), "hermes"))
    assert "sort(" not in shown and "grep(" in shown


def test_caps(tasks):
    task = a_task(tasks, "base", 0)
    text = render_calls([Call("pwd", {})], "hermes")
    episode = Episode(task, max_messages=100)
    for _ in range(bfcl.STEPS_A_TURN):
        assert episode.step(text)
    assert episode.step(text) is None and episode.done  # as in the benchmark, one more is executed
    assert episode.turn_verdicts[-1].reason == "the cap on messages was reached"
    for official, done in ((False, True), (True, False)):
        task.official = official
        episode = Episode(task, max_messages=5)
        for _ in range(5):
            episode.step(text)
        assert episode.done == done
    task.official = False


def test_a_last_turn_that_was_stopped_is_judged(tasks):
    """As in the benchmark, which hands what was done to its checker."""
    task = a_task(tasks, "base", 0)
    *first, last = [turn.calls for turn in task.turns]
    for calls, reward in ((last, 1), (last[:-1], 0)):
        episode = Episode(task, max_messages=100)
        for turn in first:
            episode.step(render_calls(turn, "hermes"))
            episode.step("done")
        episode.step(render_calls(calls, "hermes"))
        for _ in range(bfcl.STEPS_A_TURN):
            assert not episode.done
            episode.step(render_calls([Call("pwd", {})], "hermes"))
        assert episode.done and episode.reward == reward
        assert reward or episode.turn_verdicts[-1].reason == CAPPED  # a limit ended it: `Trajectory.cut`
        whole = [*first, [*calls, *[Call("pwd", {})] * bfcl.STEPS_A_TURN]]
        assert bfcl.official_verdict(task, whole, [*first, last]) == reward


def test_long_contexts_are_long(tasks):
    short, long = (
        a_task(tasks, category, 0).new_world()["GorillaFileSystem"] for category in ("base", "long_context")
    )
    assert len(str(long.root)) > 3 * len(str(short.root))


def test_schemas_are_json_schema(tasks):
    kinds = set()

    def walk(value):
        if isinstance(value, dict):
            kinds.update([value["type"]] if isinstance(value.get("type"), str) else [])
            for item in value.values():
                walk(item)

    for task in tasks.values():
        for tool in Episode(task).prompt()[1]:
            assert set(tool) == {"name", "description", "parameters"}
            walk(tool["parameters"])
    assert kinds == {"object", "string", "integer", "number", "boolean", "array"}


def test_the_longest_ground_truth_fits_into_an_episode(tasks):
    task = max(tasks.values(), key=lambda task: sum(len(turn.calls) for turn in task.turns))
    messages = [message for message in oracle(task) if message["role"] == "assistant"]
    assert sum(len(turn.calls) for turn in task.turns) == 35 and len(messages) <= MAX_MESSAGES


# --------------------------------------------------------------------------------------------------- schemes
def test_supervision_works_on_its_tasks(tasks, policy):
    """Hints, demonstrations and reflections, similar scenarios among them."""
    others = load_tasks("bfcl:train")
    sampler = Sampler(policy, max_new_tokens=24)
    small = sorted(others, key=lambda task: len(str(Episode(task).prompt())))[:2]
    rows = sampler.rollout(
        [Episode(task, max_messages=6) for task in small], [hint_text(t, "hermes") for t in small]
    )
    for task, row in zip(small, rows, strict=True):
        assert row.reward == 0 and row.source == "hint"
        assert demonstration(policy.chat, task, "hermes").reward == 1
        found = review(task, row, policy.chat)
        assert found.turns[found.error_turn].mistake
        pairs, judged = reflections(task, row, policy.chat, others, 8192)
        assert len(pairs) == 2 and not judged
        calls = next(turn.calls for turn in task.turns if turn.calls)
        same, other = similar(task, calls, others, "s")
        for scenario in [*same, other]:
            assert replay(scenario, [turn.calls for turn in scenario.turns]) == 1
            assert set(scenario.classes) & set(task.classes)


def test_calls_that_failed_are_known_to_reflections(tasks):
    calls = [Call("cd", {"nonsense": 1}), Call("cd", {"folder": "nowhere"}), Call("pwd", {})]
    turn, *_ = play_again(a_task(tasks, "base", 0), [(render_calls(calls, "hermes"), True)], "hermes")
    assert [attempt.refused for attempt in turn.attempts] == [True, True, False]


def test_a_turn_alone_begins_where_it_did(tasks):
    task = a_task(tasks, "base", 0)
    for i, turn in enumerate(task.turns):
        alone = task.turn_alone(i, "do it")
        assert alone.turns[0].user == "do it" and replay(alone, [turn.calls]) == 1
        assert not i or replay(alone, [task.turns[0].calls]) == 0


# ---------------------------------------------------------------------------------------------- the commands
def test_export(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    assert tasks_command(["--export", str(path), "--tasks", "bfcl:test"]) == 0
    assert "400 tasks in" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    task = load_tasks("bfcl:test")[0]
    assert [sorted(row) for row in rows] == [
        ["ability", "data_source", "extra_info", "prompt", "reward_model"]
    ] * 400
    row = rows[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    truth = json.loads(row["reward_model"]["ground_truth"])
    assert truth == [[{"name": c.name, "arguments": c.arguments} for c in turn.calls] for turn in task.turns]
    assert json.loads(row["extra_info"]["state"]) == task.state
    assert len(json.loads(row["extra_info"]["tools"])) == len(task.tools)
    kinds = {name: {type(row["extra_info"][name]) for row in rows} for name in row["extra_info"]}
    assert kinds == {"index": {int}, "id": {str}, "tools": {str}, "turns": {str}, "state": {str}}


@pytest.mark.slow
def test_evaluate_prints_the_papers_table(capsys):
    flags = ["--tasks", "bfcl:test", "--count", "12", "--max-messages", "1", "--format", "hermes"]
    assert evaluate.main(flags) == 0
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert head.split() == ["success", "%", *CATEGORIES, "avg"]
    assert row.startswith("hermes") and row.endswith("n=12")
