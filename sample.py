"""Watch a model use tools: `python sample.py` plays a test task; with `--chat`, you talk to it."""

import argparse
import sys
from dataclasses import replace

import nanotoolrl  # noqa: F401  (before torch)

# isort: split
import torch

from nanotoolrl.calls import FORMATS
from nanotoolrl.chat import readable, signature
from nanotoolrl.cli import command, cpu_threads, number, refuse_unheard
from nanotoolrl.env import Episode, Task, Turn, oracle
from nanotoolrl.loading import BUILT_IN, ModelError, load
from nanotoolrl.look.evaluate import (
    LIMITS,
    Limits,
    add_limits,
    add_thinking,
    chosen_limits,
    chosen_thinking,
    rules,
    sampler_of,
)
from nanotoolrl.sampler import Sampler
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.world.tasks import TASK_NAMES, load_tasks

CHAT_TURNS = 50
# Flags that say nothing beside --oracle and --chat.
UNHEARD = {
    "oracle": f"chat thinking model temperature seed force_prefix force_skeleton {LIMITS}",
    "chat": "force_prefix force_skeleton max_messages strict_empty_turn",
}


def play(sampler: Sampler, task: Task, args: argparse.Namespace, limits: Limits, color: bool) -> Trajectory:
    """Play one task and print the conversation with a verdict per turn."""
    episode = Episode(task, args.format, **rules(limits))
    forced = {name: getattr(args, name) for name in ("force_prefix", "force_skeleton")}
    row = sampler.rollout([episode], temperature=args.temperature, **forced)[0]
    turns = f"{len(task.turns)} turn{'s' * (len(task.turns) > 1)}"
    print(f"task {task.id}: {turns}, {len(task.tools)} tools shown, format {args.format}")
    print(readable(sampler.chat.decode(row.tokens), color))
    print("message states:", ", ".join(row.states))
    for turn, verdict in enumerate(row.verdicts, 1):
        word = paint("pass", 32, color) if verdict.passed else paint("FAIL", 31, color)
        print(f"turn {turn}: {word} {verdict.reason}".rstrip())
    print(f"reward {row.reward:.0f}")
    return row


class Talk(Episode):
    """An episode whose user messages come from a person. There is no ground truth, so nothing is checked."""

    def __init__(self, task: Task, format: str, first: str, tool_seconds: float) -> None:
        self.color = sys.stdout.isatty()
        blank = [Turn(first, [], "")] + [Turn("", [], "") for _ in range(CHAT_TURNS)]
        task = replace(task, id="chat", turns=blank)
        super().__init__(task, format, max_messages=10**6, tool_seconds=tool_seconds)

    def step(self, text: str, overlong: bool = False) -> list[dict] | None:
        """Show what the model wrote and what the tools answer; at a turn's end, ask the person."""
        show("assistant", text, self.color)
        answer = super().step(text, overlong)
        if answer and answer[0]["role"] == "user":
            said = ask()
            if said is None:
                self.done = True
                return None
            answer = [{"role": "user", "content": said}]
        for message in answer or []:
            if message["role"] == "tool":
                show("tool", message["content"], self.color)
        return answer

    def abort(self, reason: str) -> None:
        """End the chat and say why."""
        print(f"(the chat ends: {reason})")
        super().abort(reason)


def ask() -> str | None:
    """A line from the person; None for an empty line or the end of input."""
    try:
        return input("     user > ").strip() or None
    except EOFError:
        return None


def show(role: str, text: str, color: bool) -> None:
    print(readable(f"<|im_start|>{role}\n{text}<|im_end|>\n", color))


def talk(sampler: Sampler, task: Task, args: argparse.Namespace, limits: Limits) -> None:
    """Chat on the world of a task until an empty line."""
    print(f"the world of task {task.id}; its tools: {', '.join(task.tools)}. An empty line ends the chat.")
    for api, state in task.state.items():
        print(f"{api}: {str(state)[:300]}")
    first = ask()
    if first:
        chat = Talk(task, args.format, first, limits.tool_seconds)
        sampler.rollout([chat], temperature=args.temperature)


def paint(text: str, code: int, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, or 2 when refused."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--model",
        default=BUILT_IN,
        help="checkpoint or run directory, hub name, nano, the built-in model (default), or collapsed",
    )
    parser.add_argument("--tasks", default="test", help=f"{TASK_NAMES} (default: test)")
    parser.add_argument("--task", default="", help="id of the task (default: the first)")
    parser.add_argument(
        "--format", default="hermes", choices=tuple(FORMATS), help="syntax of calls (default: hermes)"
    )
    heat, seed = number(float, least=0, most=100), number(int, least=0, most=2**63 - 1)
    parser.add_argument("--temperature", type=heat, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    add_limits(parser)
    add_thinking(parser)
    parser.add_argument(
        "--force-prefix", action="store_true", help="start every message that should call with the tag"
    )
    parser.add_argument(
        "--force-skeleton", action="store_true", help="write all of the ground truth but the values in calls"
    )
    parser.add_argument("--oracle", action="store_true", help="print the ground-truth conversation instead")
    parser.add_argument("--chat", action="store_true", help="talk to the model on the task's world")
    args = parser.parse_args(argv)
    torch.set_num_threads(cpu_threads())
    color = sys.stdout.isatty()
    try:
        for way in filter(vars(args).get, UNHEARD):
            refuse_unheard(parser, args, UNHEARD[way].split(), f"with --{way}")
        tasks = {task.id: task for task in load_tasks(args.tasks)}
        if args.task and args.task not in tasks:
            raise ValueError(
                f"no task {args.task!r} in {args.tasks}; it holds {', '.join(list(tasks)[:5])}, ..."
            )
        task = tasks[args.task] if args.task else next(iter(tasks.values()))
        if args.oracle:
            for message in oracle(task, args.format):
                lines = [message["content"], *map(signature, message.get("tools", ()))]
                show(message["role"], "\n".join(lines), color)
            return 0
        limits, args.thinking = chosen_limits(args), chosen_thinking(args)
        sampler = sampler_of(load(args.model, thinking=args.thinking), limits, args.seed)
        talk(sampler, task, args, limits) if args.chat else play(sampler, task, args, limits, color)
    except (ModelError, OSError, ValueError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
