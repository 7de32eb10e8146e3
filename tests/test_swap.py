"""Two models that write one message."""

import pytest
import torch
from helpers.models import tiny_policy

from nanotoolrl.env import Episode
from nanotoolrl.loading import load
from nanotoolrl.look.swap import structural, swapped
from nanotoolrl.sampler import Sampler
from nanotoolrl.world.tasks import load_tasks


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def tokens_of(sampler, count=6, **how):
    episodes = [Episode(task) for task in load_tasks("train")[:count]]
    return [row.tokens for row in sampler.rollout(episodes, **how)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_swapped_with_itself_chooses_among_its_own(nano, temperature):
    """Greedily the words of one model are its own: nothing changes. Else structure still is."""
    own = Sampler(nano, context=1024)
    found = tokens_of(swapped(own, nano, nano, "hermes"), temperature=temperature)
    expected = tokens_of(own, temperature=temperature)
    assert (found == expected) == (temperature == 0)


def test_each_writes_its_part(nano):
    """Structure of the built-in model, words of one that knows nothing; and the reverse."""
    fool = tiny_policy(nano.tokenizer)
    own = Sampler(nano, context=1024, max_new_tokens=64)
    mask = structural(nano, "hermes")
    names = {nano.chat.decode([i]) for i in torch.nonzero(mask)[:, 0].tolist()}
    assert {"<tool_call>", '{"', "name", "arguments", '": "', "<|im_end|>", "\n"} <= names
    assert not {"Frida", "4", "assign_ticket"} & names
    rows = swapped(own, nano, fool, "hermes").rollout(
        [Episode(task) for task in load_tasks("train")[:6]], temperature=0.0
    )
    said = [nano.chat.decode(ids) for row in rows for ids in row.spoken_ids()]
    assert any(text.startswith('<tool_call>\n{"name": "') for text in said), said
    assert not any(row.reward for row in rows)
    # A log-prob is that of the model which chose.
    sampled = [(t, x) for row in rows for t, x, on in zip(row.tokens, row.logprobs, row.loss_mask) if on]
    assert {bool(mask[t]) for t, _ in sampled} == {True, False} and all(x <= 0 for _, x in sampled)


def test_other_tokens_are_refused(nano, monkeypatch):
    other = load("nano")
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="the same tokens"):
        swapped(Sampler(nano), nano, other, "hermes")
