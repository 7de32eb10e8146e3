"""The tables of docs/results.md: what replicates of Hao et al. 2026, and what does not.

`python -m nanotoolrl.look.results TABLE.csv` prints them from a table that a study wrote. Success is greedy,
in %, its interval over tasks (clustered by index) of the mean over seeds; in brackets after it, the least and
the most of the seeds.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanotoolrl.cli import command
from nanotoolrl.env import CATEGORIES
from nanotoolrl.look.arms import Row, numbers, percent, read_arms, spread_of
from nanotoolrl.look.evaluate import index_of
from nanotoolrl.look.intervals import over_seeds
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


def main_table(arms: Mapping[str, Sequence[Row]]) -> str:
    """A line per method, in the layout of the paper's Table 1."""
    heads = ["method", "seeds", "collapsed", "fell", "at step", *CATEGORIES, "all", "paper: Qwen2.5, Qwen3"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, rows in arms.items():
        falls = numbers(rows, "fall")
        ends = [100 * x for x in numbers(rows, "greedy_after")]
        cells = [
            arm,
            str(len(rows)),
            f"{sum(numbers(rows, 'collapsed')):.0f}",
            str(len(falls)),
            spread_of(falls),
        ]
        for name in CATEGORIES:
            shares = numbers(rows, f"after {name}")
            cells.append(f"{percent(sum(shares) / len(shares)):.1f}" if shares else "")
        cells.append(
            f"{pooled(rows, 'hermes closing', 'test')} ({min(ends):.0f} to {max(ends):.0f})" if ends else ""
        )
        cells.append(", ".join(PAPER.get(arm, ("", ""))[:2]).strip(", "))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ood_table(arms: Mapping[str, Sequence[Row]]) -> str:
    """A line per method: formats and content, as in the paper's Table 2."""
    ways = [
        f"{way} {name}" for name in ("test", "ood") for way in ("hermes", "forced prefix", "python", "xml")
    ]
    heads = ["method", *ways, "paper: foreign format, trained format, both on foreign content"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, rows in arms.items():
        cells = [arm, *(pooled(rows, way, way.split()[-1]) for way in ways)]
        cells.append(", ".join(PAPER.get(arm, ("",) * 4)[2:]).strip(", "))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pooled(rows: Sequence[Row], way: str, tasks: str) -> str:
    """Success of all seeds together in one way of playing, with its interval; "" if it was not measured."""
    found = [str(row[f"digits {way}"])[1:] for row in rows if row.get(f"digits {way}")]
    if not found:
        return ""
    order = in_order(subset(load_tasks(tasks), len(found[0])))
    share = over_seeds([list(map(float, one)) for one in found], [index_of(t.category, t.id) for t in order])
    return f"{percent(share.share):.1f} [{percent(share.low):.1f}, {percent(share.high):.1f}]"


@command
def main(argv: list[str] | None = None) -> int:
    """The command: 0, or 2 for a table that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m nanotoolrl.look.results", description=__doc__.splitlines()[0]
    )
    parser.add_argument("table", type=Path, help="CSV that a study wrote")
    args = parser.parse_args(argv)
    try:
        arms = read_arms(args.table)
    except (OSError, ValueError, KeyError) as error:
        print(f"results: {args.table} is no table of a study: {error}", file=sys.stderr)
        return 2
    print(f"{main_table(arms)}\n\n{ood_table(arms)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
