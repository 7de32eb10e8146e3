"""Every setting of a run: its default, its bounds, the presets, and the command line made from them."""

import argparse
import contextlib
import dataclasses
import difflib
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

from nanotoolrl.bfcl import NAME as BFCL
from nanotoolrl.calls import FORMATS
from nanotoolrl.cli import MOST_THREADS, out_of_bounds
from nanotoolrl.judge import Judge
from nanotoolrl.logprob import BACKENDS
from nanotoolrl.look.evaluate import BFCL_LIMITS, COUNTS, OUR_LIMITS, SECONDS
from nanotoolrl.model import BUILT_IN, DTYPES
from nanotoolrl.sampler import LEAST_TEMPERATURE
from nanotoolrl.schemes import SCHEDULES, SCHEMES
from nanotoolrl.world.tasks import TASK_NAMES, is_bfcl


class Refused(Exception):
    """The command cannot run as given; the text is the message, the exit code is 2."""


LARGEST = 2**31 - 1  # of an integer setting that says nothing else


def setting(default: object, about: str, choices: tuple = (), **bounds: float) -> object:
    """A config field: its one default, the line that --help prints, and what a number may be: `above` (not
    equal to it), `least`, `most`."""
    return dataclasses.field(default=default, metadata={"about": about, "choices": choices, "bounds": bounds})


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
    model: str = setting(BUILT_IN, "checkpoint or run directory, hub name, or nano, the built-in model")
    tasks: str = setting("train", f"training tasks: {TASK_NAMES}; of bfcl the train half unless named")
    bfcl_official: bool = setting(
        False, "bfcl: hidden tools can be called, no cap on messages but the benchmark's"
    )
    min_turns: int = setting(1, "train on those of them with at least so many user turns", least=1)
    format: str = setting("hermes", "syntax of tool calls", tuple(FORMATS))
    steps: int = setting(20, "RL steps", above=0)
    seed: int = setting(0, "of task order and sampling noise", least=0, most=2**63 - 1)
    out: str = setting("", "run directory (default: runs/SCHEME-SCHEDULE-PRESET-sSEED)")
    # one step
    prompts: int = setting(16, "tasks per step", above=0)
    group: int = setting(8, "rollouts per task", above=0, most=10_000)
    updates: int = setting(1, "optimiser steps per RL step, each on an equal share of the prompts", above=0)
    temperature: float = setting(
        1.0, "of sampling, and of the log-probs that are trained", least=LEAST_TEMPERATURE
    )
    max_new_tokens: int = setting(
        OUR_LIMITS.max_new_tokens,
        f"tokens per assistant message; longer ones are cut and fail (of bfcl: {BFCL_LIMITS.max_new_tokens})",
        **COUNTS,
    )
    max_messages: int = setting(
        OUR_LIMITS.max_messages,
        f"assistant messages per episode (of bfcl, as published: {BFCL_LIMITS.max_messages})",
        **COUNTS,
    )
    context: int = setting(
        OUR_LIMITS.context,
        f"tokens per episode, at most the model's own (of bfcl: {BFCL_LIMITS.context})",
        **COUNTS,
    )
    tool_seconds: float = setting(
        OUR_LIMITS.tool_seconds, "after which a tool call is given up; 0: never", **SECONDS
    )
    strict_empty_turn: bool = setting(
        OUR_LIMITS.strict_empty_turn, "fail a task that calls a tool in a turn whose ground truth is empty"
    )
    # the loss
    lr: float = setting(
        2e-4, "learning rate of AdamW (the paper's 1e-6 is for models a thousand times larger)", above=0
    )
    warmup: int = setting(
        5, "linear learning-rate warm-up: step s runs at (s + 1) / WARMUP of it, at most all", least=0
    )
    weight_decay: float = setting(0.01, "of AdamW", least=0)
    grad_clip: float = setting(1.0, "largest gradient norm", above=0)
    clip: float = setting(
        0.2, "ratios below 1 - CLIP get no gradient where the advantage is negative", least=0
    )
    clip_high: float = setting(0.2, "ratios above 1 + CLIP_HIGH get none where it is positive", least=0)
    dual_clip: float = setting(3.0, "bound of the loss of a negative advantage, in advantages", above=0)
    kl: float = setting(0.0, "coefficient of KL(policy || start) in the loss (published: 1e-4)", least=0)
    entropy: float = setting(0.0, "coefficient of an entropy bonus", least=0)
    loss_agg: str = setting(
        "token", "mean of the loss: over tokens, or over rows of the row's mean", ("token", "sequence")
    )
    adv_std: bool = setting(True, "divide advantages by the group's standard deviation")
    graded_reward: bool = setting(False, "reward the share of turns passed, not only all of them")
    tag_penalty: float = setting(
        0.0,
        "reward lost, times the share of bare or malformed messages; with --adv-std its size says little "
        "where a whole group fails: 0.001 then pushes as hard as 0.5",
        least=0,
    )
    # help inside a group
    hint_count: int = setting(2, "rollouts of a group that see a hint", least=0)
    hint_keep: bool = setting(False, "train hinted rollouts under the hinted prompt")
    oracle_count: int = setting(1, "rollouts of a group that are the ground truth", least=0)
    ops_loss: str = setting("shaped", "of their tokens: p / (p + 0.1), or the ratio", ("shaped", "ratio"))
    # SFT. Published: lr 1e-5, ten times that of RL, 2 epochs of batches of 128 after rounds of 50 to 150 RL
    # steps, from the failures of the last 10. Here a run has 20 steps, so rounds are short and the window is
    # the round; bursts train a fixed number of tokens, so that they can be compared. The rate is that of RL,
    # which is high already in a small model: five times more lost 6 points of greedy success in a trial.
    sft_source: str = setting(
        "own", "tasks of sft and sft_rl: the training tasks, or foreign", ("own", "foreign")
    )
    sft_coef: float = setting(0.1, "weight of an SFT loss that is added to policy updates", least=0)
    sft_lr: float = setting(2e-4, "learning rate of SFT by itself", above=0)
    sft_batch: int = setting(16, "conversations per SFT update", above=0, most=10_000)
    sft_epochs: int = setting(
        2, "passes over the examples of a burst, where --sft-tokens is 0; 0: no bursts", least=0
    )
    sft_tokens: int = setting(
        4000, "trained tokens of a burst between rounds; 0: --sft-epochs decides", least=0
    )
    sft_warmup: float = setting(
        0.3, "share of a burst's updates in which its learning rate rises", least=0, most=1
    )
    sft_window: int = setting(5, "steps whose examples are trained on", above=0)
    round_steps: int = setting(5, "RL steps between bursts", above=0)
    ets_any: bool = setting(False, "a task counts as failed if any rollout failed, not only if all did")
    judge: str = setting("", "chat-completions URL that writes the reflections of prs (default: the checker)")
    judge_model: str = setting("judge", "model name sent to it")
    judge_timeout: float = setting(30.0, "seconds for a request and its whole answer", above=0, most=86_400)
    # strengths of single schemes
    negative_weight: float = setting(0.0, "psr: factor of negative advantages", least=0)
    positive_weight: float = setting(0.0, "nsr: factor of positive advantages", least=0)
    void_weight: float = setting(
        0.0, "void: factor of the advantages of rollouts with a broken message", least=0
    )
    guard_weight: float = setting(
        1.0, "guard: share of the push-down that control tokens are spared", least=0, most=1
    )
    guard_kl: float = setting(1.0, "guard-kl: coefficient of the KL term on control tokens", least=0)
    llds_weight: float = setting(0.1, "llds: weight of the penalty on fallen likelihoods", least=0)
    chord_mu: float = setting(0.5, "chord: share of SFT in the loss at the start", least=0, most=1)
    chord_steps: int = setting(20, "chord: steps until it is 0", above=0)
    chord_phi: bool = setting(False, "chord: keep the share, weigh SFT tokens by p (1 - p)")
    sentinel_limit: float = setting(
        10.0, "sentinel: growth of a spurious probability that rolls back; 0: never", least=0
    )
    # looking
    eval_tasks: str = setting(
        "test", "tasks of the evaluation before and after training (with --tasks bfcl: bfcl:test)"
    )
    eval_count: int = setting(400, "a fixed sample of so many of them; 0: no evaluation", least=0)
    eval_every: int = setting(10, "steps between evaluations on a part of that sample; 0: none", least=0)
    eval_part: int = setting(50, "tasks in that part", least=0)
    probe_every: int = setting(2, "steps between measurements on the probe set", above=0)
    probe_tasks: int = setting(16, "ground-truth conversations in the probe set", above=0)
    show_every: int = setting(8, "steps between printed trajectories; 0: none", least=0)
    rollout_groups: int = setting(2, "groups per step written to rollouts.jsonl", least=0)
    # running
    tokens_at_once: int = setting(4096, "tokens per training micro-batch, padding included", above=0)
    checkpointing: bool = setting(False, "compute layers again in the backward pass: slower, less memory")
    share_prompt: bool = setting(False, "train a group's rows as one sequence that holds their prompt once")
    dtype: str = setting("auto", "of the weights; auto: fp32 on a CPU, bf16 or fp16 on a GPU", tuple(DTYPES))
    logprob: str = setting("auto", "log-prob implementation; auto: Triton on a GPU, else tiles", BACKENDS)
    slots: int = setting(128, "episodes sampled at a time", above=0)
    save_every: int = setting(5, "steps between checkpoints", above=0)
    keep_every: int = setting(0, "steps between models that are kept, in OUT/models; 0: none", least=0)
    threads: int = setting(
        0, "CPU threads; 0: OMP_NUM_THREADS, else all cores that it may use", least=0, most=MOST_THREADS
    )


LIMITS_OF_BFCL = {name: getattr(BFCL_LIMITS, name) for name in ("max_new_tokens", "max_messages", "context")}
# Hao et al. 2026, published code; where it is silent, ours.
PAPER = {
    "steps": 300,
    "prompts": 60,
    "updates": 3,
    "lr": 1e-6,
    "warmup": 10,
    "kl": 1e-4,
    **LIMITS_OF_BFCL,
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
            stored = vars(stored_config(Path(given["out"]) / "config.json"))
    scheme = SCHEMES[(stored | given).get("scheme", Config.scheme)]
    own = {"schedule": scheme.schedules[0] if scheme.schedules else ""} | scheme.defaults
    settings = PRESETS[given.get("preset", "nano")] | own | stored | given
    if is_bfcl(settings.get("tasks", "")):
        settings = LIMITS_OF_BFCL | {"eval_tasks": f"{BFCL}:test"} | settings
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


def check_fields(config: Config) -> None:
    """Refuse values of another type, out of bounds, or not among the choices."""
    for f in dataclasses.fields(config):
        flag, value = "--" + f.name.replace("_", "-"), getattr(config, f.name)
        if type(value) is not f.type:
            raise Refused(f"{flag} must be of type {f.type.__name__}; it is {value!r}")
        if f.metadata["choices"] and value not in f.metadata["choices"]:
            raise Refused(f"{flag} must be one of {', '.join(f.metadata['choices'])}; it is {value!r}")
        if f.type is str and "\0" in value:
            raise Refused(f"{flag} holds a character that no name can have")
        if f.type in (int, float):
            bounds = ({"most": LARGEST} if f.type is int else {}) | f.metadata["bounds"]
            if problem := out_of_bounds(value, **bounds):
                raise Refused(f"{flag} {problem}; it is {value}")


def check(config: Config) -> None:
    """Refuse values that cannot work, alone or together."""
    check_fields(config)
    scheme = SCHEMES[config.scheme]
    if config.group < 2:
        raise Refused("--group must be at least 2: advantages compare the rollouts of a group")
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


def stored_config(path: Path) -> Config:
    """The settings that a run wrote into its config.json. Refuses one that is missing or cannot be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        lacking = [f.name for f in dataclasses.fields(Config) if f.name not in stored]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        config = Config(**{f.name: _typed(stored[f.name], f.type) for f in dataclasses.fields(Config)})
        check_fields(config)
        return config
    except FileNotFoundError:
        raise Refused(f"no run to resume in {path.parent}: it has no {path.name}") from None
    except (OSError, ValueError, TypeError, RecursionError, Refused) as error:
        raise Refused(f"{path} cannot be read: {error}") from None


def _typed(value: object, kind: type) -> object:
    """JSON may write a float as an integer; no other type stands for another (`check` refuses it)."""
    return float(value) if kind is float and type(value) is int else value


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
