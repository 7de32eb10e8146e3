"""Rollouts: small tasks, and what every rollout must be."""

import numpy as np
import pytest
import torch

from helpers.models import whole_logits
from nanotoolrl import noise
from nanotoolrl.env import Call, Episode, Task, Turn

HINT = "Hint: move b from docs to work."


MESSAGES = 5  # assistant messages per episode, to save time


def small_task(name="small", turns=3):
    """A task with a short prompt; its last turn has a call."""
    listing = Call("list_files", {"folder": "docs"})
    told = [Turn(f"{name}, word {n}?", [], "What?") for n in range(turns - 1)]
    state = {"Files": {"folders": {"docs": {"b": "x"}}}}
    return Task(name, "base", state, ["list_files"], [*told, Turn("List.", [listing], "b.")])


def uniform(seed, streams, places):
    """Numpy in, numpy out."""
    keys = (torch.from_numpy(np.asarray(x, np.uint64).view(np.int64)) for x in (streams, places))
    return noise.uniform(seed, *keys).numpy()


def ragged_episodes():
    """10 episodes of 8 tasks with prompts of several lengths; two tasks are played twice."""
    tasks = [small_task("a " * (5 * n) + str(n), turns=2 + n % 3) for n in range(8)]
    return [Episode(task, max_messages=MESSAGES) for task in [*tasks, tasks[3], tasks[3]]]


def check_against_full_forward(policy, row, place, temperature, seed=0, stream=0):
    """Every sampled token of a trajectory is the one that its own noise picks from the distribution of a full
    uncached forward, and its log-prob is that distribution's."""
    seen = row.with_sampled_prompt()
    shift = seen.prompt_length - row.prompt_length
    with torch.no_grad():
        logits = whole_logits(policy, torch.tensor([seen.tokens]))[0].float()
    for t, sampled in enumerate(row.loss_mask):
        if not sampled:
            assert row.logprobs[t] == 0.0
            continue
        logprobs = torch.log_softmax(logits[t + shift - 1] / (temperature or 1.0), -1)
        token = row.tokens[t]
        assert row.logprobs[t] == pytest.approx(logprobs[token].item(), abs=2e-5)
        if temperature == 0:
            assert logprobs[token] >= logprobs.max() - 1e-5
        else:
            noise = uniform(seed, np.array([(stream << 32) + place], np.uint64), np.array([t], np.uint64))[0]
            below = logprobs[:token].double().exp().sum().item()
            assert below - 1e-5 <= noise <= below + logprobs[token].double().exp().item() + 1e-5


def check_layout(policy, row, task, max_messages=MESSAGES):
    """Replays the trajectory: prompt, sampled messages and observations stand where and as they should."""
    chat, episode = policy.chat, Episode(task, row.format, max_messages)
    assert len(row.tokens) == len(row.loss_mask) == len(row.logprobs)
    prompt = chat.prompt_ids(*episode.prompt(), row.format)
    assert row.tokens[: row.prompt_length] == prompt and not any(row.loss_mask[: row.prompt_length])
    t, messages = row.prompt_length, 0
    while t < len(row.tokens):
        start = t
        while t < len(row.tokens) and row.loss_mask[t]:
            t += 1
            if row.tokens[t - 1] in chat.stop_ids:
                break
        message = row.tokens[start:t]
        assert message, "an observation follows an observation"
        stopped = message[-1] in chat.stop_ids
        messages += 1
        answer = episode.step(chat.decode(message[:-1] if stopped else message), overlong=not stopped)
        if answer is None:
            break
        ids = chat.extend_ids(answer, message[-1])
        if t < len(row.tokens):  # else the context was full
            assert row.tokens[t : t + len(ids)] == ids and not any(row.loss_mask[t : t + len(ids)])
            t += len(ids)
    assert t == len(row.tokens) and messages == len(row.states)
    return episode


def same_rows(rows, others):
    for a, b in zip(rows, others, strict=True):
        assert a.tokens == b.tokens and a.loss_mask == b.loss_mask and a.reward == b.reward
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)


def sampled(row):
    return [token for token, mask in zip(row.tokens, row.loss_mask, strict=True) if mask]


def scripted(policy, task, texts):
    """(ids, mask) of a conversation in which the assistant says `texts`."""
    chat, episode = policy.chat, Episode(task)
    ids = chat.prompt_ids(*episode.prompt(), "hermes")
    mask = [False] * len(ids)
    for text in texts:
        message = chat.assistant_ids(text, "hermes")
        answer = episode.step(text)
        after = [] if answer is None else chat.extend_ids(answer, message[-1])
        ids, mask = ids + message + after, mask + [True] * len(message) + [False] * len(after)
    return ids, mask


CALL = '<tool_call>\n{"name": "list_files", "arguments": {"folder": "docs"}}\n</tool_call>'
