"""Updates of a tiny policy, and the loss by hand: token by token, one row at a time, from whole logits."""

import torch

from helpers.models import tiny_policy, whole_logits
from nanotoolrl import guidance, schemes, signals
from nanotoolrl.config import Config
from nanotoolrl.env import Task, Turn, Verdict
from nanotoolrl.run import (
    Run,
)
from nanotoolrl.sampler import Sampler
from nanotoolrl.signals import SCHEMES
from nanotoolrl.trajectory import Trajectory, demonstration

TIMES = ("train_tok_s", "probe_seconds")


class Recorder(torch.optim.SGD):
    """Keeps a copy of the gradients of every step, and by default changes nothing."""

    gradients: list[list[torch.Tensor]] = []

    def step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients = [*self.gradients, [p.grad.clone() for p in parameters]]
        super().step()


def make_run(policy, optimizer=Recorder, reference=None, **changes):
    settings = {
        "group": 4,
        "max_messages": 3,
        "tokens_at_once": 100_000,
        "grad_clip": 1e9,
        "warmup": 0,
        "lr": 0.0,
    }
    run = Run.begin(Config(**(settings | changes)), policy)
    run.sampler = Sampler(policy, max_new_tokens=8, seed=3)
    run.optimizer = optimizer(policy.model.parameters(), lr=run.config.lr)
    if reference:
        run.reference = reference
    return run


def tasks(n=2):
    """Tasks that a random model solves now and then: say anything that ends and calls nothing."""
    state = {"Files": {"folders": {"docs": {"b": "x"}}}}
    return [
        Task(f"t{i}", "base", state, ["list_files"], [Turn("word " * i + "?", [], "What?")]) for i in range(n)
    ]


def made_up(policy, temperature=1.0, n=8, spread=0.3, seed=0):
    """(n trajectories of random tokens with 2 sampled messages each, advantages [n]); old log-probs differ
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
    logprobs = torch.log_softmax(whole_logits(policy, torch.tensor([row.tokens]))[0] / temperature, -1)
    return torch.stack([logprobs[t - 1, row.tokens[t]] for t in range(len(row.tokens)) if row.loss_mask[t]])


def loss_by_hand(policy, rows, advantages, config, reference=None):
    """The whole objective, as the docstring of `grpo` has it."""
    loss, count = 0.0, 0
    for row, advantage in zip(rows, advantages.tolist(), strict=True):
        old = [x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled]
        new = own_logprobs(policy, row, config.temperature)
        base = own_logprobs(reference, row, config.temperature).detach() if reference else None
        for k in range(len(old)):
            ratio = (new[k] - old[k]).exp()
            bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
            term = torch.max(-advantage * ratio, -advantage * bounded)
            if advantage < 0:
                term = torch.clamp(term, max=-advantage * config.dual_clip)
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


def gradient_of(loss, policy):
    return torch.autograd.grad(loss, list(policy.model.parameters()))


def rows_by_hand(policy, rows, advantages, config):
    """[(losses, entropies) of a row's tokens], by the same formulas as `loss_by_hand`."""
    found = []
    for row, a in zip(rows, advantages.tolist(), strict=True):
        old = torch.tensor([x for x, sampled in zip(row.logprobs, row.loss_mask, strict=True) if sampled])
        new = own_logprobs(policy, row, config.temperature)
        ratio = (new - old).exp()
        loss = torch.max(-a * ratio, -a * ratio.clamp(1 - config.clip, 1 + config.clip_high))
        loss = loss.clamp(max=-a * config.dual_clip) if a < 0 else loss
        logprobs = torch.log_softmax(whole_logits(policy, torch.tensor([row.tokens]))[0], -1)
        entropy = (-logprobs.exp() * logprobs).sum(-1)
        places = [t - 1 for t in range(len(row.tokens)) if row.loss_mask[t]]
        found.append((loss, entropy[places]))
    return found


def graded(passed, turns, states, reward=0.0):
    """A trajectory without tokens."""
    outcome = {"reward": reward, "states": states, "verdicts": [Verdict(flag) for flag in passed]}
    return Trajectory("t", "base", "hermes", [], [], [], 0, turns=turns, **outcome)


def objective_of(scheme, monkeypatch, policy, rows, advantages, **changes):
    """(gradient, metrics) of what a scheme does with given rollouts."""
    run = make_run(policy, **changes)
    run.step = 1
    for module in (schemes, guidance, signals):
        monkeypatch.setattr(module, "rollout", lambda *_, **__: list(rows))
        monkeypatch.setattr(module, "group_advantages", lambda *_: advantages.clone())
    step = SCHEMES[scheme].step(run, tasks(len(advantages) // run.config.group))
    return run.optimizer.gradients, step.metrics


def with_control_tokens(policy, rows):
    """Rows in which some sampled tokens are control tokens, their log-probs a little off the policy's."""
    control = make_run(policy).control.tolist()
    for row in rows:
        places = [t for t in range(len(row.tokens)) if row.loss_mask[t]]
        for n, t in enumerate(places[::3]):
            row.tokens[t] = control[n % len(control)]
        new = iter((own_logprobs(policy, row, 1.0) - 0.05).tolist())
        row.logprobs = [next(new) if sampled else 0.0 for sampled in row.loss_mask]
    return rows, control


def sft_by_hand(policy, rows, weight=lambda p: torch.ones_like(p)):
    parts = [own_logprobs(policy, row, 1.0) for row in rows]
    total = -sum((weight(part.detach().exp()) * part).sum() for part in parts)
    return total / sum(len(part) for part in parts)


def examples(policy, n=5):
    return [demonstration(policy.chat, task, "hermes") for task in tasks(n)]
