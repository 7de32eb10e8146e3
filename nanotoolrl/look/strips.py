"""Trajectories as strips of tokens: what was sampled, how likely it was, what advantage it carries.

`python -m nanotoolrl.look.strips one_step.png` draws the two rollouts of docs/1-one-step.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nanotoolrl.chat import Chat
from nanotoolrl.cli import command
from nanotoolrl.config import Config
from nanotoolrl.loading import load
from nanotoolrl.run import Run, group_advantages, rollout
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.world.tasks import load_tasks

WIDTH = 104  # of a line, in characters
CHARACTER, LINE = 0.068, 0.36  # width of a character and height of a line, in inches
GIVEN, GOOD, BAD = "#e6e6e6", "#0072b2", "#d55e00"  # not trained; pushed up; pushed down
Box = tuple[float, str, str, float | None]  # left edge in characters, text, colour, log-prob


def boxes_of(row: Trajectory, advantage: float, chat: Chat) -> list[list[Box]]:
    """The tokens of a trajectory behind its first user message, in lines of at most `WIDTH` characters."""
    texts = [chat.decode([token]).replace("\n", "\u23ce") for token in row.tokens]
    users = [i for i, text in enumerate(texts) if text == chat.layout.begin and texts[i + 1] == "user"]
    lines: list[list[Box]] = [[]]
    at = 0.0
    for t in range(users[0], len(row.tokens)):
        width = max(len(texts[t]), 5 if row.loss_mask[t] else 1) + 0.4
        if at + width > WIDTH:
            lines.append([])
            at = 0.0
        color = (GOOD if advantage > 0 else BAD) if row.loss_mask[t] and advantage else GIVEN
        lines[-1].append((at, texts[t], color, row.logprobs[t] if row.loss_mask[t] else None))
        at += width
    return lines


def draw(rows: Sequence[Trajectory], advantages: Sequence[float], chat: Chat, path: Path) -> None:
    """A panel for each trajectory, as PNG. Under a token stands its log-prob, if it was sampled."""
    from matplotlib.figure import Figure  # for this alone
    from matplotlib.patches import Rectangle

    panels = [boxes_of(row, advantage, chat) for row, advantage in zip(rows, advantages)]
    heights = [len(lines) + 1 for lines in panels]
    canvas = Figure(figsize=(CHARACTER * WIDTH, LINE * sum(heights)))
    every = canvas.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, lines, row, advantage, height in zip(every, panels, rows, advantages, heights):
        axes.set(xlim=(0, WIDTH), ylim=(height - 1, -1))
        axes.axis("off")
        said = (
            f"R = {row.reward:.0f}, A = {advantage:+.2f}: sampled tokens are coloured, with their log-probs"
        )
        axes.text(0, -0.35, said, fontsize=8, weight="bold")
        for y, line in enumerate(lines):
            ends = [box[0] for box in line[1:]] + [WIDTH]
            for (x, text, color, logprob), end in zip(line, ends):
                width = min(end - x, max(len(text), 1 if logprob is None else 5) + 0.4) - 0.25
                shade = 0.35 if logprob is not None else 1.0
                axes.add_patch(Rectangle((x, y), width, 0.52, color=color, alpha=shade, linewidth=0))
                middle = x + width / 2
                axes.text(middle, y + 0.38, text, fontsize=6.5, family="monospace", ha="center")
                if logprob is not None:
                    axes.text(middle, y + 0.8, f"{logprob:.2f}", fontsize=5, ha="center", color="#555555")
    canvas.subplots_adjust(0.01, 0.01, 0.99, 0.99, hspace=0.05)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150)


@command
def main(argv: list[str] | None = None) -> int:
    """The command: plays the page's two rollouts and draws them."""
    parser = argparse.ArgumentParser(
        prog="python -m nanotoolrl.look.strips", description="Draw the two rollouts of docs/1-one-step.md."
    )
    parser.add_argument("out", type=Path, help="PNG to write")
    args = parser.parse_args(argv)
    run = Run.begin(Config(scheme="grpo", prompts=1, group=2, warmup=0), load("nano"))
    run.next_step()
    rows = rollout(run, [task for task in load_tasks("train") if task.id == "train-013-base"])
    draw(rows, group_advantages(run, rows).tolist(), run.policy.chat, args.out)
    print(f"figure: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
