"""Trajectories recorded as text: what changes, and what does not."""

import pytest

from nanotoolrl.record import recorded
from nanotoolrl.trajectory import Trajectory

PROMPT = [5, 6]


@pytest.fixture
def chat(policy):
    return policy.chat


def row(*messages, given=((7, 8),)):
    """A rollout of some messages, with given tokens between them."""
    made = Trajectory("t", "base", "hermes", [], [], [], len(PROMPT))
    made.append(PROMPT, sampled=False)
    for i, ids in enumerate(messages):
        made.append(ids, sampled=True, logprobs=[-0.5] * len(ids))
        if i + 1 < len(messages):
            made.append(list(given[i]), sampled=False)
    return made


def test_newlines_become_a_token_that_was_not_sampled(chat):
    newline, double = (chat.encode(text) for text in ("\n", "\n\n"))
    assert len(double) == 1
    sampled = row([*newline, *newline, chat.end_id], [*chat.encode("Done."), chat.end_id])
    for how in ("text", "encode"):
        found = recorded(sampled, chat, how)
        assert found.tokens == [*PROMPT, *double, chat.end_id, 7, 8, *chat.encode("Done."), chat.end_id]
        assert found.spoken_ids()[0] == [*double, chat.end_id] and found.rewritten == 1
        assert not found.scored and set(found.logprobs) == {0.0} and sampled.scored
    for how in ("exact", "stop", "vanish"):
        assert recorded(sampled, chat, how) is sampled


def test_special_tokens_vanish_and_tags_stay(chat):
    begin, tag = chat.special_ids["<|im_start|>"], chat.special_ids["<tool_call>"]
    sampled = row([tag, begin, chat.end_id])
    for how in ("text", "vanish"):
        assert recorded(sampled, chat, how).spoken_ids() == [[tag, chat.end_id]]
    for how in ("encode", "stop"):
        assert recorded(sampled, chat, how) is sampled


def test_a_cut_message_gets_a_stop(chat):
    sampled = row(chat.encode("Done"))
    for how in ("text", "stop"):
        found = recorded(sampled, chat, how)
        assert found.spoken_ids() == [[*chat.encode("Done"), chat.end_id]]
        assert len(found.tokens) == len(found.loss_mask) == len(found.logprobs)
    for how in ("encode", "vanish"):
        assert recorded(sampled, chat, how) is sampled


def test_another_stop_is_not_closed_twice(chat):
    """Behind `<|endoftext|>` the sampler writes the layout's stop; recorded as text, the message has it."""
    other = chat.special_ids["<|endoftext|>"]
    sampled = row([*chat.encode("Ok"), other], [*chat.encode("Ok"), chat.end_id], given=[[chat.end_id, 9]])
    found = recorded(sampled, chat, "text")
    ok = chat.encode("Ok")
    assert found.tokens == [*PROMPT, *ok, chat.end_id, 9, *ok, chat.end_id] and found.rewritten == 1
    assert found.spoken_ids() == [[*ok, chat.end_id]] * 2


def test_messages_that_agree_are_the_same_row(chat):
    call = chat.assistant_ids('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "hermes")
    sampled = row(call, [*chat.encode("Done."), chat.end_id])
    assert all(recorded(sampled, chat, how) is sampled for how in ("text", "encode", "stop", "vanish"))
