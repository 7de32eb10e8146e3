"""Success of a model on tasks, by category and call format, with intervals (Hao et al. 2026, Table 1).

`python -m nanotoolrl.evaluate --model DIR` prints the table, `--doctor` what is wrong with a model; `--help`
lists the rest.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanotoolrl.calls import FORMATS, MESSAGE_STATES
from nanotoolrl.chat import Chat
from nanotoolrl.cli import command, cpu_threads, number, refuse_unheard
from nanotoolrl.config import COUNTS, SECONDS, SETTINGS
from nanotoolrl.env import (
    BFCL_LIMITS,
    CATEGORIES,
    MAX_MESSAGES,
    OUR_LIMITS,
    TOOL_SECONDS,
    Episode,
    Limits,
    Task,
    messages_needed,
)
from nanotoolrl.files import check_writable, finite, write_atomically
from nanotoolrl.gpu.memory import evaluation_slots
from nanotoolrl.loading import BEGAN_FROM, BUILT_IN, BY_NAME, ModelError, load
from nanotoolrl.look.doctor import (
    FORCED,
    OWN_STRUCTURE,
    OWN_VALUES,
    SKELETON,
    Checkup,
    page,
    read_transcripts,
    transcripts_page,
    verdict,
)
from nanotoolrl.look.intervals import Share, difference, share_of
from nanotoolrl.look.passes import passes
from nanotoolrl.look.swap import swapped
from nanotoolrl.look.wording import unshown
from nanotoolrl.model import Policy
from nanotoolrl.probes import ProbeSet
from nanotoolrl.sampler import Sampler
from nanotoolrl.supervise import hint_text
from nanotoolrl.trajectory import demonstration
from nanotoolrl.world.tasks import TASK_NAMES, is_bfcl, load_tasks, subset

PROBE_TASKS = 32  # training tasks whose ground truth the doctor probes
MOST_NAMED = 3  # of the tasks that cannot be solved


@dataclass
class Scores:
    """Outcome of one evaluation: rewards by category and task, message states, and how long it took."""

    rewards: dict[str, dict[str, float]] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def success(self) -> float:
        """Share of tasks solved."""
        return self.of("all").share

    def of(self, category: str) -> Share:
        """Share solved of a category, or of "all"."""
        found = self.by_task(category)
        return share_of(list(found.values()), [index_of(*key) for key in found])

    def since(self, before: "Scores") -> Share:
        """Share solved more than before, on the same tasks. Raises KeyError where they are others."""
        now, then = self.by_task("all"), before.by_task("all")
        return difference(list(now.values()), [then[key] for key in now], [index_of(*key) for key in now])

    def without(self, names: Collection[str]) -> "Scores":
        """Those of the other tasks."""
        left = {
            category: {task: reward for task, reward in found.items() if task not in names}
            for category, found in self.rewards.items()
        }
        return dataclasses.replace(self, rewards=left)

    def by_task(self, category: str) -> dict[tuple[str, str], float]:
        """Rewards by (category, task) of a category, or of all."""
        wanted = self.rewards if category == "all" else [category]
        return {(name, task): x for name in wanted for task, x in self.rewards.get(name, {}).items()}


def index_of(category: str, task: str) -> str:
    """What the twins of a task have in common: its id without the category, where it last stands."""
    before, _, after = task.rpartition(category)
    return before + after


def evaluate(
    sampler: Sampler,
    tasks: Sequence[Task],
    format: str = "hermes",
    temperature: float = 0.0,
    hints: Sequence[str] | None = None,
    max_messages: int = MAX_MESSAGES,
    strict_empty_turn: bool = False,
    tool_seconds: float = TOOL_SECONDS,
    samples: int = 1,
    force_prefix: bool = False,
    force_skeleton: bool = False,
) -> Scores:
    """Play every task (greedily by default) and score it.

    samples: rollouts of each task; its reward is their mean, so that intervals are over tasks. Is the skill
    there, behind a broken format? force_prefix: the canonical prefix of a call is written wherever one should
    come; force_skeleton: all but the values in calls is. A task whose prompt does not fit the sampler's
    context fails. Tasks are played in order of the size of their world: long episodes then run beside long
    ones.
    """
    started = time.perf_counter()
    scores = Scores()
    order = []
    for i in sorted(range(len(tasks)), key=lambda i: len(str(tasks[i].state))):
        hint = hints[i] if hints else ""
        if prompt_length(sampler.chat, tasks[i], format, hint) < sampler.context:
            order += [i] * samples
        else:
            scores.rewards.setdefault(tasks[i].category, {})[tasks[i].id] = 0.0
    hints = [hints[i] for i in order] if hints else None
    how = {"strict_empty_turn": strict_empty_turn, "tool_seconds": tool_seconds}
    episodes = [Episode(tasks[i], format, max_messages, **how) for i in order]
    forced = {"force_prefix": force_prefix, "force_skeleton": force_skeleton}
    trajectories = sampler.rollout(episodes, hints, temperature, **forced)
    for i in range(0, len(trajectories), samples):
        reward = sum(row.reward for row in trajectories[i : i + samples]) / samples
        task = trajectories[i]
        scores.rewards.setdefault(task.category, {})[task.task_id] = reward
    for trajectory in trajectories:
        for state in trajectory.states:
            scores.states[state] = scores.states.get(state, 0) + 1
    scores.seconds = time.perf_counter() - started
    return scores


def table(columns: dict[str, Scores]) -> str:
    """Success in % with intervals, a row per category and a column per evaluation."""
    lines = [f"{'success %':<14}" + "".join(f"{title:>24}" for title in columns)]
    for name in categories(columns.values()):
        lines.append(f"{name:<14}" + "".join(f" {scores.of(name)!s:>23}" for scores in columns.values()))
    return "\n".join(lines)


def passes_table(columns: dict[str, Scores], samples: int) -> str:
    """pass@k and pass^k in %, a row for each k and a column per evaluation."""
    shares = []
    for scores in columns.values():
        found = scores.by_task("all")
        shares.append(passes(list(found.values()), [index_of(*key) for key in found], samples))
    lines = [f"{f'of {samples} rollouts':<14}" + "".join(f"{title:>24}" for title in columns)]
    lines += [f"{name:<14}" + "".join(f" {found[name]!s:>23}" for found in shares) for name in shares[0]]
    return "\n".join(lines)


def closing_table(before: dict[str, Scores], after: dict[str, Scores]) -> str:
    """Success in % before and after training, a row for each set of tasks and way of playing, and the
    difference on the same tasks."""
    titles = ("before", "after", "difference, paired")
    lines = [f"{'success %':<22}" + "".join(f"{title:>24}" for title in titles)]
    for way, then in before.items():
        cells = then.of("all"), after[way].of("all"), after[way].since(then)
        lines.append(f"{way:<22}" + "".join(f" {cell!s:>23}" for cell in cells))
    return "\n".join(lines)


def categories(columns: Iterable[Scores]) -> list[str]:
    """The categories that there are, and "all"."""
    there = {name for scores in columns for name in scores.rewards}
    return [name for name in CATEGORIES if name in there] + ["all"]


def paper_table(columns: dict[str, Scores]) -> str:
    """Success in % in the layout of Hao et al. 2026, Table 1: a row per evaluation, a column per category and
    the mean over tasks, with its interval (in the whole test half, that of the categories)."""
    names = categories(columns.values())[:-1]
    lines = [f"{'success %':<14}" + "".join(f"{name:>14}" for name in names) + f"{'avg':>26}"]
    for title, scores in columns.items():
        shares = [scores.of(name).share for name in names]
        cells = "".join(f"{100 * share:>14.1f}" for share in shares)
        lines.append(f"{title:<14}{cells}{scores.of('all')!s:>26}")
    return "\n".join(lines)


def unshown_table(columns: dict[str, Scores], tasks: Sequence[Task]) -> tuple[str, list[str]]:
    """(success in % without the tasks that ask for a sentence that nothing shows, a row per evaluation; their
    names). Nothing where there are none, or no others."""
    names = [task.id for task in tasks if unshown(task)]
    if len(names) in (0, len(tasks)):
        return "", names
    title = f"without the {len(names)} that ask for what nothing shows"
    lines = [f"{name:<14}{scores.without(names).of('all')!s:>26}" for name, scores in columns.items()]
    return "\n".join([title, *lines, ""]), names


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
        cells = [str(columns[format, name].of("all")) for name in sets]
        label = format if format == FORCED else f"{format} ({'trained' if format == trained else 'foreign'})"
        lines.append(f"{label:<18}" + "".join(f" {cell:>23}" for cell in cells))
    return "\n".join(lines)


def prompt_length(chat: Chat, task: Task, format: str, hint: str = "") -> int:
    """Tokens of a task's prompt."""
    return len(chat.prompt_ids(*Episode(task, format).prompt(), format, hint))


def obstacle(chat: Chat, task: Task, format: str, limits: Limits, room: int, hint: str = "") -> str:
    """Why no rollout can solve a task, or "": its prompt (with a hint) or its ground truth has more than
    `room` tokens, or a ground-truth call more than a message may have (a reply may be shorter than it is
    there), or its calls and replies take more messages than an episode may have."""
    if (length := prompt_length(chat, task, format, hint)) > room:
        return f"its prompt has {length} tokens; there is room for {room}"
    truth = demonstration(chat, task, format)
    if len(truth.tokens) > room:
        return f"its ground truth has {len(truth.tokens)} tokens; there is room for {room}"
    lengths = [sum(message) for sampled, message in itertools.groupby(truth.loss_mask) if sampled]
    longest = max(n for n, state in zip(lengths, truth.states, strict=True) if state != "reply")
    if longest > limits.max_new_tokens:
        return f"a ground-truth call has {longest} tokens, and may have {limits.max_new_tokens}"
    most = task.message_limits(limits.max_messages)[0]
    if (least := messages_needed(task)) > most:
        return f"its ground truth takes at least {least} messages; an episode may have {most}"
    return ""


def named(obstacles: dict[str, str], what: str) -> str:
    """Lines that name the first tasks with an obstacle (task id -> obstacle) and count the others. what: what
    becomes of them."""
    lines = [f"{what}: task {name}: {why}" for name, why in list(obstacles.items())[:MOST_NAMED]]
    if len(obstacles) > MOST_NAMED:
        lines.append(f"{what}: {len(obstacles) - MOST_NAMED} more such tasks")
    return "\n".join(lines)


def checkup(
    sampler: Sampler,
    name: str,
    tasks: Sequence[Task],
    format: str,
    probes: ProbeSet,
    limits: Limits,
    start: Policy | None = None,
) -> Checkup:
    """What the doctor needs to know of a model: greedy success on `tasks` in every format, with prefix or
    skeleton forced, and with one class of tokens taken from the start, if there is one; message states,
    probes."""
    ways: dict[str, tuple[str, dict[str, bool]]] = {
        one: (one, {}) for one in (format, *(f for f in FORMATS if f != format))
    }
    ways |= {FORCED: (format, {"force_prefix": True}), SKELETON: (format, {"force_skeleton": True})}
    if start:
        ways |= {OWN_STRUCTURE: (format, {}), OWN_VALUES: (format, {})}

    def player(way: str) -> Sampler:  # of swapped ones, with their caches, one at a time
        pairs = {OWN_STRUCTURE: (sampler.policy, start), OWN_VALUES: (start, sampler.policy)}
        return swapped(sampler, *pairs[way], format) if way in pairs else sampler

    played = {
        way: evaluate(player(way), tasks, one, **forced, **rules(limits))
        for way, (one, forced) in tqdm(ways.items(), f"playing {name}", unit="evaluation")
    }
    success = {way: scores.of("all") for way, scores in played.items()}
    return Checkup(name, format, success, played[format].states, probes.measure(sampler.policy).tokens)


# ------------------------------------------------------------------------------------------------ the command
# Which flags count in which kind of evaluation; others are refused, not ignored.
LIMITS = " ".join(one.name for one in dataclasses.fields(Limits))
PLAYED = "model format count temperature samples hint force_prefix force_skeleton seed"
FLAGS = {
    "score": f"thinking tasks bfcl_official {PLAYED} {LIMITS}",
    "grid": f"thinking {PLAYED} {LIMITS}",
    "doctor": f"thinking model tasks format count compare {LIMITS}",
    "transcripts": "format",
}


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Flags for every limit of an episode; `chosen_limits` says what holds where one is not given."""
    where = "(default: that of the model's run, if any, else {}, of bfcl {})"
    about = {
        "max_new_tokens": "tokens per assistant message; longer ones are cut and fail",
        "max_messages": "assistant messages per episode",
        "context": "tokens per episode, at most the model's",
        "tool_seconds": "seconds after which a tool call is given up; 0: never",
    }
    for name, text in about.items():
        kind = type(getattr(OUR_LIMITS, name))
        bounds = SECONDS if kind is float else COUNTS
        usual = where.format(getattr(OUR_LIMITS, name), getattr(BFCL_LIMITS, name))
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=number(kind, **bounds), help=f"{text} {usual}")
    parser.add_argument(
        "--strict-empty-turn",
        action=argparse.BooleanOptionalAction,
        help="fail a task that calls a tool in a turn whose ground truth is empty (default: as its run did)",
    )


def add_thinking(parser: argparse.ArgumentParser) -> None:
    """A flag; `chosen_thinking` says what holds where it is not given."""
    about = "let the model think before it speaks (default: as its run did)"
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, help=about)


def chosen_thinking(args: argparse.Namespace) -> bool:
    """The flag, before what the run that made the model did."""
    return run_settings(args.model).get("thinking", False) if args.thinking is None else args.thinking


def chosen_limits(args: argparse.Namespace) -> Limits:
    """Flags, before the limits of the run that made the model, before those of our own tasks or of the
    benchmark's. Where the run's tasks were of the other kind, the larger of these two."""
    usual = BFCL_LIMITS if is_bfcl(args.tasks) else OUR_LIMITS
    run = run_settings(args.model)
    alike = is_bfcl(run.get("tasks", "")) == is_bfcl(args.tasks)
    found = {}
    for name, value in dataclasses.asdict(usual).items():
        given = getattr(args, name)
        trained = run.get(name, value)
        found[name] = given if given is not None else trained if alike else max(trained, value)
    return Limits(**found)


def rules(limits: Limits) -> dict[str, Any]:
    """The limits that `evaluate` takes; the others are the sampler's."""
    return {name: getattr(limits, name) for name in ("max_messages", "strict_empty_turn", "tool_seconds")}


def command_line() -> argparse.ArgumentParser:
    """The flags, and their help."""
    parser = argparse.ArgumentParser(
        prog="python -m nanotoolrl.evaluate", description="Score a model on tasks.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        default=BUILT_IN,
        help="checkpoint or run directory, hub name, nano, the built-in model (default), or collapsed",
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
    count = number(int, least=0, most=2**31 - 1)
    add("--count", type=count, default=0, help="a fixed sample of so many tasks (default: 0, all)")
    heat = number(float, least=0, most=100)
    add("--temperature", type=heat, default=0.0, help="0 is greedy (default: 0)")
    samples = number(int, above=0, most=10_000)
    add("--samples", type=samples, default=1, help="rollouts of each task (default: 1); needs a temperature")
    add("--hint", action="store_true", help="put each task's hint into the system prompt")
    add("--force-prefix", action="store_true", help="write the start of a call wherever one should come")
    add("--force-skeleton", action="store_true", help="write all of the ground truth but the values in calls")
    seed = number(int, least=0, most=2**63 - 1)
    add("--seed", type=seed, default=0, help="of the sampling noise (default: 0)")
    add_limits(parser)
    add_thinking(parser)
    add("--json", metavar="FILE", type=Path, help="write the numbers there, too")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--grid", action="store_true", help="trained and foreign formats x test and ood tasks")
    kind.add_argument("--doctor", action="store_true", help="a page about what is wrong with the model")
    kind.add_argument(
        "--transcripts", metavar="FILE", help="a page about logged conversations; needs no model"
    )
    add(
        "--compare",
        metavar="DIR",
        help="--doctor: the model before training, or the doctor's page of it, JSON (default: that of its "
        "run, if any)",
    )
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, or 2 when refused."""
    parser = command_line()
    args = parser.parse_args(argv)
    kind = next((name for name in COMMANDS if getattr(args, name, None)), "score")
    arguments = [name for name in vars(args) if name in FLAGS[kind].split()]
    try:
        where = "without --doctor" if kind == "score" else f"with --{kind}"
        refuse_unheard(parser, args, vars(args).keys() - {*arguments, *COMMANDS, "json"}, where)
        if args.samples > 1 and args.temperature == 0:
            raise ValueError("--samples above 1 needs a --temperature: greedy rollouts are all the same")
        if args.json:
            check_writable(args.json)
        torch.set_num_threads(cpu_threads())
        args.limits, args.thinking = chosen_limits(args), chosen_thinking(args)
        vars(args).update(dataclasses.asdict(args.limits))
        text, numbers = COMMANDS[kind](args)
        print(text)
        if args.json:
            stored = {"kind": kind} | {name: getattr(args, name) for name in arguments}
            stored = finite({"arguments": stored} | numbers)
            write_atomically(args.json, json.dumps(stored, allow_nan=False))
    except (ModelError, OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"evaluate: {str(error).splitlines()[0]}\nlower --context or --max-new-tokens", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def chosen_tasks(name: str, count: int, official: bool = False) -> list[Task]:
    """The tasks of a set, or a fixed sample of `count` of them."""
    tasks = load_tasks(name, official)
    return subset(tasks, count) if count else tasks


def score(args: argparse.Namespace) -> tuple[str, dict]:
    """Success by category in each format, and message states."""
    tasks = chosen_tasks(args.tasks, args.count, args.bfcl_official)
    policy = load(args.model, thinking=args.thinking)
    formats = [args.format] if args.format else FORMATS
    columns = {format: play(policy, tasks, format, args) for format in formats}
    scores = {format: dataclasses.asdict(one) for format, one in columns.items()}
    numbers: dict[str, Any] = {"scores": scores}
    shown = f"{table(columns)}\n"
    if is_bfcl(args.tasks):
        others, numbers["unshown"] = unshown_table(columns, tasks)
        shown = f"{paper_table(columns)}\n{others}"
    if args.samples > 1:
        shown += f"{passes_table(columns, args.samples)}\n"
    return shown + states_table(columns), numbers


def score_grid(args: argparse.Namespace) -> tuple[str, dict]:
    """Success in the trained and the foreign formats, and with the prefix forced, on tasks of the trained and
    of other domains."""
    policy = load(args.model, thinking=args.thinking)
    trained = args.format or run_settings(args.model).get("format") or "hermes"
    formats = [trained, *(format for format in FORMATS if format != trained)]
    columns = {}
    for name in ("test", "ood"):
        tasks = chosen_tasks(name, args.count)
        columns |= {(format, name): play(policy, tasks, format, args) for format in formats}
        if not args.force_prefix:
            forced = argparse.Namespace(**vars(args) | {"force_prefix": True})
            columns[FORCED, name] = play(policy, tasks, trained, forced)
    scores = {f"{format} {name}": dataclasses.asdict(one) for (format, name), one in columns.items()}
    return grid(columns, trained), {"trained": trained, "scores": scores}


def sampler_of(policy: Policy, limits: Limits, seed: int = 0) -> Sampler:
    """A sampler under the limits, with as many slots as there is memory for."""
    slots = evaluation_slots(policy.model, limits.context, policy.device)
    return Sampler(policy, limits.max_new_tokens, limits.context, slots, seed)


def play(policy: Policy, tasks: Sequence[Task], format: str, args: argparse.Namespace) -> Scores:
    """Evaluate as the flags say, and say on stderr that it is done, and which tasks nobody can solve."""
    sampler = sampler_of(policy, args.limits, args.seed)
    hints = [hint_text(task, format) if args.hint else "" for task in tasks]
    forced = {name: getattr(args, name) for name in ("force_prefix", "force_skeleton")}
    how = {"samples": args.samples} | forced | rules(args.limits)
    scores = evaluate(sampler, tasks, format, args.temperature, hints, **how)
    print(f"{format}: {len(tasks)} tasks in {scores.seconds:.0f} s", file=sys.stderr)
    say_unsolvable(sampler, tasks, format, args.limits, hints)
    return scores


def say_unsolvable(
    sampler: Sampler, tasks: Sequence[Task], format: str, limits: Limits, hints: Sequence[str]
) -> None:
    """Name, on stderr, the tasks that no model can solve under these limits."""
    room = sampler.context - 1
    found = {}
    for task, hint in zip(tasks, hints, strict=True):
        if why := obstacle(sampler.chat, task, format, limits, room, hint):
            found[task.id] = why
    if found:
        print(named(found, f"{format}: cannot be solved"), file=sys.stderr)


def doctor(args: argparse.Namespace) -> tuple[str, dict]:
    """The doctor's page about a model."""
    tasks = chosen_tasks(args.tasks, args.count)
    probe_tasks = subset(load_tasks("train"), PROBE_TASKS)
    run = run_settings(args.model)
    trained = args.format or run.get("format") or "hermes"
    before = args.compare or run.get("model") or BEGAN_FROM.get(args.model, "")
    known = None
    if before.endswith(".json"):
        before, known = judged_before(Path(before), args, trained)
    policy, start = load(args.model, thinking=args.thinking), None
    if before:
        try:
            start = load(before, thinking=args.thinking)
        except ModelError as error:
            if args.compare:
                raise
            print(f"nothing to compare with: {error}", file=sys.stderr)
    probes = ProbeSet(start or policy, probe_tasks, trained)
    given = (tasks, trained, probes, args.limits)
    sampler = sampler_of(policy, args.limits)
    model, reference = checkup(sampler, args.model, *given, start), None
    if start:
        reference = known or checkup(sampler_of(start, args.limits), before, *given)
    say_unsolvable(sampler, tasks, trained, args.limits, [""] * len(tasks))
    numbers = {"verdict": verdict(model, reference), "model": dataclasses.asdict(model)}
    numbers["reference"] = dataclasses.asdict(reference) if reference else None
    return page(model, reference), numbers


def judged_before(path: Path, args: argparse.Namespace, trained: str) -> tuple[str, Checkup]:
    """(name of the model, what is known of it) of a page that the doctor wrote. Raises ValueError if that was
    on other tasks, under other limits, or is no such page."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = {name: getattr(args, name) for name in ("tasks", "count", *dataclasses.asdict(args.limits))}
        told = found["arguments"]
        others = [name for name, value in wanted.items() if told[name] != value]
        others += ["thinking"] if bool(told.get("thinking")) != args.thinking else []
        model = Checkup(**found["model"])
        others += ["format"] if model.format != trained else []
        shares = {way: Share(*share) for way, share in model.success.items()}
        model = dataclasses.replace(model, success=shares)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no page of the doctor: {type(error).__name__}: {error}") from None
    if others:
        raise ValueError(f"{path} was made with another {', another '.join(others)}")
    return model.name, model


def run_settings(model: str) -> dict:
    """Model, format, tasks and limits of the run that made a model; nothing if `model` is neither a run nor
    in one (RUN/model, RUN/models/step-N). Settings that the run did not have yet are left out. Raises
    ValueError for one that no run can have."""
    names = ("model", "format", "tasks", "thinking", *(one.name for one in dataclasses.fields(Limits)))
    path = Path(model).resolve()
    folders = (path, path.parent, path.parent.parent) if model not in BY_NAME and path.exists() else ()
    for folder in folders:
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict) and {"scheme", "format", "tasks"} <= found.keys():  # no model's own
            told = {name: SETTINGS[name].typed(found[name]) for name in names if name in found}
            for name, value in told.items():
                if problem := SETTINGS[name].wrong(value):
                    raise ValueError(f"{folder / 'config.json'}: {name} {problem}")
            return told
    return {}


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
