"""How much a token weighs beside its advantage, and which groups are trained on: settings of any RL scheme.

Who supervises is a scheme; how a token is weighed is a setting, so that `ets --guard 1` can be asked.

Shapes: P prompts, G rollouts per prompt, B = P G rows in group order, N trained tokens.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import and_

import torch
from torch import Tensor

from nanotoolrl.config import Config
from nanotoolrl.objective import Tokens
from nanotoolrl.run import Run, grouped_rewards, rollout
from nanotoolrl.trajectory import Trajectory


def weighed(tokens: Tokens) -> Tokens:
    """The tokens with their advantages times `token_weights`; the same where no setting weighs them."""
    config = tokens.run.config
    if config.guard == config.gtpo == config.spare_passed == config.rare == config.silence == 0:
        return tokens
    weights = token_weights(tokens)
    return replace(tokens, advantages=tokens.advantages * weights, unweighed=tokens.advantages)


def token_weights(tokens: Tokens) -> Tensor:
    """The product [N] of what each setting says, 1 at its neutral value 0:

    - `--guard g`: 1 - g on the tokens of `--guard-tokens` where A < 0. After GTPO (arXiv 2508.03772); the
      source spares shared tokens, see the next.
    - `--gtpo s`: 1 - s where A < 0 and 1 + s where A > 0, on tokens that good and bad rollouts of the group
      share (`conflicts`). GTPO, arXiv 2508.03772, at s = 1. Deviations: its filter by entropy is not here; in
      its code a token that is shared from both ends weighs 4, and weights are divided by their number.
    - `--spare-passed s`: 1 - s where A < 0, in turns before the first failed one. After VPPO, arXiv
      2601.18984, which finds the place of the error by a verifier of processes, where ours knows the turn,
      and rewards what stands before it, where ours spares it.
    - `--rare a`: a p + 1 - a, p the token's probability, without a gradient: rare tokens push less.
      Advantage reweighting of arXiv 2505.12929, a = 0.3 there.
    - `--silence P`: 0 where A > 0 and p < P: what was sampled by a fluke is no lesson. Ground truth in a
      group (`ops`) was not sampled, and is left alone. After STAPO, arXiv 2602.15620, which asks for low
      entropy at that place, too, and takes the mean over the tokens that are left.

    p is the policy's under the prompt that is trained, which of a hinted rollout is the one without the hint.
    """
    config = tokens.run.config
    bad, good = tokens.advantages < 0, tokens.advantages > 0
    weights = torch.ones_like(tokens.advantages)
    if config.guard > 0:
        weights = torch.where(tokens.spared & bad, weights * (1 - config.guard), weights)
    if config.gtpo > 0 and tokens.conflict is not None:
        weights = torch.where(tokens.conflict & bad, weights * (1 - config.gtpo), weights)
        weights = torch.where(tokens.conflict & good, weights * (1 + config.gtpo), weights)
    if config.spare_passed > 0:
        weights = torch.where(tokens.passed & bad, weights * (1 - config.spare_passed), weights)
    p = tokens.logprobs.detach().exp()
    if config.rare > 0:
        weights = weights * (config.rare * p + 1 - config.rare)
    if config.silence > 0:
        flukes = good & (p < config.silence) & ~tokens.of("oracle")
        weights = torch.where(flukes, 0.0, weights)
    return weights


def conflicts(trajectories: Sequence[Trajectory], advantages: Tensor, group: int) -> list[list[bool]]:
    """Of every row, whether each of its sampled tokens is shared: it and all before it stand at the same
    places, counted from the start of what was sampled, in a good and in a bad rollout of its group; or it and
    all behind it do, counted from the end (arXiv 2508.03772).

    Example, a good row [5, 6, 9] and a bad one [5, 7, 8, 9]: 5 (from the start) and 9 (from the end).
    """
    found = []
    signs = advantages.sign().tolist()
    for start in range(0, len(trajectories), group):
        spoken = [
            [token for ids in row.spoken_ids() for token in ids]
            for row in trajectories[start : start + group]
        ]
        seen: dict[tuple[int, int], set[float]] = defaultdict(set)  # (place, token) -> signs
        for ids, sign in zip(spoken, signs[start : start + group]):
            for place, token in enumerate(ids):
                seen[place, token].add(sign)
                seen[place - len(ids), token].add(sign)
        both = {key for key, there in seen.items() if {1.0, -1.0} <= there}
        for ids in spoken:
            ahead = accumulate(((i, token) in both for i, token in enumerate(ids)), and_)
            behind = accumulate(((-i, token) in both for i, token in enumerate(reversed(ids), 1)), and_)
            found.append([a or b for a, b in zip(ahead, [*behind][::-1], strict=True)])
    return found


def rows_kept(config: Config, trajectories: Sequence[Trajectory]) -> list[int]:
    """Rows of the groups that `--filter` keeps, in order: the share of them with the largest variance of
    rewards, at least one for each update; the first of those that are alike (RAGEN, arXiv 2504.20073)."""
    size = config.group
    rewards = grouped_rewards(config, trajectories)
    count = max(config.updates, round(config.filter * len(rewards)))
    order = rewards.var(1, correction=0).sort(descending=True, stable=True).indices[:count]
    return [i * size + k for i in sorted(order.tolist()) for k in range(size)]


def refilled(run: Run, trajectories: list[Trajectory]) -> tuple[list[Trajectory], dict[str, float]]:
    """Trajectories in group order, but up to `--refill` times those groups whose rollouts all have one reward
    are replaced by groups of other tasks, drawn by the seed: of those that were not in the batch, where there
    are enough. The second value are metrics: the success of the first rollouts, which were not chosen, and
    how many groups were replaced; {} without `--refill`.

    Dynamic sampling of DAPO (arXiv 2503.14476), which goes on until every group has contrast.
    """
    config, size, rows = run.config, run.config.group, list(trajectories)
    if not config.refill:
        return rows, {}
    success = sum(row.reward for row in rows) / len(rows)
    replaced, seen = 0, {row.task_id for row in rows}
    for attempt in range(1, config.refill + 1):
        rewards = grouped_rewards(config, rows)
        flat = (rewards == rewards[:, :1]).all(1).nonzero()[:, 0].tolist()
        if not flat:
            break
        others = [task for task in run.tasks if task.id not in seen]
        draw = random.Random(f"{config.seed}/{run.step}/refill/{attempt}")
        if len(others) >= len(flat):
            drawn = draw.sample(others, len(flat))
        else:
            drawn = draw.choices(run.tasks, k=len(flat))
        seen |= {task.id for task in drawn}
        new = rollout(run, drawn, noise_key=attempt)
        for n, i in enumerate(flat):
            rows[i * size : (i + 1) * size] = new[n * size : (n + 1) * size]
        replaced += len(flat)
    return rows, {"success": success, "refilled_groups": replaced}
