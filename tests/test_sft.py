"""Bursts of SFT: what they train, how much of it, and at which rate."""

import math

import pytest
import torch
from helpers.updates import examples, made_up, make_run, sft_by_hand

from nanotoolrl import sft
from nanotoolrl.updates import policy_update


def test_a_burst_of_bad_updates_stops_the_run(tiny):
    """A good policy update later in the same step does not hide it."""
    run = make_run(tiny, torch.optim.AdamW, sft_batch=1, sft_epochs=1)
    rows, advantages = made_up(tiny)
    handle = tiny.head.register_hook(lambda g: g * math.nan)
    sft.burst(run, rows[:3])
    handle.remove()
    assert run.skipped_updates == 3 and run.stuck
    policy_update(run, rows, advantages)
    assert run.skipped_updates == 3 and run.stuck


def test_burst_counts_passes_and_tokens(tiny, monkeypatch):
    shown, seen = examples(tiny), []
    monkeypatch.setattr(
        sft, "sft_backward", lambda run, batch: seen.append([r.task_id for r in batch]) or 1.0
    )
    run = make_run(tiny, sft_batch=2, sft_epochs=3)
    metrics = sft.burst(run, shown)
    names = [name for batch in seen for name in batch]
    assert [len(batch) for batch in seen] == [2] * 7 + [1] and sorted(names) == sorted(
        ["t0", "t1", "t2", "t3", "t4"] * 3
    )
    assert sorted(names[:5]) == sorted(names[5:10]), "every pass visits every example"
    assert metrics["sft_tokens"] == 3 * sum(row.sampled_tokens for row in shown)
    seen.clear()
    metrics = sft.burst(run, shown, tokens=20)
    assert 20 <= metrics["sft_tokens"] < 20 + max(row.sampled_tokens for row in shown)
    run.config.sft_epochs = 0
    assert sft.burst(run, shown, tokens=20) == {"sft_tokens": 0}, "0 epochs: no burst"


def test_burst_warms_up(tiny, monkeypatch):
    rates = []
    monkeypatch.setattr(sft, "optimizer_step", lambda run, loss, optimizer, lr: rates.append(lr))
    for batches, shares in ((1, [0.5]), (3, [0.5, 1, 1]), (10, [0.25, 0.5, 0.75] + [1] * 7)):
        rates.clear()
        sft.burst(make_run(tiny, sft_batch=1, sft_epochs=1, sft_lr=0.4), examples(tiny, 1) * batches)
        assert rates == pytest.approx([0.4 * share for share in shares])


def test_burst_learns_and_leaves_the_moments_of_rl_alone(tiny):
    shown = examples(tiny)
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2, sft_lr=1e-2, sft_epochs=10, sft_batch=2)
    policy_update(run, *made_up(tiny))
    moments = [state["exp_avg"].clone() for state in run.optimizer.state.values()]
    before = sft_by_hand(tiny, shown).item()
    sft.burst(run, shown)
    assert sft_by_hand(tiny, shown).item() < before - 0.5
    after = [state["exp_avg"] for state in run.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
