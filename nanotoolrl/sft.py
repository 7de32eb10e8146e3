"""SFT by itself: the pool of examples, an update, a burst."""

import itertools
import math
import random
import time
from collections.abc import Sequence
from typing import Any

from nanotoolrl.cli import progress
from nanotoolrl.notes import mean
from nanotoolrl.run import Run, new_optimizer
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.updates import optimizer_step, sft_backward, warm_up


def collect(run: Run, examples: Sequence[Trajectory]) -> None:
    """Put a step's examples into the pool, and let go of those of `sft_window` steps ago or more."""
    kept = [row for row in run.state.pool if row["step"] > run.step - run.config.sft_window]
    names = ("task_id", "category", "format", "tokens", "loss_mask", "source")
    new = [{"step": run.step} | {name: getattr(row, name) for name in names} for row in examples]
    run.state.pool = kept + new


def pool(run: Run) -> list[Trajectory]:
    """The collected examples, oldest first."""
    rows = [{name: value for name, value in row.items() if name != "step"} for row in run.state.pool]
    return [Trajectory(**row, logprobs=[0.0] * len(row["tokens"]), prompt_length=0) for row in rows]


def sft_update(run: Run, examples: Sequence[Trajectory]) -> dict[str, Any]:
    """One optimiser step of SFT with the run's own optimiser."""
    started = time.perf_counter()
    trained = sum(row.sampled_tokens for row in examples)
    loss = sft_backward(run, examples)
    norm = optimizer_step(run, loss, run.optimizer, run.config.sft_lr * warm_up(run))
    return {
        "sft_loss": loss,
        "sft_tokens": trained,
        "grad_norm": math.nan if norm is None else norm,
        "train_tok_s": sum(len(row.tokens) for row in examples) / (time.perf_counter() - started),
    }


def burst(run: Run, examples: Sequence[Trajectory], tokens: int = 0) -> dict[str, Any]:
    """SFT by itself between RL steps: `sft_epochs` passes over the examples in shuffled batches of
    `sft_batch`; with `tokens`, as many passes as train so many tokens. No burst without examples or with 0
    `sft_epochs`.

    As in the published code, where SFT is a run of its own, a burst has an AdamW of its own and a warm-up:
    its first `sft_warmup` of n updates run at 1/(w+1), 2/(w+1), ... of the rate, w = sft_warmup * n, at least
    1. The moments of RL wait for it.
    """
    config = run.config
    if not examples or not config.sft_epochs:
        return {"sft_tokens": 0}
    rng = random.Random(f"{config.seed}/{run.step}/burst")
    passes = itertools.count() if tokens else range(config.sft_epochs)
    rows = []
    trained = 0
    for row in itertools.chain.from_iterable(rng.sample(examples, len(examples)) for _ in passes):
        if tokens and trained >= tokens:
            break
        rows.append(row)
        trained += row.sampled_tokens
    batches = [rows[i : i + config.sft_batch] for i in range(0, len(rows), config.sft_batch)]
    optimizer = new_optimizer(run.masters, config.sft_lr, config.weight_decay)
    losses = []
    warm = max(1, round(config.sft_warmup * len(batches)))
    for n, batch in enumerate(progress(batches, "SFT burst", unit="batch")):
        losses.append(sft_backward(run, batch))
        optimizer_step(run, losses[-1], optimizer, config.sft_lr * min(1.0, (n + 1) / (warm + 1)))
    return {"sft_loss": mean(losses), "sft_tokens": trained}
