"""How tokens are weighed and groups are kept, by hand."""

from types import SimpleNamespace

import pytest
import torch
from helpers.models import tiny_policy
from helpers.updates import TIMES, all_close, made_up, make_run, parameters_of, tasks

from nanotoolrl.config import Config
from nanotoolrl.env import CAPPED, CUT, FULL, Verdict
from nanotoolrl.loading import load
from nanotoolrl.objective import Tokens
from nanotoolrl.run import Run, rollout
from nanotoolrl.signals import SCHEMES
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.updates import policy_update
from nanotoolrl.weights import conflicts, refilled, rows_kept, token_weights, weighed
from nanotoolrl.world.tasks import load_tasks


def row(*messages, verdicts=(), turn_of=(), turns=1, reward=0.0):
    made = Trajectory("t", "base", "hermes", [], [], [], 1, reward=reward, turns=turns)
    made.append([1], sampled=False)
    for ids in messages:
        made.append(list(ids), sampled=True)
        made.append([2], sampled=False)
    made.verdicts, made.turn_of = [Verdict(flag) for flag in verdicts], list(turn_of)
    return made


def tokens_of(rows, advantages, logprobs=None, conflict=None, **settings):
    """The tokens of a micro-batch whose policy nobody asks."""
    run = SimpleNamespace(config=Config(**settings))
    counts = torch.tensor([one.sampled_tokens for one in rows])
    index = torch.arange(len(rows)).repeat_interleave(counts)
    given = torch.zeros(len(index)) if logprobs is None else torch.tensor(logprobs)
    flags = None if conflict is None else torch.tensor(conflict)
    a = torch.tensor(advantages)[index]
    return Tokens(run, rows, torch.zeros(0), torch.zeros(0), torch.zeros(0), given, given, a, index, flags)


def test_conflicts_of_the_example():
    """Of a good row [5, 6, 9] and a bad one [5, 7, 8, 9]; a row without advantage shares nothing."""
    rows = [row([5, 6], [9]), row([5, 7, 8, 9]), row([5, 6, 9]), row([5, 6, 9])]
    found = conflicts(rows, torch.tensor([1.0, -1.0, 0.0, 0.0]), 4)
    assert found[:2] == [[True, False, True], [True, False, False, True]]
    assert found[2] == [True, False, True], "counted, though its weight changes nothing"
    assert conflicts(rows, torch.tensor([1.0, -1.0, 1.0, -1.0]), 2)[2] == [True] * 3
    island = [row([5, 6, 7, 8, 9]), row([5, 1, 7, 2, 9])]
    flags = [True, False, False, False, True]
    assert conflicts(island, torch.tensor([1.0, -1.0]), 2) == [flags, flags], "not behind a difference"
    apart = conflicts(rows, torch.tensor([1.0, 1.0, -1.0, -1.0]), 2)
    assert not any(any(flags) for flags in apart), "groups are compared within"


def test_gtpo_spares_and_doubles():
    rows = [row([5, 6]), row([5, 7])]
    flags = [True, False, True, False]
    weights = token_weights(tokens_of(rows, [1.0, -1.0], conflict=flags, gtpo=1.0))
    assert weights.tolist() == [2.0, 1.0, 0.0, 1.0]
    weights = token_weights(tokens_of(rows, [1.0, -1.0], conflict=flags, gtpo=0.5))
    assert weights.tolist() == [1.5, 1.0, 0.5, 1.0]


def test_turns_before_the_failed_one_are_spared():
    """Turn 0 passed, turn 1 failed, turn 2 was never judged; good rollouts are not spared."""
    bad = row([5], [6, 7], [8], verdicts=[True, False], turn_of=[0, 1, 2], turns=3)
    good = row([5], verdicts=[True], turn_of=[0])
    weights = token_weights(tokens_of([bad, good], [-1.0, 1.0], spare_passed=0.75))
    assert weights.tolist() == [0.25, 1.0, 1.0, 1.0, 1.0]


def test_rare_tokens_push_less():
    logprobs = torch.tensor([0.5, 0.1]).log().tolist()
    weights = token_weights(tokens_of([row([5, 6])], [1.0], logprobs, rare=0.3))
    assert weights.tolist() == pytest.approx([0.3 * 0.5 + 0.7, 0.3 * 0.1 + 0.7])


def test_flukes_of_good_rollouts_teach_nothing():
    logprobs = torch.tensor([0.5, 0.1, 0.5, 0.1]).log().tolist()
    weights = token_weights(tokens_of([row([5, 6]), row([5, 6])], [1.0, -1.0], logprobs, silence=0.2))
    assert weights.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_ground_truth_is_no_fluke():
    """It was not sampled: how likely it was says nothing."""
    shown = row([5, 6])
    shown.source = "oracle"
    logprobs = torch.tensor([0.5, 0.1]).log().tolist()
    assert token_weights(tokens_of([shown], [1.0], logprobs, silence=0.2)).tolist() == [1.0, 1.0]


def test_weights_multiply_and_neutral_ones_change_nothing():
    tokens = tokens_of([row([5, 6])], [-1.0], [0.0, 0.0])
    assert weighed(tokens) is tokens
    bad = row([5, 6], verdicts=[True, False], turn_of=[0], turns=2)
    both = tokens_of([bad], [-2.0], [0.0, -100.0], spare_passed=0.5, rare=0.5)
    assert weighed(both).advantages.tolist() == pytest.approx([-1.0, -0.5])


def test_groups_whose_rewards_vary_most_are_kept():
    rewards = [[1, 1], [1, 0], [0, 0], [0, 1]]
    rows = [row([5], reward=float(x), verdicts=[bool(x)]) for pair in rewards for x in pair]

    def kept(share, **settings):
        return rows_kept(Config(group=2, filter=share, **settings), rows)

    assert kept(0.5) == [2, 3, 6, 7] and kept(0.25) == [2, 3]
    assert kept(0.25, updates=3) == [0, 1, 2, 3, 6, 7], "one for each update"
    assert kept(1.0) == list(range(8))


@pytest.mark.parametrize("mask", [False, True])
def test_rollouts_that_a_limit_ended_carry_no_gradient(policy, mask):
    """The step is one in which their advantage is 0: their tokens still count in the mean of the loss."""
    found = []
    for zeroed in (False, True):
        tiny = tiny_policy(policy.tokenizer)
        run = make_run(tiny, torch.optim.SGD, lr=0.1, mask_overlong=mask and not zeroed)
        rows, advantages = made_up(tiny)
        for one, reason in zip(rows, (CUT, CAPPED, FULL, "", "wrong", CUT, "", ""), strict=True):
            one.verdicts = [Verdict(not reason, reason)]
        assert [one.cut for one in rows] == [True, True, True, False, False, True, False, False]
        if zeroed and mask:
            advantages = advantages * torch.tensor([0.0, 0, 0, 1, 1, 0, 1, 1])
        metrics = policy_update(run, rows, advantages)
        found.append((parameters_of(tiny), metrics["loss"]))
    all_close(found[0][0], found[1][0], atol=1e-7)
    assert found[0][1] == pytest.approx(found[1][1])


def test_a_filtered_update_is_one_on_the_kept_rows(policy):
    found = []
    for share in (0.5, 1.0):
        tiny = tiny_policy(policy.tokenizer)
        run = make_run(tiny, torch.optim.SGD, lr=0.1, filter=share)
        rows, advantages = made_up(tiny)
        for one, reward in zip(rows, [0, 0, 0, 0, 0, 1, 0, 1], strict=True):
            one.reward = float(reward)
        rows, advantages = (rows, advantages) if share < 1 else (rows[4:], advantages[4:])
        metrics = policy_update(run, rows, advantages)
        found.append((parameters_of(tiny), {k: v for k, v in metrics.items() if k not in TIMES}))
    all_close(found[0][0], found[1][0], atol=1e-7)
    assert found[0][1]["loss"] == pytest.approx(found[1][1]["loss"])


def test_groups_without_contrast_are_refilled(tiny, monkeypatch):
    """By hand: groups that all fail (0, 2), then one that still does (2), then none; what was chosen does not
    count as success."""
    run = make_run(tiny, group=2, refill=5)
    run.tasks = tasks(7)
    rewards = iter([[0, 0, 1, 0, 0, 0], [1, 0, 1, 1], [0, 1]])
    asked = []

    def played(run, chosen, noise_key=0):
        asked.append((noise_key, len(chosen)))
        assert all(task in run.tasks for task in chosen) and len({task.id for task in chosen}) == len(chosen)
        return [
            Trajectory(task.id, "base", "hermes", [], [], [], 0, reward=float(reward))
            for task, reward in zip([t for t in chosen for _ in range(2)], next(rewards), strict=True)
        ]

    monkeypatch.setattr("nanotoolrl.weights.rollout", played)
    rows, notes = refilled(run, played(run, run.tasks[:3]))
    assert len({row.task_id for row in rows}) == 3 and {"t0", "t2"}.isdisjoint(row.task_id for row in rows)
    assert [row.reward for row in rows] == [1, 0, 1, 0, 0, 1]
    assert asked == [(0, 3), (1, 2), (2, 1)], "it ends when all have contrast"
    assert notes == {"success": 1 / 6, "refilled_groups": 3}


def test_refilling_gives_up_and_is_off_by_default(tiny):
    run = make_run(tiny, group=2, refill=2)
    run.tasks = tasks(3)
    plain = rollout(run, tasks(3))
    rows, notes = refilled(run, rollout(run, tasks(3)))
    assert len(rows) == 6 and notes["success"] == sum(row.reward for row in plain) / 6
    fresh = [row.task_id for row in rows]
    assert len(fresh) == 6 and set(fresh) <= {"t0", "t1", "t2"}, "no others are there"
    again, _ = refilled(run, rollout(run, tasks(3)))
    assert [row.tokens for row in again] == [row.tokens for row in rows], "drawn by the seed"
    run.config.refill = 0
    rows, notes = refilled(run, rollout(run, tasks(3)))
    assert [row.tokens for row in rows] == [row.tokens for row in plain] and notes == {}


@pytest.mark.slow
def test_a_scheme_trains_on_the_refilled_groups_and_counts_the_first(policy):
    """More groups have contrast; `success` is that of the rollouts that were not chosen."""
    found = []
    for refill in (0, 3):
        config = Config(scheme="grpo", prompts=4, group=4, updates=1, refill=refill, max_messages=6, seed=2)
        run = Run.begin(config, load("nano"), load_tasks("train")[:40])
        run.next_step()
        step = SCHEMES["grpo"].step(run, run.tasks[:4])
        contrast = sum(len({row.reward for row in step.trajectories[i : i + 4]}) > 1 for i in range(0, 16, 4))
        found.append((step, contrast))
    (plain, before), (more, after) = found
    assert "refilled_groups" not in plain.metrics and more.metrics["refilled_groups"] > 0
    assert after > before
    assert more.metrics["success"] == sum(row.reward for row in plain.trajectories) / 16
    assert more.metrics.keys() - plain.metrics.keys() == {"refilled_groups", "success"}
