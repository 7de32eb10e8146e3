"""Updates against the loss written by hand: token by token, one row at a time, from whole logits."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_model import tiny_policy

from nanotoolrl import schemes
from nanotoolrl.env import Task, Turn
from nanotoolrl.sampler import Sampler, Trajectory
from nanotoolrl.schemes import SCHEMES, Run, advantages, grpo, hint, policy_update, rollout, score

TIMES = ("train_tok_s",)


@pytest.fixture
def tiny(policy):
    return tiny_policy(policy.tokenizer)


class Recorder(torch.optim.SGD):
    """Keeps a copy of the gradients of every step, and by default changes nothing."""

    def step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients = [*getattr(self, "gradients", []), [p.grad.clone() for p in parameters]]
        super().step()


def make_run(policy, optimizer=Recorder, reference=None, **changes):
    settings = {
        "group": 4,
        "format": "hermes",
        "max_messages": 3,
        "strict_empty_turn": False,
        "temperature": 1.0,
        "adv_std": True,
        "updates": 1,
        "tokens_at_once": 100_000,
        "clip": 0.2,
        "dual_clip": 3.0,
        "kl": 0.0,
        "grad_clip": 1e9,
        "warmup": 0,
        "lr": 0.0,
        "hint_count": 2,
        "hint_keep": False,
    }
    config = SimpleNamespace(**(settings | changes))
    sampler = Sampler(policy, max_new_tokens=8, seed=3)
    return Run(config, policy, sampler, optimizer(policy.model.parameters(), lr=config.lr), reference)


def tasks(n=2):
    """Tasks that a random model solves now and then: say anything that ends and calls nothing."""
    state = {"Files": {"folders": {"docs": {"b": "x"}}}}
    return [
        Task(f"t{i}", "base", state, ["list_files"], [Turn("word " * i + "?", [], "What?")]) for i in range(n)
    ]


def made_up(policy, temperature=1.0, n=8, spread=0.3, seed=0):
    """(n trajectories of random tokens with 2 sampled messages each, scores [n]); the old log-probs differ
    from the policy's own by about `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def some(low, high):
        length = torch.randint(low, high, (1,), generator=generator).item()
        return torch.randint(len(policy.tokenizer), (length,), generator=generator).tolist()

    rows = []
    for i in range(n):
        row = Trajectory(f"t{i}", "base", "hermes", [], [], [], 0)
        row.append(some(5, 40), sampled=False)
        row.prompt_length = len(row.tokens)
        for observation in (some(1, 20), []):
            row.append(some(1, 15), sampled=True)
            row.append(observation, sampled=False)
        old = torch.tensor(own_logprobs(policy, row, temperature).tolist())
        old = (old + spread * torch.randn(len(old), generator=generator)).tolist()
        row.logprobs = [old.pop(0) if sampled else 0.0 for sampled in row.loss_mask]
        rows.append(row)
    return rows, torch.randn(n, generator=generator)


def neighbour(policy):
    """A reference: the tiny policy with slightly other weights."""
    other = tiny_policy(policy.tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return other


def own_logprobs(policy, row, temperature):
    """Log-probs [N] of a row's sampled tokens: token t from the logits after token t - 1."""
    logprobs = torch.log_softmax(policy.model(torch.tensor([row.tokens])).logits[0] / temperature, -1)
    return torch.stack([logprobs[t - 1, row.tokens[t]] for t in range(len(row.tokens)) if row.loss_mask[t]])


def loss_by_hand(policy, rows, scores, config, reference=None):
    """The whole objective, as the docstring of `grpo` has it."""
    loss, count = 0.0, 0
    for row, score_of_row in zip(rows, scores.tolist(), strict=True):
        old = [x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled]
        new = own_logprobs(policy, row, config.temperature)
        base = own_logprobs(reference, row, config.temperature).detach() if reference else None
        for k in range(len(old)):
            ratio = (new[k] - old[k]).exp()
            bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
            term = torch.max(-score_of_row * ratio, -score_of_row * bounded)
            if score_of_row < 0:
                term = torch.clamp(term, max=-score_of_row * config.dual_clip)
            if reference:
                d = base[k] - new[k]
                term = term + config.kl * (d.exp() - d - 1).clamp(max=10)
            loss, count = loss + term, count + 1
    return loss / count


def parameters_of(policy):
    return [parameter.detach().clone() for parameter in policy.model.parameters()]


def all_close(tensors, others, atol, rtol=0.0):
    for a, b in zip(tensors, others, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


# ------------------------------------------------------------------------------------------ the objective
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gradient_and_metrics_by_hand(policy, tiny, temperature, kl):
    reference = neighbour(policy) if kl else None
    settings = {"temperature": temperature, "kl": kl, "clip": 0.3, "dual_clip": 1.5}
    run = make_run(tiny, reference=reference, **settings)
    rows, scores = made_up(tiny, temperature)
    expected = loss_by_hand(tiny, rows, scores, run.config, reference)
    gradients = torch.autograd.grad(expected, list(tiny.model.parameters()))
    metrics = policy_update(run, rows, scores)
    all_close(run.optimizer.gradients[0], gradients, atol=2e-5, rtol=1e-3)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 1e-3
    assert metrics["skipped_updates"] == 0


def test_clip_fraction_entropy_and_gap_by_hand(tiny):
    run = make_run(tiny, tokens_at_once=200)
    rows, scores = made_up(tiny)
    clipped, gaps, entropies = [], [], []
    for row, score_of_row in zip(rows, scores.tolist(), strict=True):
        new = own_logprobs(tiny, row, 1.0).tolist()
        old = [x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled]
        for a, b in zip(new, old, strict=True):
            ratio = math.exp(a - b)
            clipped.append(ratio > 1.2 if score_of_row > 0 else ratio < 0.8 or ratio > 3)
            gaps.append(abs(a - b))
        logprobs = torch.log_softmax(tiny.model(torch.tensor([row.tokens])).logits[0], -1)
        by_place = (-logprobs.exp() * logprobs).sum(-1).tolist()
        entropies += [by_place[t - 1] for t in range(len(row.tokens)) if row.loss_mask[t]]
    metrics = policy_update(run, rows, scores)
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
    logprobs = torch.log_softmax(tiny.model(torch.tensor([row.tokens])).logits[0], -1)
    places = [t for t in range(len(row.tokens)) if row.loss_mask[t]]
    total = sum(logprobs[t - 1, row.tokens[t]] for t in places)
    expected = torch.autograd.grad(1.5 * total / len(places), list(tiny.model.parameters()))
    all_close(run.optimizer.gradients[0], expected, atol=2e-5, rtol=1e-3)


def test_each_mask_bit_matters(tiny):
    """Training one more token, be it of the prompt or of the observation, gives another gradient."""
    rows, scores = made_up(tiny, n=1)
    row = rows[0]

    def gradient(mask):
        changed = Trajectory(**{**vars(row), "loss_mask": mask})
        run = make_run(tiny, group=1)
        policy_update(run, [changed], scores)
        return torch.cat([g.flatten() for g in run.optimizer.gradients[0]])

    usual = gradient(row.loss_mask)
    assert torch.equal(usual, gradient(list(row.loss_mask)))
    for t in range(1, len(row.tokens)):
        flipped = [bit != (i == t) for i, bit in enumerate(row.loss_mask)]
        assert (gradient(flipped) - usual).abs().max() > 1e-4, t


def test_log_probs_outside_the_mask_are_never_read(tiny):
    rows, scores = made_up(tiny)

    def gradient():
        run = make_run(tiny)
        policy_update(run, rows, scores)
        return run.optimizer.gradients[0]

    usual = gradient()
    for row in rows:
        row.logprobs = [
            x if sampled else math.nan for x, sampled in zip(row.logprobs, row.loss_mask, strict=True)
        ]
    assert all(torch.equal(a, b) for a, b in zip(usual, gradient(), strict=True))


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
        assert others == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def test_updates_share_the_prompts(policy):
    """Two updates: the first half of the groups, then the second half under the moved parameters, with the
    old log-probs of both from before."""
    tiny, other = tiny_policy(policy.tokenizer), tiny_policy(policy.tokenizer)
    run = make_run(tiny, torch.optim.SGD, updates=2, lr=0.1, group=2)
    rows, scores = made_up(tiny)
    for part in (slice(0, 4), slice(4, 8)):
        loss = loss_by_hand(other, rows[part], scores[part], run.config)
        gradients = torch.autograd.grad(loss, list(other.model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(other.model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    policy_update(run, rows, scores)
    all_close(parameters_of(tiny), parameters_of(other), atol=1e-5)


def test_uneven_shares_use_every_prompt_once(tiny):
    """3 groups in 2 updates: no row is left out, none is used twice."""
    rows, scores = made_up(tiny, n=6)
    run = make_run(tiny, updates=2, group=2)
    policy_update(run, rows, scores)
    expected = []
    for part in (slice(0, 2), slice(2, 6)):
        loss = loss_by_hand(tiny, rows[part], scores[part], run.config)
        expected.append(torch.autograd.grad(loss, list(tiny.model.parameters())))
    for ours, hand in zip(run.optimizer.gradients, expected, strict=True):
        all_close(ours, hand, atol=2e-5, rtol=1e-3)


def test_rows_without_advantage_may_be_left_out(policy, tiny):
    """With a KL coefficient too small to count, rows without contrast pass through the model too, and add
    nothing."""
    seen = []
    count = lambda module, args, out: seen.append(out.last_hidden_state[..., 0].numel())  # noqa: E731
    hook = tiny.model.model.register_forward_hook(count)
    rows, scores = made_up(tiny)
    scores[[1, 2, 5]] = 0.0
    gradients, tokens = [], []
    for kl in (0.0, 1e-30):
        run = make_run(tiny, reference=tiny_policy(policy.tokenizer), kl=kl, tokens_at_once=1)
        seen.clear()
        policy_update(run, rows, scores)
        gradients += run.optimizer.gradients
        tokens.append(sum(seen))
    hook.remove()
    all_close(*gradients, atol=1e-7)
    loss = loss_by_hand(tiny, rows, scores, run.config)  # divided by the tokens of all rows
    all_close(gradients[0], torch.autograd.grad(loss, list(tiny.model.parameters())), atol=2e-5, rtol=1e-3)
    left_out = sum(len(rows[i].tokens) for i in (1, 2, 5))
    assert tokens == [tokens[1] - left_out, tokens[1]]


def test_no_contrast_at_all(tiny):
    """Adam's momentum goes on; there is no loss and nothing to measure."""
    rows, scores = made_up(tiny)
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2)
    policy_update(run, rows, scores)
    before = parameters_of(tiny)
    metrics = policy_update(run, rows, torch.zeros(8))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_updates"] == 0.0
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
    rows, scores = made_up(tiny)
    good = rows[2].logprobs
    if bad == "old log-prob":
        place = rows[2].loss_mask.index(True)
        rows[2].logprobs = [value if i == place else x for i, x in enumerate(good)]
    handle = tiny.head.register_hook(lambda g: g * value if bad == "gradient" else g)
    before = parameters_of(tiny)
    for count in (1, 2):
        assert policy_update(run, rows, scores)["skipped_updates"] == 1
        assert run.skipped_in_a_row == count
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(tiny), before, strict=True))
    assert not run.optimizer.state, "Adam's moments must not see it either"
    assert all((parameter.grad == 0).all() for parameter in tiny.model.parameters())
    handle.remove()
    rows[2].logprobs = good
    metrics = policy_update(run, rows, scores)
    assert metrics["skipped_updates"] == run.skipped_in_a_row == 0 and math.isfinite(metrics["grad_norm"])
    assert not any(torch.equal(a, b) for a, b in zip(parameters_of(tiny), before, strict=True) if a.ndim > 1)


def test_one_bad_update_of_two(tiny):
    """The other update of the step is made."""
    run = make_run(tiny, updates=2)
    rows, scores = made_up(tiny)
    rows[0].logprobs = [math.nan] * len(rows[0].tokens)
    metrics = policy_update(run, rows, scores)
    assert metrics["skipped_updates"] == 1 and run.skipped_in_a_row == 0
    assert len(run.optimizer.gradients) == 1 and math.isfinite(metrics["grad_norm"])


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
    assert advantages(run, rows).tolist() == pytest.approx([1.1547, -0.5774, -0.5774, 0, 0, 0], abs=1e-3)
    run.config.adv_std = False
    assert advantages(run, rows).tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])


def test_score_is_what_the_sampler_said(tiny):
    run = make_run(tiny, temperature=0.7)
    for row in rollout(run, tasks(1)):
        scored = score(tiny, row, 0.7)
        assert scored == pytest.approx(row.logprobs, abs=2e-5) and len(scored) == len(row.tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_has_ratio_one(tiny, temperature):
    """Sampler and trainer agree, so that a first update clips nothing."""
    run = make_run(tiny, temperature=temperature)
    metrics = policy_update(run, rollout(run, tasks()), torch.ones(8))
    assert metrics["logprob_gap"] <= 2e-5 and metrics["clip_fraction"] == 0.0


# ----------------------------------------------------------------------------------------------- the schemes
def three_steps(policy, scheme, **changes):
    tiny = tiny_policy(policy.tokenizer, stop=0.2, close=0.1)
    run = make_run(tiny, torch.optim.AdamW, lr=1e-2, updates=2, grad_clip=1.0, warmup=2, **changes)
    steps = []
    for _ in range(3):
        run.step += 1
        steps.append(SCHEMES[scheme].step(run, tasks()))
    return parameters_of(tiny), steps


def test_hint_without_hints_is_grpo(policy):
    weights, steps = three_steps(policy, "grpo")
    others, hint_steps = three_steps(policy, "hint", hint_count=0)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    for a, b in zip(steps, hint_steps, strict=True):
        assert a.trajectories == b.trajectories and torch.equal(a.advantages, b.advantages)
        for name in set(a.metrics) - set(TIMES):
            assert a.metrics[name] == b.metrics[name] or math.isnan(a.metrics[name] + b.metrics[name])
    start = parameters_of(tiny_policy(policy.tokenizer, stop=0.2, close=0.1))
    assert steps[0].advantages.any() and not torch.equal(weights[0], start[0]), "nothing was learned"


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
    calls, loss = [], schemes.policy_loss

    def recording(logprobs, old_logprobs, *rest):
        calls.append((logprobs.detach().clone(), old_logprobs.clone()))
        return loss(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(schemes, "policy_loss", recording)
    monkeypatch.setattr(schemes, "hint_text", lambda task, format: "Hint: say that docs is a folder.")
    monkeypatch.setattr(schemes, "advantages", lambda run, rows: torch.linspace(-1, 1, len(rows)))
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


def test_table_of_schemes():
    assert list(SCHEMES)[:2] == ["grpo", "hint"]
    for name, entry in SCHEMES.items():
        assert (
            entry.name == name == entry.step.__name__ and entry.about and entry.source and entry.step.__doc__
        )
