"""Arms of a study, each a setting with a run for every seed: their table and their figure.

Means are over seeds, with 95 % intervals of Student's t. Every arm is compared at its fall, if it fell.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanotoolrl.look.intervals import student

SHOWN = ("<|im_end|>", '"}}', "<tool_call>")  # whose net push the table shows
Row = Mapping[str, Any]


def arms_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by arm: what stands before `-seedN` in the name of a run; other runs have none."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        arm, cut, _ = row["run"].rpartition("-seed")
        if cut:
            found.setdefault(arm, []).append(row)
    return found


def read_arms(path: Path) -> dict[str, list[Row]]:
    """Those of a table that the study wrote."""
    return arms_of(read_rows(path))


def read_rows(path: Path) -> list[Row]:
    """The rows of such a table, every cell as its text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows: Sequence[Row], column: str) -> list[float]:
    """What a column holds, where it holds anything."""
    return [float(row[column]) for row in rows if row.get(column) not in (None, "")]


def table_of(arms: Mapping[str, Sequence[Row]]) -> str:
    """A Markdown table with a line per arm: seeds, falls and their steps; sampled success, its best and its
    last mean over 640 rollouts, in %; net push in thousandths; what was lost at the fall."""
    heads = [
        "arm",
        "seeds",
        "fell",
        "at step",
        "best %",
        "end %",
        *("push `" + token.replace("|", "\\|") + "`" for token in SHOWN),
    ]
    heads += ["lost"]
    lines = heading(heads)
    for arm, rows in arms.items():
        falls = numbers(rows, "fall")
        lost = sorted(str(row["lost"]) for row in rows if row.get("lost") and row.get("fall"))
        said = ", ".join(f"{name} {lost.count(name)}" for name in dict.fromkeys(lost))
        cells = [arm, len(rows), len(falls), spread_of(falls)]
        cells += [shown(numbers(rows, f"sampled_{when}"), 100, 0) for when in ("best", "end")]
        cells += [shown(numbers(rows, f"net {token}"), 1, 2) for token in SHOWN]
        lines.append(line_of([*cells, said]))
    return "\n".join(lines)


WAYS = ("hermes", "forced prefix", "forced skeleton", "python", "xml", "its structure", "its values")


def falls_table(rows: Sequence[Row]) -> str:
    """A Markdown table with a line per run that was judged at its fall: success in % with its interval, by
    way of playing; first that of the start. Then the shares of broken messages and of replies, and the
    commonest unhealthy state."""
    judged = [row for row in rows if row.get("verdict") and row.get("fall")]
    heads = ["run", "step", *WAYS, "broken %", "replies %", "most"]
    lines = heading(heads)
    if judged:
        start = [judged[0].get(f"before {name}") for name in (*WAYS, "broken", "replies")]
        cells = ["" if value in (None, "") else f"{percent(value):.1f}" for value in start]
        lines.append(line_of(["before", "0", *cells, ""]))
    for row in judged:
        cells = []
        for way in WAYS:
            found = [row.get(f"judged {way}{end}") for end in ("", " low", " high")]
            cells.append(
                "" if "" in found or None in found else "{:.1f} [{:.1f}, {:.1f}]".format(*map(percent, found))
            )
        cells += [f"{percent(row[name]):.1f}" for name in ("broken", "replies")]
        cells = [row["run"], f"{float(row['fall']):.0f}", *cells, row["worst_state"]]
        lines.append(line_of(cells))
    return "\n".join(lines)


def heading(heads: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [line_of(heads), "|" + "---|" * len(heads)]


def line_of(cells: Sequence[object]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def percent(share: Any) -> float:
    """A share, as a number or as a table has it, in %."""
    return 100 * float(share)


def shown(values: Sequence[float], factor: float, digits: int) -> str:
    """Mean and interval of values times a factor. Example: `0.46 ± 0.05`."""
    middle, half = student([factor * value for value in values])
    if math.isnan(middle):
        return ""
    return f"{middle:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def spread_of(falls: Sequence[float]) -> str:
    """The steps of falls, the first and the last. Example: `15 to 18`."""
    if not falls:
        return ""
    first, last = min(falls), max(falls)
    return f"{first:.0f}" if first == last else f"{first:.0f} to {last:.0f}"


def draw(arms: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Two panels as PNG: sampled success at the end of each run, and the net push on control tokens; a point
    for each seed, and the mean with its interval."""
    from matplotlib.figure import Figure  # for this alone

    from nanotoolrl.look.figures import COLORS

    canvas = Figure(figsize=(9, 3.4))
    left, right = canvas.subplots(1, 2)
    places = range(len(arms))
    for axes, columns, factor in ((left, {"sampled_end": "success"}, 100), (right, pushes(arms), 1)):
        for c, (column, label) in enumerate(columns.items()):
            found = [[factor * x for x in numbers(rows, column)] for rows in arms.values()]
            shift = 0.12 * (c - (len(columns) - 1) / 2)
            for place, values in zip(places, found):
                axes.plot([place + shift] * len(values), values, ".", color=COLORS[c], alpha=0.5)
            middles = [student(values) for values in found]
            halves = [0.0 if math.isnan(half) else half for _, half in middles]
            at = [place + shift for place in places]
            axes.errorbar(
                at, [m for m, _ in middles], halves, color=COLORS[c], label=label, capsize=3, marker="o"
            )
        axes.set_xticks(list(places), list(arms), rotation=20 if len(arms) > 3 else 0, fontsize=8)
        axes.grid(alpha=0.3)
    left.set_ylabel("sampled success, last 640 rollouts, %")
    left.set_ylim(bottom=0)
    right.set_ylabel("net push on the logit, thousandths a step")
    right.axhline(0, color="#999999", linewidth=0.6)
    right.legend(fontsize=8)
    canvas.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)


def pushes(arms: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """The columns of the net push that the table shows, with their labels."""
    there = {name for rows in arms.values() for row in rows for name in row}
    return {f"net {token}": token for token in SHOWN if f"net {token}" in there}
