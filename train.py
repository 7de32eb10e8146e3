"""Train a model to use tools over several turns: `python train.py --scheme hint`.

Read it top to bottom: the config, the setup of a run, the loop, saving. What one step does is a scheme's
business (nanotoolrl/schemes.py); the loop does not know which one it runs.
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import torch
import transformers
from tqdm import tqdm

from nanotoolrl import distributed, logprob
from nanotoolrl.bfcl import NAME as BFCL
from nanotoolrl.chat import FORMATS, MESSAGE_STATES, UNHEALTHY_STATES, readable
from nanotoolrl.env import MAX_MESSAGES, Task
from nanotoolrl.evaluate import LONG_CONTEXT, Scores, evaluate, fits, table
from nanotoolrl.judge import Judge
from nanotoolrl.logprob import BACKENDS
from nanotoolrl.masters import Masters
from nanotoolrl.memory import available, describe, plan
from nanotoolrl.model import BUILT_IN, DTYPES, ModelError, Policy, load
from nanotoolrl.probes import ProbeSet, advantage_mass, displacement_own, survival
from nanotoolrl.sampler import Sampler, Trajectory
from nanotoolrl.schemes import SCHEDULES, SCHEMES
from nanotoolrl.tasks import TASK_NAMES, in_epochs, is_bfcl, load_tasks, subset
from nanotoolrl.updates import Run, Step, new_optimizer, trained_reward

METRICS = [
    *"step reward success contrast_groups loss kl entropy grad_norm clip_fraction tokens".split(),
    *"sample_tok_s train_tok_s logprob_gap".split(),
    *(f"state_{state}" for state in MESSAGE_STATES),
    *"spurious_control required_control nll_control nll_content spurious_growth".split(),
    *"displacement_truth displacement_own probe_seconds eval_success".split(),
    *"hinted_rows oracle_rows dropped_rows failed_tasks forced_success reflections judge_fallbacks".split(),
    *"sft_loss sft_tokens chord_mu rollbacks".split(),
    *"skipped_updates skipped_tasks forward_tokens sample_seconds seconds".split(),
]
MOST_NAMED = 3  # of the tasks that are skipped
STATE_JUMP = 0.2  # a share of an unhealthy message state this far above the first step's raises the alarm
SPURIOUS_JUMP = 10  # so does this growth of a control token's spurious probability


def setting(default: object, about: str, choices: tuple = ()) -> object:
    """A config field: its one default, and the line that --help prints."""
    return dataclasses.field(default=default, metadata={"about": about, "choices": choices})


@dataclass
class Config:
    """Every setting, flat. The command line is made from it."""

    # what runs
    scheme: str = setting("hint", "trainer variant; see --list", tuple(SCHEMES))
    schedule: str = setting("", "when an SFT signal is trained (default: the scheme's own)", ("", *SCHEDULES))
    preset: str = setting(
        "nano",
        "named set of settings, overridden by flags",
        ("nano", "smoke", "collapse", "paper", "qwen0.5b", "qwen1.5b", "qwen3-1.7b"),
    )
    model: str = setting(BUILT_IN, "checkpoint directory, hub name, or nano, the built-in model")
    tasks: str = setting("train", f"training tasks: {TASK_NAMES}; of bfcl the train half unless named")
    bfcl_official: bool = setting(
        False, "bfcl: hidden tools can be called, no cap on messages but the benchmark's"
    )
    min_turns: int = setting(1, "train on those of them with at least so many user turns")
    format: str = setting("hermes", "syntax of tool calls", tuple(FORMATS))
    steps: int = setting(20, "RL steps")
    seed: int = setting(0, "of task order and sampling noise")
    out: str = setting("", "run directory (default: runs/SCHEME-SCHEDULE-PRESET-sSEED)")
    # one step
    prompts: int = setting(16, "tasks per step")
    group: int = setting(8, "rollouts per task")
    updates: int = setting(1, "optimiser steps per RL step, each on an equal share of the prompts")
    temperature: float = setting(1.0, "of sampling, and of the log-probs that are trained")
    max_new_tokens: int = setting(128, "tokens per assistant message; longer ones are cut and fail")
    max_messages: int = setting(
        20, "assistant messages per episode (published: 30); no ground truth has more than 14"
    )
    context: int = setting(2048, "tokens per episode, at most the model's own (with --tasks bfcl: 8192)")
    strict_empty_turn: bool = setting(
        False, "fail a task that calls a tool in a turn whose ground truth is empty"
    )
    # the loss
    lr: float = setting(
        2e-4, "learning rate of AdamW (the paper's 1e-6 is for models a thousand times larger)"
    )
    warmup: int = setting(
        5, "linear learning-rate warm-up: step s runs at (s + 1) / WARMUP of it, at most all"
    )
    weight_decay: float = setting(0.01, "of AdamW")
    grad_clip: float = setting(1.0, "largest gradient norm")
    clip: float = setting(0.2, "ratios below 1 - CLIP get no gradient where the advantage is negative")
    clip_high: float = setting(0.2, "ratios above 1 + CLIP_HIGH get none where it is positive")
    dual_clip: float = setting(3.0, "bound of the loss of a negative advantage, in advantages")
    kl: float = setting(0.0, "coefficient of KL(policy || start) in the loss (published: 1e-4)")
    entropy: float = setting(0.0, "coefficient of an entropy bonus")
    loss_agg: str = setting(
        "token", "mean of the loss: over tokens, or over rows of the row's mean", ("token", "sequence")
    )
    adv_std: bool = setting(True, "divide advantages by the group's standard deviation")
    graded_reward: bool = setting(False, "reward the share of turns passed, not only all of them")
    tag_penalty: float = setting(0.0, "reward lost, times the share of bare or malformed messages")
    # help inside a group
    hint_count: int = setting(2, "rollouts of a group that see a hint")
    hint_keep: bool = setting(False, "train hinted rollouts under the hinted prompt")
    oracle_count: int = setting(1, "rollouts of a group that are the ground truth")
    ops_loss: str = setting("shaped", "of their tokens: p / (p + 0.1), or the ratio", ("shaped", "ratio"))
    # SFT. Published: lr 1e-5, ten times that of RL, 2 epochs of batches of 128 after rounds of 50 to 150 RL
    # steps, from the failures of the last 10. Here a run has 20 steps, so rounds are short and the window is
    # the round; bursts train a fixed number of tokens, so that they can be compared. The rate is that of RL,
    # which is high already in a small model: five times more lost 6 points of greedy success in a trial.
    sft_source: str = setting(
        "own", "tasks of sft and sft_rl: the training tasks, or foreign", ("own", "foreign")
    )
    sft_coef: float = setting(0.1, "weight of an SFT loss that is added to policy updates")
    sft_lr: float = setting(2e-4, "learning rate of SFT by itself")
    sft_batch: int = setting(16, "conversations per SFT update")
    sft_epochs: int = setting(2, "passes over the examples of a burst, where --sft-tokens is 0; 0: no bursts")
    sft_tokens: int = setting(4000, "trained tokens of a burst between rounds; 0: --sft-epochs decides")
    sft_warmup: float = setting(0.3, "share of a burst's updates in which its learning rate rises")
    sft_window: int = setting(5, "steps whose examples are trained on")
    round_steps: int = setting(5, "RL steps between bursts")
    ets_any: bool = setting(False, "a task counts as failed if any rollout failed, not only if all did")
    judge: str = setting("", "chat-completions URL that writes the reflections of prs (default: the checker)")
    judge_model: str = setting("judge", "model name sent to it")
    judge_timeout: float = setting(30.0, "seconds before it is asked again")
    # strengths of single schemes
    negative_weight: float = setting(0.0, "psr: factor of negative advantages")
    positive_weight: float = setting(0.0, "nsr: factor of positive advantages")
    void_weight: float = setting(0.0, "void: factor of the advantages of rollouts with a broken message")
    guard_weight: float = setting(1.0, "guard: share of the push-down that control tokens are spared")
    guard_kl: float = setting(1.0, "guard-kl: coefficient of the KL term on control tokens")
    llds_weight: float = setting(0.1, "llds: weight of the penalty on fallen likelihoods")
    chord_mu: float = setting(0.5, "chord: share of SFT in the loss at the start")
    chord_steps: int = setting(20, "chord: steps until it is 0")
    chord_phi: bool = setting(False, "chord: keep the share, weigh SFT tokens by p (1 - p)")
    sentinel_limit: float = setting(
        10.0, "sentinel: growth of a spurious probability that rolls back; 0: never"
    )
    # looking
    eval_tasks: str = setting(
        "test", "tasks of the evaluation before and after training (with --tasks bfcl: bfcl:test)"
    )
    eval_count: int = setting(400, "a fixed sample of so many of them; 0: no evaluation")
    eval_every: int = setting(10, "steps between evaluations on a part of that sample; 0: none")
    eval_part: int = setting(50, "tasks in that part")
    probe_every: int = setting(2, "steps between measurements on the probe set")
    probe_tasks: int = setting(16, "ground-truth conversations in the probe set")
    show_every: int = setting(8, "steps between printed trajectories; 0: none")
    rollout_groups: int = setting(2, "groups per step written to rollouts.jsonl")
    # running
    tokens_at_once: int = setting(4096, "tokens per training micro-batch, padding included")
    checkpointing: bool = setting(False, "compute layers again in the backward pass: slower, less memory")
    share_prompt: bool = setting(False, "train a group's rows as one sequence that holds their prompt once")
    dtype: str = setting("auto", "of the weights; auto: fp32 on a CPU, bf16 or fp16 on a GPU", tuple(DTYPES))
    logprob: str = setting("auto", "log-prob implementation; auto: Triton on a GPU, else tiles", BACKENDS)
    slots: int = setting(128, "episodes sampled at a time")
    save_every: int = setting(5, "steps between checkpoints")
    threads: int = setting(0, "CPU threads; 0: all cores")


# Hao et al. 2026, published code; where it is silent, ours.
PAPER = {
    "steps": 300,
    "prompts": 60,
    "updates": 3,
    "lr": 1e-6,
    "warmup": 10,
    "kl": 1e-4,
    "context": LONG_CONTEXT,
    "max_new_tokens": 1024,
    "max_messages": MAX_MESSAGES,
    "sft_lr": 1e-5,
    "sft_batch": 20,  # conversations; published: 128 pairs of a message and all before it
    "sft_tokens": 0,
    "chord_steps": 300,
    "sft_window": 10,
    "round_steps": 50,
}
# The paper's experiment: its benchmark, and what lets it run on one GPU.
QWEN = PAPER | {
    "tasks": "bfcl",
    "checkpointing": True,
    "slots": 32,
    "tokens_at_once": 16384,
    "eval_every": 50,
    "show_every": 25,
    "probe_every": 10,
}
PRESETS: dict[str, dict] = {
    "nano": {},
    "smoke": {
        "steps": 2,
        "prompts": 4,
        "group": 4,
        "warmup": 1,
        "eval_count": 16,
        "eval_part": 8,
        "eval_every": 1,
        "probe_tasks": 4,
        "round_steps": 1,
        "sft_window": 1,
        "sft_epochs": 1,
        "sft_tokens": 500,
    },
    # Many small, noisy steps at five times the usual rate: success first holds, then calls fall apart.
    "collapse": {
        "steps": 100,
        "prompts": 4,
        "lr": 1e-3,
        "warmup": 60,
        "probe_every": 4,
        "eval_count": 100,
        "eval_every": 25,
        "show_every": 25,
    },
    "paper": PAPER,
    "qwen0.5b": QWEN | {"model": "Qwen/Qwen2.5-0.5B-Instruct"},
    "qwen1.5b": QWEN | {"model": "Qwen/Qwen2.5-1.5B-Instruct"},
    "qwen3-1.7b": QWEN | {"model": "Qwen/Qwen3-1.7B"},
}


# What torch.load raises on a file that is no checkpoint.
UNREADABLE = (OSError, RuntimeError, EOFError, AttributeError, ImportError)
UNREADABLE += (pickle.UnpicklingError, BadZipFile)
WHY_STOPPED = {
    1: "Stopped: three updates in a row had a loss or gradient that is not finite; lower --lr.",
    130: "Stopped by Ctrl-C; go on with --resume.",
}


class Refused(Exception):
    """The command cannot run as given; the text is the message, the exit code is 2."""


# ---------------------------------------------------------------------------------------------- command line
def parse(argv: list[str] | None) -> tuple[Config, set[str], bool]:
    """(config, names given as flags, whether to resume). Defaults < preset < flags; bad flags exit 2."""
    parser = argparse.ArgumentParser(
        description="Train a model to use tools over several turns.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--list", action="store_true", help="list the schemes and exit")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out; only --steps may grow"
    )
    for f in dataclasses.fields(Config):
        flag = "--" + f.name.replace("_", "-")
        about = f.metadata["about"] + (f" (default: {f.default})" if f.default != "" else "")
        if f.metadata["choices"]:
            about += f"; one of {', '.join(f.metadata['choices'])}"
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=about)
        else:
            parser.add_argument(
                flag, type=f.type, help=about, choices=f.metadata["choices"] or None, metavar=f.name.upper()
            )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = sorted(
            flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")
        )
        near = difflib.get_close_matches(unknown[0], flags, 1)
        parser.error(
            f"unknown argument {unknown[0]}; "
            + (f"did you mean {near[0]}? " if near else "")
            + f"known: {' '.join(flags)}"
        )
    given = vars(given)
    if given.pop("list", False):
        print(scheme_table())
        raise SystemExit(0)
    resume = given.pop("resume", False)
    stored = {}
    if resume and "out" in given:
        with contextlib.suppress(Refused):  # said later, by `reopen`
            stored = vars(RunDirectory(given["out"]).stored())
    scheme = SCHEMES[(stored | given).get("scheme", Config.scheme)]
    own = {"schedule": scheme.schedules[0] if scheme.schedules else ""} | scheme.defaults
    settings = PRESETS[given.get("preset", "nano")] | own | stored | given
    if is_bfcl(settings.get("tasks", "")):
        settings = {"context": LONG_CONTEXT, "eval_tasks": f"{BFCL}:test"} | settings
        if not settings["tasks"].endswith((":train", ":test")):
            settings["tasks"] += ":train"
    config = Config(**settings)
    name = [config.scheme, config.schedule, config.preset, f"s{config.seed}"]
    config.out = config.out or "runs/" + "-".join(filter(None, name))
    try:
        check(config)
    except Refused as error:
        parser.error(str(error))
    return config, set(given), resume


def check(config: Config) -> None:
    """Refuse values that cannot work."""
    for name in (
        *"steps prompts group updates max_new_tokens max_messages context lr temperature".split(),
        *"probe_every probe_tasks tokens_at_once slots save_every dual_clip grad_clip".split(),
        *"sft_lr sft_batch sft_window round_steps chord_steps judge_timeout".split(),
    ):
        if not getattr(config, name) > 0:
            raise Refused(f"--{name.replace('_', '-')} must be positive, not {getattr(config, name)}")
    for name in (
        *"hint_count eval_count eval_every eval_part show_every rollout_groups".split(),
        *"kl warmup threads seed".split(),
        *"weight_decay clip clip_high entropy tag_penalty oracle_count".split(),
        *"sft_coef sft_epochs sft_tokens".split(),
        *"negative_weight positive_weight void_weight guard_kl llds_weight sentinel_limit".split(),
    ):
        if not getattr(config, name) >= 0:
            raise Refused(f"--{name.replace('_', '-')} must not be negative, it is {getattr(config, name)}")
    for name in ("chord_mu", "sft_warmup", "guard_weight"):
        if not 0 <= getattr(config, name) <= 1:
            raise Refused(f"--{name.replace('_', '-')} must be from 0 to 1, not {getattr(config, name)}")
    scheme = SCHEMES[config.scheme]
    if config.group < 2:
        raise Refused("--group must be at least 2: advantages compare the rollouts of a group")
    if config.seed >= 2**63:
        raise Refused(f"--seed must be below 2**63, it is {config.seed}")
    if "hint_count" in scheme.settings and config.hint_count > config.group:
        raise Refused(f"--hint-count {config.hint_count} is more than --group {config.group}")
    if "oracle_count" in scheme.settings and config.oracle_count >= config.group:
        raise Refused(f"--oracle-count {config.oracle_count} leaves no rollout in --group {config.group}")
    if config.judge:
        try:
            Judge(config.judge)
        except ValueError as error:
            raise Refused(f"--judge: {error}") from None
    allowed = scheme.schedules or (scheme.defaults.get("schedule", ""),)
    if config.schedule not in allowed:
        known = f"one of {', '.join(allowed)}" if scheme.schedules else "no --schedule"
        raise Refused(f"{config.scheme} takes {known}, not {config.schedule or 'none at all'}")
    if config.updates > config.prompts:
        raise Refused(f"--updates {config.updates} needs at least as many --prompts, not {config.prompts}")


def scheme_table() -> str:
    """What --list prints: name, one line, source, settings that matter with the value that makes it grpo."""
    lines = []
    for one in SCHEMES.values():
        flags = ["--schedule " + "|".join(one.schedules)] if one.schedules else []
        for name in one.settings:
            neutral = f" ({one.neutral[name]:g}: grpo)" if name in one.neutral else ""
            flags.append("--" + name.replace("_", "-") + neutral)
        lines += [f"{one.name:<11}{one.about}", f"{'':<11}  {one.source}"]
        indent = {"initial_indent": " " * 13, "subsequent_indent": " " * 13}
        lines += textwrap.wrap(", ".join(flags), 110, break_on_hyphens=False, **indent)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ the run directory
class RunDirectory:
    """config.json, metrics.csv, probes.jsonl, rollouts.jsonl, checkpoint.pt, result.json and model/ of one
    run. Of several processes only the first writes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.json", self.path / "metrics.csv"
        self.rollouts, self.checkpoint = self.path / "rollouts.jsonl", self.path / "checkpoint.pt"
        self.probes = self.path / "probes.jsonl"
        self.result, self.model = self.path / "result.json", self.path / "model"

    def create(self, config: Config) -> None:
        """Make a new one. Refuses a directory that exists."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise Refused(f"{self.path} exists: choose another --out, or go on with --resume")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"cannot make the directory {self.path}: {error.strerror}") from None
        with self.metrics.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(METRICS)
        self.rollouts.touch()
        self.probes.touch()
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Resolved settings with versions and git revision."""
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"transformers": transformers.__version__, "git": git_revision()}
        write_atomically(
            self.config, json.dumps(dataclasses.asdict(config) | {"versions": versions}, indent=1)
        )

    def stored(self) -> Config:
        """The config of the run. Refuses one that is missing or cannot be read."""
        if not self.config.is_file():
            raise Refused(f"no run to resume in {self.path}: it has no config.json")
        try:
            stored = json.loads(self.config.read_text())
            return Config(**{f.name: stored[f.name] for f in dataclasses.fields(Config)})
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{self.config} cannot be read: {type(error).__name__}: {error}") from None

    def reopen(self, config: Config, given: set[str]) -> tuple[Config, dict]:
        """(config of the run with grown steps, checkpoint); changes nothing."""
        old = self.stored()
        for name in sorted(given - {"steps", "out", "preset"}):
            if getattr(config, name) != getattr(old, name):
                raise Refused(
                    f"only --steps may change on --resume; {name} is {getattr(old, name)!r}, "
                    f"not {getattr(config, name)!r}"
                )
        if "steps" in given and config.steps < old.steps:
            raise Refused(f"--steps may only grow on --resume: the run has {old.steps}")
        saved = self.read_checkpoint()
        resumed = dataclasses.replace(
            old, steps=config.steps if "steps" in given else old.steps, out=str(self.path)
        )
        return resumed, saved

    def rewind(self, config: Config, step: int) -> None:
        """Cut what is newer than the checkpoint from the logs, and write the config of the longer run."""
        cut(self.metrics, lambda line: int(line.split(",")[0]) <= step, header=True)
        for path in (self.probes, self.rollouts):
            cut(path, lambda line: json.loads(line)["step"] <= step)
        self.write_config(config)

    def read_checkpoint(self) -> dict:
        """The saved state. Refuses, by name, a checkpoint that is missing, half-written or not one."""
        if not self.checkpoint.is_file():
            raise Refused(
                f"{self.path} has no checkpoint.pt: it ended before its first save; remove it and start anew"
            )
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            names = ("step", "model", "optimizer", "masters", "state", "torch_rng", "before")
            return {name: saved[name] for name in names}
        except (*UNREADABLE, ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"{self.checkpoint} is not a checkpoint of this program, or is half-written "
                f"({type(error).__name__}); nothing was changed"
            ) from None

    def save(self, run: Run, before: Scores | None) -> None:
        """Write the checkpoint atomically: a reader sees the old one or the new one."""
        if not distributed.first():
            return
        state = {
            "step": run.step,
            "model": run.policy.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "masters": run.masters.state(),
            "state": run.state,
            "torch_rng": torch.get_rng_state(),
            "before": dataclasses.asdict(before) if before else None,
        }
        half = self.checkpoint.with_suffix(".tmp")
        torch.save(state, half)
        os.replace(half, self.checkpoint)

    def log_probes(self, details: dict) -> None:
        """One line of probes.jsonl."""
        if not distributed.first():
            return
        with self.probes.open("a") as file:
            file.write(json.dumps(rounded(details)) + "\n")

    def log(self, config: Config, run: Run, row: dict, details: dict, step: Step) -> None:
        """One metrics row, one line of details, and the first `rollout_groups` groups of the step."""
        if not distributed.first():
            return
        with self.metrics.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([text(row.get(name)) for name in METRICS])
        self.log_probes(details)
        with self.rollouts.open("a") as file:
            shown = min(config.rollout_groups * config.group, len(step.trajectories))
            for i, one in enumerate(step.trajectories[:shown]):
                entry = {"step": run.step, "group": i // config.group, "rollout": i % config.group}
                entry |= {
                    "advantage": round(step.advantages[i].item(), 4),
                    "text": run.policy.chat.decode(one.tokens),
                }
                entry |= dataclasses.asdict(one)
                entry["logprobs"] = [round(x, 4) for x in one.logprobs]
                entry["loss_mask"] = [int(x) for x in one.loss_mask]
                file.write(json.dumps(entry) + "\n")


def text(value: object) -> str:
    """A metrics cell: empty where a column does not apply."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rounded(value: object) -> object:
    """JSON of the same shape with floats of six digits, None for nan."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def cut(path: Path, keep, header: bool = False) -> None:
    """Keep the lines of a log for which `keep` holds, and its header; drop a half-written end."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = lines[:1] if header else []
    for line in lines[len(kept) :]:
        try:
            kept += [line] if line.endswith("\n") and keep(line) else []
        except ValueError:  # half-written
            break
    write_atomically(path, "".join(kept))


def write_atomically(path: Path, content: str) -> None:
    half = path.with_suffix(path.suffix + ".tmp")
    half.write_text(content)
    os.replace(half, path)


def git_revision() -> str:
    """Commit of the source tree, "+" if it was changed; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------------------------------- one run
def setup(config: Config) -> tuple[Run, list[Task], int]:
    """(run, evaluation tasks, number of training tasks that do not fit the context)."""
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // distributed.neighbours()))
    torch.manual_seed(config.seed)
    try:
        logprob.use(config.logprob)
        policy = load(config.model, dtype=DTYPES[config.dtype])
        tasks = load_tasks(config.tasks, config.bfcl_official)
        official = config.bfcl_official and is_bfcl(config.eval_tasks)
        held = load_tasks(config.eval_tasks, official) if config.eval_count else []
    except (ModelError, FileNotFoundError, ValueError) as error:
        raise Refused(str(error)) from None
    tasks = [task for task in tasks if len(task.turns) >= config.min_turns]
    held = subset(held, config.eval_count)
    room = min(config.context, policy.context) - config.max_new_tokens
    fitting = [fits(policy, task, config.format, room, hinted=True) for task in tasks]
    skipped = [task.id for task, ok in zip(tasks, fitting, strict=True) if not ok]
    for name in skipped[:MOST_NAMED]:
        print(f"skipped: task {name}, with its hint or its ground truth, is longer than {room} tokens")
    if len(skipped) > MOST_NAMED:
        print(f"skipped: {len(skipped) - MOST_NAMED} more such tasks")
    tasks = [task for task, ok in zip(tasks, fitting, strict=True) if ok]
    chosen, held = held, [task for task in held if fits(policy, task, config.format, room)]
    if len(held) < len(chosen):
        print(f"not evaluated: {len(chosen) - len(held)} tasks with a prompt of more than {room} tokens")
    if len(tasks) < config.prompts:
        there_are = f"{len(tasks)} tasks with --min-turns {config.min_turns} fit into the context"
        raise Refused(f"{there_are}, fewer than --prompts {config.prompts}")
    if config.checkpointing:
        policy.checkpoint_layers()
    needed = SCHEMES[config.scheme].memory
    print(describe(plan(policy.model, config, needed), available(policy.device), needed))
    masters = Masters(policy.model)
    optimizer = new_optimizer(masters, config.lr, config.weight_decay)
    sampler = Sampler(policy, config.max_new_tokens, config.context, config.slots, config.seed)
    run = Run(config, policy, sampler, optimizer, tasks, masters=masters)
    return run, held, fitting.count(False)


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


def train(config: Config, resume: bool, given: set[str]) -> int:
    """Run the loop; returns the exit code."""
    directory, saved = RunDirectory(config.out), None
    if resume:
        config, saved = directory.reopen(config, given)
    run, held, left_out = setup(config)
    if saved is None:
        distributed.from_first(lambda: directory.create(config))
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
        before = score_tasks(run, held, "before") if run.step == 0 else None
    if run.step == 0:
        directory.save(run, before)
    code, part = 0, held[: config.eval_part]
    bar = tqdm(total=config.steps, initial=run.step, unit="step", dynamic_ncols=True)
    with bar, StopSignal() as stop:
        while run.step < config.steps and code == 0:
            run.step += 1
            run.sampled_tokens, run.sample_seconds, run.skipped_updates = 0, 0.0, 0
            started = time.perf_counter()
            step = SCHEMES[config.scheme].step(run, tasks_of_step(config, run.tasks, run.step))
            row = {"step": run.step, "skipped_tasks": left_out} | measures(run, step) | step.metrics
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
            code = 1 if run.stuck else 130 if distributed.total(stop.asked) else 0
            if run.step % config.save_every == 0 or run.step == config.steps or code:
                directory.save(run, before)
    if code:
        distributed.wait()
        if distributed.first():
            print(WHY_STOPPED[code], f"Step {run.step} is saved in {directory.path}.", file=sys.stderr)
    else:
        finish(run, directory, held, before)
    return code


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


def greedy(run: Run, tasks: list[Task]) -> Scores:
    """Scores of the policy as it is, in the run's format."""
    names = ("format", "max_messages", "strict_empty_turn")
    return evaluate(run.sampler, tasks, **{name: getattr(run.config, name) for name in names})


def finish(run: Run, directory: RunDirectory, held: list[Task], before: Scores | None) -> None:
    """Save the model, evaluate, and print the closing table."""
    if distributed.first():
        run.policy.save(directory.model)
    after = score_tasks(run, held, "after")
    if before and after:
        scores = {"before": before, "after": after}
        print(table(scores))
        if distributed.first():
            result = {name: dataclasses.asdict(one) for name, one in scores.items()}
            write_atomically(directory.result, json.dumps(result, indent=1))
    if run.policy.device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(
        f"model: {directory.model}; metrics: {directory.metrics}\n"
        f"look: python sample.py --model {directory.model}"
    )


def restore(run: Run, saved: dict, directory: RunDirectory) -> None:
    """Put the checkpoint into the run. Refuses one of another model size."""
    try:
        run.policy.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.masters.load(saved["masters"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise Refused(
            f"{directory.checkpoint} does not fit the model {run.config.model}: {str(error).splitlines()[0]}"
        ) from None
    run.step, run.state = saved["step"], saved["state"]
    torch.set_rng_state(saved["torch_rng"])


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
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        before = tqdm.__init__
        tqdm.__init__ = lambda bar, *args, **settings: before(bar, *args, **settings | {"disable": True})
        try:
            yield
        finally:
            tqdm.__init__ = before


class StopSignal:
    """While it is open, Ctrl-C asks the loop to save after the current step; a second one stops at once."""

    def __enter__(self) -> "StopSignal":
        self.asked, self.old = False, None
        if threading.current_thread() is threading.main_thread():  # elsewhere Ctrl-C stays as it is
            self.old = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.old is not None:
            signal.signal(signal.SIGINT, self.old)

    def _handle(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if distributed.first():
            print("\nfinishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The command: returns 0 when done, 1 when training broke, 2 when refused, 130 after Ctrl-C."""
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
    except KeyboardInterrupt:
        saved = RunDirectory(config.out).checkpoint.is_file()
        what = "--resume goes on from the last checkpoint" if saved else "nothing was saved yet"
        print(f"\nstopped at once; {what}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            print("out of memory: lower --tokens-at-once (training) or --slots (sampling)", file=sys.stderr)
            return 1
        raise


if __name__ == "__main__":
    sys.exit(main())
