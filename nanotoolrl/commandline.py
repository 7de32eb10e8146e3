"""Presets, what wins where several places say something, and the command line of train.py."""

import argparse
import contextlib
import difflib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanotoolrl.bfcl import NAME as BFCL
from nanotoolrl.config import SETTINGS, Config, Refused, flag
from nanotoolrl.env import BFCL_LIMITS
from nanotoolrl.look.metrics import metrics_table
from nanotoolrl.schemes import Scheme
from nanotoolrl.signals import SCHEMES
from nanotoolrl.world.tasks import is_bfcl

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
# Runs that are watched as they fall: probed at every step, the models around the fall kept.
FALLING = {
    "skip_dead": True,
    "keep_fall": True,
    "probe_every": 1,
    "eval_count": 100,
    "eval_trained": 0,
    "eval_samples": 0,
    "eval_every": 0,
}
PRESETS: dict[str, dict] = {
    # What runs by default: few tasks, seen ten times each, so that a run is seen to learn within minutes.
    "first": {"task_count": 32, "updates": 2, "lr": 4e-4, "warmup": 2, "eval_count": 100},
    "nano": {},  # all training tasks, at half that rate: what schemes are compared with
    "smoke": {
        "steps": 2,
        "prompts": 4,
        "group": 4,
        "warmup": 1,
        "eval_count": 16,
        "eval_trained": 8,
        "eval_samples": 1,
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
        "eval_samples": 1,
        "eval_every": 25,
        "show_every": 25,
    },
    # Bad rollouts do not push control tokens down (--guard 1): success holds for a dozen steps, then the
    # structure of calls breaks, and the skill stands behind it.
    "spike": FALLING | {"steps": 20, "guard": 1.0, "show_every": 5},
    # The same, longer, and in rounds: where signals have something to rescue.
    "rescue": FALLING
    | {
        "steps": 24,
        "guard": 1.0,
        "show_every": 5,
        "probe_every": 4,
        "round_steps": 4,
        "sft_window": 4,
        "restart_steps": 4,
        "eval_count": 200,
    },
    # Messages are trained as their decoded text, encoded anew; `--record exact` is the twin that is not.
    "roundtrip": FALLING
    | {
        "steps": 120,
        "record": "text",
        "prompts": 8,
        "updates": 2,
        "lr": 4e-4,
        "warmup": 10,
        "show_every": 20,
    },
    "paper": PAPER,
    "qwen0.5b": QWEN | {"model": "Qwen/Qwen2.5-0.5B-Instruct"},
    "qwen1.5b": QWEN | {"model": "Qwen/Qwen2.5-1.5B-Instruct"},
    "qwen3-1.7b": QWEN | {"model": "Qwen/Qwen3-1.7B"},
}


# ------------------------------------------------------------------------------------------------- precedence
def resolve(given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Config:
    """The settings of a run. What stands further down wins:

    1. the defaults of `Config` and of the schemes
    2. where the tasks are the benchmark's: its limits, and its test half for evaluations
    3. the preset
    4. what the scheme has other defaults for, and the first of its schedules
    5. stored: the settings of the run that goes on
    6. given: the flags

    `--tasks bfcl` means its train half, and a run without `--out` gets one. Raises Refused, by name, for what
    cannot be.
    """
    chosen = dict(stored or {}) | dict(given)
    scheme = known("scheme", chosen.get("scheme", SETTINGS["scheme"].default), SCHEMES)
    preset = known("preset", given.get("preset", SETTINGS["preset"].default), PRESETS)
    refuse_others(scheme, given)
    first = {"schedule": scheme.schedules[0]} if scheme.schedules else {}
    settings = preset | first | dict(scheme.defaults) | chosen
    if is_bfcl(settings.get("tasks", "")):
        settings = LIMITS_OF_BFCL | {"eval_tasks": f"{BFCL}:test"} | settings
        if not settings["tasks"].endswith((":train", ":test")):
            settings["tasks"] += ":train"
    config = Config(**settings)
    name = [config.scheme, config.schedule, config.preset, f"s{config.seed}"]
    config.out = config.out or "runs/" + "-".join(filter(None, name))
    check(config)
    return config


def known(name: str, value: Any, table: Mapping[str, Any]) -> Any:
    """What a table holds under the value of a setting. Raises Refused if that is nothing."""
    if not isinstance(value, str) or value not in table:
        raise Refused(f"{flag(name)} must be one of {', '.join(table)}; it is {value!r}")
    return table[value]


def check(config: Config) -> None:
    """Raise Refused, by name, for settings that cannot work, alone or together."""
    config.check()
    scheme: Scheme = known("scheme", config.scheme, SCHEMES)
    known("preset", config.preset, PRESETS)
    config.check_together(settings_of(scheme))
    allowed = scheme.schedules or (scheme.defaults.get("schedule", ""),)
    if config.schedule not in allowed:
        those = f"one of {', '.join(allowed)}" if scheme.schedules else "no --schedule"
        raise Refused(f"{config.scheme} takes {those}, not {config.schedule or 'none at all'}")


def refuse_others(scheme: Scheme, given: Mapping[str, Any]) -> None:
    """Raise Refused for a flag that only other schemes have: it would do nothing."""
    for name in [name for name in given if name in SETTINGS and name not in settings_of(scheme)]:
        owners = ", ".join(one.name for one in SCHEMES.values() if name in one.settings)
        raise Refused(f"{scheme.name} has no {flag(name)}, which is of {owners}")


def settings_of(scheme: Scheme) -> list[str]:
    """The settings that all schemes share, and its own."""
    others = {name for one in SCHEMES.values() for name in one.settings} - scheme.settings.keys()
    return [name for name in SETTINGS if name not in others]


def stored_config(path: Path) -> Config:
    """The settings that a run wrote into its config.json. Refuses one that is missing or cannot be read.

    What other schemes have declared since then has its default.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("it holds no settings")
        scheme = known("scheme", stored.get("scheme"), SCHEMES)
        lacking = [name for name in settings_of(scheme) if name not in stored]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        there = {name: one for name, one in SETTINGS.items() if name in stored}
        config = Config(**{name: one.typed(stored[name]) for name, one in there.items()})
        check(config)
        return config
    except FileNotFoundError:
        raise Refused(f"no run to resume in {path.parent}: it has no {path.name}") from None
    except (OSError, ValueError, TypeError, RecursionError, Refused) as error:
        raise Refused(f"{path} cannot be read: {error}") from None


# ------------------------------------------------------------------------------------------- the command line
def parse(argv: list[str] | None) -> tuple[Config, set[str], bool]:
    """(config, names given as flags, whether to resume). Bad flags exit with 2."""
    parser = command_line()
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = sorted(
            name for action in parser._actions for name in action.option_strings if name.startswith("--")
        )
        near = difflib.get_close_matches(unknown[0], flags, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        parser.error(f"unknown argument {unknown[0]}; {meant}known: {' '.join(flags)}")
    given = vars(namespace)
    if given.pop("list", False):
        print(scheme_table())
        raise SystemExit(0)
    resume = given.pop("resume", False)
    stored = {}
    if resume and "out" in given:
        with contextlib.suppress(Refused):  # said later, by `reopen`
            stored = vars(stored_config(Path(given["out"]) / "config.json"))
    try:
        return resolve(given, stored), set(given), resume
    except Refused as error:
        parser.error(str(error))


def command_line() -> argparse.ArgumentParser:
    """The flags: one for each setting, those of schemes in groups."""
    parser = argparse.ArgumentParser(
        description="Train a model to use tools over several turns.",
        epilog=f"columns of metrics.csv:\n{metrics_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--list", action="store_true", help="list the schemes and exit")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out; only --steps (and --track) may change",
    )
    schedules = dict.fromkeys(schedule for one in SCHEMES.values() for schedule in one.schedules)
    choices = {"scheme": tuple(SCHEMES), "preset": tuple(PRESETS), "schedule": ("", *schedules)}
    groups: dict[str, Any] = {}
    for name, one in SETTINGS.items():
        owners = ", ".join(scheme.name for scheme in SCHEMES.values() if name in scheme.settings)
        if owners not in groups:
            groups[owners] = parser.add_argument_group(f"of {owners}") if owners else parser
        about = one.about + said_default(name)
        possible = choices.get(name, one.choices)
        if possible:
            about += f"; one of {', '.join(filter(None, possible))}"
        how: dict[str, Any] = {"type": one.kind, "choices": possible or None, "metavar": name.upper()}
        if one.kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        groups[owners].add_argument(flag(name), help=about.replace("%", "%%"), **how)
    return parser


def said_default(name: str) -> str:
    """What --help says of a setting's default: that of no preset, and who has another one."""
    default, first = SETTINGS[name].default, SETTINGS["preset"].default
    others = {f"the preset {first}": PRESETS[first].get(name, default)}
    others |= {one.name: one.defaults.get(name, default) for one in SCHEMES.values()}
    said = [f"{value} in {owner}" for owner, value in others.items() if value != default]
    return f" (default: {'; '.join([str(default), *said])})" if default != "" else ""


def scheme_table() -> str:
    """What --list prints: name, one line, source, settings that matter with the value that makes it grpo."""
    lines = []
    width = 1 + max(map(len, SCHEMES))
    for one in SCHEMES.values():
        flags = [f"--schedule {'|'.join(one.schedules)}"] if one.schedules else []
        for name in (*one.settings, *one.uses):
            neutral = f" ({one.neutral[name]:g}: grpo)" if name in one.neutral else ""
            flags.append(flag(name) + neutral)
        lines += [f"{one.name:<{width}}{one.about}", f"{'':<{width}}  {one.source}"]
        indent = " " * (width + 2)
        lines += textwrap.wrap(
            ", ".join(flags), 110, break_on_hyphens=False, initial_indent=indent, subsequent_indent=indent
        )
    return "\n".join(lines)
