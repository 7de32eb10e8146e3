"""The verbs of schemes: roll out, compare within a group, look up what failed, go back."""

from types import SimpleNamespace

import pytest
import torch
from helpers.updates import graded, made_up, make_run, parameters_of, tasks

from nanotoolrl import signals
from nanotoolrl.config import Config
from nanotoolrl.loading import TEMPLATES, load
from nanotoolrl.run import (
    Run,
    failed_tasks,
    first_model,
    group_advantages,
    roll_back,
    rollout,
    snapshot,
    trained_reward,
)
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.updates import policy_update


def test_rollout_is_in_group_order(tiny):
    run = make_run(tiny)
    rows = rollout(run, tasks(3))
    assert [row.task_id for row in rows] == ["t0"] * 4 + ["t1"] * 4 + ["t2"] * 4
    assert len({tuple(row.tokens) for row in rows[:4]}) > 1
    run.step += 1
    assert [row.tokens for row in rollout(run, tasks(3))] != [row.tokens for row in rows], (
        "the step keys the noise"
    )


def test_advantages_by_group(tiny):
    rows = [Trajectory("t", "base", "hermes", [], [], [], 0, reward=float(i == 0)) for i in range(6)]
    run = make_run(tiny, group=3)
    assert group_advantages(run, rows).tolist() == pytest.approx(
        [1.1547, -0.5774, -0.5774, 0, 0, 0], abs=1e-3
    )
    run.config.adv_std = False
    assert group_advantages(run, rows).tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])


def test_trained_reward_by_hand():
    row = graded([True, False], 4, ["call", "bare", "malformed", "reply"])
    config = Config()
    assert trained_reward(config, row) == 0.0
    config.graded_reward = True
    assert trained_reward(config, row) == 0.25, "turns that were not reached did not pass"
    config.tag_penalty = 0.2
    assert trained_reward(config, row) == pytest.approx(0.25 - 0.2 * 2 / 4)
    assert trained_reward(config, graded([True], 1, [], 1.0)) == 1.0


def test_a_tag_penalty_pushes_as_hard_however_small_where_a_group_fails():
    """Divided by the group's own spread, only the order is left of it (said beside the setting)."""
    rows = [graded([False], 1, states) for states in (["bare"], ["bare", "call"], ["call"], ["call"])]
    found = []
    for penalty in (0.001, 0.5):
        config = Config(tag_penalty=penalty, group=4)
        found.append(group_advantages(SimpleNamespace(config=config), rows))
    assert torch.allclose(found[0], found[1], atol=0.02) and found[0].abs().max() > 1


def test_advantages_use_the_trained_reward(tiny):
    rows = [graded([True] * k + [False] * (3 - k), 3, ["call"]) for k in range(4)]
    run = make_run(tiny, adv_std=False)
    assert group_advantages(run, rows).tolist() == [0.0] * 4, "none of them passed"
    run.config.graded_reward = True
    assert group_advantages(run, rows).tolist() == pytest.approx([-0.5, -1 / 6, 1 / 6, 0.5])


def test_failed_tasks_by_both_rules(tiny):
    rows = [graded([], 1, [], reward) for reward in (0.0, 0.0, 1.0, 0.0, 1.0, 1.0)]
    assert failed_tasks(rows, 2) == [0]
    assert failed_tasks(rows, 2, any) == [0, 1]
    run = make_run(tiny, group=2, ets_any=True)
    assert [row.task_id for row in signals.ets(run, tasks(3), rows)[0]] == [task.id for task in tasks(3)[:2]]


def test_roll_back_restores_weights_and_moments(tiny):
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2)
    policy_update(run, *made_up(tiny))
    saved = snapshot(run)
    before, moments = parameters_of(tiny), [s["exp_avg"].clone() for s in run.optimizer.state.values()]
    for _ in range(2):  # twice: the snapshot must survive being put back
        policy_update(run, *made_up(tiny, seed=1))
        assert not torch.equal(parameters_of(tiny)[0], before[0])
        roll_back(run, saved)
        assert all(torch.equal(a, b) for a, b in zip(parameters_of(tiny), before, strict=True))
        now = [state["exp_avg"] for state in run.optimizer.state.values()]
        assert all(torch.equal(a, b) for a, b in zip(now, moments, strict=True))


def test_a_rounded_copy_samples():
    """What `--sampler-dtype bf16` samples with follows the policy, and is not it: the gap is seen."""
    policy = load("nano")
    run = Run.begin(Config(sampler_dtype="bf16", prompts=1, group=2, updates=1), policy)
    assert run.sampler.policy is not policy and run.sampler.policy.dtype == torch.bfloat16
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.5)
    rows = rollout(run, tasks(1))
    copied = run.sampler.policy.head
    assert torch.equal(copied, policy.head.bfloat16())
    metrics = policy_update(run, rows, torch.tensor([1.0, -1.0]))
    assert 1e-3 < metrics["logprob_gap"] < 1


def test_reference_has_the_chat_template_of_the_run(tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATES["nano"].read_text(encoding="utf-8"), encoding="utf-8")
    config = Config(scheme="grpo", chat_template=str(template))
    run = Run.begin(config, first_model(config, "fp32"))
    assert run.reference.template == run.policy.template == str(template)
