"""The verbs that schemes are composed of: roll out, compare, update the policy, train on examples.

Shapes: P prompts, G rollouts per prompt, B = P G rows in group order, T tokens, N trained tokens.
"""

import copy
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from nanotoolrl.calls import BROKEN_TAG_STATES
from nanotoolrl.chat import control_tokens
from nanotoolrl.env import Episode, Task
from nanotoolrl.gpu import distributed
from nanotoolrl.gpu.masters import Masters
from nanotoolrl.logprob import token_logprob
from nanotoolrl.losses import group_advantages, kl_k3, policy_loss
from nanotoolrl.model import DTYPES, Policy, load, pad
from nanotoolrl.probes import control_probabilities, logit_gradient
from nanotoolrl.sampler import Sampler
from nanotoolrl.trajectory import Trajectory, demonstration
from nanotoolrl.world.tasks import in_epochs, load_tasks

MOST_SKIPPED = 3  # updates in a row that were not finite, after which a run stops


@dataclass
class Run:
    """What a scheme works with. `config` is train.py's, `tasks` are all training tasks."""

    config: object
    policy: Policy
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    tasks: list[Task] = field(default_factory=list)
    step: int = 0
    state: dict = field(default_factory=dict)  # what is kept across steps; saved in the checkpoint
    sampled_tokens: int = 0  # of this step so far
    sample_seconds: float = 0.0  # of this step so far
    skipped_updates: int = 0  # of this step so far
    masters: Masters | None = None  # what the optimiser steps

    def __post_init__(self) -> None:
        self.masters = self.masters or Masters(self.policy.model)

    @cached_property
    def reference(self) -> Policy:
        """The policy RL started from, for KL terms; loaded when one first needs it."""
        policy = load(self.config.model, dtype=DTYPES[self.config.dtype])
        if "reference" in self.state:
            policy.model.load_state_dict(self.state["reference"])
        return policy

    @property
    def stuck(self) -> bool:
        """Whether too many updates in a row were not finite."""
        return self.state.get("skipped_in_a_row", 0) >= MOST_SKIPPED

    @cached_property
    def source(self) -> list[Task]:
        """The tasks of plain SFT: the training tasks, or those of another domain (`--sft-source foreign`)."""
        return self.tasks if self.config.sft_source == "own" else load_tasks("foreign")

    @cached_property
    def control(self) -> Tensor:
        """Ids [C] of the control tokens of the format."""
        ids = control_tokens(self.policy.chat, self.config.format).values()
        return torch.tensor(list(ids), device=self.policy.device)


@dataclass
class Step:
    """What one step did: its trajectories, their advantages [B], and its metrics (columns of metrics.csv)."""

    trajectories: list[Trajectory]
    advantages: Tensor
    metrics: dict[str, float]


# ------------------------------------------------------------------------------------ rollouts and advantages
def rollout(
    run: Run,
    tasks: Sequence[Task],
    hints: Sequence[str] | None = None,
    group: int | None = None,
    part: int = 0,
    force_prefix: bool = False,
) -> list[Trajectory]:
    """`group` rollouts (default: the config's G) of every task with the current policy, in group order.

    hints: one text per row. part: keys the noise; a second rollout within a step takes another one.
    force_prefix: write the canonical prefix where a call should come (`Sampler.rollout`).
    """
    config = run.config
    how = {name: getattr(config, name) for name in ("max_messages", "strict_empty_turn", "tool_seconds")}
    episodes = [
        Episode(task, config.format, **how)
        for task in tasks
        for _ in range(config.group if group is None else group)
    ]
    started, stream = time.perf_counter(), run.step + (part << 24)
    rows = run.sampler.rollout(episodes, hints, config.temperature, stream, force_prefix)
    run.sample_seconds += time.perf_counter() - started
    run.sampled_tokens += sum(row.sampled_tokens for row in rows)
    return rows


def trained_reward(config: object, row: Trajectory) -> float:
    """The reward that advantages are made of: 0 or 1; the share of turns passed with `--graded-reward`; less
    `--tag-penalty` times the share of messages with a broken tag."""
    passed = sum(verdict.passed for verdict in row.verdicts) / row.turns
    broken = sum(state in BROKEN_TAG_STATES for state in row.states) / max(1, len(row.states))
    return (passed if config.graded_reward else row.reward) - config.tag_penalty * broken


def advantages(run: Run, trajectories: list[Trajectory]) -> Tensor:
    """Group-relative advantages [B] of trajectories in group order."""
    rewards = [trained_reward(run.config, row) for row in trajectories]
    grouped = torch.tensor(rewards).view(-1, run.config.group)  # [P, G]
    return group_advantages(grouped, run.config.adv_std).flatten()


def failed_tasks(trajectories: list[Trajectory], group: int, enough: Callable = all) -> list[int]:
    """Indices of the tasks whose rollouts all failed, or (`enough` is any) of those with any failure."""
    groups = [trajectories[i : i + group] for i in range(0, len(trajectories), group)]
    return [i for i, rows in enumerate(groups) if enough(row.reward == 0 for row in rows)]


def demonstrations(run: Run, tasks: Sequence[Task]) -> list[Trajectory]:
    """Ground-truth conversations of the tasks; those that do not fit the context are left out."""
    rows = [demonstration(run.policy.chat, task, run.config.format) for task in tasks]
    return [row for row in rows if len(row.tokens) <= run.sampler.context]


def source_examples(run: Run) -> list[Trajectory]:
    """Ground truth of this step's `sft_batch` tasks of the SFT source, in seeded epochs."""
    size = run.config.sft_batch
    places = range((run.step - 1) * size, run.step * size)
    return demonstrations(run, in_epochs(run.source, f"sft/{run.config.seed}", places))


# --------------------------------------------------------------------------------------------- policy updates
@dataclass(frozen=True)
class Tokens:
    """The N trained tokens of some rows, as an objective sees them: `logprobs` (differentiable), the `old`
    ones they were sampled with, `advantages`, and `row`, the index of each token's row; all [N]."""

    run: Run
    rows: list[Trajectory]
    ids: Tensor  # [rows, T]
    mask: Tensor  # [rows, T]
    hidden: Tensor  # [N, D]
    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    row: Tensor
    shared: int = 0  # first tokens that all rows have in common and that pass through the model once

    @cached_property
    def control(self) -> Tensor:
        """[N], True on control tokens."""
        return torch.isin(self.ids[self.mask], self.run.control)

    @cached_property
    def reference(self) -> Tensor:
        """Log-probs [N] under the reference."""
        with torch.no_grad():
            how = {"temperature": self.run.config.temperature, "shared": self.shared}
            return self.run.reference.logprobs(self.ids, self.mask, **how)[0]

    def of(self, source: str) -> Tensor:
        """[N], True on the tokens of rows from `source`."""
        flags = torch.tensor([row.source == source for row in self.rows], device=self.row.device)
        return flags[self.row]


Objective = Callable[[Run, Tokens], tuple[Tensor, Tensor]]


def clipped_objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """GRPO's objective: (loss, whether it was clipped), both [N]."""
    config = run.config
    bounds = (config.clip, config.clip_high, config.dual_clip)
    return policy_loss(tokens.logprobs, tokens.old, tokens.advantages, *bounds)


@dataclass(frozen=True)
class Supervision:
    """An SFT loss that rides along with policy updates: coefficient times the mean over trained tokens of
    -w log p, on up to `sft_batch` of the examples, drawn anew for each update."""

    examples: list[Trajectory]
    coefficient: float
    weight: Callable[[Tensor], Tensor] = torch.ones_like  # w [N] of the tokens' probabilities [N]


def policy_update(
    run: Run,
    trajectories: list[Trajectory],
    scores: Tensor,
    objective: Objective = clipped_objective,
    every_row: bool = False,
    supervised: Supervision | None = None,
) -> dict[str, float]:
    """`updates` optimiser steps on an objective, each on an equal share of the prompts.

    scores: advantages [B]. The loss is the mean over all sampled tokens of the share (`--loss-agg sequence`:
    the mean over rows of each row's mean). Rows without advantage are left out, unless `every_row` or a KL or
    entropy term says something about them. Old log-probs are the sampler's. Rows that lack them under this
    prompt (hinted, oracle) get new ones: with a single update from the gradient forward itself, so that the
    ratio is exactly 1, with several from a scoring forward first. Returns `Tally.metrics`.
    """
    config, tally = run.config, Tally()
    every_row = every_row or config.kl > 0 or config.entropy > 0
    by_token, groups = config.loss_agg == "token", len(trajectories) // config.group
    ends = [groups * k // config.updates * config.group for k in range(config.updates + 1)]
    used = [
        [i for i in range(*span) if every_row or scores[i] != 0] for span in itertools.pairwise(ends)
    ]  # rows of each update
    used = [[rows[k] for k in distributed.share(len(rows))] for rows in used]
    old = {i: old_logprobs(run, trajectories[i]) for rows in used for i in rows}
    for update, mine in enumerate(used):
        share = trajectories[ends[update] : ends[update + 1]]
        total = sum(row.sampled_tokens for row in share) if by_token else len(share)
        loss_sum = 0.0
        for part in batches(run, [trajectories[i] for i in mine]):
            batch = [mine[k] for k in part]
            rows, before = [trajectories[i] for i in batch], [old[i] for i in batch]
            losses, tokens = token_losses(run, rows, before, scores[batch], objective, tally, update == 0)
            lengths = [row.sampled_tokens for row in rows]
            if not by_token:
                losses = losses / losses.new_tensor([n for n in lengths for _ in range(n)])
            loss = losses.sum() / total
            (loss * run.masters.scale).backward()
            tally.push(tokens)
            loss_sum += loss.item()
        if supervised and supervised.coefficient > 0:
            tally.supervise(run, supervised, update)
        loss_sum = distributed.total(loss_sum)
        tally.losses.append(loss_sum)
        tally.norms.append(optimizer_step(run, loss_sum, run.optimizer, config.lr * warm_up(run)))
    return tally.metrics()


def token_losses(
    run: Run,
    rows: list[Trajectory],
    old: list[list[float] | None],
    scores: Tensor,
    objective: Objective,
    tally: "Tally",
    first_update: bool,
) -> tuple[Tensor, Tokens]:
    """Loss [N] of the sampled tokens of some rows, objective + kl * k3 - entropy * H, and those tokens;
    `tally` takes notes. old: log-probs of each row's tokens; None: those computed here, detached."""
    config = run.config
    ids, mask = pad([(row.tokens, row.loss_mask) for row in rows], run.policy.device)
    want_entropy = first_update or config.entropy > 0
    shared = rows[0].prompt_length if config.share_prompt else 0
    hidden = run.policy.trained_hidden(ids, mask, shared)  # [N, D]
    logprobs, entropy = token_logprob(
        hidden, run.policy.head, ids[mask], config.temperature, want_entropy
    )  # [N]
    logprobs.retain_grad()
    counts = torch.tensor([row.sampled_tokens for row in rows], device=logprobs.device)
    index = torch.arange(len(rows), device=logprobs.device).repeat_interleave(counts)
    known = [values or [0.0] * len(row.tokens) for values, row in zip(old, rows)]
    before = [x for values, row in zip(known, rows) for x, sampled in zip(values, row.loss_mask) if sampled]
    missing = torch.tensor([values is None for values in old], device=logprobs.device)[index]
    before = torch.where(missing, logprobs.detach(), logprobs.new_tensor(before))
    weights = scores.to(logprobs)[index]
    tokens = Tokens(run, rows, ids, mask, hidden.detach(), logprobs, before, weights, index, shared)
    loss, clipped = objective(run, tokens)
    if config.kl > 0:
        loss = loss + config.kl * kl_k3(logprobs, tokens.reference)
    if config.entropy > 0:
        loss = loss - config.entropy * entropy
    own, sampled = tokens.of("policy"), ~tokens.of("oracle")
    tally.tokens += sum(len(row.tokens) for row in rows)
    tally.forward_tokens += sum(len(row.tokens) for row in rows) - shared * (len(rows) - 1)
    tally.clipped += clipped[own].tolist()
    if first_update:
        tally.entropies += entropy[sampled].tolist()
        tally.gaps += (logprobs - before).detach().abs()[own].tolist()
    return loss, tokens


@dataclass
class Tally:
    """Notes of one policy update, summed up by `metrics`. Rows that are not the policy's own (hinted, oracle)
    stay out of `clipped` and `gaps`, oracle rows also out of `entropies`."""

    started: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    forward_tokens: int = 0  # that passed through the model; less than `tokens` where rows share a prompt
    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)  # None: the update was skipped
    clipped: list[bool] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    gradients: Tensor | None = None  # [2, C], see `logit_gradient`
    probe_seconds: float = 0.0
    sft_losses: list[float] = field(default_factory=list)
    sft_tokens: int = 0

    @torch.no_grad()
    def push(self, tokens: Tokens) -> None:
        """After a backward pass: add up which way the policy loss pushes the logits of control tokens through
        the log-probs (an entropy or SFT term pushes, too, and is not counted)."""
        started = time.perf_counter()
        run, ids = tokens.run, tokens.ids[tokens.mask]
        temperature, logprobs = run.config.temperature, tokens.logprobs
        p = control_probabilities(
            tokens.hidden, run.policy.head, ids, logprobs, run.control, temperature
        )  # [N, C]
        found = logit_gradient(-logprobs.grad, ids, p, run.control) / temperature / run.masters.scale
        self.gradients = found if self.gradients is None else self.gradients + found
        self.probe_seconds += time.perf_counter() - started

    def supervise(self, run: Run, supervised: Supervision, update: int) -> None:
        """Add the gradient of the SFT loss that rides along with this update."""
        count = min(run.config.sft_batch, len(supervised.examples))
        draw = random.Random(f"{run.config.seed}/{run.step}/{update}").sample(supervised.examples, count)
        if draw:
            self.sft_losses.append(sft_backward(run, draw, supervised.coefficient, supervised.weight))
            self.sft_tokens += sum(row.sampled_tokens for row in draw)
            mine = sum(len(draw[i].tokens) for i in distributed.share(len(draw)))
            self.tokens += mine
            self.forward_tokens += mine

    def metrics(self) -> dict[str, float]:
        """Columns of metrics.csv; nan where there is nothing to average."""
        found = distributed.gathered([] if self.gradients is None else [self.gradients.cpu()])
        columns = {
            "loss": _mean(self.losses),
            "entropy": _mean(distributed.gathered(self.entropies)),
            "grad_norm": _mean([norm for norm in self.norms if norm is not None]),
            "clip_fraction": _mean(distributed.gathered(self.clipped)),
            "train_tok_s": distributed.total(self.tokens) / (time.perf_counter() - self.started),
            "forward_tokens": distributed.total(self.forward_tokens),
            "logprob_gap": max(distributed.gathered(self.gaps), default=math.nan),
        }
        sft = {"sft_loss": _mean(self.sft_losses), "sft_tokens": self.sft_tokens}
        gradients = torch.stack(found).sum(0).tolist() if found else None
        columns |= {"logit_gradient": gradients, "probe_seconds": self.probe_seconds}
        return columns | (sft if self.sft_losses else {})


def warm_up(run: Run) -> float:
    """Share of the learning rate that this step runs at."""
    return min(1.0, (run.step + 1) / max(1, run.config.warmup))


def new_optimizer(masters: Masters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over all weights in one fused call."""
    return torch.optim.AdamW(masters.tensors, lr=lr, weight_decay=weight_decay, fused=True)


def optimizer_step(run: Run, loss: float, optimizer: torch.optim.Optimizer, lr: float) -> float | None:
    """Sum the gradients of all processes, clip and step; returns the norm, or None, without a step, if
    anything is not finite.

    Counts what it skips; a run that is stuck stays so, whatever follows within the step. An overflow that a
    smaller scale of the loss can cure does not count towards being stuck.
    """
    distributed.sum_gradients(run.masters.tensors)
    norm = torch.nn.utils.clip_grad_norm_(run.masters.tensors, run.config.grad_clip).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        run.masters.publish()
    run.skipped_updates += not finite
    curable = False
    if not finite and math.isfinite(loss):
        curable = run.masters.lower_scale()
    if not run.stuck and not curable:
        run.state["skipped_in_a_row"] = 0 if finite else run.state.get("skipped_in_a_row", 0) + 1
    run.masters.zero_gradients()
    return norm if finite else None


def old_logprobs(run: Run, row: Trajectory) -> list[float] | None:
    """Log-probs of a row before the update: the sampler's, or new ones where those say nothing; None if the
    only update computes them anyway."""
    if row.scored:
        return row.logprobs
    if run.config.updates == 1:
        return None
    return score(run.policy, row, run.config.temperature)


@torch.no_grad()
def score(policy: Policy, row: Trajectory, temperature: float) -> list[float]:
    """New `Trajectory.logprobs` of a row: the policy's, under the row's own (unhinted) prompt."""
    ids, mask = pad([(row.tokens, row.loss_mask)], policy.device)
    values = iter(policy.logprobs(ids, mask, temperature)[0].tolist())
    return [next(values) if sampled else 0.0 for sampled in row.loss_mask]


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most `budget` padded tokens (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= budget:
            end += 1
        yield order[start:end]
        start = end


def batches(run: Run, rows: Sequence[Trajectory]) -> Iterator[list[int]]:
    """Indices of rows in micro-batches; with `--share-prompt` each is of one prompt."""
    budget, lengths = run.config.tokens_at_once, [len(row.tokens) for row in rows]
    if not run.config.share_prompt:
        yield from micro_batches(lengths, budget)
        return
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(row.tokens[: row.prompt_length]), []).append(i)
    for prompt, members in groups.items():
        part, used = [], len(prompt)
        for i in members:
            own = lengths[i] - len(prompt)
            if part and used + own > budget:
                yield part
                part, used = [], len(prompt)
            part, used = [*part, i], used + own
        yield part


# ---------------------------------------------------------------------------------------- supervised training
def sft_backward(
    run: Run,
    examples: Sequence[Trajectory],
    coefficient: float = 1.0,
    weight: Callable[[Tensor], Tensor] = torch.ones_like,
) -> float:
    """Add the gradient of coefficient * SFT loss; returns the SFT loss, the mean over the examples' trained
    tokens of -w log p in nats (temperature 1).

    Whole conversations, every assistant message trained: the same gradient as the published pairs (all before
    a message -> the message), in one forward each.
    """
    total = sum(row.sampled_tokens for row in examples)
    mine = [examples[i] for i in distributed.share(len(examples))]
    loss_sum = 0.0
    for part in micro_batches([len(row.tokens) for row in mine], run.config.tokens_at_once):
        rows = [(mine[i].tokens, mine[i].loss_mask) for i in part]
        logprobs = run.policy.logprobs(*pad(rows, run.policy.device))[0]  # [N]
        loss = -(weight(logprobs.detach().exp()) * logprobs).sum() / total
        (coefficient * run.masters.scale * loss).backward()
        loss_sum += loss.item()
    return distributed.total(loss_sum)


def sft_update(run: Run, examples: Sequence[Trajectory]) -> dict[str, float]:
    """One optimiser step of SFT with the run's own optimiser."""
    started, trained = time.perf_counter(), sum(row.sampled_tokens for row in examples)
    loss = sft_backward(run, examples)
    norm = optimizer_step(run, loss, run.optimizer, run.config.sft_lr * warm_up(run))
    return {
        "sft_loss": loss,
        "sft_tokens": trained,
        "grad_norm": math.nan if norm is None else norm,
        "train_tok_s": sum(len(row.tokens) for row in examples) / (time.perf_counter() - started),
    }


def burst(run: Run, examples: Sequence[Trajectory], tokens: int = 0) -> dict[str, float]:
    """SFT by itself between RL steps: `sft_epochs` passes over the examples in shuffled batches of
    `sft_batch`; with `tokens`, as many passes as train so many tokens. No burst if either is nothing.

    As in the published code, where SFT is a run of its own, a burst has an AdamW of its own and a warm-up:
    its first `sft_warmup` of n updates run at 1/(w+1), 2/(w+1), ... of the rate, w = sft_warmup * n, at least
    1. The moments of RL wait for it.
    """
    config = run.config
    if not examples or not config.sft_epochs:
        return {"sft_tokens": 0}
    rng = random.Random(f"{config.seed}/{run.step}/burst")
    passes = itertools.count() if tokens else range(config.sft_epochs)
    rows, trained = [], 0
    for row in itertools.chain.from_iterable(rng.sample(examples, len(examples)) for _ in passes):
        if tokens and trained >= tokens:
            break
        rows.append(row)
        trained += row.sampled_tokens
    batches = [rows[i : i + config.sft_batch] for i in range(0, len(rows), config.sft_batch)]
    optimizer, losses = new_optimizer(run.masters, config.sft_lr, config.weight_decay), []
    warm = max(1, round(config.sft_warmup * len(batches)))
    for n, batch in enumerate(tqdm(batches, "SFT burst", unit="batch", leave=False, disable=None)):
        losses.append(sft_backward(run, batch))
        optimizer_step(run, losses[-1], optimizer, config.sft_lr * min(1.0, (n + 1) / (warm + 1)))
    return {"sft_loss": _mean(losses), "sft_tokens": trained}


def collect(run: Run, examples: Sequence[Trajectory]) -> None:
    """Put a step's examples into the pool, and let go of those of more than `sft_window` steps ago."""
    kept = [row for row in run.state.get("pool", []) if row["step"] > run.step - run.config.sft_window]
    names = ("task_id", "category", "format", "tokens", "loss_mask", "source")
    new = [{"step": run.step} | {name: getattr(row, name) for name in names} for row in examples]
    run.state["pool"] = kept + new


def pool(run: Run) -> list[Trajectory]:
    """The collected examples, oldest first."""
    rows = [
        {name: value for name, value in row.items() if name != "step"} for row in run.state.get("pool", [])
    ]
    return [Trajectory(**row, logprobs=[0.0] * len(row["tokens"]), prompt_length=0) for row in rows]


# -------------------------------------------------------------------------------------------------- snapshots
def snapshot(run: Run) -> dict:
    """Copies of weights and optimiser state, to be put back by `roll_back`; in main memory, where there is
    more room than on a GPU."""
    parts = {"model": run.policy.model, "optimizer": run.optimizer}
    return copied({k: v.state_dict() for k, v in parts.items()} | {"masters": run.masters.state()})


def copied(value: object) -> object:
    """A copy of a nested state, its tensors in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def roll_back(run: Run, saved: dict) -> None:
    """Put a snapshot back."""
    run.policy.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    run.masters.load(saved["masters"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
