"""Updates against the loss written by hand: token by token, one row at a time, from whole logits."""

import math

import pytest
import torch
from helpers.models import tiny_policy, whole_logits
from helpers.updates import (
    TIMES,
    all_close,
    examples,
    gradient_of,
    loss_by_hand,
    made_up,
    make_run,
    neighbour,
    own_logprobs,
    parameters_of,
    rows_by_hand,
    sft_by_hand,
    tasks,
    with_control_tokens,
)

from nanotoolrl import guidance, updates
from nanotoolrl.guidance import hint
from nanotoolrl.record import recorded
from nanotoolrl.run import (
    rollout,
)
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.updates import Supervision, policy_update, rescore


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


@pytest.mark.parametrize("updates", [1, 2])
def test_only_several_updates_need_a_scoring_pass(tiny, monkeypatch, updates):
    calls, honest = [], rescore
    monkeypatch.setattr(guidance, "hint_text", lambda task, format: "Hint: say that docs is a folder.")
    monkeypatch.setattr(guidance, "group_advantages", lambda run, rows: torch.linspace(-1, 1, len(rows)))
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
        kept = dict(metrics)
        for name in ("logit_gradient", "net_push"):
            pushes = (torch.tensor(one.pop(name)) for one in (others, kept))
            torch.testing.assert_close(*pushes, rtol=1e-3, atol=1e-5)
        expected = kept
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


def test_sft_gradient_and_micro_batches(tiny):
    shown = examples(tiny)
    expected = sft_by_hand(tiny, shown)
    gradients = gradient_of(expected, tiny)
    for size in (1, 300, 100_000):
        run = make_run(tiny, tokens_at_once=size)
        assert updates.sft_backward(run, shown) == pytest.approx(expected.item(), abs=1e-5)
        all_close([p.grad for p in tiny.model.parameters()], gradients, atol=2e-5, rtol=1e-3)


# -------------------------------------------------------------------------------------- dead runs, recordings
@pytest.mark.parametrize("skip", [False, True])
def test_a_dead_step_goes_on_by_momentum_or_not(policy, skip):
    """After a step with contrast, one without: AdamW moves on, `--skip-dead` stays."""
    tiny = tiny_policy(policy.tokenizer)
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2, skip_dead=skip, updates=2)
    rows, advantages = made_up(tiny)
    policy_update(run, rows, advantages)
    before = parameters_of(tiny)
    metrics = policy_update(run, rows, torch.zeros_like(advantages))
    moved = any((a != b).any() for a, b in zip(parameters_of(tiny), before, strict=True))
    assert moved == (not skip) and (metrics["logprob_gap"] != metrics["logprob_gap"])
    half = advantages.clone()
    half[: len(half) // 2] = 0  # the first of two updates is dead, the second is not
    policy_update(run, rows, half)
    assert any((a != b).any() for a, b in zip(parameters_of(tiny), before, strict=True))


@pytest.mark.parametrize("supervised", [None, Supervision([], 1.0), "without weight"])
def test_nothing_rides_along_in_a_dead_step(policy, supervised):
    """A signal without examples, or of weight 0, is none."""
    tiny = tiny_policy(policy.tokenizer)
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2, skip_dead=True)
    rows, advantages = made_up(tiny)
    policy_update(run, rows, advantages)
    before = parameters_of(tiny)
    shown = examples(tiny)
    riding = Supervision(shown, 0.0) if supervised == "without weight" else supervised
    policy_update(run, rows, torch.zeros_like(advantages), supervised=riding)
    assert all((a == b).all() for a, b in zip(parameters_of(tiny), before, strict=True))
    policy_update(run, rows, torch.zeros_like(advantages), supervised=Supervision(shown, 1.0))
    assert any((a != b).any() for a, b in zip(parameters_of(tiny), before, strict=True))


def test_what_is_recorded_is_trained(policy):
    """`--record text` trains the same as an update on rows that were recorded by hand, old log-probs anew."""
    found = []
    for how in ("text", "by hand"):
        tiny = tiny_policy(policy.tokenizer)
        run = make_run(tiny, torch.optim.SGD, lr=0.1, updates=2, record="text" if how == "text" else "exact")
        rows, advantages = made_up(tiny)
        if how == "by hand":
            rows = [recorded(row, tiny.chat, "text") for row in rows]
            assert any(row.rewritten for row in rows)
        metrics = policy_update(run, rows, advantages)
        assert ("rewritten" in metrics) == (how == "text")
        found.append(parameters_of(tiny))
    all_close(*found, atol=1e-7)
    assert 0 < policy_update(make_run(tiny, record="stop"), *made_up(tiny))["rewritten"] <= 1


def test_a_row_of_which_nothing_is_left_is_left_out(policy):
    """A cut message of special tokens alone vanishes; the others are trained as before."""
    found = []
    for with_it in (True, False):
        tiny = tiny_policy(policy.tokenizer)
        run = make_run(tiny, torch.optim.SGD, lr=0.1, record="vanish", tokens_at_once=1, loss_agg="sequence")
        rows, advantages = made_up(tiny)
        begin = tiny.chat.special_ids["<|im_start|>"]
        rows[0].tokens = [begin if on else t for t, on in zip(rows[0].tokens, rows[0].loss_mask)]
        if not with_it:
            advantages[0] = 0.0
        policy_update(run, rows, advantages)
        found.append(parameters_of(tiny))
    all_close(*found, atol=1e-7)


def test_the_share_of_rewritten_messages_is_of_all(tiny):
    """Whatever `--filter` leaves out of the update."""
    shares = []
    for kept in (1.0, 0.5):
        rows, advantages = made_up(tiny)
        run = make_run(tiny, record="stop", filter=kept)
        shares.append(policy_update(run, rows, advantages)["rewritten"])
    assert shares[0] == shares[1] > 0
