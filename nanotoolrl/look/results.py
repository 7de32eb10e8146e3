"""The tables of docs/results.md: what replicates of Hao et al. 2026, and what does not.

`python -m nanotoolrl.look.results TABLE.csv` prints them from a table that a study wrote; `--figure` draws
success over steps. Success is greedy, in %, its interval for other tasks (clustered by index) and other
seeds; changes are in points, paired by task, from the untrained model.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from nanotoolrl.cli import command
from nanotoolrl.env import CATEGORIES
from nanotoolrl.look.arms import Row, heading, line_of, numbers, percent, read_arms, shown, spread_of
from nanotoolrl.look.evaluate import index_of
from nanotoolrl.look.intervals import Share, difference_over_seeds, over_seeds
from nanotoolrl.look.rows import in_order
from nanotoolrl.world.tasks import load_tasks, subset

# Averages of the paper's Table 1 in %: Qwen2.5-1.5B-Instruct, Qwen3-1.7B; and its ACEBench accuracy of
# Qwen2.5: foreign format and content, trained format and foreign content. One seed, no intervals.
PAPER = {
    "untrained": ("3.5", "12.5", "26.0", "31.6"),
    "sft": ("", "20", "0.0", "24.1"),
    "grpo": ("0.0", "1.5", "24.75", "0.0"),
    "sft_rl": ("17.25", "0", "", ""),
    "sft_rl-foreign": ("17.25", "", "", ""),
    "ops": ("1.5", "0", "25.75", "23.2"),
    "hint": ("0.0", "0.75", "22.5", "0.0"),
    "ets": ("20.0", "23.25", "8.75", "21.6"),
    "prs": ("25.75", "19.5", "12.0", "25.8"),
}
# What the figure shows: a panel for each, its arms.
PANELS = {
    "RL, and signals mixed into every step": ("grpo", "restart", "ops", "hint"),
    "SFT between rounds of RL, or before it": ("ets", "prs", "sft_rl", "bursts"),
}
START = "untrained"  # the arm that others are compared with
WAYS = [f"{way} {name}" for name in ("test", "ood") for way in ("hermes", "forced prefix", "python", "xml")]


def main_table(arms: Mapping[str, Sequence[Row]]) -> str:
    """A line per method, in the layout of the paper's Table 1."""
    heads = [
        "method",
        "seeds",
        "collapsed",
        "fell",
        "at step",
        *CATEGORIES,
        "all",
        "seeds from, to",
        "change",
        "sampled, at the end",
        "untrained so",
        "SFT tokens",
    ]
    lines = heading([*heads, "paper: Qwen2.5, Qwen3", "flags"])
    for arm, rows in arms.items():
        falls = numbers(rows, "fall")
        ends = [100 * x for x in numbers(rows, "greedy_after")]
        cells = [arm, len(rows), f"{sum(numbers(rows, 'collapsed')):.0f}", len(falls), spread_of(falls)]
        for name in CATEGORIES:
            shares = numbers(rows, f"after {name}")
            cells.append(f"{percent(sum(shares) / len(shares)):.1f}" if shares else "")
        cells += [written(pooled(rows, "closing")), f"{min(ends):.0f}, {max(ends):.0f}" if ends else ""]
        cells.append("" if arm == START else written(changed(arms, arm, "closing"), "+"))
        cells += [shown(numbers(rows, f"{name}_end"), 100, 0) for name in ("sampled", "null")]
        tokens = numbers(rows, "sft_tokens")
        cells.append(f"{sum(tokens) / len(tokens) / 1000:.0f}k" if sum(tokens) else "")
        cells.append(", ".join(PAPER.get(arm, ("", ""))[:2]).strip(", "))
        flags = str(rows[0].get("flags") or "").split(" --preset ")[0]  # what follows is the study's
        cells.append(f"`{flags}`" if flags else "")
        lines.append(line_of(cells))
    return "\n".join(lines)


def ood_table(arms: Mapping[str, Sequence[Row]], when: str = "") -> str:
    """A line per method: formats and content, as in the paper's Table 2; when: "" or " at the fall". A method
    of which nothing was measured has none."""
    heads = ["method", "seeds", *WAYS]
    lines = heading(
        heads if when else [*heads, "paper: foreign format, trained format, both on foreign content"]
    )
    for arm, rows in arms.items():
        cells = [written(pooled(rows, way + when)) for way in WAYS]
        if any(cells):
            paper = [", ".join(PAPER.get(arm, ("",) * 4)[2:]).strip(", ")]
            lines.append(line_of([arm, measured(rows, when), *cells, *([] if when else paper)]))
    return "\n".join(lines)


def changes_table(arms: Mapping[str, Sequence[Row]]) -> str:
    """A line per method: the change from the untrained model in each way of playing."""
    lines = heading(["method", "seeds", *WAYS])
    for arm, rows in arms.items():
        cells = [written(changed(arms, arm, way), "+") for way in WAYS]
        if arm != START and any(cells):
            lines.append(line_of([arm, measured(rows), *cells]))
    return "\n".join(lines)


def measured(rows: Sequence[Row], when: str = "") -> int:
    """How many runs were played in all ways."""
    return min(len(rewards_of(rows, way + when)) for way in WAYS)


def written(found: Share | None, sign: str = "") -> str:
    """A cell: in %, with the interval; "" for nothing. sign: "+" for a change."""
    if found is None:
        return ""
    share, low, high = (100 * x + 0.0 for x in found[:3])
    return f"{share:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def rewards_of(rows: Sequence[Row], way: str) -> list[list[float]]:
    """Success [seeds][tasks] in one way of playing, of the runs of which it was measured."""
    return [list(map(float, str(row[f"digits {way}"])[1:])) for row in rows if row.get(f"digits {way}")]


@cache
def clusters_of(way: str, count: int) -> list[object]:
    """The index of each task, in the order of the digits."""
    tasks = load_tasks("ood" if " ood" in way else "test")
    return [index_of(task.category, task.id) for task in in_order(subset(tasks, count))]


def pooled(rows: Sequence[Row], way: str) -> Share | None:
    """Success of all seeds together in one way of playing; None if it was not measured."""
    found = rewards_of(rows, way)
    return over_seeds(found, clusters_of(way, len(found[0]))) if found else None


def changed(arms: Mapping[str, Sequence[Row]], arm: str, way: str, since: str = START) -> Share | None:
    """Success of an arm less that of another on the same tasks; None where one was not measured."""
    after, before = rewards_of(arms[arm], way), rewards_of(arms.get(since, ()), way)
    if not after or not before:
        return None
    return difference_over_seeds(after, before, clusters_of(way, len(after[0])))


def finished(arms: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """The runs that have ended, by arm; of an arm with none there is none."""
    found = {arm: [row for row in rows if numbers([row], "greedy_after")] for arm, rows in arms.items()}
    return {arm: rows for arm, rows in found.items() if rows}


def tables(arms: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """All of them, those that have a line, of the runs that are finished."""
    arms = finished(arms)
    found = {
        "": main_table(arms),
        "In other formats, and on tasks of other domains:": ood_table(arms),
        "The same, as changes from the untrained model:": changes_table(arms),
        "At the fall, of the runs that fell and were played there:": ood_table(arms, " at the fall"),
    }
    for caption, table in found.items():
        if table.count("\n") > 1:
            yield f"{caption}\n\n{table}".lstrip()


def courses(rows: Sequence[Row]) -> list[list[float]]:
    """Sampled success of every run, step by step in %; runs without rollouts have none."""
    found = [
        [math.nan if x == "-" else float(x) / 10 for x in str(row.get("course", "")).split()] for row in rows
    ]
    return [course for course in found if not all(map(math.isnan, course))]


def draw(arms: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Success over steps as PNG: every seed thin, their mean thick, and untrained success as a line."""
    from matplotlib.figure import Figure  # for this alone

    from nanotoolrl.look.figures import COLORS

    canvas, arms = Figure(figsize=(9, 3.4)), finished(arms)
    null = [percent(x) for rows in arms.values() for x in numbers(rows, "null_half")]
    for axes, (title, names) in zip(canvas.subplots(1, 2, sharey=True), PANELS.items()):
        for color, name in zip(COLORS, names):
            runs = courses(arms.get(name, ()))
            for course in runs:
                axes.plot(range(1, len(course) + 1), course, color=color, linewidth=0.6, alpha=0.5)
            if runs:
                mean = [sum(found) / len(found) for found in zip(*runs)]
                axes.plot(range(1, len(mean) + 1), mean, color=color, linewidth=2.2, label=name)
        if null:
            axes.axhline(sum(null) / len(null), color="#999999", linestyle=":", label="untrained, same tasks")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2, loc="upper right")
    canvas.axes[0].set_ylabel("sampled success, %")
    canvas.axes[0].set_ylim(0, 1.25 * canvas.axes[0].get_ylim()[1])  # room for the legends
    canvas.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)


@command
def main(argv: list[str] | None = None) -> int:
    """The command: 0, or 2 for a table that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m nanotoolrl.look.results", description=__doc__.splitlines()[0]
    )
    parser.add_argument("table", type=Path, help="CSV that a study wrote")
    parser.add_argument("--figure", type=Path, help="draw success over steps into this PNG")
    args = parser.parse_args(argv)
    try:
        arms = read_arms(args.table)
        print("\n\n".join(tables(arms)))
    except (OSError, ValueError, KeyError) as error:
        print(f"results: {args.table} is no table of a study: {error}", file=sys.stderr)
        return 2
    if args.figure:
        draw(arms, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
