"""Schemes that sample: what each does with given rollouts, against the loss written by hand."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from helpers.models import tiny_policy
from helpers.updates import (
    TIMES,
    all_close,
    graded,
    gradient_of,
    loss_by_hand,
    made_up,
    make_run,
    neighbour,
    objective_of,
    own_logprobs,
    parameters_of,
    tasks,
    with_control_tokens,
)

from nanotoolrl import guidance, objective, schemes
from nanotoolrl.config import SETTINGS, setting
from nanotoolrl.env import CAPPED, Call, Turn, Verdict
from nanotoolrl.guidance import hint
from nanotoolrl.look.metrics import metrics
from nanotoolrl.run import (
    Run,
)
from nanotoolrl.schemes import grpo
from nanotoolrl.signals import SCHEMES
from nanotoolrl.trajectory import demonstration


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
    calls, loss = [], objective.policy_loss

    def recording(logprobs, old_logprobs, *rest):
        calls.append((logprobs.detach().clone(), old_logprobs.clone()))
        return loss(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(objective, "policy_loss", recording)
    monkeypatch.setattr(guidance, "hint_text", lambda task, format: "Hint: say that docs is a folder.")
    monkeypatch.setattr(guidance, "group_advantages", lambda run, rows: torch.linspace(-1, 1, len(rows)))
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
    gradients, _ = objective_of("guard", monkeypatch, tiny, rows, advantages, guard=weight)
    loss, count = 0.0, 0
    for row, a in zip(rows, advantages.tolist(), strict=True):
        new = own_logprobs(tiny, row, 1.0)
        old = torch.tensor([x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled])
        ids = [t for t, sampled in zip(row.tokens, row.loss_mask, strict=True) if sampled]
        factor = torch.tensor([(1 - weight) if a < 0 and t in control else 1.0 for t in ids])
        loss, count = loss - (a * factor * (new - old).exp()).sum(), count + len(ids)
    all_close(gradients[0], gradient_of(loss / count, tiny), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["control", "structure", "paper", "opener", "stop"])
def test_every_scheme_spares_the_tokens_of_its_guard(tiny, monkeypatch, name):
    """`--guard 1` of grpo: bad rollouts push all tokens down but those of `--guard-tokens`."""
    rows, advantages = made_up(tiny)
    rows, _ = with_control_tokens(tiny, rows)
    how = {"guard": 1.0, "guard_tokens": name}
    gradients, _ = objective_of("grpo", monkeypatch, tiny, rows, advantages, **how)
    structure = make_run(tiny).structure
    loss, count, spared = 0.0, 0, 0
    for row, a in zip(rows, advantages.tolist(), strict=True):
        new = own_logprobs(tiny, row, 1.0)
        old = torch.tensor([x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled])
        ids = [t for t, sampled in zip(row.tokens, row.loss_mask, strict=True) if sampled]
        if name == "structure":
            kinds = [k == 0 for message in row.spoken_ids() for k in structure.classes(message)]
        else:
            kinds = [t in structure.named(name) for t in ids]
        factor = torch.tensor([0.0 if a < 0 and kind else 1.0 for kind in kinds])
        spared += int((factor == 0).sum())
        loss, count = loss - (a * factor * (new - old).exp()).sum(), count + len(ids)
    assert spared > 0
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
    advantages = advantages.abs() * torch.tensor([1, 0, -1, -1] * 2)  # those without advantage are held, too
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
        lengths = [len(ids) for ids in row.spoken_ids()]
        for ours, theirs in zip(new.split(lengths), old.split(lengths), strict=True):
            if a >= 0 and (theirs - ours).sum() > 1e-3:
                loss, fell = loss + 0.6 * (theirs - ours).clamp(min=0).sum(), fell + 1
    assert 0 < fell < 2 * (advantages >= 0).sum()
    all_close(gradients[0], gradient_of(loss / count, tiny), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("spared", ["guard", "spare_passed", "gtpo"])
def test_llds_never_holds_a_bad_rollout_up(tiny, monkeypatch, spared):
    """Its tokens may weigh 0, which is not below 0: whose they are decides."""
    rows, _ = made_up(tiny, spread=0.0)
    rows, _ = with_control_tokens(tiny, rows)
    for row in rows:  # as if everything had been likelier
        row.logprobs = [x + 0.3 for x in row.logprobs]
        row.verdicts, row.turn_of = [Verdict(True), Verdict(False)], [0, 0]
        row.turns = 2
    bad = torch.full((len(rows),), -1.0)
    settings = {spared: 1.0, "updates": 1}
    held, _ = objective_of("llds", monkeypatch, tiny, rows, bad, llds_weight=0.6, **settings)
    plain, _ = objective_of("grpo", monkeypatch, tiny, rows, bad, **settings)
    all_close(held[0], plain[0], atol=1e-7)
    mixed = bad.clone()
    mixed[0] = 0.5
    held, _ = objective_of("llds", monkeypatch, tiny, rows, mixed, llds_weight=0.6, **settings)
    plain, _ = objective_of("grpo", monkeypatch, tiny, rows, mixed, **settings)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(held[0], plain[0]))


def test_llds_says_nothing_of_rollouts_that_are_masked(tiny, monkeypatch):
    """`--mask-overlong` takes the advantage of one that a limit ended: it is not good for that."""
    rows, _ = made_up(tiny, spread=0.0)
    for row in rows:  # as if everything had been likelier
        row.logprobs = [x + 0.3 for x in row.logprobs]
    bad = torch.full((len(rows),), -1.0)
    rows[0].verdicts = [Verdict(False, CAPPED)]
    masked = {"mask_overlong": True, "updates": 1}
    held, _ = objective_of("llds", monkeypatch, tiny, rows, bad, llds_weight=0.6, **masked)
    plain, _ = objective_of("grpo", monkeypatch, tiny, rows, bad, **masked)
    all_close(held[0], plain[0], atol=1e-7)


def test_llds_stays_in_a_dead_step(policy, monkeypatch):
    """Without contrast nothing has fallen, so with `--skip-dead` nothing moves, as in grpo."""
    tiny = tiny_policy(policy.tokenizer)
    rows, advantages = made_up(tiny)
    settings = {"updates": 2, "skip_dead": True, "llds_weight": 0.6}
    alive, _ = objective_of("llds", monkeypatch, tiny, rows, advantages, **settings)
    dead, _ = objective_of("llds", monkeypatch, tiny, rows, torch.zeros_like(advantages), **settings)
    assert len(alive) == 2 and dead == []


@pytest.mark.parametrize("kind", ["shaped", "ratio"])
def test_ops_by_hand(tiny, monkeypatch, kind):
    """One oracle row in each group, its tokens trained by their own loss, in the group's mean."""
    rows, advantages = made_up(tiny)
    one = demonstration(tiny.chat, tasks(1)[0], "hermes")
    monkeypatch.setattr(guidance, "demonstrations", lambda run, tasks: [one] * len(tasks))
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


def test_ghpo_reports_the_success_of_unhinted_rollouts(tiny, monkeypatch):
    """2 tasks x 2 rollouts, 1 success: the failed group's first is replaced, success stays 1 in 4."""
    run = make_run(tiny, group=2, hint_count=1)
    first = [graded([], 1, [], reward) for reward in (0.0, 0.0, 1.0, 0.0)]
    second = [replace(graded([], 1, [], 1.0), source="hint")]
    rows = iter([first, second])
    monkeypatch.setattr(guidance, "rollout", lambda *_, **__: list(next(rows)))
    monkeypatch.setattr(guidance, "policy_update", lambda *_: {})
    monkeypatch.setattr(guidance, "hint_text", lambda *_: "a hint")
    step = SCHEMES["ghpo"].step(run, tasks(2))
    assert [row.source for row in step.trajectories] == ["hint", "policy", "policy", "policy"]
    assert step.metrics == {"failed_tasks": 1, "success": 0.25}


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
    settings |= {"round_steps": 1, "sft_window": 1, "sft_tokens": 200, "sft_epochs": 1, "restart_steps": 1}
    run = make_run(tiny, torch.optim.AdamW, **(settings | changes))
    run.tasks, steps = chosen, []
    for run.step in (1, 2, 3):
        steps.append(SCHEMES[scheme].step(run, chosen))
    return parameters_of(tiny), steps


RL = [(name, schedule) for name, one in SCHEMES.items() if one.neutral for schedule in one.schedules or ("",)]
RL = [(name, schedule) for name, schedule in RL if schedule != "none"]


@pytest.mark.slow
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
        one = SCHEMES[name]
        strength = {key: value for key, value in one.defaults.items() if key in one.neutral}
        others, _ = three_steps(policy, name, chosen, schedule=schedule, **strength)
        assert any(not torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_says_what_it_is_and_fits_on_a_screen(name):
    one = SCHEMES[name]
    assert one.name == name and one.about and one.source and one.step.__doc__
    assert set(one.neutral) <= {*one.settings, *one.uses} <= set(SETTINGS)
    assert set(one.defaults) <= set(SETTINGS) and not set(one.settings) & set(one.uses)
    code = inspect.getsource(one.step).split('"""')[-1].strip().splitlines()
    assert len(code) <= 30


def test_a_name_means_one_scheme_one_setting_and_one_metric():
    before = dict(SCHEMES), dict(SETTINGS)
    with pytest.raises(TypeError, match="another scheme called grpo"):
        schemes.scheme(about="a", source="b")(schemes.grpo)
    with pytest.raises(TypeError, match="another setting called lr"):
        schemes.scheme(about="a", source="b", name="new", settings={"lr": setting(1.0, "x")})(schemes.grpo)
    with pytest.raises(TypeError, match="unexpected keyword"):
        schemes.scheme(about="a", source="b", colour="red")(schemes.psr)
    assert (dict(SCHEMES), dict(SETTINGS)) == before
    for metric in ("loss", "dropped_rows"):
        one = replace(SCHEMES["grpo"], metrics={metric: ("share", "something else")})
        with pytest.raises(TypeError, match=f"declares the metric {metric}, which means"):
            metrics(SCHEMES | {"grpo": one})
