"""Success of a model on tasks, by category and call format, with intervals (Hao et al. 2026, Table 1).

`python -m nanotoolrl.evaluate --model DIR` prints the table, `--doctor` what is wrong with a model; `--help`
lists the rest.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nanotoolrl.chat import FORMATS, MESSAGE_STATES
from nanotoolrl.doctor import FORCED, Checkup, page, read_transcripts, transcripts_page, verdict
from nanotoolrl.env import CATEGORIES, MAX_MESSAGES, Episode, Task
from nanotoolrl.model import BUILT_IN, ModelError, Policy, load
from nanotoolrl.probes import ProbeSet
from nanotoolrl.sampler import Sampler, demonstration
from nanotoolrl.supervise import hint_text
from nanotoolrl.tasks import TASK_NAMES, is_bfcl, load_tasks, subset

LONG_CONTEXT = 8192  # tokens per episode of the benchmark, as published
PROBE_TASKS = 32  # training tasks whose ground truth the doctor probes


@dataclass
class Scores:
    """Outcome of one evaluation: rewards by category, message states, and how long it took."""

    rewards: dict[str, list[float]] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def success(self) -> float:
        """Share of tasks solved."""
        return self.of("all")[0]

    def of(self, category: str) -> tuple[float, float, float, int]:
        """(share solved, 95 % Wilson interval low, high, number of tasks) of a category, or of "all"."""
        rewards = sum(self.rewards.values(), []) if category == "all" else self.rewards.get(category, [])
        return wilson(sum(rewards), len(rewards)) + (len(rewards),)


def wilson(solved: float, n: int) -> tuple[float, float, float]:
    """(share, low, high): the Wilson score interval at 95 %; (nan, nan, nan) for n = 0."""
    if n == 0:
        return (math.nan,) * 3
    z, share = 1.96, solved / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return share, max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    sampler: Sampler,
    tasks: Sequence[Task],
    format: str = "hermes",
    temperature: float = 0.0,
    hints: Sequence[str] | None = None,
    max_messages: int = MAX_MESSAGES,
    strict_empty_turn: bool = False,
    samples: int = 1,
    force_prefix: bool = False,
) -> Scores:
    """Play every task (greedily by default) and score it.

    samples: rollouts of each task; its reward is their mean, so that intervals are over tasks. force_prefix:
    the canonical prefix of a call is written wherever one should come: is the skill there, behind a broken
    format? Tasks are played in order of the size of their world: long episodes then run beside long ones.
    """
    started = time.perf_counter()
    order = sorted(range(len(tasks)), key=lambda i: len(str(tasks[i].state)))
    order = [i for i in order for _ in range(samples)]
    hints = [hints[i] for i in order] if hints else None
    episodes = [Episode(tasks[i], format, max_messages, strict_empty_turn) for i in order]
    trajectories = sampler.rollout(episodes, hints, temperature, force_prefix=force_prefix)
    scores = Scores()
    for i in range(0, len(trajectories), samples):
        reward = sum(row.reward for row in trajectories[i : i + samples]) / samples
        scores.rewards.setdefault(trajectories[i].category, []).append(reward)
    for trajectory in trajectories:
        for state in trajectory.states:
            scores.states[state] = scores.states.get(state, 0) + 1
    scores.seconds = time.perf_counter() - started
    return scores


def table(columns: dict[str, Scores]) -> str:
    """Success in % with intervals, a row per category and a column per evaluation."""
    names = [c for c in CATEGORIES if any(c in scores.rewards for scores in columns.values())] + ["all"]
    lines = [f"{'success %':<14}" + "".join(f"{title:>24}" for title in columns)]
    for name in names:
        cells = []
        for scores in columns.values():
            cells.append(_cell(scores.of(name)))
        lines.append(f"{name:<14}" + "".join(f" {cell:>23}" for cell in cells))
    return "\n".join(lines)


def paper_table(columns: dict[str, Scores]) -> str:
    """Success in % in the layout of Hao et al. 2026, Table 1: a row per evaluation, a column per category and
    the mean over tasks, with its interval (in the whole test half, that of the categories)."""
    names = [c for c in CATEGORIES if any(c in scores.rewards for scores in columns.values())]
    lines = [f"{'success %':<14}" + "".join(f"{name:>14}" for name in names) + f"{'avg':>26}"]
    for title, scores in columns.items():
        shares = [scores.of(name)[0] for name in names]
        cells = "".join(f"{100 * share:>14.1f}" for share in shares)
        lines.append(f"{title:<14}{cells}{_cell(scores.of('all')):>26}")
    return "\n".join(lines)


def states_table(columns: dict[str, Scores]) -> str:
    """Share of assistant messages in each state in %, a row per state and a column per evaluation."""
    lines = [f"{'messages %':<14}" + "".join(f"{title:>24}" for title in columns)]
    for state in MESSAGE_STATES:
        shares = [s.states.get(state, 0) / max(1, sum(s.states.values())) for s in columns.values()]
        lines.append(f"{state:<14}" + "".join(f"{100 * share:>24.1f}" for share in shares))
    return "\n".join(lines)


def grid(columns: dict[tuple[str, str], Scores], trained: str) -> str:
    """Success in % over all categories: a row per call format, a column per set of tasks."""
    formats, sets = (list(dict.fromkeys(key[i] for key in columns)) for i in (0, 1))
    lines = [f"{'success %':<18}" + "".join(f"{name:>24}" for name in sets)]
    for format in formats:
        cells = [_cell(columns[format, name].of("all")) for name in sets]
        label = f"{format} ({'trained' if format == trained else 'foreign'})"
        lines.append(f"{label:<18}" + "".join(f" {cell:>23}" for cell in cells))
    return "\n".join(lines)


def _cell(share: tuple[float, float, float, int]) -> str:
    return f"{100 * share[0]:.1f} [{100 * share[1]:.1f}, {100 * share[2]:.1f}] n={share[3]}"


def fits(policy: Policy, task: Task, format: str, room: int, hinted: bool = False) -> bool:
    """Whether the prompt of a task has at most `room` tokens; if `hinted`, with its hint, and whether its
    ground truth has, too."""
    hint = hint_text(task, format) if hinted else ""
    if len(policy.chat.prompt_ids(*Episode(task, format).prompt(), format, hint)) > room:
        return False
    return not hinted or len(demonstration(policy.chat, task, format).tokens) <= room


def checkup(
    sampler: Sampler, name: str, tasks: Sequence[Task], format: str, probes: ProbeSet, max_messages: int
) -> Checkup:
    """What the doctor needs to know of a model: greedy success on `tasks` in every format and with the prefix
    forced, message states, probes."""
    ways = {one: (one, False) for one in (format, *(f for f in FORMATS if f != format))}
    ways[FORCED] = (format, True)
    played = {
        way: evaluate(sampler, tasks, one, max_messages=max_messages, force_prefix=forced)
        for way, (one, forced) in tqdm(ways.items(), f"playing {name}", unit="evaluation")
    }
    success = {way: scores.of("all") for way, scores in played.items()}
    return Checkup(name, format, success, played[format].states, probes.measure(sampler.policy).tokens)


# ------------------------------------------------------------------------------------------------ the command
# Which flags count in which kind of evaluation; others are refused, not ignored.
FLAGS = {
    "score": "model tasks bfcl_official format count temperature samples hint force_prefix seed context "
    "max_messages",
    "grid": "model format count temperature samples hint force_prefix seed context max_messages",
    "doctor": "model tasks format count compare context max_messages",
    "transcripts": "format",
}


def command_line() -> argparse.ArgumentParser:
    """The flags, and their help."""
    parser = argparse.ArgumentParser(
        prog="python -m nanotoolrl.evaluate", description="Score a model on tasks.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        default=BUILT_IN,
        help="checkpoint directory, hub name, or nano, the built-in model (default)",
    )
    add("--tasks", default="test", help=f"{TASK_NAMES} (default: test)")
    add(
        "--bfcl-official",
        action="store_true",
        help="bfcl: hidden tools can be called, no cap on messages but the benchmark's",
    )
    add(
        "--format",
        choices=tuple(FORMATS),
        help="syntax of calls (default: all; for --grid, --doctor and --transcripts the trained one: that of "
        "the model's run, if any, else hermes)",
    )
    add("--count", type=int, default=0, help="a fixed sample of so many tasks (default: 0, all)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--samples", type=int, default=1, help="rollouts of each task (default: 1); needs a temperature")
    add("--hint", action="store_true", help="put each task's hint into the system prompt")
    add("--force-prefix", action="store_true", help="write the start of a call wherever one should come")
    add("--seed", type=int, default=0, help="of the sampling noise (default: 0)")
    add("--context", type=int, help="tokens per episode (default: 2048, of bfcl 8192), at most the model's")
    add("--max-messages", type=int, default=20, help="assistant messages per episode (default: 20)")
    add("--json", metavar="FILE", help="write the numbers there, too")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--grid", action="store_true", help="trained and foreign formats x test and ood tasks")
    kind.add_argument("--doctor", action="store_true", help="a page about what is wrong with the model")
    kind.add_argument(
        "--transcripts", metavar="FILE", help="a page about logged conversations; needs no model"
    )
    add(
        "--compare",
        metavar="DIR",
        help="--doctor: the model before training (default: that of its run, if any)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, or 2 when refused."""
    parser = command_line()
    args = parser.parse_args(argv)
    kind = next((name for name in COMMANDS if getattr(args, name, None)), "score")
    arguments = {name: value for name, value in vars(args).items() if name in FLAGS[kind].split()}
    try:
        for name in vars(args).keys() - arguments.keys() - {*COMMANDS, "json"}:
            if getattr(args, name) != parser.get_default(name):
                where = "without --doctor" if kind == "score" else f"with --{kind}"
                raise ValueError(f"--{name.replace('_', '-')} says nothing {where}")
        if args.count < 0 or args.temperature < 0 or args.samples < 1:
            raise ValueError("--count and --temperature must not be negative, --samples must be positive")
        if args.samples > 1 and args.temperature == 0:
            raise ValueError("--samples above 1 needs a --temperature: greedy rollouts are all the same")
        if args.json and not Path(args.json).resolve().parent.is_dir():
            raise FileNotFoundError(f"no directory for --json {args.json}")
        args.context = args.context or (LONG_CONTEXT if is_bfcl(args.tasks) else 2048)
        text, numbers = COMMANDS[kind](args)
    except (ModelError, OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print(text)
    if args.json:
        arguments = {"kind": kind} | {name: getattr(args, name) for name in arguments}
        Path(args.json).write_text(json.dumps({"arguments": arguments} | numbers))
    return 0


def chosen_tasks(name: str, count: int, official: bool = False) -> list[Task]:
    """The tasks of a set, or a fixed sample of `count` of them."""
    tasks = load_tasks(name, official)
    return subset(tasks, count) if count else tasks


def score(args: argparse.Namespace) -> tuple[str, dict]:
    """Success by category in each format, and message states."""
    tasks = chosen_tasks(args.tasks, args.count, args.bfcl_official)
    policy = load(args.model)
    formats = [args.format] if args.format else FORMATS
    columns = {format: play(policy, tasks, format, args) for format in formats}
    scores = {format: dataclasses.asdict(one) for format, one in columns.items()}
    shown = paper_table(columns) if is_bfcl(args.tasks) else table(columns)
    return f"{shown}\n{states_table(columns)}", {"scores": scores}


def score_grid(args: argparse.Namespace) -> tuple[str, dict]:
    """Success in the trained and the foreign formats on tasks of the trained and of other domains."""
    policy, trained = load(args.model), args.format or of_run(args.model, "format") or "hermes"
    formats = [trained, *(format for format in FORMATS if format != trained)]
    columns = {}
    for name in ("test", "ood"):
        tasks = chosen_tasks(name, args.count)
        columns |= {(format, name): play(policy, tasks, format, args) for format in formats}
    scores = {f"{format} {name}": dataclasses.asdict(one) for (format, name), one in columns.items()}
    return grid(columns, trained), {"trained": trained, "scores": scores}


def play(policy: Policy, tasks: Sequence[Task], format: str, args: argparse.Namespace) -> Scores:
    """Evaluate as the flags say, and say on stderr that it is done. A task whose prompt is too long fails."""
    sampler = Sampler(policy, context=args.context, seed=args.seed)
    room = sampler.context - 1
    texts = [hint_text(task, format) if args.hint else "" for task in tasks]
    fitting = [
        len(policy.chat.prompt_ids(*Episode(task, format).prompt(), format, hint)) <= room
        for task, hint in zip(tasks, texts, strict=True)
    ]
    hints = [hint for hint, ok in zip(texts, fitting) if ok] if args.hint else None
    how = {"max_messages": args.max_messages, "samples": args.samples, "force_prefix": args.force_prefix}
    played = [task for task, ok in zip(tasks, fitting) if ok]
    scores = evaluate(sampler, played, format, args.temperature, hints, **how)
    for task in [task for task, ok in zip(tasks, fitting) if not ok]:
        scores.rewards.setdefault(task.category, []).append(0.0)
    print(f"{format}: {len(tasks)} tasks in {scores.seconds:.0f} s", file=sys.stderr)
    if not all(fitting):
        left_out = fitting.count(False)
        print(f"{format}: {left_out} of them failed: a prompt of more than {room} tokens", file=sys.stderr)
    return scores


def doctor(args: argparse.Namespace) -> tuple[str, dict]:
    """The doctor's page about a model."""
    tasks = chosen_tasks(args.tasks, args.count)
    probe_tasks = subset(load_tasks("train"), PROBE_TASKS)
    before = args.compare or of_run(args.model, "model")
    trained = args.format or of_run(args.model, "format") or "hermes"
    policies = [load(name) for name in [args.model, *filter(None, [before])]]
    probes = ProbeSet(policies[-1], probe_tasks, trained)
    samplers = [Sampler(policy, context=args.context) for policy in policies]
    found = [
        checkup(sampler, name, tasks, trained, probes, args.max_messages)
        for sampler, name in zip(samplers, [args.model, before])
    ]
    model, reference = found[0], found[1] if before else None
    numbers = {"verdict": verdict(model, reference), "model": dataclasses.asdict(model)}
    numbers["reference"] = dataclasses.asdict(reference) if reference else None
    return page(model, reference), numbers


def of_run(model: str, setting: str) -> str:
    """A setting of the run that made a model, if `model` is the directory of its result; else ""."""
    config = Path(model).parent / "config.json"
    try:
        return str(json.loads(config.read_text())[setting])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def logged(args: argparse.Namespace) -> tuple[str, dict]:
    """The page about a file of conversations."""
    found = read_transcripts(Path(args.transcripts), args.format or "hermes")
    numbers = {
        "conversations": found.conversations,
        "states": dict(found.states),
        "first_broken": found.first_broken,
        "broken_at": dict(found.broken_at),
        "breakages": [[*what, count] for what, count in found.breakages.most_common()],
    }
    return transcripts_page(found), numbers


COMMANDS = {"score": score, "grid": score_grid, "doctor": doctor, "transcripts": logged}


if __name__ == "__main__":
    sys.exit(main())
