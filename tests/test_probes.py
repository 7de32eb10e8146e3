"""The probe set against whole softmax tables, and its layout against a rollout that says the ground truth."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_model import tiny_policy

from nanotoolrl.chat import FORMATS, control_tokens
from nanotoolrl.env import Episode, oracle
from nanotoolrl.probes import ProbeSet
from nanotoolrl.sampler import Sampler, demonstration
from nanotoolrl.tasks import load_tasks

COLUMNS = ["kl", "spurious_control", "required_control", "nll_control", "nll_content"]
COLUMNS += ["spurious_growth"]


@pytest.fixture
def tiny(policy):
    return tiny_policy(policy.tokenizer)


@pytest.fixture(scope="module")
def tasks():
    """Two tasks of every category."""
    every = load_tasks("train")
    categories = dict.fromkeys(task.category for task in every)
    return [task for name in categories for task in [task for task in every if task.category == name][:2]]


def laid_out(policy, task, format):
    """(ids, mask, where messages begin) of a demonstration."""
    row = demonstration(policy.chat, task, format)
    starts = [t for t in range(1, len(row.tokens)) if row.loss_mask[t] and not row.loss_mask[t - 1]]
    return row.tokens, row.loss_mask, starts


class Speaker:
    """Stands in for a model that continues the given ids, for certain, and checks what it is fed."""

    def __init__(self, policy, ids):
        self.chat, self.device, self.context = policy.chat, torch.device("cpu"), len(ids) + 1
        self.ids, self.head = torch.tensor([*ids, 0, 0]), torch.eye(len(policy.tokenizer))
        self.model = SimpleNamespace(model=self.forward)

    def forward(self, input_ids, position_ids, **_):
        assert torch.equal(input_ids, self.ids[position_ids])
        return SimpleNamespace(last_hidden_state=1000.0 * self.head[self.ids[position_ids + 1]])


@pytest.mark.parametrize("format", FORMATS)
def test_layout_is_that_of_a_rollout(policy, tasks, format):
    """A model that says the ground truth is rolled out to exactly these ids and this mask, and rewarded."""
    for task in tasks:
        ids, mask, starts = laid_out(policy, task, format)
        speaker = Speaker(policy, ids)
        row = Sampler(speaker, max_new_tokens=500).rollout([Episode(task, format)], temperature=0)[0]
        assert (row.tokens, row.loss_mask) == (ids, mask)
        shown = demonstration(policy.chat, task, format)
        assert (row.reward, row.states, row.verdicts) == (shown.reward, shown.states, shown.verdicts)
        said = [message["content"] for message in oracle(task, format) if message["role"] == "assistant"]
        assert row.messages(policy.chat) == [(text, True) for text in said]
        assert row.reward == 1.0 and set(row.states) <= {"call", "reply"}
        assert len(starts) == len(row.states)


@pytest.mark.parametrize("format", FORMATS)
def test_mask_covers_the_assistants_messages(policy, tasks, format):
    end = policy.chat.end_id
    for task in tasks:
        ids, mask, starts = laid_out(policy, task, format)
        said = [message["content"] for message in oracle(task, format) if message["role"] == "assistant"]
        assert len(ids) == len(mask) and len(starts) == len(said)
        assert sum(mask) == sum(len(policy.chat.assistant_ids(text, format)) for text in said)
        for start, text in zip(starts, said, strict=True):
            stop = ids.index(end, start)
            assert policy.chat.decode(ids[start:stop]) == text
            assert not mask[start - 1] and all(mask[start : stop + 1]) and not any(mask[stop + 1 : stop + 2])
            assert policy.chat.decode(ids[:start]).endswith("<|im_start|>assistant\n")


# ------------------------------------------------------------------------------------------------- columns
def plain(policy, start, tasks, format):
    """(columns, spurious probability by control token, the one that grew most), from whole [N, V]
    tables, row by row."""
    control = control_tokens(policy.chat, format)
    logp, logq, targets, firsts = [], [], [], []
    for task in tasks:
        ids, mask, starts = laid_out(policy, task, format)
        with torch.no_grad():
            ours, theirs = (
                torch.log_softmax(p.model(torch.tensor([ids])).logits[0], -1) for p in (policy, start)
            )
        for t in range(len(ids)):
            if mask[t]:
                logp.append(ours[t - 1])
                logq.append(theirs[t - 1])
                targets.append(ids[t])
                firsts.append(t in starts)
    logp, logq = torch.stack(logp), torch.stack(logq)  # [N, V]
    spurious, required = {}, []
    for name, token in control.items():
        p = logp[:, token].exp().tolist()
        places = list(zip(p, targets, firsts, strict=True))
        wrong = [x for x, target, first in places if target != token and not first]
        right = [x for x, target, _ in places if target == token]
        spurious[name] = sum(wrong) / len(wrong)
        required += [sum(right) / len(right)] if right else []
    nll = [-logp[i, target].item() for i, target in enumerate(targets)]
    of_control = [x for x, target in zip(nll, targets, strict=True) if target in control.values()]
    of_content = [x for x, target in zip(nll, targets, strict=True) if target not in control.values()]
    start = spurious if policy is start else plain(start, start, tasks, format)[1]
    growth = {name: max(p, 1e-6) / max(start[name], 1e-6) for name, p in spurious.items()}
    columns = {
        "kl": (logp.exp() * (logp - logq)).sum(-1).mean().item(),
        "spurious_control": sum(spurious.values()) / len(spurious),
        "required_control": sum(required) / len(required),
        "nll_control": sum(of_control) / len(of_control),
        "nll_content": sum(of_content) / len(of_content),
        "spurious_growth": max(growth.values()),
    }
    return columns, spurious, max(growth, key=growth.get)


def perturb(policy, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("at_once", [7, 100_000])
def test_columns_equal_whole_tables(policy, tiny, tasks, monkeypatch, format, at_once):
    monkeypatch.setattr("nanotoolrl.probes.ROWS_AT_ONCE", at_once)
    probes = ProbeSet(tiny, tasks[:4], format)
    perturb(tiny, 0.02)
    columns, worst = probes.measure(tiny)
    expected, _, token = plain(tiny, tiny_policy(policy.tokenizer), tasks[:4], format)
    assert list(columns) == COLUMNS and worst == token
    assert columns == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert expected["kl"] > 1e-3 and expected["spurious_control"] > 0 and expected["required_control"] > 0


def test_columns_of_the_builtin_model(policy, tasks):
    columns, _ = ProbeSet(policy, tasks[:3], "hermes").measure(policy)
    expected, *_ = plain(policy, policy, tasks[:3], "hermes")
    assert columns == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_nothing_moved(tiny, tasks):
    """At the start the divergence is 0 and nothing has grown; measuring changes nothing."""
    probes = ProbeSet(tiny, tasks, "hermes")
    columns, worst = probes.measure(tiny)
    assert columns["kl"] == 0.0 and columns["spurious_growth"] == 1.0
    assert probes.measure(tiny) == (columns, worst)
    assert all(math.isfinite(value) for value in columns.values())


def test_divergence_grows_with_the_change(tiny, tasks):
    """The start is kept by value: training in place must not move it along."""
    probes, seen = ProbeSet(tiny, tasks[:3], "hermes"), []
    for size in (0.003, 0.01, 0.03):
        perturb(tiny, size)
        seen.append(probes.measure(tiny)[0]["kl"])
    assert 0 < seen[0] < seen[1] < seen[2]


def test_set_is_frozen(policy, tiny, tasks):
    """Another model is compared with the start as well: it is not the object that is remembered."""
    probes = ProbeSet(tiny, tasks[:3], "hermes")
    other = tiny_policy(policy.tokenizer, seed=1)
    expected, *_ = plain(other, tiny, tasks[:3], "hermes")
    assert probes.measure(other)[0]["kl"] == pytest.approx(expected["kl"], rel=1e-3)


# --------------------------------------------------------------------------------------------------- growth
@pytest.mark.parametrize("name", ["<tool_call>", "<|im_start|>", "</tool_response>"])
def test_growth_names_the_token_that_is_pushed(tiny, tasks, name):
    probes = ProbeSet(tiny, tasks[:3], "hermes")
    before = probes.measure(tiny)[0]
    with torch.no_grad():
        tiny.head[tiny.chat.control[name], 0] += 50.0  # dimension 0 of the hidden state is always positive
    columns, worst = probes.measure(tiny)
    assert worst == name and columns["spurious_growth"] >= 10
    assert columns["spurious_control"] > before["spurious_control"]


def test_growth_is_that_of_the_mean_probability(tiny, tasks):
    probes = ProbeSet(tiny, tasks[:3], "hermes")
    token = tiny.chat.control["</tool_call>"]
    usual = tiny.head[token, 0].item()
    start = plain(tiny, tiny, tasks[:3], "hermes")[1]
    grown = []
    for push in (0.2, 0.6, 1.0, 1.5, 2.0, 8.0):
        with torch.no_grad():
            tiny.head[token, 0] = usual + push
        now = plain(tiny, tiny, tasks[:3], "hermes")[1]
        growth = {name: max(now[name], 1e-6) / max(start[name], 1e-6) for name in now}
        columns, worst = probes.measure(tiny)
        assert worst == max(growth, key=growth.get)
        assert columns["spurious_growth"] == pytest.approx(growth[worst], rel=1e-3)
        grown.append(growth[worst])
    assert any(3 < growth < 10 for growth in grown) and grown[-1] > 10


def test_growth_ignores_what_stays_tiny(tiny, tasks):
    """A probability that grows a thousandfold and stays under one in a million has not grown."""
    token = tiny.chat.control["<tool_call>"]
    with torch.no_grad():
        tiny.head[token] = 0
        tiny.head[token, 0] = -100.0
    probes = ProbeSet(tiny, tasks[:3], "hermes")
    with torch.no_grad():
        tiny.head[token, 0] = -50.0
    assert plain(tiny, tiny, tasks[:3], "hermes")[1]["<tool_call>"] < 1e-6
    assert probes.measure(tiny)[0]["spurious_growth"] < 2
