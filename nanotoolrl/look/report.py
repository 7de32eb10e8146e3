"""A run, or several compared, to look at: `python -m nanotoolrl.report RUN [RUN ...]`.

Reads what a run directory holds (config.json, metrics.csv, probes.jsonl, rollouts.jsonl) and writes
report.html, one file that needs no network, and the figures as PNG. The terminal gets one screen with
sparklines.
"""

import argparse
import base64
import json
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from nanotoolrl.calls import MESSAGE_STATES
from nanotoolrl.chat import Chat
from nanotoolrl.cli import command, number, progress
from nanotoolrl.loading import ModelError, load_chat
from nanotoolrl.look.metrics import FIRST, LAST
from nanotoolrl.look.runfiles import RunFiles, Unreadable, logged_lines, read_run, tell_apart
from nanotoolrl.look.viewer import TEMPLATE, page_of

MEGABYTES = 14.0  # of rollouts in the page; together with figures it stays under 20
SPARKS = "▁▂▃▄▅▆▇█"


# ------------------------------------------------------------------------------------------------------- page
def rollouts_of(run: RunFiles, most_bytes: int) -> tuple[list[dict], dict[int, str], int]:
    """(steps for the viewer, vocabulary: id -> text, number of steps in the log). Steps are left out evenly,
    the first and the last stay, until the lines take at most `most_bytes`."""
    chat = chat_of(run)
    lines: dict[int, list[str]] = {}
    for line in logged_lines(run.path / "rollouts.jsonl"):
        lines.setdefault(json.loads(line)["step"], []).append(line)
    numbers = list(lines)
    size = sum(len(line) for step in lines.values() for line in step) // 2  # half of a line is not shown
    kept = max(2, int(len(numbers) * min(1.0, most_bytes / max(1, size))))
    if kept < len(numbers):
        numbers = [numbers[round(i * (len(numbers) - 1) / (kept - 1))] for i in range(kept)]
    steps = []
    used = set()
    for step in numbers:
        groups: dict[int, dict] = {}
        for line in lines[step]:
            row = json.loads(line)
            group = groups.setdefault(row["group"], {"task": row["task_id"], "rollouts": []})
            group["rollouts"].append(_rollout(row, chat))
            used.update(row["tokens"])
        steps.append({"step": step, "groups": list(groups.values())})
    return steps, {token: chat.decode([token]) for token in sorted(used)}, len(lines)


def chat_of(run: RunFiles) -> Chat:
    """How the run's tokens read: of the model it began from, or where that is not on this machine, of the one
    it ended with."""
    try:
        return load_chat(run.config["model"], run.config.get("chat_template", "auto"))
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
    left = list(states)
    found = []
    for start, end in zip(starts, starts[1:] + [len(tokens)]):
        role, _, body = chat.decode(tokens[start + 1 : end]).partition(chat.layout.middle)
        from_tool = role == "ipython" or (role == "user" and body.startswith("<tool_response>"))
        role = "tool" if from_tool else role
        state = left.pop(0) if role == "assistant" and left else ""
        found.append({"role": role, "start": start, "end": end, "state": state})
    return found


def build(runs: Sequence[RunFiles], directory: Path, megabytes: float = MEGABYTES) -> Path:
    """Write figures and report.html into a directory; returns the page's path. megabytes: of rollouts, of all
    runs together."""
    from nanotoolrl.look.figures import about, draw  # matplotlib, for this alone

    figures = draw(runs, directory)
    share = int(1e6 * megabytes) // len(runs)
    shown = []
    notes = []
    for run in progress(runs, "rollouts", unit="run"):
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
        "summary": [
            ["run", *SUMMARY.values(), "the scheme's own"],
            *([run.name, *summary(run)] for run in runs),
        ],
        "sampled": f"Shown are {sampled}: the log is longer than a page should be." if sampled else "",
        "figures": [
            {"title": title, "about": about(title), "png": base64.b64encode(path.read_bytes()).decode()}
            for path in figures
            for title in [path.stem.replace("_", " ")]
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
    """First and last value of the columns of SUMMARY, and of those that the scheme declares."""
    cells = []
    for column in SUMMARY:
        values = run.series(column)[1]
        cells.append(f"{values[0]:.3g} to {values[-1]:.3g}" if values else "-")
    counted = {name: run.series(name)[1] for name in own_metrics(run)}
    own = ", ".join(f"{name} {values[0]:.3g} to {values[-1]:.3g}" for name, values in counted.items())
    return [*cells, own or "-"]


def own_metrics(run: RunFiles) -> list[str]:
    """The measured columns that the run's scheme declares."""
    return [name for name in run.metrics if name not in FIRST | LAST and run.series(name)[1]]


def spark(values: Sequence[float], width: int = 24) -> str:
    """A line of blocks: values between their least and their largest, averaged down to `width`."""
    if not values:
        return ""
    n = min(width, len(values))
    cuts = [values[len(values) * i // n : max(len(values) * (i + 1) // n, 1)] for i in range(n)]
    means = [sum(cut) / len(cut) for cut in cuts]
    low = min(means)
    span = (max(means) - min(means)) or 1.0
    return "".join(SPARKS[min(7, int(8 * (x - low) / span))] for x in means)


def has_screen() -> bool:
    """Whether a browser could have a window: a browser of the terminal would take the terminal."""
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def screen(runs: Sequence[RunFiles]) -> str:
    """One screen about the runs, for people without a browser."""
    lines = []
    for run in runs:
        steps = run.metrics["step"]
        head = f"{run.name}: {run.config['scheme']}, {len(steps)} steps"
        lines.append(f"{head:<44}{'first':>8} {'last':>8}  [least, most]")
        columns = {"reward": "reward", **SUMMARY} | {f"state_{s}": s for s in MESSAGE_STATES}
        columns |= {name: name for name in own_metrics(run)}
        for column, label in columns.items():
            values = run.series(column)[1]
            if values and (not column.startswith("state_") or max(values) > 0.005):
                ends = f"{values[0]:>8.3g} {values[-1]:>8.3g}  [{min(values):.2g}, {max(values):.2g}]"
                lines.append(f"  {label:<17} {spark(values):<24} {ends}")
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
    parser.add_argument(
        "--megabytes",
        type=number(float, above=0, most=1000),
        default=MEGABYTES,
        help="of rollouts in the page, the steps left out evenly (default: %(default)s)",
    )
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(path) for path in args.runs]
        tell_apart(runs)
        directory = args.out or args.runs[0] / "report"
        directory.mkdir(parents=True, exist_ok=True)
        page = build(runs, directory, args.megabytes)
        text = screen(runs)
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
    if args.open and not (has_screen() and webbrowser.open(page.resolve().as_uri())):
        print(f"There is no browser to show it here: open {page} in one.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
