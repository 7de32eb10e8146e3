"""Every setting of a run: its default, its bounds and one line about it.

Settings that all schemes share are fields of `Config`. A scheme declares its own in its decorator
(schemes.py); they then are fields of every `Config`, too. What a run gets where several places say something
is decided by `commandline.resolve`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nanotoolrl.calls import FORMATS
from nanotoolrl.cli import MOST_THREADS, out_of_bounds
from nanotoolrl.env import BFCL_LIMITS, OUR_LIMITS, Limits
from nanotoolrl.loading import BUILT_IN, DTYPES
from nanotoolrl.logprob import BACKENDS
from nanotoolrl.sampler import LEAST_TEMPERATURE, SLOTS
from nanotoolrl.world.tasks import TASK_NAMES

LARGEST = 2**31 - 1  # of an integer setting that says nothing else
WIDTHS = tuple(name for name in DTYPES if name != "auto")
# Bounds of an episode's limits.
COUNTS: dict[str, Any] = {"above": 0, "most": LARGEST}
SECONDS: dict[str, Any] = {"least": 0, "most": 86_400}


class Refused(Exception):
    """The command cannot run as given; the text is the message, the exit code is 2."""


@dataclass(frozen=True)
class Setting:
    """A setting: its one default, the line that --help prints, and what it may be."""

    default: Any
    about: str
    choices: tuple[str, ...] = ()
    bounds: dict[str, float | str] = dataclasses.field(default_factory=dict)
    problem: Callable[[Any], str] = lambda value: ""  # why a value cannot be, or ""

    @property
    def kind(self) -> Any:
        return type(self.default)

    def typed(self, value: Any) -> Any:
        """JSON may write a float as an integer; no other type stands for another (`wrong` refuses it)."""
        return float(value) if self.kind is float and type(value) is int else value

    def wrong(self, value: Any) -> str:
        """Why a value cannot be, whatever the other settings are, or ""."""
        if type(value) is not self.kind:
            return f"must be of type {self.kind.__name__}; it is {value!r}"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}; it is {value!r}"
        if self.kind is str and "\0" in value:
            return "holds a character that no name can have"
        if self.kind in (int, float):
            numbers: dict[str, float] = {"most": LARGEST} if self.kind is int else {}
            numbers |= {how: bound for how, bound in self.bounds.items() if not isinstance(bound, str)}
            if problem := out_of_bounds(value, **numbers):
                return f"{problem}; it is {value}"
        return self.problem(value)


def setting(
    default: Any,
    about: str,
    choices: tuple[str, ...] = (),
    problem: Callable[[Any], str] = lambda value: "",
    **bounds: float | str,
) -> Any:
    """Declare a setting, as a field of `Config` or in a scheme's decorator.

    bounds of a number: `above` and `below` (not equal to it), `least`, `most`; one may be the name of another
    setting. problem: says why a value cannot be.
    """
    return Setting(default, about, choices, bounds, problem)


class Config:
    """Every setting of a run, flat. `Config(lr=1e-3)` has the defaults but for that.

    What a scheme has other defaults for, and its schedule, is put in by `commandline.resolve`.
    """

    # what runs
    scheme: str = setting("hint", "trainer variant; see --list")
    schedule: str = setting("", "when an SFT signal is trained (default: the scheme's own)")
    preset: str = setting("first", "named set of settings, overridden by flags")
    model: str = setting(
        BUILT_IN, "checkpoint or run directory, hub name, nano, the built-in model, or collapsed"
    )
    chat_template: str = setting(
        "auto",
        "own: the model's; nano: the built-in model's; a file; auto: own, but nano where own lists no tools",
    )
    thinking: bool = setting(
        False, "let a model think before it speaks; what it thinks is trained and stays (Qwen3)"
    )
    tasks: str = setting("train", f"training tasks: {TASK_NAMES}; of bfcl the train half unless named")
    bfcl_official: bool = setting(
        False, "bfcl: hidden tools can be called, no cap on messages but the benchmark's"
    )
    min_turns: int = setting(1, "train on those of them with at least so many user turns", least=1)
    task_count: int = setting(0, "train on a fixed sample of so many of them; 0: on all", least=0)
    format: str = setting("hermes", "syntax of tool calls", tuple(FORMATS))
    steps: int = setting(20, "RL steps", above=0)
    seed: int = setting(0, "of task order and sampling noise", least=0, most=2**63 - 1)
    out: str = setting("", "run directory (default: runs/SCHEME-SCHEDULE-PRESET-sSEED)")
    # one step
    prompts: int = setting(16, "tasks per step", above=0)
    group: int = setting(8, "rollouts per task, which advantages compare", least=2, most=10_000)
    updates: int = setting(
        1, "optimiser steps per RL step, each on an equal share of the prompts", above=0, most="prompts"
    )
    temperature: float = setting(
        1.0, "of sampling, and of the log-probs that are trained", least=LEAST_TEMPERATURE
    )
    top_p: float = setting(
        1.0,
        "sample among the likeliest tokens of so much probability; trained as if among all",
        above=0,
        most=1,
    )
    min_p: float = setting(
        0.0, "sample among tokens at least so likely, relative to the likeliest", least=0, below=1
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
    lora: int = setting(
        0, "train adapters of this rank alone, best at ten times the learning rate; 0: all weights", least=0
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
    guard: float = setting(
        0.0, "share of the push-down that bad rollouts spare the tokens of --guard-tokens", least=0, most=1
    )
    guard_tokens: str = setting(
        "control",
        "control tokens; all structure; the paper's three; what opens a call; the stop",
        ("control", "structure", "paper", "opener", "stop"),
    )
    guard_kl: float = setting(0.0, "coefficient of a KL term to the start on control tokens alone", least=0)
    gtpo: float = setting(
        0.0,
        "tokens that good and bad rollouts of a group share at a place weigh 1 - GTPO in bad ones, 1 + GTPO "
        "in good ones",
        least=0,
        most=1,
    )
    spare_passed: float = setting(
        0.0,
        "share of the push-down that a failed rollout spares turns before its first failed one",
        least=0,
        most=1,
    )
    rare: float = setting(
        0.0, "share of a token's advantage that is multiplied by its probability", least=0, most=1
    )
    silence: float = setting(
        0.0, "tokens of good rollouts below this probability teach nothing", least=0, most=1
    )
    mask_overlong: bool = setting(
        False, "rollouts that a limit ended have no advantage; they count in their group's mean"
    )
    filter: float = setting(
        1.0,
        "share of the groups that are trained on: those with the largest variance of rewards",
        above=0,
        most=1,
    )
    loss: str = setting(
        "ppo",
        "of a token: PPO's; CISPO's, which clips its weight, not its gradient; GSPO's, with a ratio per row",
        ("ppo", "cispo", "gspo"),
    )
    record: str = setting(
        "exact",
        "what of a message is trained: its tokens; its text, encoded anew with a stop behind it (the "
        "published round trip); or a part of that alone: encoding anew, the stop, no special tokens",
        ("exact", "text", "encode", "stop", "vanish"),
    )
    skip_dead: bool = setting(
        False, "take no optimiser step without contrast: else AdamW goes on by its momentum"
    )
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
    # SFT by itself. Published: lr 1e-5, ten times that of RL, 2 epochs of batches of 128. Here bursts train a
    # fixed number of tokens, so that they can be compared. The rate is that of RL, which is high already in a
    # small model: five times more lost 6 points of greedy success in a trial.
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
    # looking
    eval_tasks: str = setting(
        "test", "tasks of the evaluation before and after training (with --tasks bfcl: bfcl:test)"
    )
    eval_count: int = setting(400, "a fixed sample of so many of them; 0: no evaluation", least=0)
    eval_trained: int = setting(32, "a fixed sample of so many training tasks, beside them; 0: none", least=0)
    eval_samples: int = setting(
        2, "sampled rollouts of each of these, beside the greedy one; 0: none", least=0, most=10_000
    )
    eval_every: int = setting(10, "steps between evaluations on a part of that sample; 0: none", least=0)
    eval_part: int = setting(50, "tasks in that part", least=0)
    probe_every: int = setting(2, "steps between measurements on the probe set", above=0)
    probe_tasks: int = setting(16, "ground-truth conversations in the probe set", above=0)
    show_every: int = setting(8, "steps between printed trajectories; 0: none", least=0)
    rollout_groups: int = setting(2, "groups per step written to rollouts.jsonl", least=0)
    track: str = setting(
        "none",
        "where numbers and rollouts go besides OUT",
        ("none", "tensorboard", "trackio", "wandb"),
    )
    # running
    tokens_at_once: int = setting(4096, "tokens per training micro-batch, padding included", above=0)
    checkpointing: bool = setting(False, "compute layers again in the backward pass: slower, less memory")
    dtype: str = setting("auto", "of the weights; auto: fp32 on a CPU, bf16 or fp16 on a GPU", tuple(DTYPES))
    sampler_dtype: str = setting(
        "same", "of the weights that sample; another one than --dtype makes a copy of them", ("same", *WIDTHS)
    )
    logprob: str = setting("auto", "log-prob implementation; auto: Triton on a GPU, else tiles", BACKENDS)
    slots: int = setting(SLOTS, "episodes sampled at a time", above=0)
    save_every: int = setting(5, "steps between checkpoints", above=0)
    keep_every: int = setting(0, "steps between models that are kept, in OUT/models; 0: none", least=0)
    keep_fall: bool = setting(
        False, "keep the models before and at the fall of sampled success, in OUT/models"
    )
    threads: int = setting(
        0, "CPU threads; 0: OMP_NUM_THREADS, else all cores that it may use", least=0, most=MOST_THREADS
    )

    def __init__(self, **values: Any) -> None:
        """Raises TypeError for a name that is no setting."""
        if unknown := values.keys() - SETTINGS.keys():
            raise TypeError(f"no setting is called {', '.join(sorted(unknown))}")
        for name, one in SETTINGS.items():
            setattr(self, name, values.get(name, one.default))

    def __getattr__(self, name: str) -> Any:  # of a setting that was declared later, or of none
        if name in SETTINGS:
            return SETTINGS[name].default
        raise AttributeError(f"no setting is called {name}; a scheme declares its own in its decorator")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and vars(self) == vars(other)

    def __repr__(self) -> str:
        changed = [
            f"{name}={value!r}" for name, value in vars(self).items() if value != SETTINGS[name].default
        ]
        return f"Config({', '.join(changed)})"

    def but(self, **values: Any) -> "Config":
        """The same settings but for these."""
        return Config(**vars(self) | values)

    def limits(self) -> Limits:
        """Those of an episode."""
        return Limits(**{one.name: getattr(self, one.name) for one in dataclasses.fields(Limits)})

    def check(self) -> None:
        """Raise Refused, by name, for a value of another type, out of bounds, or not among the choices."""
        for name, one in SETTINGS.items():
            if problem := one.wrong(getattr(self, name)):
                raise Refused(f"{flag(name)} {problem}")

    def check_together(self, names: Iterable[str]) -> None:
        """Raise Refused, by name, for one of these settings that another one bounds."""
        for name in names:
            for how, other in SETTINGS[name].bounds.items():
                if isinstance(other, str):
                    value, bound = getattr(self, name), getattr(self, other)
                    if problem := out_of_bounds(value, **{how: bound}):
                        raise Refused(f"{flag(name)} {problem}, as {flag(other)} says; it is {value}")


SETTINGS: dict[str, Setting] = {name: one for name, one in vars(Config).items() if isinstance(one, Setting)}


def declare(settings: Mapping[str, Setting]) -> None:
    """Make settings of a scheme fields of every `Config`. Raises TypeError for a name that is taken."""
    for name, one in settings.items():
        if SETTINGS.setdefault(name, one) != one:
            raise TypeError(f"there is another setting called {name}")


def flag(name: str) -> str:
    """How the command line writes the name of a setting."""
    return "--" + name.replace("_", "-")
