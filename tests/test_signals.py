"""Schemes that train examples: which, when, and with what weight."""

import pytest
import torch
from helpers.models import tiny_policy
from helpers.updates import (
    all_close,
    examples,
    graded,
    gradient_of,
    loss_by_hand,
    made_up,
    make_run,
    objective_of,
    parameters_of,
    sft_by_hand,
    tasks,
)

from nanotoolrl import sft, signals
from nanotoolrl.chat import control_tokens
from nanotoolrl.run import (
    Step,
)
from nanotoolrl.sampler import Sampler
from nanotoolrl.signals import SCHEMES
from nanotoolrl.trajectory import demonstration
from nanotoolrl.world.tasks import load_tasks


@pytest.mark.parametrize("phi", [False, True])
def test_chord_by_hand(tiny, monkeypatch, phi):
    rows, advantages = made_up(tiny)
    settings = {"chord_mu": 0.4, "chord_steps": 10, "chord_phi": phi, "temperature": 1.0}
    gradients, metrics = objective_of("chord", monkeypatch, tiny, rows, advantages, **settings)
    config = make_run(tiny).config
    shown = [demonstration(tiny.chat, task, "hermes") for task in tasks(2)]
    weight = {"weight": lambda p: p * (1 - p)} if phi else {}
    loss = 0.6 * loss_by_hand(tiny, rows, advantages, config) + 0.4 * sft_by_hand(tiny, shown, **weight)
    all_close(gradients[0], gradient_of(loss, tiny), atol=2e-5, rtol=1e-3)
    assert metrics["chord_mu"] == 0.4


def test_chord_decays(tiny, monkeypatch):
    rows, _ = made_up(tiny)
    monkeypatch.setattr(signals, "rollout", lambda *_: rows)
    run, seen = make_run(tiny, chord_mu=0.8, chord_steps=4), []
    for step in range(1, 7):
        run.step = step
        seen.append(SCHEMES["chord"].step(run, tasks()).metrics["chord_mu"])
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0, 0.0])


def test_hpt_by_hand(tiny, monkeypatch):
    """The group that failed is trained by SFT on its ground truth, the other by its advantages."""
    rows, advantages = made_up(tiny)
    advantages[:4] = 0.0
    rows[5].reward = 1.0
    gradients, metrics = objective_of("hpt", monkeypatch, tiny, rows, advantages, sft_coef=0.3)
    shown = [demonstration(tiny.chat, tasks(1)[0], "hermes")]
    loss = loss_by_hand(tiny, rows, advantages, make_run(tiny).config) + 0.3 * sft_by_hand(tiny, shown)
    all_close(gradients[0], gradient_of(loss, tiny), atol=2e-5, rtol=1e-3)
    assert metrics["failed_tasks"] == 1 and metrics["sft_tokens"] == shown[0].sampled_tokens
    assert metrics["sft_loss"] == pytest.approx(sft_by_hand(tiny, shown).item(), abs=1e-5)


def test_sync_rides_along_in_every_update(tiny, monkeypatch):
    rows, advantages = made_up(tiny)
    settings = {"schedule": "sync", "sft_coef": 0.5, "updates": 2, "sft_window": 1}
    gradients, metrics = objective_of("ets", monkeypatch, tiny, rows, advantages, **settings)
    shown = [demonstration(tiny.chat, task, "hermes") for task in tasks(2)]
    for part, gradient in zip((slice(0, 4), slice(4, 8)), gradients, strict=True):
        loss = loss_by_hand(tiny, rows[part], advantages[part], make_run(tiny).config)
        loss = loss + 0.5 * sft_by_hand(tiny, shown)
        all_close(gradient, gradient_of(loss, tiny), atol=2e-5, rtol=1e-3)
    assert metrics["failed_tasks"] == 2 and metrics["sft_tokens"] == 2 * sum(x.sampled_tokens for x in shown)


def test_nothing_failed(tiny, monkeypatch):
    """No example: sync is grpo, a burst is none, and no metric claims otherwise."""
    rows, advantages = made_up(tiny)
    for row in rows[::4]:
        row.reward = 1.0
    gradients, metrics = objective_of("ets", monkeypatch, tiny, rows, advantages, schedule="sync")
    plain, _ = objective_of("grpo", monkeypatch, tiny, rows, advantages)
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], plain[0], strict=True))
    assert metrics["failed_tasks"] == 0 and "sft_loss" not in metrics
    assert sft.burst(make_run(tiny), []) == {"sft_tokens": 0}


def test_equal_tokens_for_ets_and_its_control(policy, monkeypatch):
    """With `--sft-tokens`, the bursts of `ets` and of `bursts` train the same number of tokens, within one
    example, however many tasks failed."""
    counts = {}
    for name, schedule in (("ets", "interleaved"), ("bursts", "none")):
        run = make_run(tiny_policy(policy.tokenizer), sft_tokens=100, round_steps=1, sft_window=1, lr=1e-3)
        for run.step in (1, 2):
            run.config.schedule = schedule
            metrics = SCHEMES[name].step(run, tasks(3 if name == "ets" else 1)).metrics
        counts[name] = metrics["sft_tokens"]
    longest = max(row.sampled_tokens for row in examples(tiny_policy(policy.tokenizer), 3))
    assert all(100 <= count < 100 + longest for count in counts.values())


def test_failed_tasks_are_shown_in_every_format(tiny):
    """Each in each, what RL plays first; by default in that alone."""
    rows, _ = made_up(tiny)
    for row in rows:
        row.reward = 0.0
    shown = {}
    for formats in ("own", "all"):
        run = make_run(tiny, format="xml", ets_formats=formats)
        found, counts = signals.ets(run, tasks(2), rows)
        assert counts == {"failed_tasks": 2}
        shown[formats] = [(row.format, row.task_id) for row in found]
    names = [task.id for task in tasks(2)]
    assert shown["own"] == [("xml", name) for name in names]
    assert sorted(shown["all"]) == sorted((f, name) for f in ("hermes", "python", "xml") for name in names)


@pytest.mark.parametrize("window", [2, 5])
def test_window_and_rounds(window, tiny, monkeypatch):
    """Bursts come before steps 4 and 7, from the last 2 (5: all) steps of their own round of 3."""
    made, run = [], make_run(tiny, round_steps=3, sft_window=window, schedule="interleaved")
    monkeypatch.setattr(
        signals, "burst", lambda run, rows, tokens: made.append((run.step, [r.task_id for r in rows])) or {}
    )
    monkeypatch.setattr(signals, "grpo", lambda run, tasks: Step([], torch.zeros(0), {}))

    def signal(run, tasks, trajectories):
        row = examples(tiny, 1)[0]
        row.task_id = f"of step {run.step}"
        return [row], {}

    for run.step in range(1, 8):
        signals.interleaved(run, [], signal, between=signals.grpo)
    rounds = [(4, ["of step 1", "of step 2", "of step 3"]), (7, ["of step 4", "of step 5", "of step 6"])]
    assert made == [(step, names[-window:]) for step, names in rounds]


def test_ctrl_sft_trains_control_tokens_only(tiny):
    run = make_run(tiny, group=2)
    rows = [graded([], 1, [], 0.0) for _ in range(4)]
    whole, _ = signals.ets(run, tasks(), rows)
    narrow, _ = signals.ctrl_sft(run, tasks(), rows)
    control = set(run.control.tolist())
    for a, b in zip(whole, narrow, strict=True):
        assert a.tokens == b.tokens
        chosen = [t for t, on in zip(b.tokens, b.loss_mask, strict=True) if on]
        assert chosen and chosen == [
            t for t, on in zip(a.tokens, a.loss_mask, strict=True) if on and t in control
        ]


def test_ctrl_sft_knows_the_control_tokens_of_each_format(tiny):
    """What opens and closes a call is trained in every format that it is shown in."""
    run = make_run(tiny, group=2, ets_formats="all")
    rows = [graded([], 1, [], 0.0) for _ in range(4)]
    shown = signals.ctrl_sft(run, load_tasks("train")[:2], rows)[0]
    for format in ("hermes", "python", "xml"):
        found = [row for row in shown if row.format == format]
        trained = {t for row in found for t, on in zip(row.tokens, row.loss_mask, strict=True) if on}
        assert trained <= set(control_tokens(tiny.chat, format).values()) and len(trained) > 2, format


def test_forced_prefixes_are_trained(policy):
    """selfrepair: what was forced is trained, nothing else is added, whoever wrote the rest."""
    run = make_run(policy, max_messages=20)
    run.sampler = Sampler(policy, seed=3)
    chosen = [task for task in load_tasks("train") if len(task.turns) == 1][:24]
    kept, counts = signals.selfrepair(run, chosen, [])
    assert kept and counts["forced_success"] == len(kept) / 24
    chat = policy.chat
    for row in kept:
        assert row.reward == 1 and "call" in row.states
        for _, ended in row.messages(chat):
            assert ended
        said = [text for text, _ in row.messages(chat)]
        assert sum(text.startswith("<tool_call>\n") for text in said) == row.states.count("call")
        body = chat.decode([t for t, on in zip(row.tokens, row.loss_mask, strict=True) if not on])
        assert "assistant\n<tool_call>" not in body


def test_sentinel_rolls_back_and_bursts(policy, monkeypatch):
    tiny = tiny_policy(policy.tokenizer, stop=0.2, close=0.1)
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2, sft_tokens=30, sentinel_limit=5.0)
    weights, notes, seen = [], [], {}
    for real in (signals.roll_back, signals.burst):

        def spied(run, *rest, real=real):
            notes = real(run, *rest)
            seen[real.__name__] = parameters_of(tiny)
            return notes

        monkeypatch.setattr(signals, real.__name__, spied)
    for run.step, growth in ((1, 1.0), (2, 2.0), (3, 6.0), (4, 1.0)):
        weights.append(parameters_of(tiny))
        notes.append(SCHEMES["sentinel"].step(run, tasks(6)).metrics)
        run.state.probe = {"step": run.step, "spurious_growth": growth}
    assert [note.get("rollbacks") for note in notes] == [None, None, None, 1]
    assert notes[3]["sft_tokens"] >= 30
    same = [torch.equal(a, b) for a, b in zip(seen["roll_back"], weights[2], strict=True)]
    assert all(same), "as measured after step 2"
    healthy = run.state.healthy["model"]
    named = dict(zip((name for name, _ in tiny.model.named_parameters()), seen["burst"], strict=True))
    assert all(torch.equal(healthy[name], value) for name, value in named.items()), "as repaired"
