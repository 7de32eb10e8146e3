"""Updates against the loss written by hand: token by token, one row at a time, from whole logits."""

import dataclasses
import inspect
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.models import tiny_policy, whole_logits
from helpers.updates import (
    TIMES,
    all_close,
    examples,
    graded,
    gradient_of,
    loss_by_hand,
    made_up,
    make_run,
    neighbour,
    objective_of,
    own_logprobs,
    parameters_of,
    rows_by_hand,
    sft_by_hand,
    tasks,
    with_control_tokens,
)

from nanotoolrl import schemes, sft, signals, updates
from nanotoolrl.config import SETTINGS, Config
from nanotoolrl.env import Call, Turn
from nanotoolrl.run import (
    Run,
    Step,
    failed_tasks,
    group_advantages,
    roll_back,
    rollout,
    snapshot,
    trained_reward,
)
from nanotoolrl.sampler import Sampler
from nanotoolrl.schemes import grpo, hint
from nanotoolrl.signals import SCHEMES
from nanotoolrl.trajectory import Trajectory, demonstration
from nanotoolrl.updates import policy_update, rescore
from nanotoolrl.world.tasks import load_tasks


# ------------------------------------------------------------------------------------------ the objective
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gradient_and_metrics_by_hand(policy, tiny, temperature, kl):
    reference = neighbour(policy) if kl else None
    settings = {"temperature": temperature, "kl": kl, "clip": 0.3, "clip_high": 0.3, "dual_clip": 1.5}
    run = make_run(tiny, reference=reference, **settings)
    rows, advantages = made_up(tiny, temperature)
    expected = loss_by_hand(tiny, rows, advantages, run.config, reference)
    gradients = torch.autograd.grad(expected, list(tiny.model.parameters()))
    metrics = policy_update(run, rows, advantages)
    all_close(run.optimizer.gradients[0], gradients, atol=2e-5, rtol=1e-3)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 1e-3
    assert run.skipped_updates == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logit_gradient_of_a_step_by_hand(tiny, temperature):
    """Self and other of every control token: the gradient of the objective at the whole logits, negated."""
    run = make_run(tiny, temperature=temperature, tokens_at_once=100, dual_clip=1.5)
    rows, advantages = made_up(tiny, temperature)
    with_control_tokens(tiny, rows)
    logits = []

    def keep(module, arguments, out):
        out.retain_grad()
        logits.append(out)

    handle = tiny.model.lm_head.register_forward_hook(keep)
    loss_by_hand(tiny, rows, advantages, run.config).backward()
    handle.remove()
    expected = torch.zeros(2, len(run.control))
    for row, one in zip(rows, logits, strict=True):
        for t in (t for t, sampled in enumerate(row.loss_mask) if sampled):
            for c, token in enumerate(run.control.tolist()):
                expected[int(row.tokens[t] != token), c] -= one.grad[0, t - 1, token]
    assert (expected.abs() > 1e-6).any(1).all()
    found = torch.tensor(policy_update(run, rows, advantages)["logit_gradient"])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-3)


def test_clip_fraction_entropy_and_gap_by_hand(tiny):
    run = make_run(tiny, tokens_at_once=200)
    rows, advantages = made_up(tiny)
    clipped, gaps, entropies = [], [], []
    for row, advantage in zip(rows, advantages.tolist(), strict=True):
        new = own_logprobs(tiny, row, 1.0).tolist()
        old = [x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled]
        for a, b in zip(new, old, strict=True):
            ratio = math.exp(a - b)
            clipped.append(ratio > 1.2 if advantage > 0 else ratio < 0.8 or ratio > 3)
            gaps.append(abs(a - b))
        logprobs = torch.log_softmax(whole_logits(tiny, torch.tensor([row.tokens]))[0], -1)
        by_place = (-logprobs.exp() * logprobs).sum(-1).tolist()
        entropies += [by_place[t - 1] for t in range(len(row.tokens)) if row.loss_mask[t]]
    metrics = policy_update(run, rows, advantages)
    assert metrics["clip_fraction"] == pytest.approx(sum(clipped) / len(clipped))
    assert 0.1 < sum(clipped) / len(clipped) < 0.9
    assert metrics["logprob_gap"] == pytest.approx(max(gaps), abs=1e-4)
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)


def test_one_row_at_ratio_one(tiny):
    """The gradient is that of -A times the sum of the sampled tokens' log-probs, over their number: nothing
    of the prompt, nothing of the observation, nothing shifted by one."""
    rows, _ = made_up(tiny, n=1, spread=0.0)
    row = rows[0]
    run = make_run(tiny, group=1)
    policy_update(run, rows, torch.tensor([-1.5]))
    logprobs = torch.log_softmax(whole_logits(tiny, torch.tensor([row.tokens]))[0], -1)
    places = [t for t in range(len(row.tokens)) if row.loss_mask[t]]
    total = sum(logprobs[t - 1, row.tokens[t]] for t in places)
    expected = torch.autograd.grad(1.5 * total / len(places), list(tiny.model.parameters()))
    all_close(run.optimizer.gradients[0], expected, atol=2e-5, rtol=1e-3)


def test_each_mask_bit_matters(tiny):
    """Training one more token, be it of the prompt or of the observation, gives another gradient."""
    rows, advantages = made_up(tiny, n=1)
    row = rows[0]

    def gradient(mask):
        changed = Trajectory(**{**vars(row), "loss_mask": mask})
        run = make_run(tiny, group=1)
        policy_update(run, [changed], advantages)
        return torch.cat([g.flatten() for g in run.optimizer.gradients[0]])

    usual = gradient(row.loss_mask)
    assert torch.equal(usual, gradient(list(row.loss_mask)))
    for t in range(1, len(row.tokens)):
        flipped = [bit != (i == t) for i, bit in enumerate(row.loss_mask)]
        assert (gradient(flipped) - usual).abs().max() > 1e-4, t


def test_log_probs_outside_the_mask_are_never_read(tiny):
    rows, advantages = made_up(tiny)

    def gradient():
        run = make_run(tiny)
        policy_update(run, rows, advantages)
        return run.optimizer.gradients[0]

    usual = gradient()
    for row in rows:
        row.logprobs = [
            x if sampled else math.nan for x, sampled in zip(row.logprobs, row.loss_mask, strict=True)
        ]
    assert all(torch.equal(a, b) for a, b in zip(usual, gradient(), strict=True))


@pytest.mark.parametrize("budget", [1, 100, 100_000])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_sharing_the_prompt_changes_nothing_but_the_work(policy, tiny, budget, kl):
    """The same loss and gradient, with a group's prompt passed through the model once (per micro-batch)."""

    def update(**changes):
        reference = neighbour(policy) if kl else None
        run = make_run(tiny, reference=reference, kl=kl, temperature=0.7, **changes)
        rows, advantages = made_up(tiny, temperature=0.7)
        for i, row in enumerate(rows):  # groups of four with one prompt each; the last row has its own
            like = rows[i - i % 4]
            if i < 7 and row is not like:
                rest = row.tokens[row.prompt_length :]
                n = like.prompt_length
                rows[i] = dataclasses.replace(
                    row,
                    tokens=like.tokens[:n] + rest,
                    loss_mask=[False] * n + row.loss_mask[row.prompt_length :],
                    logprobs=[0.0] * n + row.logprobs[row.prompt_length :],
                    prompt_length=n,
                )
        metrics = policy_update(run, rows, advantages)
        return run.optimizer.gradients[0], metrics, rows

    gradients, plain, rows = update()
    shared_gradients, shared, _ = update(share_prompt=True, tokens_at_once=budget)
    all_close(shared_gradients, gradients, atol=2e-5, rtol=1e-3)
    for name in ("loss", "entropy", "clip_fraction", "logprob_gap"):
        assert shared[name] == pytest.approx(plain[name], abs=1e-5), name
    assert plain["forward_tokens"] == sum(len(row.tokens) for row in rows)
    saved = 3 * rows[0].prompt_length + 2 * rows[4].prompt_length
    expected = plain["forward_tokens"] - (saved if budget == 100_000 else 0)
    if budget == 100:
        assert plain["forward_tokens"] - saved < shared["forward_tokens"] < plain["forward_tokens"]
    else:
        assert shared["forward_tokens"] == expected


@pytest.mark.parametrize("updates", [1, 2])
def test_only_several_updates_need_a_scoring_pass(tiny, monkeypatch, updates):
    calls, honest = [], rescore
    monkeypatch.setattr(schemes, "hint_text", lambda task, format: "Hint: say that docs is a folder.")
    monkeypatch.setattr(schemes, "group_advantages", lambda run, rows: torch.linspace(-1, 1, len(rows)))
    monkeypatch.setattr("nanotoolrl.updates.rescore", lambda *args: calls.append(1) or honest(*args))
    hint(make_run(tiny, updates=updates), tasks())
    assert len(calls) == (0 if updates == 1 else 4)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_size_of_micro_batches_never_matters(policy, kl):
    def update(tokens_at_once):
        tiny, reference = tiny_policy(policy.tokenizer), neighbour(policy) if kl else None
        settings = {"updates": 2, "lr": 0.01, "kl": kl, "tokens_at_once": tokens_at_once}
        run = make_run(tiny, torch.optim.SGD, reference, **settings)
        metrics = policy_update(run, *made_up(tiny))
        return parameters_of(tiny), {name: value for name, value in metrics.items() if name not in TIMES}

    before = parameters_of(tiny_policy(policy.tokenizer))
    whole, metrics = update(100_000)
    assert max((a - b).abs().max() for a, b in zip(whole, before, strict=True)) > 1e-3, "nothing moved"
    for tokens_at_once in (1, 200):
        parts, others = update(tokens_at_once)
        all_close(parts, whole, atol=1e-6)
        pushes = (torch.tensor(one.pop("logit_gradient")) for one in (others, dict(metrics)))
        torch.testing.assert_close(*pushes, rtol=1e-3, atol=1e-5)
        expected = {name: value for name, value in metrics.items() if name != "logit_gradient"}
        assert others == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_updates_share_the_prompts(policy):
    """Two updates: the first half of the groups, then the second half under the moved parameters, with the
    old log-probs of both from before."""
    tiny, other = tiny_policy(policy.tokenizer), tiny_policy(policy.tokenizer)
    run = make_run(tiny, torch.optim.SGD, updates=2, lr=0.1, group=2)
    rows, advantages = made_up(tiny)
    for part in (slice(0, 4), slice(4, 8)):
        loss = loss_by_hand(other, rows[part], advantages[part], run.config)
        gradients = torch.autograd.grad(loss, list(other.model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(other.model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    policy_update(run, rows, advantages)
    all_close(parameters_of(tiny), parameters_of(other), atol=1e-5)


def test_uneven_shares_use_every_prompt_once(tiny):
    """3 groups in 2 updates: no row is left out, none is used twice."""
    rows, advantages = made_up(tiny, n=6)
    run = make_run(tiny, updates=2, group=2)
    policy_update(run, rows, advantages)
    expected = []
    for part in (slice(0, 2), slice(2, 6)):
        loss = loss_by_hand(tiny, rows[part], advantages[part], run.config)
        expected.append(torch.autograd.grad(loss, list(tiny.model.parameters())))
    for ours, hand in zip(run.optimizer.gradients, expected, strict=True):
        all_close(ours, hand, atol=2e-5, rtol=1e-3)


def test_rows_without_advantage_may_be_left_out(policy, tiny):
    """With a KL coefficient too small to count, rows without contrast pass through the model too, and add
    nothing."""
    seen = []
    count = lambda module, args, out: seen.append(out[..., 0].numel())  # noqa: E731
    hook = tiny.model.register_forward_hook(count)
    rows, advantages = made_up(tiny)
    advantages[[1, 2, 5]] = 0.0
    gradients, tokens = [], []
    for kl in (0.0, 1e-30):
        run = make_run(tiny, reference=tiny_policy(policy.tokenizer), kl=kl, tokens_at_once=1)
        seen.clear()
        policy_update(run, rows, advantages)
        gradients += run.optimizer.gradients
        tokens.append(sum(seen))
    hook.remove()
    all_close(*gradients, atol=1e-7)
    loss = loss_by_hand(tiny, rows, advantages, run.config)  # divided by the tokens of all rows
    all_close(gradients[0], torch.autograd.grad(loss, list(tiny.model.parameters())), atol=2e-5, rtol=1e-3)
    left_out = sum(len(rows[i].tokens) for i in (1, 2, 5))
    assert tokens == [tokens[1] - left_out, tokens[1]]


def test_no_contrast_at_all(tiny):
    """Adam's momentum goes on; there is no loss and nothing to measure."""
    rows, advantages = made_up(tiny)
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2)
    policy_update(run, rows, advantages)
    before = parameters_of(tiny)
    metrics = policy_update(run, rows, torch.zeros(8))
    assert metrics["loss"] == metrics["grad_norm"] == run.skipped_updates == 0.0
    assert math.isnan(metrics["entropy"]) and math.isnan(metrics["clip_fraction"])
    assert not any(torch.equal(a, b) for a, b in zip(parameters_of(tiny), before, strict=True) if a.ndim > 1)


# ---------------------------------------------------------------------------------------- the optimiser step
def test_gradient_is_clipped_to_the_norm(tiny):
    run = make_run(tiny, torch.optim.SGD, lr=1.0, grad_clip=0.01)
    before = parameters_of(tiny)
    metrics = policy_update(run, *made_up(tiny))
    moved = torch.cat([(a - b).flatten() for a, b in zip(parameters_of(tiny), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-2)
    assert metrics["grad_norm"] > 0.05, "the norm before clipping is reported"


@pytest.mark.parametrize(
    "bad, value", [("old log-prob", math.nan), ("gradient", math.nan), ("gradient", math.inf)]
)
def test_non_finite_updates_are_skipped(tiny, bad, value):
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2)
    rows, advantages = made_up(tiny)
    good = rows[2].logprobs
    if bad == "old log-prob":
        place = rows[2].loss_mask.index(True)
        rows[2].logprobs = [value if i == place else x for i, x in enumerate(good)]
    handle = tiny.head.register_hook(lambda g: g * value if bad == "gradient" else g)
    before = parameters_of(tiny)
    for count in (1, 2):
        assert math.isnan(policy_update(run, rows, advantages)["grad_norm"])
        assert run.skipped_updates == run.state.skipped_in_a_row == count
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(tiny), before, strict=True))
    assert not run.optimizer.state, "Adam's moments must not see it either"
    assert all((parameter.grad == 0).all() for parameter in tiny.model.parameters())
    handle.remove()
    rows[2].logprobs = good
    metrics = policy_update(run, rows, advantages)
    assert run.skipped_updates == 2 and run.state.skipped_in_a_row == 0
    assert math.isfinite(metrics["grad_norm"])
    assert not any(torch.equal(a, b) for a, b in zip(parameters_of(tiny), before, strict=True) if a.ndim > 1)


def test_one_bad_update_of_two(tiny):
    """The other update of the step is made."""
    run = make_run(tiny, updates=2)
    rows, advantages = made_up(tiny)
    rows[0].logprobs = [math.nan] * len(rows[0].tokens)
    metrics = policy_update(run, rows, advantages)
    assert run.skipped_updates == 1 and run.state.skipped_in_a_row == 0
    assert len(run.optimizer.gradients) == 1 and math.isfinite(metrics["grad_norm"])


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


# ------------------------------------------------------------------------------------------------- the verbs
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


def test_rescore_gives_what_the_sampler_said(tiny):
    run = make_run(tiny, temperature=0.7)
    for row in rollout(run, tasks(1)):
        scored = rescore(tiny, row, 0.7)
        assert scored == pytest.approx(row.logprobs, abs=2e-5) and len(scored) == len(row.tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_has_ratio_one(tiny, temperature):
    """Sampler and trainer agree, so that a first update clips nothing."""
    run = make_run(tiny, temperature=temperature)
    metrics = policy_update(run, rollout(run, tasks()), torch.ones(8))
    assert metrics["logprob_gap"] <= 2e-5 and metrics["clip_fraction"] == 0.0


# ----------------------------------------------------------------------------------------------- the schemes
def test_grpo_learns_the_contrast(policy):
    """A few steps make the easy task (end without a call) easier: the sign of the whole chain is right."""
    tiny = tiny_policy(policy.tokenizer, stop=0.2, close=0.1)
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2, group=16, grad_clip=1.0)
    success = []
    for _ in range(6):
        run.step += 1
        step = grpo(run, tasks())
        success.append(sum(row.reward for row in step.trajectories) / len(step.trajectories))
    assert 0.1 < success[0] < 0.9 and success[-1] > success[0] + 0.1


@pytest.fixture
def recorded(monkeypatch):
    """(log-probs, old log-probs) of every call of the loss."""
    calls, loss = [], updates.policy_loss

    def recording(logprobs, old_logprobs, *rest):
        calls.append((logprobs.detach().clone(), old_logprobs.clone()))
        return loss(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(updates, "policy_loss", recording)
    monkeypatch.setattr(schemes, "hint_text", lambda task, format: "Hint: say that docs is a folder.")
    monkeypatch.setattr(schemes, "group_advantages", lambda run, rows: torch.linspace(-1, 1, len(rows)))
    return calls


def test_hinted_rows_are_rescored_without_the_hint(tiny, recorded):
    run = make_run(tiny, tokens_at_once=200)
    step = hint(run, tasks())
    assert [row.source for row in step.trajectories] == ["hint", "hint", "policy", "policy"] * 2
    new, old = (torch.cat(parts) for parts in zip(*recorded, strict=True))
    assert len(new) == sum(row.sampled_tokens for row in step.trajectories)
    assert ((new - old).exp() - 1).abs().max() <= 1e-5
    hinted = step.trajectories[0]
    under_hint = torch.tensor(
        [x for x, sampled in zip(hinted.logprobs, hinted.loss_mask, strict=True) if sampled]
    )
    assert (own_logprobs(tiny, hinted, 1.0) - under_hint).abs().max() > 1e-3, "the hint changes nothing"


def test_hinted_rows_are_trained_without_the_hint(tiny, recorded):
    """The gradient is that of the same tokens under the prompt without the hint, at ratio 1."""
    run = make_run(tiny)
    step = hint(run, tasks())
    total = sum(row.sampled_tokens for row in step.trajectories)
    loss = -sum(a * own_logprobs(tiny, row, 1.0).sum() for a, row in zip(step.advantages, step.trajectories))
    expected = torch.autograd.grad(loss / total, list(tiny.model.parameters()))
    all_close(run.optimizer.gradients[0], expected, atol=2e-5, rtol=1e-3)


def test_hint_kept(tiny, recorded):
    """`hint_keep`: trained under the hinted prompt, where the sampler's log-probs hold."""
    run = make_run(tiny, hint_keep=True)
    step = hint(run, tasks())
    new, old = (torch.cat(parts) for parts in zip(*recorded, strict=True))
    assert ((new - old).exp() - 1).abs().max() <= 2e-5
    rows = [row.with_sampled_prompt() for row in step.trajectories]
    total = sum(row.sampled_tokens for row in rows)
    loss = -sum(a * own_logprobs(tiny, row, 1.0).sum() for a, row in zip(step.advantages, rows, strict=True))
    expected = torch.autograd.grad(loss / total, list(tiny.model.parameters()))
    all_close(run.optimizer.gradients[0], expected, atol=2e-5, rtol=1e-3)
    assert all("Hint:" not in tiny.chat.decode(row.tokens) for row in step.trajectories)


def test_all_rows_hinted(tiny, recorded):
    step = hint(make_run(tiny, hint_count=4), tasks())
    assert all(row.source == "hint" and row.sampled_prompt for row in step.trajectories)
    assert math.isfinite(step.metrics["loss"]) and math.isnan(step.metrics["clip_fraction"])


# ------------------------------------------------------------------------------------------- further settings


@pytest.mark.parametrize("tokens_at_once", [200, 100_000])
@pytest.mark.parametrize("loss_agg", ["token", "sequence"])
def test_aggregation_entropy_and_clip_high_by_hand(tiny, loss_agg, tokens_at_once):
    settings = {"loss_agg": loss_agg, "entropy": 0.1, "clip_high": 0.4, "tokens_at_once": tokens_at_once}
    run = make_run(tiny, **settings)
    rows, advantages = made_up(tiny)
    advantages[2] = 0.0
    found = rows_by_hand(tiny, rows, advantages, run.config)
    parts = [loss - 0.1 * entropy for loss, entropy in found]
    whole = torch.cat(parts).mean()
    expected = whole if loss_agg == "token" else torch.stack([part.mean() for part in parts]).mean()
    gradients = gradient_of(expected, tiny)
    metrics = policy_update(run, rows, advantages)
    all_close(run.optimizer.gradients[0], gradients, atol=2e-5, rtol=1e-3)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    other = torch.stack([part.mean() for part in parts]).mean() if loss_agg == "token" else whole
    assert abs(other - expected) > 1e-3, "the two means are alike here"


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


# -------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("scheme, kept", [("psr", 1), ("nsr", -1)])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_one_sign_by_hand(tiny, monkeypatch, scheme, kept, weight):
    rows, advantages = made_up(tiny)
    changed = torch.where(advantages * kept > 0, advantages, weight * advantages)
    settings = {"negative_weight": weight, "positive_weight": weight}
    gradients, _ = objective_of(scheme, monkeypatch, tiny, rows, advantages, **settings)
    expected = gradient_of(loss_by_hand(tiny, rows, changed, make_run(tiny).config), tiny)
    all_close(gradients[0], expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_void_by_hand(tiny, monkeypatch, weight):
    rows, advantages = made_up(tiny)
    for i, states in enumerate([["call"], ["bare"], ["polluted"], ["call", "empty"], ["malformed"]]):
        rows[i].states = states
    changed = advantages * torch.tensor([1, weight, 1, weight, weight, 1, 1, 1])
    gradients, metrics = objective_of("void", monkeypatch, tiny, rows, advantages, void_weight=weight)
    expected = gradient_of(loss_by_hand(tiny, rows, changed, make_run(tiny).config), tiny)
    all_close(gradients[0], expected, atol=2e-5, rtol=1e-3)
    assert metrics["dropped_rows"] == 3 / 8


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_guard_by_hand(tiny, monkeypatch, weight):
    rows, advantages = made_up(tiny)
    rows, control = with_control_tokens(tiny, rows)
    gradients, _ = objective_of("guard", monkeypatch, tiny, rows, advantages, guard_weight=weight)
    loss, count = 0.0, 0
    for row, a in zip(rows, advantages.tolist(), strict=True):
        new = own_logprobs(tiny, row, 1.0)
        old = torch.tensor([x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled])
        ids = [t for t, sampled in zip(row.tokens, row.loss_mask, strict=True) if sampled]
        factor = torch.tensor([(1 - weight) if a < 0 and t in control else 1.0 for t in ids])
        loss, count = loss - (a * factor * (new - old).exp()).sum(), count + len(ids)
    all_close(gradients[0], gradient_of(loss / count, tiny), atol=2e-5, rtol=1e-3)


def test_guard_kl_by_hand(policy, tiny, monkeypatch):
    rows, advantages = made_up(tiny)
    rows, control = with_control_tokens(tiny, rows)
    advantages[:4] = 0.0  # rows without advantage are guarded, too
    reference = neighbour(policy)
    settings = {"guard_kl": 0.7, "reference": reference}
    gradients, _ = objective_of("guard-kl", monkeypatch, tiny, rows, advantages, **settings)
    loss, count = 0.0, 0
    for row, a in zip(rows, advantages.tolist(), strict=True):
        new, base = own_logprobs(tiny, row, 1.0), own_logprobs(reference, row, 1.0).detach()
        old = torch.tensor([x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled])
        ids = [t for t, sampled in zip(row.tokens, row.loss_mask, strict=True) if sampled]
        guarded = torch.tensor([float(t in control) for t in ids])
        k3 = (base - new).exp() - (base - new) - 1  # however large
        loss = loss + (-a * (new - old).exp() + 0.7 * guarded * k3).sum()
        count += len(ids)
    all_close(gradients[0], gradient_of(loss / count, tiny), atol=2e-5, rtol=1e-3)


def test_llds_by_hand(tiny, monkeypatch):
    rows, advantages = made_up(tiny, spread=0.02)
    advantages = advantages.abs() * torch.tensor([1, 1, -1, -1] * 2)
    for row in rows[::2]:
        row.logprobs = [x + 0.05 for x in row.logprobs]  # as if they had been likelier
    for row in rows[1::2]:
        row.logprobs = [x - 0.05 for x in row.logprobs]
    gradients, _ = objective_of("llds", monkeypatch, tiny, rows, advantages, llds_weight=0.6)
    loss, count, fell = 0.0, 0, 0
    for row, a in zip(rows, advantages.tolist(), strict=True):
        new = own_logprobs(tiny, row, 1.0)
        old = torch.tensor([x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled])
        loss, count = loss - (a * (new - old).exp()).sum(), count + len(old)
        if a > 0 and new.sum() < old.sum():
            loss, fell = loss + 0.6 * (old - new).clamp(min=0).sum(), fell + 1
    assert 0 < fell < (advantages > 0).sum()
    all_close(gradients[0], gradient_of(loss / count, tiny), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["shaped", "ratio"])
def test_ops_by_hand(tiny, monkeypatch, kind):
    """One oracle row in each group, its tokens trained by their own loss, in the group's mean."""
    rows, advantages = made_up(tiny)
    one = demonstration(tiny.chat, tasks(1)[0], "hermes")
    monkeypatch.setattr(schemes, "demonstrations", lambda run, tasks: [one] * len(tasks))
    advantages[0] = abs(advantages[0])
    del rows[4], rows[0]
    gradients, _ = objective_of("ops", monkeypatch, tiny, rows, advantages, ops_loss=kind)
    placed = [one, *rows[:3], one, *rows[3:]]
    loss, count = 0.0, 0
    for row, a in zip(placed, advantages.tolist(), strict=True):
        new = own_logprobs(tiny, row, 1.0)
        if row is one:
            w = new.exp() / (new.exp() + 0.1) if kind == "shaped" else (new - new.detach()).exp()
            term = torch.max(-a * w, -a * w.clamp(0.8, 1.2))
        else:
            old = torch.tensor([x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled])
            ratio = (new - old).exp()
            term = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2))
            term = term.clamp(max=-3 * a) if a < 0 else term
        loss, count = loss + term.sum(), count + len(new)
    all_close(gradients[0], gradient_of(loss / count, tiny), atol=2e-5, rtol=1e-3)


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


# ------------------------------------------------------------------------------------------------- bursts


def test_sft_gradient_and_micro_batches(tiny):
    shown = examples(tiny)
    expected = sft_by_hand(tiny, shown)
    gradients = gradient_of(expected, tiny)
    for size in (1, 300, 100_000):
        run = make_run(tiny, tokens_at_once=size)
        assert updates.sft_backward(run, shown) == pytest.approx(expected.item(), abs=1e-5)
        all_close([p.grad for p in tiny.model.parameters()], gradients, atol=2e-5, rtol=1e-3)


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


def test_failed_tasks_by_both_rules(tiny):
    rows = [graded([], 1, [], reward) for reward in (0.0, 0.0, 1.0, 0.0, 1.0, 1.0)]
    assert failed_tasks(rows, 2) == [0]
    assert failed_tasks(rows, 2, any) == [0, 1]
    run = make_run(tiny, group=2, ets_any=True)
    assert [row.task_id for row in signals.ets(run, tasks(3), rows)[0]] == [task.id for task in tasks(3)[:2]]


def test_ghpo_reports_the_success_of_unhinted_rollouts(tiny, monkeypatch):
    """2 tasks x 2 rollouts, 1 success: the failed group's first is replaced, success stays 1 in 4."""
    run = make_run(tiny, group=2, hint_count=1)
    first = [graded([], 1, [], reward) for reward in (0.0, 0.0, 1.0, 0.0)]
    second = [replace(graded([], 1, [], 1.0), source="hint")]
    rows = iter([first, second])
    monkeypatch.setattr(schemes, "rollout", lambda *_, **__: list(next(rows)))
    monkeypatch.setattr(schemes, "policy_update", lambda *_: {})
    monkeypatch.setattr(schemes, "hint_text", lambda *_: "a hint")
    step = SCHEMES["ghpo"].step(run, tasks(2))
    assert [row.source for row in step.trajectories] == ["hint", "policy", "policy", "policy"]
    assert step.metrics == {"failed_tasks": 1, "success": 0.25}


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


# ------------------------------------------------------------------------------------------------- neutrality
def one_of_two_turns(n):
    """Tasks whose first turn a random model passes now and then, and whose second it never does: all fail,
    and with a graded reward there is contrast."""
    found = tasks(n)
    for task in found:
        task.turns.append(Turn("List docs.", [Call("list_files", {"folder": "docs"})], "b"))
    return found


def three_steps(policy, scheme, chosen, **changes):
    """(weights, steps) of three steps of a random model, with contrast between rollouts."""
    tiny = tiny_policy(policy.tokenizer, stop=0.2, close=0.1)
    settings = {"lr": 1e-2, "updates": 2, "grad_clip": 1.0, "warmup": 2, "graded_reward": True}
    settings |= {"round_steps": 1, "sft_window": 1, "sft_tokens": 200, "sft_epochs": 1}
    run = make_run(tiny, torch.optim.AdamW, **(settings | changes))
    run.tasks, steps = chosen, []
    for run.step in (1, 2, 3):
        steps.append(SCHEMES[scheme].step(run, chosen))
    return parameters_of(tiny), steps


RL = [(name, schedule) for name, one in SCHEMES.items() if one.neutral for schedule in one.schedules or ("",)]
RL = [(name, schedule) for name, schedule in RL if schedule != "none"]


@pytest.mark.parametrize("name, schedule", RL)
def test_strength_and_its_neutral_value(policy, monkeypatch, name, schedule):
    """At the neutral value, three steps are those of grpo, to the bit; at the default they are not."""
    monkeypatch.setattr(Run, "reference", neighbour(policy))
    chosen = tasks(2) if name == "selfrepair" else one_of_two_turns(2)  # it needs successes
    weights, steps = three_steps(policy, "grpo", chosen)
    others, other_steps = three_steps(policy, name, chosen, schedule=schedule, **SCHEMES[name].neutral)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    for a, b in zip(steps, other_steps, strict=True):
        assert a.trajectories == b.trajectories and torch.equal(a.advantages, b.advantages)
        for column in set(a.metrics) - set(TIMES):
            assert a.metrics[column] == b.metrics[column] or math.isnan(a.metrics[column] + b.metrics[column])
    start = parameters_of(tiny_policy(policy.tokenizer, stop=0.2, close=0.1))
    assert steps[0].advantages.any() and not torch.equal(weights[0], start[0]), "nothing was learned"
    if name != "sentinel":  # it waits for an alarm, and has a test of its own
        others, _ = three_steps(policy, name, chosen, schedule=schedule)
        assert any(not torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_says_what_it_is_and_fits_on_a_screen(name):
    one = SCHEMES[name]
    assert one.name == name and one.about and one.source and one.step.__doc__
    assert set(one.neutral) <= {*one.settings, *one.uses} <= set(SETTINGS)
    assert set(one.defaults) <= set(SETTINGS) and not set(one.settings) & set(one.uses)
    code = inspect.getsource(one.step).split('"""')[-1].strip().splitlines()
    assert len(code) <= 30
