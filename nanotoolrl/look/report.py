"""A run, or several compared, to look at: `python -m nanotoolrl.report RUN [RUN ...]`.

Reads what a run directory holds (config.json, metrics.csv, probes.jsonl, rollouts.jsonl) and writes
report.html, one file that needs no network, and the figures as PNG. The terminal gets one screen with
sparklines.
"""

import argparse
import base64
import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from tqdm import tqdm  # noqa: E402

from nanotoolrl.calls import MESSAGE_STATES, UNHEALTHY_STATES
from nanotoolrl.chat import Chat  # noqa: E402
from nanotoolrl.cli import command  # noqa: E402
from nanotoolrl.loading import (
    ModelError,
    load_chat,  # noqa: E402
)
from nanotoolrl.look.viewer import TEMPLATE, page_of  # noqa: E402
from nanotoolrl.probes import SPURIOUS_FLOOR  # noqa: E402

MOST_BYTES = 14_000_000  # of rollouts in the page; together with figures it stays under 20 MB
# Okabe and Ito's palette: told apart by colour-blind readers, and in print by line style.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")
STYLES = ("-", "--", ":", "-.")
STATE_COLORS = {
    "call": "#0072B2",
    "reply": "#56B4E9",
    "foreign": "#F0E442",
    "polluted": "#E69F00",
    "malformed": "#D55E00",
    "bare": "#000000",
    "empty": "#999999",
    "overlong": "#CC79A7",
}
SIDES = ("self", "other")
plt.rcParams |= {"lines.marker": ".", "lines.markersize": 4}  # a single step is a point
SMOOTH = 5  # steps over which rewards are averaged in figures
SPARKS = "▁▂▃▄▅▆▇█"


class Unreadable(Exception):
    """A run directory cannot be reported on; the text says which file and why."""


@dataclass
class RunFiles:
    """What a run left: settings, columns of metrics.csv (None: an empty cell), lines of probes.jsonl."""

    path: Path
    name: str
    config: dict
    metrics: dict[str, list[float | None]]
    probes: list[dict]

    def series(self, column: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a column where it is not empty; from step 0, the start, if that was measured."""
        pairs = zip(self.metrics.get("step", []), self.metrics.get(column, []))
        found = [(line["step"], line[column]) for line in self.probes[:1] if column in line]
        found += [(step, value) for step, value in pairs if value is not None]
        return [step for step, _ in found], [value for _, value in found]

    def details(self, *keys: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a nested entry of probes.jsonl, given by its keys."""
        steps, values = [], []
        for line in self.probes:
            value = line
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                steps.append(line["step"])
                values.append(value)
        return steps, values

    @property
    def tokens(self) -> list[str]:
        """The control tokens that were probed."""
        return next((list(line["tokens"]) for line in self.probes if "tokens" in line), [])


def read_run(path: Path) -> RunFiles:
    """Read a run directory. Raises Unreadable."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        with (path / "metrics.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        metrics = {name: [_number(row[name]) for row in rows] for name in rows[0]}
        probes = [json.loads(line) for line in whole_lines(path / "probes.jsonl")]
        if not {"scheme", "model"} <= config.keys() or not all("step" in line for line in probes):
            raise KeyError("scheme, model or step is missing")
        if None in metrics["step"]:
            raise ValueError("metrics.csv has a row without a step")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{path} is not a finished step of a run: {type(error).__name__}: {error}") from None
    return RunFiles(path, path.resolve().name, config, metrics, probes)


def _number(cell: str) -> float | None:
    """A cell of metrics.csv; None if it is empty or not finite."""
    value = float(cell or "nan")
    return value if math.isfinite(value) else None


def tell_apart(runs: Sequence[RunFiles]) -> None:
    """Name runs by their directories, with the parent's where two are alike, for legends and menus."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.name}"
        run.name = run.name.lstrip("_") or "run"  # matplotlib hides labels that begin with one


def whole_lines(path: Path) -> list[str]:
    """Whole lines of a log; none where there is no such file."""
    if not path.exists():
        return []
    return [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n") and line.strip()
    ]


# ---------------------------------------------------------------------------------------------------- figures
def reward_and_success(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """Reward of the step's rollouts; success of the policy's own; greedy success on evaluation tasks."""
    columns = {"reward": "-", "success": "--", "eval_success": ":"}
    labels = {"reward": "reward", "success": "success, sampled", "eval_success": "success, greedy"}
    _overlay(axes, runs, columns, labels, SMOOTH)
    axes.set_ylabel(f"share of rollouts, mean of {SMOOTH} steps")
    axes.set_ylim(0, 1)


def message_states(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """Shares of message states: stacked for one run, unhealthy ones summed up for several."""
    if len(runs) == 1:
        steps, _ = runs[0].series("state_call")
        shares = [runs[0].series(f"state_{state}")[1] for state in STATE_COLORS]
        if steps:
            axes.stackplot(steps, shares, labels=list(STATE_COLORS), colors=list(STATE_COLORS.values()))
        axes.set_ylabel("share of messages")
    else:
        for i, run in enumerate(runs):
            steps = run.series("state_call")[0]
            parts = [run.series(f"state_{state}")[1] for state in UNHEALTHY_STATES]
            if steps:
                axes.plot(steps, [sum(values) for values in zip(*parts)], color=COLORS[i % 9], label=run.name)
        axes.set_ylabel("share of unhealthy messages")
    axes.set_ylim(0, 1)


def spurious(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """Probability of control tokens where they are certainly wrong."""
    _by_token(axes, runs, "spurious")
    axes.set_ylabel("spurious probability")
    axes.set_yscale("log")


def required(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """Missing probability of control tokens where they are next."""
    _by_token(axes, runs, "required", lambda p: max(1 - p, SPURIOUS_FLOOR))
    axes.set_ylabel("1 - required probability")
    axes.set_yscale("log")


def logit_gradients(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """Push on the logits of control tokens, added up over the steps: from where they were sampled (self) and
    from everywhere else (other). Of several runs the sum over tokens."""
    for i, run in enumerate(runs):
        pushes = {
            f"{token} {side}": run.details("logit_gradient", token, side)
            for token in run.tokens
            for side in SIDES
        }
        curves = {name: (steps, list(accumulate(values))) for name, (steps, values) in pushes.items()}
        if len(runs) == 1:
            most = max((abs(x) for _, values in curves.values() for x in values), default=0)
            for c, (name, (steps, values)) in enumerate(curves.items()):
                if values and max(map(abs, values)) > 0.02 * most:
                    axes.plot(steps, values, STYLES[c % 2], color=COLORS[c // 2 % 9], label=name)
            continue
        for k, side in enumerate(SIDES):
            parts = [curve for name, curve in curves.items() if name.endswith(side)]
            if parts:
                total = [sum(values) for values in zip(*(values for _, values in parts))]
                axes.plot(parts[0][0], total, STYLES[k], color=COLORS[i % 9], label=f"{run.name}, {side}")
    axes.axhline(0, color="#999999", linewidth=0.6)
    axes.set_ylabel("push on the logit, per sampled token, summed")


def divergence(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """KL from the start, entropy, and negative log-likelihood of control and content tokens."""
    names = {
        "kl": "KL from start",
        "entropy": "entropy",
        "nll_control": "NLL control",
        "nll_content": "NLL content",
    }
    _overlay(axes, runs, dict(zip(names, STYLES)), names)
    axes.set_ylabel("nats per token")
    axes.set_yscale("log")


def turn_survival(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """Share of rollouts that passed all of their first k turns, of tasks with so many."""
    for i, run in enumerate(runs):
        steps, curves = run.details("survival")
        for k in range(max(map(len, curves), default=0)):
            points = [(step, curve[k]) for step, curve in zip(steps, curves) if len(curve) > k]
            label = f"{k + 1} turn{'s' if k else ''}" if len(runs) == 1 else f"{run.name}, {k + 1}"
            style = {"color": COLORS[(k if len(runs) == 1 else i) % 9], "linestyle": STYLES[k % 4]}
            steps_of, shares = zip(*points)
            axes.plot(steps_of, smooth(shares, SMOOTH), label=label, **style)
    axes.set_ylabel(f"share that passed so many turns, mean of {SMOOTH} steps")
    axes.set_ylim(0, 1)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and those before it, `width` in all; fewer at the beginning."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _overlay(
    axes: Axes, runs: Sequence[RunFiles], columns: dict[str, str], labels: dict[str, str], width: int = 1
) -> None:
    """Columns of metrics.csv: a colour per column for one run, a colour per run for several. What every step
    has is smoothed over `width` steps."""
    for i, run in enumerate(runs):
        for k, (column, style) in enumerate(columns.items()):
            steps, values = run.series(column)
            values = smooth(values, width) if len(values) == len(run.metrics["step"]) else values
            if steps:
                label = labels[column] if len(runs) == 1 else f"{run.name}, {labels[column]}"
                axes.plot(steps, values, style, color=COLORS[(k if len(runs) == 1 else i) % 9], label=label)


def _by_token(
    axes: Axes, runs: Sequence[RunFiles], name: str, change: Callable[[float], float] = lambda p: p
) -> None:
    """A number of every control token, a colour each; of several runs the worst token, a colour per run."""
    for i, run in enumerate(runs):
        curves = {token: run.details("tokens", token, name) for token in run.tokens}
        curves = {token: (steps, [change(p) for p in ps]) for token, (steps, ps) in curves.items() if steps}
        if len(runs) > 1 and curves:
            worst = max(curves, key=lambda token: curves[token][1][-1])
            axes.plot(*curves[worst], color=COLORS[i % 9], label=f"{run.name}: {worst}")
            continue
        for c, (token, curve) in enumerate(curves.items()):
            axes.plot(*curve, STYLES[c // 5], color=COLORS[c % 9], label=token)


FIGURES: dict[str, Callable[[Axes, Sequence[RunFiles]], None]] = {
    "reward and success": reward_and_success,
    "message states": message_states,
    "spurious control tokens": spurious,
    "required control tokens": required,
    "logit gradients": logit_gradients,
    "divergence": divergence,
    "turn survival": turn_survival,
}


def draw(runs: Sequence[RunFiles], directory: Path) -> list[Path]:
    """Write every figure as PNG; returns their paths."""
    paths = []
    for title, figure in FIGURES.items():
        canvas, axes = plt.subplots(figsize=(5.5, 3.6))
        figure(axes, runs)
        axes.set_title(title)
        axes.set_xlabel("RL step")
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", integer=True)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            labels = [label.replace("$", r"\$") for label in labels]
            beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
            axes.legend(handles, labels, fontsize=7.5, ncols=1 + len(labels) // 15, **beside)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        paths.append(directory / f"{title.replace(' ', '_')}.png")
        canvas.savefig(paths[-1], dpi=110, bbox_inches="tight")
        plt.close(canvas)
    return paths


# ------------------------------------------------------------------------------------------------------- page
def rollouts_of(run: RunFiles, most_bytes: int) -> tuple[list[dict], dict[int, str], int]:
    """(steps for the viewer, vocabulary: id -> text, number of steps in the log). Steps are left out evenly,
    the first and the last stay, until the lines take at most `most_bytes`."""
    chat = chat_of(run)
    lines: dict[int, list[str]] = {}
    for line in whole_lines(run.path / "rollouts.jsonl"):
        lines.setdefault(json.loads(line)["step"], []).append(line)
    numbers = list(lines)
    size = sum(len(line) for step in lines.values() for line in step) // 2  # half of a line is not shown
    kept = max(2, int(len(numbers) * min(1.0, most_bytes / max(1, size))))
    if kept < len(numbers):
        numbers = [numbers[round(i * (len(numbers) - 1) / (kept - 1))] for i in range(kept)]
    steps, used = [], set()
    for number in numbers:
        groups: dict[int, dict] = {}
        for line in lines[number]:
            row = json.loads(line)
            group = groups.setdefault(row["group"], {"task": row["task_id"], "rollouts": []})
            group["rollouts"].append(_rollout(row, chat))
            used.update(row["tokens"])
        steps.append({"step": number, "groups": list(groups.values())})
    return steps, {token: chat.decode([token]) for token in sorted(used)}, len(lines)


def chat_of(run: RunFiles) -> Chat:
    """How the run's tokens read: of the model it began from, or where that is not on this machine, of the one
    it ended with."""
    try:
        return load_chat(run.config["model"])
    except ModelError as error:
        if not (run.path / "model").is_dir():
            raise
        print(f"{run.name}: its tokens are read with {run.path / 'model'}: {error}", file=sys.stderr)
        return load_chat(run.path / "model")


def _rollout(row: dict, chat: Chat) -> dict:
    """What the viewer shows of one trajectory."""
    verdicts = ["pass" if v["passed"] else f"fail: {v['reason']}" for v in row["verdicts"]]
    return {
        "tokens": row["tokens"],
        "mask": "".join(map(str, row["loss_mask"])),
        "logprobs": []
        if row["source"] == "oracle"
        else [None if x is None else round(x, 2) for x in row["logprobs"]],
        "reward": row["reward"],
        "advantage": row["advantage"],
        "source": row["source"],
        "verdicts": verdicts,
        "messages": messages_of(row["tokens"], row["loss_mask"], row["states"], chat),
    }


def messages_of(tokens: list[int], mask: list[int], states: list[str], chat: Chat) -> list[dict]:
    """Role, first and last token, and state of every message. A message begins where the layout wrote the
    token that begins one; one that a model sampled is its text."""
    begin = chat.special_ids[chat.layout.begin]
    starts = [t for t, (token, sampled) in enumerate(zip(tokens, mask)) if token == begin and not sampled]
    left, found = list(states), []
    for start, end in zip(starts, starts[1:] + [len(tokens)]):
        role, _, body = chat.decode(tokens[start + 1 : end]).partition(chat.layout.middle)
        from_tool = role == "ipython" or (role == "user" and body.startswith("<tool_response>"))
        role = "tool" if from_tool else role
        state = left.pop(0) if role == "assistant" and left else ""
        found.append({"role": role, "start": start, "end": end, "state": state})
    return found


def build(runs: Sequence[RunFiles], directory: Path) -> Path:
    """Write figures and report.html into a directory; returns the page's path."""
    figures = draw(runs, directory)
    share, shown, notes = MOST_BYTES // len(runs), [], []
    for run in tqdm(runs, "rollouts", unit="run", leave=False, disable=None):
        try:
            steps, vocabulary, total = rollouts_of(run, share)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            log = run.path / "rollouts.jsonl"
            raise Unreadable(f"{log} cannot be read: {type(error).__name__}: {error}") from None
        shown.append({"name": run.name, "steps": steps, "vocabulary": vocabulary})
        notes.append(f"{run.name}: {len(steps)} of the {total} logged steps" if len(steps) < total else "")
    sampled = "; ".join(filter(None, notes))
    data = {
        "title": " and ".join(run.name for run in runs),
        "summary": [["run", *SUMMARY.values()], *([run.name, *summary(run)] for run in runs)],
        "sampled": f"Shown are {sampled}: the log is longer than a page should be." if sampled else "",
        "figures": [
            {"title": path.stem.replace("_", " "), "png": base64.b64encode(path.read_bytes()).decode()}
            for path in figures
        ],
        "runs": shown,
    }
    page = directory / "report.html"
    page.write_text(page_of(TEMPLATE.read_text(encoding="utf-8"), data), encoding="utf-8")
    return page


# --------------------------------------------------------------------------------------------------- terminal
SUMMARY = {
    "success": "success, sampled",
    "eval_success": "success, greedy",
    "kl": "KL",
    "nll_control": "NLL control",
    "nll_content": "NLL content",
    "spurious_growth": "largest spike",
}


def summary(run: RunFiles) -> list[str]:
    """First and last value of the columns of SUMMARY."""
    cells = []
    for column in SUMMARY:
        values = run.series(column)[1]
        cells.append(f"{values[0]:.3g} to {values[-1]:.3g}" if values else "-")
    return cells


def spark(values: Sequence[float], width: int = 24) -> str:
    """A line of blocks: values between their least and their largest, averaged down to `width`."""
    if not values:
        return ""
    n = min(width, len(values))
    cuts = [values[len(values) * i // n : max(len(values) * (i + 1) // n, 1)] for i in range(n)]
    means = [sum(cut) / len(cut) for cut in cuts]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(SPARKS[min(7, int(8 * (x - low) / span))] for x in means)


def screen(runs: Sequence[RunFiles]) -> str:
    """One screen about the runs, for people without a browser."""
    lines = []
    for run in runs:
        steps = run.metrics["step"]
        head = f"{run.name}: {run.config['scheme']}, {len(steps)} steps"
        lines.append(f"{head:<44}{'first':>8} {'last':>8}  [least, most]")
        columns = {"reward": "reward", **SUMMARY} | {f"state_{s}": s for s in MESSAGE_STATES}
        for column, label in columns.items():
            values = run.series(column)[1]
            if values and (not column.startswith("state_") or max(values) > 0.005):
                ends = f"{values[0]:>8.3g} {values[-1]:>8.3g}  [{min(values):.2g}, {max(values):.2g}]"
                lines.append(f"  {label:<17}{spark(values):<25}{ends}")
        last = next((line["tokens"] for line in reversed(run.probes) if "tokens" in line), {})
        worst = sorted(last, key=lambda token: -(last[token].get("growth") or 0))[:2]
        if worst:
            said = ", ".join(f"{token} x{last[token].get('growth') or 0:.1f}" for token in worst)
            lines.append(f"  spikes at the end: {said}")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, or 2 when refused."""
    parser = argparse.ArgumentParser(
        prog="python -m nanotoolrl.report",
        description="Figures, a page and a summary of runs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory; several: compared")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN/report of the first)")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(path) for path in args.runs]
        tell_apart(runs)
        directory = args.out or args.runs[0] / "report"
        directory.mkdir(parents=True, exist_ok=True)
        page, text = build(runs, directory), screen(runs)
    except (Unreadable, ModelError, OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:  # logs that somebody changed
        print(
            f"report: a log does not read as one of a run: {type(error).__name__}: {error}", file=sys.stderr
        )
        return 2
    print(text)
    print(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB); figures: {directory}/*.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
