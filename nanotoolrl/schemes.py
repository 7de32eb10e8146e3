"""Trainer variants: one short function each, and the table of them.

A scheme makes one training step: it takes the run and the step's P tasks and returns a `Step`. It is composed
of few verbs (nanotoolrl/updates.py) and reads like the method section of a paper; read `grpo` first. To add
one, write the function and put `@scheme(...)` on it (README, "Add a scheme").

Most schemes are GRPO plus something, and have a strength at whose neutral value they are GRPO, to the bit.
A signal that is an SFT loss on examples goes through a schedule: `sync` adds the loss to every policy update,
`interleaved` makes bursts of SFT between rounds of RL, `none` makes the bursts without any RL.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nanotoolrl.calls import FORMATS, VOID_STATES
from nanotoolrl.env import Task
from nanotoolrl.gpu import distributed
from nanotoolrl.judge import AT_ONCE, Judge
from nanotoolrl.losses import kl_k3, likelihood_drop, shaped_loss
from nanotoolrl.supervise import hint_text, reflections
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.updates import (
    Run,
    Step,
    Supervision,
    Tokens,
    advantages,
    burst,
    clipped_objective,
    collect,
    copied,
    demonstrations,
    failed_tasks,
    policy_update,
    pool,
    roll_back,
    rollout,
    sft_update,
    snapshot,
    source_examples,
)


@dataclass(frozen=True)
class Scheme:
    """A row of the table: the step function and what `--list` says about it.

    neutral: the strengths, and the values at which the scheme is plain GRPO. defaults: settings that differ
    from the config's own. schedules: what `--schedule` may be, the default first. memory: parts of the memory
    plan that it needs whatever the settings.
    """

    name: str
    step: Callable[[Run, list[Task]], Step]
    about: str
    source: str
    settings: tuple[str, ...]
    neutral: Mapping[str, float]
    defaults: Mapping[str, object]
    schedules: tuple[str, ...]
    memory: tuple[str, ...]


SCHEMES: dict[str, Scheme] = {}


def scheme(
    about: str,
    source: str,
    settings: Sequence[str] = (),
    neutral: Mapping[str, float] | None = None,
    defaults: Mapping[str, object] | None = None,
    schedules: Sequence[str] = (),
    memory: Sequence[str] = (),
    name: str = "",
) -> Callable:
    """Register a step function under its own name, or under `name`."""

    def register(step: Callable[[Run, list[Task]], Step]) -> Callable[[Run, list[Task]], Step]:
        key = name or step.__name__
        rest = (tuple(settings), neutral or {}, defaults or {}, tuple(schedules), tuple(memory))
        SCHEMES[key] = Scheme(key, step, about, source, *rest)
        return step

    return register


# ---------------------------------------------------------------------------------------------- reward alone
@scheme("groups of rollouts, reward above the group's mean is good", "Hao et al. 2026, §4; arXiv 2402.03300")
def grpo(run: Run, tasks: list[Task]) -> Step:
    """GRPO: G rollouts of every task; the tokens of one share A = (R - mean) / std over its group.

    loss = mean over trained tokens of max(-A r, -A clamp(r, 0.8, 1.2)), dual clip 3, plus kl * k3.
    Published: kl 1e-4; our small preset has 0, which lets the rows without contrast be left out of the
    update.
    """
    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    return Step(trajectories, scores, policy_update(run, trajectories, scores))


@scheme(
    "like grpo, but bad rollouts weigh --negative-weight (0: only the good ones teach)",
    "arXiv 2506.01347",
    ("negative_weight",),
    {"negative_weight": 1.0},
)
def psr(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but A < 0 is multiplied by `negative_weight`: positive sample reinforcement.

    Deviation: the source has rewards +-1 and no groups; here a group that always succeeds still has A = 0.
    """
    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    kept = torch.where(scores < 0, scores * run.config.negative_weight, scores)
    return Step(trajectories, scores, policy_update(run, trajectories, kept))


@scheme(
    "like grpo, but good rollouts weigh --positive-weight (0: only the bad ones teach)",
    "arXiv 2506.01347",
    ("positive_weight",),
    {"positive_weight": 1.0},
)
def nsr(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but A > 0 is multiplied by `positive_weight`: negative sample reinforcement.

    Deviation: the source has rewards +-1 and no groups; here a group that fails as a whole has A = 0 and is
    not pushed down.
    """
    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    kept = torch.where(scores > 0, scores * run.config.positive_weight, scores)
    return Step(trajectories, scores, policy_update(run, trajectories, kept))


@scheme(
    "like grpo, but rollouts with an empty, bare or malformed message weigh --void-weight",
    "SimpleTIR, arXiv 2509.02479",
    ("void_weight",),
    {"void_weight": 1.0},
)
def void(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but A is multiplied by `void_weight` in rollouts that hold a broken message (0: dropped).

    Deviation: the source drops rollouts with a turn that holds neither a call nor an answer; ours are the
    message states empty, bare and malformed. They still count in their group's mean and in the loss's mean.
    """
    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    broken = torch.tensor([bool(set(row.states) & set(VOID_STATES)) for row in trajectories])
    kept = torch.where(broken, scores * run.config.void_weight, scores)
    metrics = policy_update(run, trajectories, kept)
    return Step(trajectories, scores, metrics | {"dropped_rows": broken.float().mean().item()})


# ---------------------------------------------------------------------------- guarding tokens and likelihoods
@scheme(
    "like grpo, but no control token is pushed down",
    "after GTPO, arXiv 2508.03772",
    ("guard_weight",),
    {"guard_weight": 0.0},
)
def guard(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but on control tokens A < 0 becomes (1 - guard_weight) A: the direct test of the mechanism.

    Deviations: the source spares tokens that good and bad rollouts share at the same position, counted from
    either end; ours are the control tokens, wherever they stand. The source also weighs those tokens twice
    where A > 0, and filters out rollouts of high entropy.
    """

    def objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
        spared = tokens.control & (tokens.advantages < 0)
        weights = torch.where(spared, (1 - run.config.guard_weight) * tokens.advantages, tokens.advantages)
        return clipped_objective(run, replace(tokens, advantages=weights))

    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    return Step(trajectories, scores, policy_update(run, trajectories, scores, objective))


@scheme(
    "like grpo, but control tokens are held by a KL term to the start",
    "ours; the test beside guard",
    ("guard_kl",),
    {"guard_kl": 0.0},
    memory=["reference"],
    name="guard-kl",
)
def guard_kl(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but loss + guard_kl * k3(policy || start) on control tokens, in every rollout.

    Unlike `--kl`, content tokens are free to move, and k3 has no upper bound: a control token is pulled back
    however far it fell (up to a factor of e^20).
    """
    strength = run.config.guard_kl

    def objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
        loss, clipped = clipped_objective(run, tokens)
        if strength > 0:
            loss = loss + strength * tokens.control * kl_k3(tokens.logprobs, tokens.reference, most=math.inf)
        return loss, clipped

    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    metrics = policy_update(run, trajectories, scores, objective, every_row=strength > 0)
    return Step(trajectories, scores, metrics)


@scheme(
    "like grpo, but good rollouts whose likelihood fell are pulled back up",
    "LLDS, arXiv 2512.04220",
    ("llds_weight", "updates"),
    {"llds_weight": 0.0},
    defaults={"updates": 4},
)
def llds(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but loss + llds_weight * max(0, log p_old - log p) on tokens of good rollouts (A > 0) whose
    summed log-prob is below that at sampling (`likelihood_drop`).

    In a step's first update nothing has fallen yet, so this needs `--updates` above 1 (its default is 4), in
    which the updates on other prompts can displace this prompt's good rollouts. Deviation: the source also
    has gates per action, and keeps actions with A = 0.
    """

    def objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
        loss, clipped = clipped_objective(run, tokens)
        fallen = likelihood_drop(tokens.logprobs, tokens.old, tokens.advantages > 0, tokens.row)
        return loss + run.config.llds_weight * fallen, clipped

    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    return Step(trajectories, scores, policy_update(run, trajectories, scores, objective))


# ------------------------------------------------------------------------- help inside the group of rollouts
@scheme(
    "like grpo, but --oracle-count rollouts of a group are the ground truth",
    "Hao et al. 2026, §4, off-policy supervision (OPS)",
    ("oracle_count", "ops_loss"),
    {"oracle_count": 0},
)
def ops(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but `oracle_count` of the G rollouts are the ground truth, played through a live episode.

    They enter the group's mean and std. Loss of their tokens, `--ops-loss`: "shaped" (default, the published
    code) has w = p / (p + 0.1) where the ratio stands, "ratio" (the text) the plain ratio to the policy
    before the update, with no correction for who wrote them.

    Deviations: LUFFY, where the shaping comes from, clips nothing and does not divide by the group's standard
    deviation; here `--clip` and `--adv-std` hold for these tokens, too.
    """

    def objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
        loss, clipped = clipped_objective(run, tokens)
        if run.config.ops_loss == "shaped":
            bounds = (run.config.clip, run.config.clip_high)
            shaped = shaped_loss(tokens.logprobs, tokens.advantages, *bounds)
            loss = torch.where(tokens.of("oracle"), shaped, loss)
        return loss, clipped

    count = run.config.oracle_count
    rest = run.config.group - count
    sampled = rollout(run, tasks, group=rest)
    trajectories = []
    for i, shown in zip(range(len(tasks)), demonstrations(run, tasks), strict=True):
        trajectories += [shown] * count + sampled[i * rest : (i + 1) * rest]
    scores = advantages(run, trajectories)
    return Step(trajectories, scores, policy_update(run, trajectories, scores, objective))


@scheme(
    "like grpo, but some rollouts of a group see a hint that the update does not see",
    "Hao et al. 2026, §4, hint-based guidance (HBG)",
    ("hint_count", "hint_keep"),
    {"hint_count": 0},
)
def hint(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but the first `hint_count` of the G rollouts are sampled with a hint in the system prompt.

    The hint is removed before the update and their old log-probs are computed anew without it, so that the
    ratio starts at 1: tokens sampled from pi(. | hint) are trained as if from pi(.). `--hint-keep` trains
    them under the prompt they were sampled with instead.
    """
    group = run.config.group
    hints = [
        hint_text(task, run.config.format) if k < run.config.hint_count else ""
        for task in tasks
        for k in range(group)
    ]
    trajectories = rollout(run, tasks, hints)
    scores = advantages(run, trajectories)
    trained = [row.with_sampled_prompt() for row in trajectories] if run.config.hint_keep else trajectories
    return Step(trajectories, scores, policy_update(run, trained, scores))


@scheme(
    "like hint, but only where a whole group fails, and the update sees the hint",
    "GHPO, arXiv 2507.10628",
    ("hint_count",),
    {"hint_count": 0},
)
def ghpo(run: Run, tasks: list[Task]) -> Step:
    """Like hint, but only in groups that failed without one: their first `hint_count` rollouts are replaced
    by hinted ones, which are trained under the prompt with the hint.

    Deviation: the source replaces the whole group's prompt and lengthens the hint in stages; our hint has one
    length. `success` is that of the rollouts before the replacement.
    """
    group, count = run.config.group, run.config.hint_count
    trajectories = rollout(run, tasks)
    failed = failed_tasks(trajectories, group)
    success = sum(row.reward for row in trajectories) / len(trajectories)
    hints = [hint_text(tasks[i], run.config.format) for i in failed for _ in range(count)]
    hinted = rollout(run, [tasks[i] for i in failed], hints, group=count, part=1)
    for n, i in enumerate(failed):
        trajectories[i * group : i * group + count] = hinted[n * count : (n + 1) * count]
    scores = advantages(run, trajectories)
    metrics = policy_update(run, [row.with_sampled_prompt() for row in trajectories], scores)
    return Step(trajectories, scores, metrics | {"failed_tasks": len(failed), "success": success})


# -------------------------------------------------------------------------- signals: examples for an SFT loss
Signal = Callable[[Run, list[Task], list[Trajectory]], tuple[list[Trajectory], dict[str, float]]]


def collected_failures(run: Run, trajectories: list[Trajectory]) -> list[int]:
    """Indices of the tasks that ETS collects: all rollouts failed, or with `--ets-any` any of them."""
    return failed_tasks(trajectories, run.config.group, any if run.config.ets_any else all)


def ground_truth_of_source(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple:
    """Signal of `sft`: the ground truth of `sft_batch` tasks of the source, whatever the rollouts were."""
    return source_examples(run), {}


def ground_truth_of_failures(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple:
    """Signal of `ets`: the ground truth of this step's failed tasks."""
    failed = collected_failures(run, trajectories)
    return demonstrations(run, [tasks[i] for i in failed]), {"failed_tasks": len(failed)}


def reflections_on_failures(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple:
    """Signal of `prs`: that of `ets`, and reflections on the first failed rollout of each failed task."""
    examples, metrics = ground_truth_of_failures(run, tasks, trajectories)
    config, group = run.config, run.config.group
    judge = Judge(config.judge, config.judge_model, config.judge_timeout) if config.judge else None

    def reflect(i: int) -> tuple[list[Trajectory], bool]:
        row = next(row for row in trajectories[i * group : (i + 1) * group] if row.reward == 0)
        return reflections(tasks[i], row, run.policy.chat, run.tasks, run.sampler.context, judge)

    def reflect_on_all() -> list[tuple[list[Trajectory], bool]]:
        failed = collected_failures(run, trajectories)
        if not judge:
            return [reflect(i) for i in failed]
        with ThreadPoolExecutor(AT_ONCE) as threads, closing(judge):  # after Ctrl-C, nobody waits for it
            return list(threads.map(reflect, failed))

    made = distributed.from_first(reflect_on_all)  # a judge may not say the same twice
    counts = {"reflections": sum(len(pairs) for pairs, _ in made)}
    counts |= {"judge_fallbacks": sum(fallen for _, fallen in made)} if judge else {}
    return examples + [row for pairs, _ in made for row in pairs], metrics | counts


def control_tokens_of_failures(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple:
    """Signal of `ctrl_sft`: that of `ets`, with the loss on control tokens only."""
    examples, metrics = ground_truth_of_failures(run, tasks, trajectories)
    control = set(run.control.tolist())
    masks = [[on and t in control for t, on in zip(row.tokens, row.loss_mask)] for row in examples]
    return [replace(row, loss_mask=mask) for row, mask in zip(examples, masks)], metrics


def own_successes(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple:
    """Signal of `selfrepair`: one more rollout of every task with the canonical prefix of a call forced where
    a call should come; the successful ones, the forced prefixes trained like the rest."""
    rows = rollout(run, tasks, group=1, part=1, force_prefix=True)
    prefix = run.policy.chat.assistant_ids(FORMATS[run.config.format].prefix, run.config.format)[:-1]
    kept = [row.with_trained(prefix) for row in rows if row.reward == 1]
    return kept, {"forced_success": len(kept) / len(rows)}


# ----------------------------------------------------------------------------------------------- schedules
def sync(run: Run, tasks: list[Task], signal: Signal) -> Step:
    """Synchronous: loss of grpo + sft_coef * SFT loss on the signal's examples of the last `sft_window`
    steps, this one included, in every policy update."""
    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    examples, notes = signal(run, tasks, trajectories)
    collect(run, examples)
    supervised = Supervision(pool(run), run.config.sft_coef)
    return Step(trajectories, scores, policy_update(run, trajectories, scores, supervised=supervised) | notes)


def interleaved(run: Run, tasks: list[Task], signal: Signal, between: Callable = grpo) -> Step:
    """Interleaved: between rounds of `round_steps` steps a burst of SFT on the signal's examples of the
    round's last `sft_window` steps. between: what a step is apart from that.

    The burst is the first thing that the first step of the next round does: none follows the last round.
    """
    place, size = (run.step - 1) % run.config.round_steps, run.config.round_steps
    notes = {}
    if place == 0 and run.step > 1:
        notes = burst(run, pool(run), run.config.sft_tokens)
        run.state["pool"] = []
    step = between(run, tasks)
    if place >= size - run.config.sft_window:
        examples, counts = signal(run, tasks, step.trajectories)
        collect(run, examples)
        notes |= counts
    return replace(step, metrics=step.metrics | notes)


def look(run: Run, tasks: list[Task]) -> Step:
    """Rollouts, and no update."""
    trajectories = rollout(run, tasks)
    return Step(trajectories, advantages(run, trajectories), {})


SCHEDULES: dict[str, Callable[[Run, list[Task], Signal], Step]] = {
    "sync": sync,
    "interleaved": interleaved,
    "none": partial(interleaved, between=look),
}
# What a scheme with a signal says of itself.
SFT_OFF = {"sft_coef": 0.0, "sft_epochs": 0}
BURST_SETTINGS = ("sft_window", "sft_epochs", "sft_tokens", "sft_lr", "sft_batch")
SFT_SETTINGS = ("sft_coef", "round_steps", *BURST_SETTINGS)
ETS_SETTINGS = (*SFT_SETTINGS, "ets_any")
INTERLEAVED_FIRST = ("interleaved", "sync", "none")


@scheme(
    "supervised training on ground truth, no rollouts; with a schedule, beside grpo",
    "Hao et al. 2026, §4, SFT",
    ("sft_source", *SFT_SETTINGS),
    SFT_OFF,
    schedules=("none", "sync", "interleaved"),
)
def sft(run: Run, tasks: list[Task]) -> Step:
    """SFT: loss = mean over the assistant's tokens of -log p on the ground truth of `sft_batch` tasks a step.

    `--sft-source foreign` takes them from another domain. `--schedule sync` and `interleaved` add the same
    signal to grpo. Published: 3 epochs, at the paper preset's batch of 20 conversations --steps 45.
    """
    if run.config.schedule == "none":
        return Step([], torch.zeros(0), sft_update(run, source_examples(run)))
    return SCHEDULES[run.config.schedule](run, tasks, ground_truth_of_source)


@scheme(
    "sft on the whole source, then grpo",
    "Hao et al. 2026, §4, SFT+RL",
    ("sft_source", "sft_epochs", "sft_lr", "sft_batch"),
    {"sft_epochs": 0},
    defaults={"sft_epochs": 3},
    memory=["burst optimiser"],
)
def sft_rl(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but from an SFT checkpoint: before the first step, `sft_epochs` passes over the source.

    KL terms then pull to that checkpoint, as published.
    """
    notes = {}
    if run.step == 1:
        notes = burst(run, demonstrations(run, run.source))
        if run.config.kl > 0:
            run.state["reference"] = copied(run.policy.model.state_dict())
    step = grpo(run, tasks)
    return replace(step, metrics=step.metrics | notes)


@scheme(
    "grpo, and SFT on the ground truth of tasks whose rollouts all failed",
    "Hao et al. 2026, §4, erroneous-trajectory supervision (ETS)",
    ETS_SETTINGS,
    SFT_OFF,
    schedules=INTERLEAVED_FIRST,
)
def ets(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but with SFT on the ground truth of the tasks that failed in the last `sft_window` steps.

    Failed: no rollout of the group succeeded; `--ets-any` takes the published code's rule, any failure. The
    synchronous schedule differs from `hpt` in that failures of earlier steps ride along, too.
    Deviations: RL keeps its optimiser state over a burst, where the published rounds are runs of their own;
    bursts may be of equal size (`--sft-tokens`) instead of 2 epochs. A task that fails twice within the
    window is in the pool twice, and trained twice in a pass.
    """
    return SCHEDULES[run.config.schedule](run, tasks, ground_truth_of_failures)


@scheme(
    "like ets, with reflections on the failed rollouts as further examples",
    "Hao et al. 2026, §4, process-reflection supervision (PRS)",
    (*ETS_SETTINGS, "judge"),
    SFT_OFF,
    defaults={"sft_tokens": 0},
    schedules=INTERLEAVED_FIRST,
)
def prs(run: Run, tasks: list[Task]) -> Step:
    """Like ets, but also with SFT on pairs (log of a failed rollout and its ground truth -> reflection): one
    turn by turn, one on the first failed turn with similar scenarios and a look-alike.

    A burst is `sft_epochs` passes (`--sft-tokens 0`): reflections are many times longer than ground truth.
    Deviation: in the paper an LLM judge writes the reflections; here the checker does, unless `--judge URL`
    names a server (`supervise.reflections`, nanotoolrl/judge.py).
    """
    return SCHEDULES[run.config.schedule](run, tasks, reflections_on_failures)


@scheme(
    "like ets, but only control tokens are trained by SFT",
    "ours",
    ETS_SETTINGS,
    SFT_OFF,
    defaults={"sft_tokens": 0},
    schedules=INTERLEAVED_FIRST,
)
def ctrl_sft(run: Run, tasks: list[Task]) -> Step:
    """Like ets, but SFT trains control tokens only: if only they break, only they need repair.

    A burst is `sft_epochs` passes (`--sft-tokens 0`): a fixed number of control tokens would be several times
    as many passes over the same tasks as in ets. What opens a call is a control token and what opens an
    answer is not, so this also teaches to call where an answer is due.
    """
    return SCHEDULES[run.config.schedule](run, tasks, control_tokens_of_failures)


@scheme(
    "grpo, and SFT on the model's own successes, sampled with the call prefix forced",
    "ours",
    SFT_SETTINGS,
    SFT_OFF,
    schedules=INTERLEAVED_FIRST,
)
def selfrepair(run: Run, tasks: list[Task]) -> Step:
    """Like ets, but the examples are rollouts of the model that succeed when the canonical prefix of a call
    is forced: the skill behind the broken format, in its own words, so little else should move."""
    return SCHEDULES[run.config.schedule](run, tasks, own_successes)


@scheme(
    "control: the bursts of ets without any RL between them",
    "ours",
    ("round_steps", *BURST_SETTINGS, "ets_any"),
    defaults={"schedule": "none"},
    memory=["burst optimiser"],
)
def bursts(run: Run, tasks: list[Task]) -> Step:
    """The bursts of ets and nothing else: rollouts find the failed tasks, no policy update is made. It tells
    rescue from re-teaching: equal SFT tokens by `--sft-tokens`, no RL to be rescued from."""
    return SCHEDULES["none"](run, tasks, ground_truth_of_failures)


# ------------------------------------------------------------------------------ RL and SFT in the same update
@scheme(
    "per task: grpo if any rollout succeeded, else SFT on its ground truth",
    "HPT, arXiv 2509.04419",
    ("sft_coef", "sft_batch"),
    {"sft_coef": 0.0},
)
def hpt(run: Run, tasks: list[Task]) -> Step:
    """Like sync ets, but only this step's failed groups are trained on: loss of grpo + sft_coef * SFT loss.

    Deviation: the source switches per prompt between two losses of weight 1; ours are summed with a weight,
    each a mean over its own tokens. A failed group has no advantage (without `--graded-reward`), so each task
    still has one of them. With `--updates` above 1, each of them trains on all failed tasks of the step.
    """
    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    failed = failed_tasks(trajectories, run.config.group)
    supervised = Supervision(demonstrations(run, [tasks[i] for i in failed]), run.config.sft_coef)
    metrics = policy_update(run, trajectories, scores, supervised=supervised)
    return Step(trajectories, scores, metrics | {"failed_tasks": len(failed)})


@scheme(
    "(1 - mu) grpo + mu SFT on the step's tasks, mu decaying; --chord-phi: constant, weighed",
    "CHORD, arXiv 2508.11408",
    ("chord_mu", "chord_steps", "chord_phi", "sft_batch"),
    {"chord_mu": 0.0},
)
def chord(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but loss = (1 - mu) RL + mu SFT on the ground truth of the step's tasks.

    mu falls linearly from `chord_mu` to 0 over `chord_steps` steps. With `--chord-phi` it stays, and SFT
    tokens weigh p (1 - p): neither what is certain nor what is out of reach. (1 - mu) is put on the
    advantages: the clipped loss is linear in their size (KL and entropy terms, if any, stay whole).
    Deviation: in the source's code mu rises first and then falls along a cosine.
    """
    left = 1.0 if run.config.chord_phi else max(0.0, 1 - (run.step - 1) / run.config.chord_steps)
    mu = run.config.chord_mu * left
    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    phi = {"weight": lambda p: p * (1 - p)} if run.config.chord_phi else {}
    supervised = Supervision(demonstrations(run, tasks), mu, **phi)
    metrics = policy_update(run, trajectories, (1 - mu) * scores, supervised=supervised)
    return Step(trajectories, scores, metrics | {"chord_mu": mu})


@scheme(
    "like grpo, but a broken control token rolls weights back and starts a burst of ets",
    "ours",
    ("sentinel_limit", "probe_every", *BURST_SETTINGS, "ets_any"),
    {"sentinel_limit": 0.0},
    memory=["burst optimiser"],
)
def sentinel(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but watches the probes: when the spurious probability of a control token has grown
    `sentinel_limit` times since the start (`spurious_growth`), weights and optimiser go back to the last
    healthy measurement, and a burst of SFT on the recently failed tasks follows; what it makes counts as
    healthy, so that the next rollback starts from there. 0: never.
    """
    limit, probe, notes = run.config.sentinel_limit, run.state.get("probe", {}), {}
    measured = probe.get("step") == run.step - 1
    if limit and measured and probe["spurious_growth"] >= limit:
        roll_back(run, run.state["healthy"])
        notes = {"rollbacks": 1} | burst(run, pool(run), run.config.sft_tokens)
    if limit and (measured or run.step == 1):
        run.state["healthy"] = snapshot(run)
    step = grpo(run, tasks)
    examples, counts = ground_truth_of_failures(run, tasks, step.trajectories)
    collect(run, examples)
    return replace(step, metrics=step.metrics | counts | notes)
