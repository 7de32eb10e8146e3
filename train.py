"""Train a model to use tools over several turns: `python train.py --scheme hint`.

Read it top to bottom: the setup of a run, the loop, how it stops. What one step does is a scheme's
business (nanotoolrl/schemes.py); the loop does not know which one it runs.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import nanotoolrl  # noqa: F401  (before torch)

# isort: split
import torch
from tqdm import tqdm

from nanotoolrl import logprob
from nanotoolrl.calls import MESSAGE_STATES, UNHEALTHY_STATES
from nanotoolrl.chat import readable
from nanotoolrl.cli import command, cpu_threads
from nanotoolrl.config import Config, Refused, parse
from nanotoolrl.env import Task
from nanotoolrl.files import finite, write_atomically
from nanotoolrl.gpu import distributed
from nanotoolrl.gpu.masters import Masters
from nanotoolrl.gpu.memory import available, describe, plan
from nanotoolrl.judge import Judge
from nanotoolrl.look.evaluate import Limits, Scores, evaluate, named, obstacle, rules, say_unsolvable, table
from nanotoolrl.look.rundir import RunDirectory
from nanotoolrl.model import DTYPES, ModelError, Policy, finite_logits, finite_weights, load
from nanotoolrl.probes import ProbeSet, advantage_mass, displacement_own, survival
from nanotoolrl.sampler import Sampler
from nanotoolrl.schemes import SCHEMES
from nanotoolrl.supervise import hint_text
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.updates import Run, Step, new_optimizer, trained_reward
from nanotoolrl.world.tasks import in_epochs, is_bfcl, load_tasks, subset

STATE_JUMP = 0.2  # a share of an unhealthy message state this far above the first step's raises the alarm
SPURIOUS_JUMP = 10  # so does this growth of a control token's spurious probability
STUCK, SPOILED = 1, 3  # why a run ends early; 128 + n: signal n
EXIT_CODES = {STUCK: 1, SPOILED: 1}
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


# ---------------------------------------------------------------------------------------------------- one run
def setup(config: Config) -> tuple[Run, list[Task], int]:
    """(run, evaluation tasks, number of training tasks that nobody can solve within the limits)."""
    torch.set_num_threads(config.threads or cpu_threads(distributed.neighbours()))
    torch.manual_seed(config.seed)
    try:
        logprob.use(config.logprob)
        policy = load(config.model, dtype=DTYPES[config.dtype])
        tasks = load_tasks(config.tasks, config.bfcl_official)
        official = config.bfcl_official and is_bfcl(config.eval_tasks)
        held = load_tasks(config.eval_tasks, official) if config.eval_count else []
        if config.judge and "judge" in SCHEMES[config.scheme].settings:
            judge = Judge(config.judge, config.judge_model, config.judge_timeout)
            distributed.from_first(judge.check)
    except (ModelError, OSError, ValueError) as error:
        raise Refused(str(error)) from None
    tasks = [task for task in tasks if len(task.turns) >= config.min_turns]
    held, limits = subset(held, config.eval_count), limits_of(config)
    room = min(config.context, policy.context) - config.max_new_tokens
    hints = [hint_text(task, config.format) for task in tasks]
    why = [obstacle(policy.chat, task, config.format, limits, room, hint) for task, hint in zip(tasks, hints)]
    skipped = {task.id: said for task, said in zip(tasks, why, strict=True) if said}
    if skipped:
        print(named(skipped, "skipped"))
    tasks = [task for task in tasks if task.id not in skipped]
    if len(tasks) < config.prompts:
        there_are = f"{len(tasks)} tasks with --min-turns {config.min_turns} can be solved within the limits"
        raise Refused(f"{there_are}, fewer than --prompts {config.prompts}")
    if config.checkpointing:
        policy.model.checkpointing = True
    needed = SCHEMES[config.scheme].memory
    print(describe(plan(policy.model, config, needed), available(policy.device), needed))
    masters = Masters(policy.model)
    optimizer = new_optimizer(masters, config.lr, config.weight_decay)
    sampler = Sampler(policy, config.max_new_tokens, config.context, config.slots, config.seed)
    run = Run(config, policy, sampler, optimizer, tasks, masters=masters)
    say_unsolvable(sampler, held, config.format, limits, [""] * len(held))
    return run, held, len(skipped)


def limits_of(config: Config) -> Limits:
    """The limits of an episode among all settings."""
    return Limits(**{one.name: getattr(config, one.name) for one in dataclasses.fields(Limits)})


def tasks_of_step(config: Config, tasks: list[Task], step: int) -> list[Task]:
    """The P tasks of a step: a pure function of its arguments."""
    return in_epochs(tasks, str(config.seed), range((step - 1) * config.prompts, step * config.prompts))


def measures(run: Run, step: Step) -> dict[str, float]:
    """The metrics every scheme shares, from its trajectories; none without any."""
    rows = step.trajectories
    if not rows:
        return {}
    own = [row.reward for row in rows if row.source == "policy"]
    states = [state for row in rows if row.source != "oracle" for state in row.states]
    return {
        "reward": sum(trained_reward(run.config, row) for row in rows) / len(rows),
        "success": sum(own) / len(own) if own else math.nan,
        "contrast_groups": int((step.advantages.view(-1, run.config.group) != 0).any(1).sum()),
        "hinted_rows": sum(row.source == "hint" for row in rows) / len(rows),
        "oracle_rows": sum(row.source == "oracle" for row in rows) / len(rows),
        "tokens": run.sampled_tokens,
        "sample_tok_s": run.sampled_tokens / run.sample_seconds,
        "sample_seconds": run.sample_seconds,
        **{f"state_{state}": states.count(state) / len(states) for state in MESSAGE_STATES},
    }


def anatomy(run: Run, step: Step, probes: ProbeSet) -> tuple[dict[str, float], dict]:
    """(columns of metrics.csv, line of probes.jsonl) of a step: what its rollouts and its update did at the
    control tokens and, every `probe_every` steps, what the policy does there now."""
    columns, details, started = {}, {"step": run.step}, time.perf_counter()
    if step.trajectories:
        details["survival"] = survival(step.trajectories)
        details["advantage_mass"] = advantage_mass(step.trajectories, step.advantages, run.control)
    if step.metrics.get("logit_gradient"):
        names = ("self", "other")
        pushes = zip(probes.control, *step.metrics["logit_gradient"], strict=True)
        details["logit_gradient"] = {token: dict(zip(names, push)) for token, *push in pushes}
    if run.step % run.config.probe_every == 0:
        measured = distributed.from_first(lambda: probes.measure(run.policy))  # a scheme may act on it
        columns = dict(measured.columns)
        columns["displacement_own"] = displacement_own(run.policy, step.trajectories, run.config.temperature)
        details["tokens"] = measured.tokens
        run.state["probe"] = {"step": run.step} | measured.columns
    spent = time.perf_counter() - started
    return columns | {"probe_seconds": spent + step.metrics.get("probe_seconds", 0.0)}, details


def progress(row: dict) -> str:
    """What the progress bar says of a step."""
    said = []
    if "reward" in row:
        said += [f"reward {row['reward']:.2f}", f"success {row['success']:.2f}"]
        said += [f"{row['sample_tok_s']:.0f} tok/s"]
    if row.get("sft_tokens"):
        said += [f"SFT loss {row['sft_loss']:.3f}"]
    if "eval_success" in row:
        said += [f"greedy {row['eval_success']:.2f}"]
    return " ".join(said)


def alarm(row: dict, first: dict, tokens: dict) -> str:
    """What the progress bar warns of: an unhealthy message state, or a control token (`tokens`: what was
    measured of them in this step, if anything was), that jumped."""
    spikes = {token: values["growth"] for token, values in tokens.items()}
    warnings = [f"{token} x{spike:.0f}" for token, spike in spikes.items() if spike >= SPURIOUS_JUMP]
    for name in (f"state_{state}" for state in UNHEALTHY_STATES):
        if name in row and row[name] - first[name] > STATE_JUMP:
            warnings.append(f"{name.removeprefix('state_')} {row[name]:.0%}")
    return " ALARM " + ", ".join(warnings) if warnings else ""


def spoiled(run: Run, step: Step) -> str:
    """What of a step is not finite, or "". A loss can look sound where weights are not: rollouts of a model
    that is all NaN have no contrast, hence no loss."""
    if not finite_weights(run.policy.model):
        return "weights"
    if not finite_logits(run.policy):
        return "logits"
    logprobs = (x for row in step.trajectories for x in row.logprobs)
    return "" if all(map(math.isfinite, logprobs)) else "log-probs of what was sampled"


def train(config: Config, resume: bool, given: set[str]) -> int:
    """Run the loop; returns the exit code."""
    directory = RunDirectory(config.out)
    try:
        with StopSignal() as stop:
            saved = None
            if resume:
                config, saved = directory.reopen(config, given)
            return train_in(directory, config, resume, saved, stop)
    finally:
        directory.release()


def train_in(
    directory: RunDirectory, config: Config, resume: bool, saved: dict | None, stop: "StopSignal"
) -> int:
    """`train`, in a directory that this run owns once it is set up; saved: the checkpoint it goes on from."""
    run, held, left_out = setup(config)
    if saved is None:
        distributed.from_first(lambda: (directory.start if resume else directory.create)(config))
        directory.save(run, None)
    else:
        restore(run, saved, directory)
        distributed.from_first(lambda: directory.rewind(config, run.step))
    updates = f"{config.updates} update{'s' if config.updates > 1 else ''}"
    print(
        f"{config.scheme}{', ' + config.schedule if config.schedule else ''}: {config.prompts} prompts x "
        f"{config.group} rollouts = {config.prompts * config.group} trajectories, {updates}; "
        f"{config.steps} steps on {len(run.tasks)} tasks; {directory.path}"
    )
    probes = probes_of_start(run, directory)
    if saved and saved["before"]:
        before = Scores(**saved["before"])
    else:
        before = opening_scores(run, held, directory) if run.step == 0 else None
    if run.step == 0:
        directory.save(run, before)
    code, part = 0, held[: config.eval_part]
    bar = tqdm(total=config.steps, initial=run.step, unit="step", dynamic_ncols=True)
    with bar, stop.after_the_step():
        while run.step < config.steps and code == 0:
            run.step += 1
            run.sampled_tokens, run.sample_seconds, run.skipped_updates = 0, 0.0, 0
            started = time.perf_counter()
            step = SCHEMES[config.scheme].step(run, tasks_of_step(config, run.tasks, run.step))
            row = {"step": run.step, "skipped_tasks": left_out} | measures(run, step) | step.metrics
            columns, details, broken = {}, {"step": run.step}, spoiled(run, step)
            if not broken:
                columns, details = anatomy(run, step, probes)
                if config.eval_every and part and run.step % config.eval_every == 0:
                    scores = greedy(run, part)
                    columns["eval_success"], details["greedy_states"] = scores.success, scores.states
            row |= columns
            row |= {"skipped_updates": run.skipped_updates, "seconds": time.perf_counter() - started}
            shares = {name: share for name, share in row.items() if name.startswith("state_")}
            first = run.state.setdefault("first", shares)
            directory.log(config, run, row, details, step)
            bar.set_postfix_str(progress(row) + alarm(row, first, details.get("tokens", {})), refresh=False)
            bar.update()
            if config.show_every and run.step % config.show_every == 0 and step.trajectories:
                tqdm.write(show(run.policy, step.trajectories[-1], run.step))
            signals = max(distributed.gathered([stop.signal]))
            code = SPOILED if broken else STUCK if run.stuck else 128 + signals if signals else 0
            if not broken and (run.step % config.save_every == 0 or run.step == config.steps or code):
                directory.save(run, before)
            if not broken and config.keep_every and run.step % config.keep_every == 0:
                directory.save_model(run.policy, f"models/step-{run.step}")
    if not code:
        finish(run, directory, held, before)
        return 0
    stopped(run, directory, code, broken)
    return EXIT_CODES.get(code, code)


def stopped(run: Run, directory: RunDirectory, code: int, broken: str) -> None:
    """Leave a model to look at, and say why the run ended early and what can be done."""
    if distributed.first():
        step = run.step
        if broken:
            saved = directory.read_checkpoint()
            run.policy.model.load_state_dict(saved["model"])
            step = saved["step"]
        directory.save_model(run.policy)
        again = "Start anew with a lower --lr; this run would end in the same way again."
        advice = {
            STUCK: f"three updates in a row had a loss or gradient that is not finite. {again}",
            SPOILED: f"after step {run.step} the {broken} are not finite. {again}",
        }
        why = advice.get(code)
        if not why:
            name = signal.Signals(code - 128).name
            why = f"{'Ctrl-C' if name == 'SIGINT' else name}. Go on with --resume."
        where = f"Step {step} is saved in {directory.path}, its model in {directory.model}."
        print(f"Stopped: {why} {where}", file=sys.stderr)
    distributed.wait()


def probes_of_start(run: Run, directory: RunDirectory) -> ProbeSet:
    """What the policy is compared with: the model the run began from, on the probe tasks."""
    config = run.config
    start = load(config.model, dtype=DTYPES[config.dtype]) if run.step else run.policy
    probes = ProbeSet(start, subset(run.tasks, config.probe_tasks), config.format)
    if distributed.from_first(lambda: directory.probes.stat().st_size == 0):
        measured = probes.measure(start)
        nll = {name: measured.columns[name] for name in ("nll_control", "nll_content")}
        directory.log_probes({"step": 0} | nll | {"tokens": measured.tokens})
    return probes


def score_tasks(run: Run, held: list[Task], when: str) -> Scores | None:
    """Greedy scores on the evaluation tasks, or None if there are none."""
    if not held:
        return None
    print(f"evaluating {when} training: {len(held)} tasks, greedy, {run.config.format} ...", flush=True)
    return greedy(run, held)


def opening_scores(run: Run, held: list[Task], directory: RunDirectory) -> Scores | None:
    """`score_tasks` before training. Whoever stops the run here has a model to look at, too."""
    try:
        return score_tasks(run, held, "before")
    except KeyboardInterrupt:
        directory.save_model(run.policy)
        raise


def greedy(run: Run, tasks: list[Task]) -> Scores:
    """Scores of the policy as it is, in the run's format."""
    return evaluate(run.sampler, tasks, run.config.format, **rules(limits_of(run.config)))


def finish(run: Run, directory: RunDirectory, held: list[Task], before: Scores | None) -> None:
    """Save the model, evaluate, and print the closing table."""
    directory.save_model(run.policy)
    after = score_tasks(run, held, "after")
    if before and after:
        scores = {"before": before, "after": after}
        print(table(scores))
        if distributed.first():
            result = {name: dataclasses.asdict(one) for name, one in scores.items()}
            write_atomically(directory.result, json.dumps(finite(result), indent=1))
    if run.policy.device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(
        f"model: {directory.model}; metrics: {directory.metrics}\n"
        f"look: python sample.py --model {directory.model}"
    )


def restore(run: Run, saved: dict, directory: RunDirectory) -> None:
    """Put the checkpoint into the run. Refuses one of another model size, or whose weights are not finite."""
    try:
        run.policy.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.masters.load(saved["masters"])
        for weight, moments in run.optimizer.state.items():
            shapes = {name: x.shape for name, x in moments.items()}
            if shapes != {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}:
                raise ValueError("the optimiser's moments have other names or shapes than AdamW's")
        run.step, run.state = saved["step"], dict(saved["state"])
        torch.set_rng_state(saved["torch_rng"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Refused(
            f"{directory.checkpoint} does not fit the model {run.config.model}: {str(error).splitlines()[0]}"
        ) from None
    if not finite_weights(run.policy.model):
        raise Refused(f"{directory.checkpoint} holds weights that are not finite")


def show(policy: Policy, trajectory: Trajectory, step: int) -> str:
    """A trajectory for the terminal."""
    verdicts = ", ".join("pass" if v.passed else f"fail ({v.reason})" for v in trajectory.verdicts)
    head = f"--- step {step}, task {trajectory.task_id}, reward {trajectory.reward:.0f}; turns: {verdicts}"
    body = readable(policy.chat.decode(trajectory.tokens), color=sys.stdout.isatty())
    return f"{head}\n{body}\n---"


@contextlib.contextmanager
def talking_once() -> Iterator[None]:
    """Of several processes, only the first says what it does; all say what goes wrong."""
    if distributed.first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        before = tqdm.__init__
        tqdm.__init__ = lambda bar, *args, **settings: before(bar, *args, **settings | {"disable": True})
        try:
            yield
        finally:
            tqdm.__init__ = before


class StopSignal:
    """While it is open, Ctrl-C, SIGTERM (Slurm, docker stop) and SIGHUP (a closed terminal) raise
    KeyboardInterrupt with their number. In `after_the_step` the first one only asks the loop to save after
    the current step: `signal` is its number, else 0. What was ignored at the start (nohup) stays so."""

    def __enter__(self) -> "StopSignal":
        self.signal, self.patient, self.old = 0, False, {}
        if threading.current_thread() is threading.main_thread():  # elsewhere they stay as they are
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def after_the_step(self) -> Iterator[None]:
        self.patient = True
        yield
        self.patient = False

    def _handle(self, number: int, _: object) -> None:
        if self.signal or not self.patient:
            raise KeyboardInterrupt(number)
        self.signal = number
        if distributed.first():
            print("\nfinishing this step, then saving; once more stops at once", file=sys.stderr)


@command
def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0 when done, 1 when training broke or a file cannot be written, 2 when refused,
    128 + n after signal n (130: Ctrl-C)."""
    config, given, resume = parse(argv)
    try:
        distributed.start()
        with talking_once():
            code = train(config, resume, given)
        distributed.stop()
        return code
    except (Refused, distributed.TooManyProcesses) as error:
        if distributed.first():
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        saved = RunDirectory(config.out).checkpoint.is_file()
        what = "--resume goes on from the last checkpoint" if saved else "nothing was saved yet"
        print(f"\nstopped at once; {what}", file=sys.stderr)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
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
