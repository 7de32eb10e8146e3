"""Train a model to use tools over several turns: `python train.py --scheme hint`.

What a run does, as GRPO has it (arXiv 2402.03300), each line with its function:
1. Draw P tasks. (`tasks_of_step`)
2. Roll out G episodes of each, token by token from pi(. | prefix) at temperature T. (`rollout`)
3. Reward an episode 1 if every turn leaves the world, and has seen the results, of the ground truth, else 0.
   (`Episode.reward`)
4. Compare within a task: A = (R - mean R) / std R. (`group_advantages`)
5. Minimise the mean over sampled tokens of max(-A r, -A clip(r)), r = pi / pi_old. (`policy_update`)
6. Look at the control tokens. (`probe_step`)
7. Save, and go on. (`RunDirectory.save`)

Lines 2 to 5 are the scheme's business (nanotoolrl/schemes.py, signals.py); the loop does not know which one
it runs. Where we deviate from textbook GRPO:
- One to four updates a step, by preset and scheme (`--updates`). In the first of them r = 1, and nothing is
  clipped.
- The mean is over all tokens of an update, not over rows of each row's mean (`--loss-agg sequence`).
- No KL term by default; groups without contrast then have no gradient and are not computed (`--kl`).
- A dual clip bounds the loss of a negative advantage (`--dual-clip`), as in the published code.
"""

import json
import math
import signal
import sys
import time
from dataclasses import asdict
from typing import Any

import nanotoolrl  # noqa: F401  (before torch)

# isort: split
import torch

from nanotoolrl.cli import StopSignal, command, cpu_threads, one_voice, progress
from nanotoolrl.commandline import parse
from nanotoolrl.config import Config, Refused
from nanotoolrl.env import Task
from nanotoolrl.files import finite, write_atomically
from nanotoolrl.gpu import distributed
from nanotoolrl.gpu.memory import available, describe, plan
from nanotoolrl.judge import Judge
from nanotoolrl.loading import ModelError, finite_logits, finite_weights
from nanotoolrl.look.evaluate import Scores, closing_table, evaluate, named, obstacle, rules, say_unsolvable
from nanotoolrl.look.falls import worth_keeping
from nanotoolrl.look.loggers import absent
from nanotoolrl.look.metrics import measures, probe_step
from nanotoolrl.look.rundir import RunDirectory
from nanotoolrl.look.screen import SPOILED, STUCK, tell, why_ended
from nanotoolrl.probes import ProbeSet
from nanotoolrl.run import Run, Step, first_model
from nanotoolrl.signals import SCHEMES
from nanotoolrl.supervise import hint_text
from nanotoolrl.world.tasks import in_epochs, is_bfcl, load_tasks, subset


# ---------------------------------------------------------------------------------------------------- the run
def train(config: Config, resume: bool, given: set[str]) -> int:
    """Make a run, or go on with one (given: the flags that were). Returns the exit code."""
    directory = RunDirectory(config.out)
    try:
        with StopSignal() as stop:
            saved = None
            if resume:
                config, saved = directory.reopen(config, given)
            run, held, skipped = setup(config)
            before = begin(run, held, directory, saved, resume)
            probes = probes_of_start(run, directory)
            if run.step == 0 and not before:
                before = opening_scores(run, held, directory)
                directory.save(run, before)
            code, broken = loop(run, held, skipped, directory, probes, before, stop)
            if code:
                stopped(run, directory, code, broken)
                return 1 if code == SPOILED else code
            finish(run, directory, held, before)
            return 0
    finally:
        directory.release()


def loop(
    run: Run,
    held: list[Task],
    skipped: int,
    directory: RunDirectory,
    probes: ProbeSet,
    before: dict[str, Scores],
    stop: StopSignal,
) -> tuple[int, str]:
    """Take the steps that are left; returns (0 or why it ended early, what is not finite or "")."""
    config = run.config
    code = 0
    broken = ""
    scheme = SCHEMES[config.scheme]
    eval_subset = held[: config.eval_part]
    bar = progress(total=config.steps, initial=run.step, unit="step")
    with bar, stop.after_the_step():
        while run.step < config.steps and not code:
            run.next_step()
            started = time.perf_counter()
            step = scheme.step(run, tasks_of_step(config, run.tasks, run.step))
            row = {"step": run.step, "skipped_tasks": skipped} | measures(run, step) | step.metrics
            details: dict[str, Any] = {"step": run.step}
            broken = spoiled(run, step)
            if not broken:
                columns, details = probe_step(run, step, probes)
                row |= columns
                if config.eval_every and eval_subset and run.step % config.eval_every == 0:
                    scores = greedy(run, eval_subset)
                    row["eval_success"], details["greedy_states"] = scores.success, scores.states
            row |= {"skipped_updates": run.skipped_updates, "seconds": time.perf_counter() - started}
            directory.log(run, row, details, step)
            tell(run, row, details, step, bar)
            asked = max(distributed.gathered([stop.signal]))
            code = SPOILED if broken else STUCK if run.stuck else 128 + asked if asked else 0
            if not broken:
                keep(run, row, directory)
            if not broken and (run.step % config.save_every == 0 or run.step == config.steps or code):
                directory.save(run, before)
    return code, broken


def keep(run: Run, row: dict[str, Any], directory: RunDirectory) -> None:
    """Save the models on the way that `--keep-every` and `--keep-fall` ask for. Before the checkpoint: a run
    that goes on from it has them all."""
    config = run.config
    if config.keep_every and run.step % config.keep_every == 0:
        directory.save_model(run.policy, f"models/step-{run.step}")
    if config.keep_fall and "success" in row:
        run.state.successes.append(row["success"])
        if name := worth_keeping(run.state.successes):
            directory.save_model(run.policy, f"models/{name}")


def tasks_of_step(config: Config, tasks: list[Task], step: int) -> list[Task]:
    """The P tasks of a step: a pure function of its arguments."""
    return in_epochs(tasks, str(config.seed), range((step - 1) * config.prompts, step * config.prompts))


def spoiled(run: Run, step: Step) -> str:
    """What of a step is not finite, or "". A loss can look sound where weights are not: rollouts of a model
    that is all NaN have no contrast, hence no loss."""
    if not finite_weights(run.policy.model):
        return "weights"
    if not finite_logits(run.policy):
        return "logits"
    logprobs = (x for row in step.trajectories for x in row.logprobs)
    return "" if all(map(math.isfinite, logprobs)) else "log-probs of what was sampled"


# ------------------------------------------------------------------------------------------- before the steps
def setup(config: Config) -> tuple[Run, list[Task], int]:
    """(run, evaluation tasks, number of training tasks that nobody can solve within the limits)."""
    if missing := absent(config.track):
        raise Refused(missing)
    torch.set_num_threads(config.threads or cpu_threads(distributed.neighbours()))
    torch.manual_seed(config.seed)
    try:
        policy = first_model(config, config.dtype)
        tasks = load_tasks(config.tasks, config.bfcl_official)
        official = config.bfcl_official and is_bfcl(config.eval_tasks)
        held = load_tasks(config.eval_tasks, official) if config.eval_count else []
        if config.judge and "judge" in SCHEMES[config.scheme].settings:
            judge = Judge(config.judge, config.judge_model, config.judge_timeout)
            distributed.from_first(judge.check)
    except (ModelError, OSError, ValueError) as error:
        raise Refused(str(error)) from None
    if policy.template != "own":
        print(f"chat template: {policy.template}, in place of the model's own (--chat-template)")
    held = subset(held, config.eval_count)
    tasks = [task for task in tasks if len(task.turns) >= config.min_turns]
    room = min(config.context, policy.context) - 1  # the last token is sampled, and not looked at
    hints = [hint_text(task, config.format) for task in tasks]
    why = [
        obstacle(policy.chat, task, config.format, config.limits(), room, hint)
        for task, hint in zip(tasks, hints, strict=True)
    ]
    skipped = {task.id: said for task, said in zip(tasks, why, strict=True) if said}
    if skipped:
        print(named(skipped, "skipped"))
    tasks = [task for task in tasks if task.id not in skipped]
    if config.task_count:
        tasks = subset(tasks, config.task_count)
    if len(tasks) < config.prompts:
        there_are = f"{len(tasks)} tasks with --min-turns {config.min_turns} can be solved within the limits"
        raise Refused(f"{there_are}, fewer than --prompts {config.prompts}")
    policy.model.checkpointing = config.checkpointing
    needed = SCHEMES[config.scheme].memory
    print(describe(plan(policy.model, config, needed), available(policy.device), needed))
    run = Run.begin(config, policy, tasks)
    say_unsolvable(run.sampler, held, config.format, config.limits(), [""] * len(held))
    return run, held, len(skipped)


def begin(
    run: Run, held: list[Task], directory: RunDirectory, saved: dict[str, Any] | None, resume: bool
) -> dict[str, Scores]:
    """Own the directory, at the step that the checkpoint has; returns the scores of the start, if known."""
    config = run.config
    if saved is None:
        distributed.from_first(lambda: (directory.start if resume else directory.create)(config))
        # It may be refused: without a checkpoint a run begins anew.
        distributed.from_first(lambda: directory.open_logger(config, run.step))
        directory.save(run, {})
    else:
        directory.restore(run, saved)
        distributed.from_first(lambda: directory.rewind(config, run.step))
        distributed.from_first(lambda: directory.open_logger(config, run.step))
    print(
        f"{config.scheme}{', ' + config.schedule if config.schedule else ''}: {config.prompts} prompts x "
        f"{config.group} rollouts = {config.prompts * config.group} trajectories, {config.updates} "
        f"update{'s' if config.updates > 1 else ''}; {config.steps} steps on {len(run.tasks)} tasks; "
        f"{directory.path}"
    )
    return {way: Scores(**one) for way, one in saved["before"].items()} if saved else {}


def probes_of_start(run: Run, directory: RunDirectory) -> ProbeSet:
    """What the policy is compared with: the model the run began from, on the probe tasks."""
    config = run.config
    start = run.policy
    if run.step:
        start = first_model(config, config.dtype)
    probes = ProbeSet(start, subset(run.tasks, config.probe_tasks), config.format)
    if distributed.from_first(lambda: directory.probes.stat().st_size == 0):
        measured = probes.measure(start)
        nll = {name: value for name, value in measured.columns.items() if name.startswith("nll_")}
        directory.log_probes({"step": 0} | nll | {"tokens": measured.tokens})
    return probes


def opening_scores(run: Run, held: list[Task], directory: RunDirectory) -> dict[str, Scores]:
    """`score_tasks` before training. Whoever stops the run here has a model to look at, too."""
    try:
        return score_tasks(run, held, "before")
    except KeyboardInterrupt:
        directory.save_model(run.policy)
        raise


def score_tasks(run: Run, held: list[Task], when: str) -> dict[str, Scores]:
    """Scores on the evaluation tasks and on some of the training tasks, greedy and sampled as in training, by
    a name for each; {} where there is no evaluation."""
    config = run.config
    trained = {task.id for task in run.tasks}
    sets = {"evaluated" if any(task.id in trained for task in held) else "held out": held}
    if config.eval_trained:
        sets["trained on"] = subset(run.tasks, config.eval_trained)
    how = rules(config.limits())
    ways = {"greedy": how}
    if config.eval_samples:
        ways["sampled"] = how | {"temperature": config.temperature, "samples": config.eval_samples}
    scores = {}
    if held:
        what = ", ".join(f"{len(tasks)} tasks {name}" for name, tasks in sets.items())
        print(f"evaluating {when} training: {what}, {' and '.join(ways)}, {config.format} ...", flush=True)
        for name, tasks in sets.items():
            for way, how in ways.items():
                scores[f"{name}, {way}"] = evaluate(run.sampler, tasks, config.format, **how)
    return scores


def greedy(run: Run, tasks: list[Task]) -> Scores:
    """Scores of the policy as it is, in the run's format."""
    return evaluate(run.sampler, tasks, run.config.format, **rules(run.config.limits()))


# -------------------------------------------------------------------------------------------- after the steps
def finish(run: Run, directory: RunDirectory, held: list[Task], before: dict[str, Scores]) -> None:
    """Save the model, evaluate, and print the closing table."""
    directory.save_model(run.policy)
    after = score_tasks(run, held, "after")
    if before and after:
        print(closing_table(before, after))
        if distributed.first():
            scores = {"before": before, "after": after}
            result = {when: {way: asdict(one) for way, one in both.items()} for when, both in scores.items()}
            write_atomically(directory.result, json.dumps(finite(result), indent=1))
    if run.policy.device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(
        f"model: {directory.model}; metrics: {directory.metrics}\n"
        f"look: python sample.py --model {directory.model}"
    )


def stopped(run: Run, directory: RunDirectory, code: int, broken: str) -> None:
    """Leave a model to look at, and say why the run ended early and what can be done."""
    if distributed.first():
        step = run.step
        if broken:
            saved = directory.read_checkpoint()
            run.policy.model.load_state_dict(saved["model"])
            step = saved["step"]
        directory.save_model(run.policy)
        where = f"Step {step} is saved in {directory.path}, its model in {directory.model}."
        print(f"Stopped: {why_ended(code, run.step, broken)} {where}", file=sys.stderr)
    distributed.wait()


@command
def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0 when done, 1 when training broke, memory or a disk was full, 2 when refused,
    128 + n after signal n (130: Ctrl-C)."""
    config, given, resume = parse(argv)
    try:
        distributed.start()
        with one_voice():
            code = train(config, resume, given)
        distributed.stop()
        return code
    except (Refused, distributed.TooManyProcesses) as error:
        if distributed.first():
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        saved = RunDirectory(config.out).checkpoint.is_file()
        what = "--resume goes on from the last checkpoint" if saved else "nothing was saved yet"
        print(f"\nstopped at once; {what}", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except OSError as error:
        print(f"train.py: {error}; what was saved before is whole", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            print("out of memory: lower --tokens-at-once (training) or --slots (sampling)", file=sys.stderr)
            return 1
        raise


if __name__ == "__main__":
    sys.exit(main())
