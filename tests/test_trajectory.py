"""Trajectories: tokens, masks and log-probs side by side."""

import pytest
import torch
from helpers.models import tiny_policy
from helpers.rollouts import (
    HINT,
    check_against_full_forward,
    check_layout,
    ragged_episodes,
    sampled,
    small_task,
)

from nanotoolrl.calls import FORMATS
from nanotoolrl.env import Episode
from nanotoolrl.sampler import Sampler
from nanotoolrl.trajectory import Trajectory


@pytest.fixture(scope="module")
def tiny(policy):
    return tiny_policy(policy.tokenizer)


@pytest.mark.parametrize("format", FORMATS)
def test_layout(tiny, train, format):
    tasks = train[:16:2]
    player = Sampler(tiny, max_new_tokens=24, slots=5)
    rows = player.rollout([Episode(task, format, max_messages=4) for task in tasks])
    for row, task in zip(rows, tasks, strict=True):
        episode = check_layout(tiny, row, task, max_messages=4)
        assert (row.task_id, row.category, row.format) == (task.id, task.category, format)
        assert (row.reward, row.verdicts) == (episode.reward, episode.turn_verdicts)
        assert row.source == "policy" and row.sampled_prompt is None and row.with_sampled_prompt() is row
        assert row.sampled_tokens == len(sampled(row))
    assert max(len(row.states) for row in rows) > 1


def test_stop_tokens_are_trained_in_every_turn(tiny):
    """As many sampled stop tokens as messages that stopped, each with mask and log-prob."""
    rows = Sampler(tiny, max_new_tokens=24).rollout(ragged_episodes())
    for row in rows:
        stops = [i for i, token in enumerate(row.tokens) if token in tiny.chat.stop_ids and row.loss_mask[i]]
        assert len(stops) == sum(state != "overlong" for state in row.states)
        assert all(row.logprobs[i] < 0 for i in stops)
    assert sum(len(row.states) for row in rows) > 2 * len(rows)


def test_sampled_ids_are_never_encoded_again(tiny):
    """A random model writes ids that no tokenizer would: they are kept, in every turn."""
    rows = Sampler(tiny, max_new_tokens=24).rollout(ragged_episodes())
    odd = 0
    for row, episode in zip(rows, ragged_episodes(), strict=True):
        check_layout(tiny, row, episode.task)
        check_against_full_forward(tiny, row, rows.index(row), 1.0)
        text = tiny.chat.decode(sampled(row))
        odd += tiny.chat.encode(text) != sampled(row) and "\ufffd" in text
    assert odd > 0


def test_other_stop_token(policy):
    """<|endoftext|> ends a message too; the layout is repaired by an unmasked <|im_end|>."""
    model = tiny_policy(policy.tokenizer, stop=1e-6)
    text_end = model.chat.special_ids["<|endoftext|>"]
    with torch.no_grad():
        model.head[text_end] = 0
        model.head[text_end, 0] = 100.0
    row = Sampler(model, max_new_tokens=8).rollout([Episode(small_task(turns=2))])[0]
    check_layout(model, row, small_task(turns=2))
    at = row.prompt_length
    assert row.tokens[at : at + 2] == [text_end, model.chat.end_id]
    assert row.loss_mask[at : at + 2] == [True, False]
    assert row.states == ["empty", "empty"] and row.tokens[-1] == text_end


def test_with_sampled_prompt(tiny):
    row = Sampler(tiny, max_new_tokens=24).rollout([Episode(small_task())], [HINT])[0]
    kept, own = row.with_sampled_prompt(), row.prompt_length
    assert kept.tokens == row.sampled_prompt + row.tokens[own:]
    assert kept.loss_mask == [False] * len(row.sampled_prompt) + row.loss_mask[own:]
    assert kept.logprobs == [0.0] * len(row.sampled_prompt) + row.logprobs[own:]
    assert kept.prompt_length == len(row.sampled_prompt) > own and kept.sampled_prompt is None
    assert sampled(kept) == sampled(row) and kept.sampled_tokens == row.sampled_tokens
    assert (kept.reward, kept.states, kept.source) == (row.reward, row.states, "hint")
    with torch.no_grad():
        trained = tiny.logprobs(torch.tensor([kept.tokens]), torch.tensor([kept.loss_mask]))[0]
    own = [x for x, mask in zip(kept.logprobs, kept.loss_mask, strict=True) if mask]
    assert trained.tolist() == pytest.approx(own, abs=2e-5)


def test_trajectory_example():
    """The three-token example of the docstring."""
    row = Trajectory("t", "base", "hermes", [], [], [], 2)
    row.append([5, 6], sampled=False)
    row.append([7], sampled=True, logprobs=[-0.5])
    row.append([1], sampled=True, logprobs=[-0.25])
    row.append([8], sampled=False)
    row.append([1], sampled=True, logprobs=[-0.125])
    assert row.tokens == [5, 6, 7, 1, 8, 1]
    assert row.loss_mask == [False, False, True, True, False, True]
    assert row.logprobs == [0.0, 0.0, -0.5, -0.25, 0.0, -0.125] and row.sampled_tokens == 3
