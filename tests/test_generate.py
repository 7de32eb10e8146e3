"""The generator, and the committed tasks that it wrote."""

import copy
import json
from collections import Counter

import pytest

from nanotoolrl.env import CATEGORIES, oracle
from nanotoolrl.world.api import API, API_CLASSES, schema
from nanotoolrl.world.generate import _enlarge, generate, make_split
from nanotoolrl.world.goals import Domain, all_goals
from nanotoolrl.world.tasks import SPLITS


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_files_are_what_the_generator_writes(split, splits):
    assert splits[split] == make_split(split)


def test_split_sizes_and_categories(splits):
    counts = {split: Counter(task.category for task in tasks) for split, tasks in splits.items()}
    three = {"base": 100, "miss_func": 100, "miss_param": 100}
    assert counts["train"] == counts["foreign"] == three
    assert counts["test"] == counts["ood"] == three | {"long_context": 100}


def test_pools_stay_apart(splits):
    for split, tasks in splits.items():
        pool = split if split in ("foreign", "ood") else "train"
        assert {API_CLASSES[api].pool for task in tasks for api in task.state} == {pool}
    assert all(len({API_CLASSES[api].pool for api in goal.apis()}) == 1 for goal in all_goals())


def test_twins_stay_on_one_side_and_no_task_is_in_two_splits(splits):
    def conversation(task):
        return json.dumps([turn.user for turn in task.turns]) + json.dumps(task.state)

    seen = {}
    for split, tasks in splits.items():
        for task in tasks:
            assert task.id.startswith(split + "-")
            assert seen.setdefault(conversation(task), split) == split


def test_shape_of_tasks(splits):
    for tasks in splits.values():
        for task in tasks:
            assert 1 <= len(task.turns) <= 4
            assert all(len(turn.calls) <= 5 for turn in task.turns)
            offered = [tool for turn in task.turns for tool in turn.offers]
            assert 3 <= len(task.tools) + len(offered) <= 8
            assert not set(offered) & set(task.tools)
            empty = [i for i, turn in enumerate(task.turns) if not turn.calls]
            assert len(empty) == (task.category in ("miss_func", "miss_param"))
            assert bool(offered) == (task.category == "miss_func")


def test_most_tasks_show_distractors_and_hold_data_dependencies(splits):
    """A dependency: an argument whose value no user message holds, so that only a result can reveal it."""
    distracted = dependent = 0
    for task in splits["test"]:
        used = {call.name for turn in task.turns for call in turn.calls}
        distracted += bool(set(task.tools) - used)
        said = " ".join(turn.user for turn in task.turns)
        values = [str(v) for turn in task.turns for call in turn.calls for v in call.arguments.values()]
        dependent += any(value not in said for value in values)
    assert distracted > 200
    assert dependent > 200


def test_long_context_is_long(splits):
    def size(task):
        return sum(len(message["content"]) for message in oracle(task) if message["role"] == "tool")

    by = {category: [size(t) for t in splits["test"] if t.category == category] for category in CATEGORIES}
    assert sorted(by["long_context"])[50] > 4 * sorted(by["base"])[50]


@pytest.mark.slow
def test_prompt_and_transcript_budgets(splits, policy):
    """DESIGN: prompt at most 250 tokens at the median, transcript at most 600, long ones at most 2,048."""
    chat = policy.chat
    prompts, whole = [], []
    for task in splits["train"] + splits["test"]:
        messages = oracle(task)
        tools = [{"type": "function", "function": t} for t in _tools(task)]
        text = chat.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        whole.append(len(chat.encode(text)))
        prompts.append(len(chat.prompt_ids(messages[:2], _tools(task), "hermes")))
    assert sorted(prompts)[len(prompts) // 2] <= 250
    assert sorted(whole)[len(whole) // 2] <= 600
    assert max(whole) <= 2048


def _tools(task):
    return [schema(tool) for tool in task.tools]


def test_a_larger_world_keeps_what_is_there():
    """New records share no key with the old ones and join their groups. What is no record stays as it is."""
    domain = Domain(API, dict, dict, (), (), ("id", "name"), ("bed",))
    old, new = {"id": 11, "name": "rose", "bed": "north"}, {"id": 12, "name": "iris", "bed": "south"}
    rows = [{"id": 11, "name": "fern", "bed": "east"}, {"id": 13, "name": "rose", "bed": "east"}, new]
    small = {"plants": [old], "empty": [], "notes": ["a"], "count": 3, "box": {"a": {"x": 1}}}
    large = {"plants": rows, "empty": [dict(new)], "notes": ["b"], "count": 9, "box": {"b": {"y": 2}}}
    assert _enlarge(small, copy.deepcopy(large), domain) == small | {
        "plants": [old, new | {"bed": "north"}],
        "empty": [new],
        "box": {"a": {"x": 1, "y": 2}, "b": {"y": 2}},
    }


def test_generate_is_a_pure_function_of_its_name():
    assert generate("train", "x") == generate("train", "x") != generate("train", "y")
