"""Scenarios to compare a turn with."""

import json
from collections import Counter

import pytest

from nanotoolrl.calls import Call
from nanotoolrl.env import replay
from nanotoolrl.world.api import API_CLASSES, owner_of
from nanotoolrl.world.generate import honest
from nanotoolrl.world.similar import similar
from nanotoolrl.world.tasks import load_tasks, subset

ANY = load_tasks("train")[0]  # of our own world


@pytest.fixture(scope="module")
def train(splits):
    return splits["train"]


def test_similar_scenarios_are_fresh_honest_and_of_the_train_pool(train):
    seen = set()
    for task in subset(train, 80):
        for i, turn in enumerate(task.turns):
            if not turn.calls:
                continue
            tools = [call.name for call in turn.calls]
            same, other = similar(ANY, turn.calls, [], f"{task.id}/{i}")
            assert len(same) == 3
            sequences = [[call.name for call in fresh.turns[0].calls] for fresh in same]
            assert sequences[0] == sequences[1] == sequences[2]
            at = [tools[k : k + len(sequences[0])] for k in range(len(tools))]
            assert sequences[0] in at
            rival = [call.name for call in other.turns[0].calls]
            assert rival != sequences[0]
            assert set(map(owner_of, rival)) & set(map(owner_of, sequences[0]))
            for fresh in [*same, other]:
                assert len(fresh.turns) == 1 and honest(fresh)
                assert {API_CLASSES[api].pool for api in fresh.state} == {"train"}
                assert all(fresh.state.get(api) != state for api, state in task.state.items())
            assert len({json.dumps(fresh.state) for fresh in same}) == 3
            seen.add(tuple(sequences[0]))
    assert len(seen) > 25


def test_similar_takes_the_longest_goal_and_shares_tools_with_the_other(train):
    calls = [Call("find_phone", {"person": "Mara"}), Call("send_message", {"phone": "1", "text": "x"})]
    inbox = Call("read_inbox", {"person": "Otto"})
    same, other = similar(ANY, [inbox, *calls], [], "s")
    assert [call.name for call in same[0].turns[0].calls] == ["read_inbox", "find_phone", "send_message"]
    assert {call.name for call in other.turns[0].calls} & {"read_inbox", "find_phone", "send_message"}
    assert similar(ANY, [inbox], train, "s", count=5)[0][4].turns[0].calls[0].name == "read_inbox"


def test_similar_is_a_pure_function_of_its_arguments(train):
    calls = next(turn.calls for turn in train[5].turns if turn.calls)
    assert (
        similar(ANY, calls, train, "a") == similar(ANY, calls, train, "a") != similar(ANY, calls, train, "b")
    )


def test_without_a_goal_similar_borrows_turns_of_other_tasks():
    """The foreign pool stands for a world without a generator."""
    foreign = load_tasks("foreign")
    sizes = Counter()
    for task in subset(foreign, 30):
        for turn in task.turns:
            same, other = similar(ANY, turn.calls, foreign, task.id)
            assert (same, other) == similar(ANY, turn.calls, foreign, task.id)
            sizes[len(same)] += bool(turn.calls)
            for found in [*same, *filter(None, [other])]:
                assert replay(found, [turn.calls for turn in found.turns]) == 1
                assert len(found.turns) == 1 and found.turns[0].calls != turn.calls
            tools = [{call.name for call in found.turns[0].calls} for found in same]
            assert all(names == {call.name for call in turn.calls} for names in tools)
    assert sizes[3] > 10 and set(sizes) <= {0, 1, 2, 3}
    assert similar(ANY, foreign[0].turns[0].calls, [], "s") == ([], None)
    assert similar(ANY, [], foreign, "s") == ([], None)


def test_a_borrowed_turn_that_cannot_stand_alone_brings_its_task(monkeypatch):
    foreign = load_tasks("foreign")
    monkeypatch.setattr("nanotoolrl.world.similar.replay", lambda task, calls: 0.0)
    same, other = similar(ANY, foreign[0].turns[0].calls, foreign, "s")
    assert other in foreign and all(task in foreign for task in same)
