"""Schemes with help inside the group of rollouts: ground truth in it, hints before it, a hinted teacher.

Shapes: P prompts, G rollouts per prompt, B = P G rows in group order, N trained tokens, V vocabulary.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanotoolrl.config import setting
from nanotoolrl.env import Episode, Task
from nanotoolrl.losses import shaped_loss
from nanotoolrl.model import Policy, pad
from nanotoolrl.objective import Tokens, clipped_objective
from nanotoolrl.run import Run, Step, demonstrations, failed_tasks, group_advantages, rollout
from nanotoolrl.schemes import scheme
from nanotoolrl.supervise import hint_text
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.updates import policy_update

ROWS_AT_ONCE = 1024  # positions whose whole distributions exist at a time

FAILED_TASKS = {"failed_tasks": ("count", "tasks whose rollouts all failed (where `--ets-any` counts: any)")}
HINTS = {"hint_count": setting(2, "rollouts of a group that see a hint", least=0, most="group")}


@scheme(
    about="like grpo, but --oracle-count rollouts of a group are the ground truth",
    source="Hao et al. 2026, §4, off-policy supervision (OPS)",
    settings={
        "oracle_count": setting(1, "rollouts of a group that are the ground truth", least=0, below="group"),
        "ops_loss": setting("shaped", "of their tokens: p / (p + 0.1), or the ratio", ("shaped", "ratio")),
    },
    neutral={"oracle_count": 0},
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
    advantages = group_advantages(run, trajectories)
    return Step(trajectories, advantages, policy_update(run, trajectories, advantages, objective))


@scheme(
    about="like grpo, but some rollouts of a group see a hint that the update does not see",
    source="Hao et al. 2026, §4, hint-based guidance (HBG)",
    settings=HINTS | {"hint_keep": setting(False, "train hinted rollouts under the hinted prompt")},
    neutral={"hint_count": 0},
)
def hint(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but the first `hint_count` of the G rollouts are sampled with a hint in the system prompt.

    The hint is removed before the update. The old log-probs of these rollouts are computed anew without it,
    so that the ratio starts at 1: tokens sampled from pi(. | hint) are trained as if from pi(.).
    `--hint-keep` trains them under the prompt they were sampled with instead.
    """
    count, format = run.config.hint_count, run.config.format
    without = [""] * (run.config.group - count)
    hints = [text for task in tasks for text in [hint_text(task, format)] * count + without]
    trajectories = rollout(run, tasks, hints)
    advantages = group_advantages(run, trajectories)
    trained = [row.with_sampled_prompt() for row in trajectories] if run.config.hint_keep else trajectories
    return Step(trajectories, advantages, policy_update(run, trained, advantages))


@scheme(
    about="like hint, but only where a whole group fails, and the update sees the hint",
    source="GHPO, arXiv 2507.10628",
    settings=HINTS,
    neutral={"hint_count": 0},
    metrics=FAILED_TASKS,
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
    hinted = rollout(run, [tasks[i] for i in failed], hints, group=count, noise_key=1)
    for n, i in enumerate(failed):
        trajectories[i * group : i * group + count] = hinted[n * count : (n + 1) * count]
    advantages = group_advantages(run, trajectories)
    metrics = policy_update(run, [row.with_sampled_prompt() for row in trajectories], advantages)
    return Step(trajectories, advantages, metrics | {"failed_tasks": len(failed), "success": success})


@scheme(
    about="like grpo, but a copy of the policy that sees the hint teaches it on its own tokens",
    source="after SDPO, arXiv 2601.20802; gate after SDAR, arXiv 2605.15155",
    settings={"distil_coef": setting(0.1, "weight of the KL term to the hinted policy", least=0)},
    neutral={"distil_coef": 0.0},
)
def selfdistil(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but loss + distil_coef * g_t KL(q_t || p_t) on all rollouts' tokens: p the policy, q the
    same policy under the prompt with the task's hint, without a gradient.

    g_t = q(x) / (q(x) + p(x)) of the sampled token x: what the hint makes likelier counts more. Tokens and
    prompt are the student's own, where `hint` trains tokens that were sampled under another prompt.
    Deviations: SDPO's teacher sees feedback on the rollout, ours the hint; its KL is over the likeliest
    tokens, ours over all.
    """
    strength, chat, format = run.config.distil_coef, run.policy.chat, run.config.format
    hinted = {
        task.id: chat.prompt_ids(*Episode(task, format).prompt(), format, hint_text(task, format))
        for task in tasks
    }

    def objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
        loss, clipped = clipped_objective(run, tokens)
        if strength > 0:
            loss = loss + strength * distillation(run.policy, tokens, hinted, run.config.temperature)
        return loss, clipped

    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)
    metrics = policy_update(run, trajectories, advantages, objective, every_row=strength > 0)
    return Step(trajectories, advantages, metrics)


def distillation(policy: Policy, tokens: Tokens, hinted: dict[str, list[int]], temperature: float) -> Tensor:
    """g_t KL(q_t || p_t) [N] of the trained tokens in nats, q under the prompts in `hinted` (task id -> ids).

    The policy's hidden states are computed once more, with a gradient; whole distributions exist for
    ROWS_AT_ONCE positions at a time.
    """
    with torch.no_grad():
        taught = pad([under(row, hinted[row.task_id]) for row in tokens.rows], policy.device)
        teacher = policy.trained_hidden(*taught)  # [N, D]
    student = policy.trained_hidden(tokens.ids, tokens.mask)  # [N, D]
    ids = tokens.ids[tokens.mask]  # [N]
    parts = []
    for start in range(0, len(ids), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        given = student[part], teacher[part], policy.head, ids[part], temperature
        parts.append(checkpoint(gated_kl, *given, use_reentrant=False))
    return torch.cat(parts)


def gated_kl(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """g_t KL(q_t || p_t) [N] of hidden states [N, D] of the student (p) and the teacher (q) under the head
    [V, D]; q and g have no gradient."""
    logp = torch.log_softmax(student.float() @ head.float().T / temperature, -1)  # [N, V]
    with torch.no_grad():
        logq = torch.log_softmax(teacher.float() @ head.float().T / temperature, -1)
        gap = (logq - logp).gather(1, ids[:, None])[:, 0]  # [N]
    return torch.sigmoid(gap) * (logq.exp() * (logq - logp)).sum(-1)


def under(row: Trajectory, prompt: list[int]) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a row under another prompt."""
    return prompt + row.tokens[row.prompt_length :], [False] * len(prompt) + row.loss_mask[
        row.prompt_length :
    ]
