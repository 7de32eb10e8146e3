"""The figures of a report: one function each, for one run or several."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanotoolrl.calls import UNHEALTHY_STATES
from nanotoolrl.look.falls import RISE, fall_of, mean_and_error, onset_of, pushes_up_to
from nanotoolrl.look.runfiles import RunFiles
from nanotoolrl.places import CLASSES
from nanotoolrl.probes import SPURIOUS_FLOOR

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
SMOOTH = 5  # steps over which rewards are averaged


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


def token_classes(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """Change since the start of the negative log-likelihood of each class of ground-truth tokens; a mark
    where it has its onset."""
    for i, run in enumerate(runs):
        for k, name in enumerate(CLASSES):
            steps, values = run.series(f"nll_{name}")
            if not steps:
                continue
            color = COLORS[(k if len(runs) == 1 else i) % 9]
            label = name if len(runs) == 1 else f"{run.name}, {name}"
            changes = [value - values[0] for value in values]
            axes.plot(steps, changes, STYLES[k % 4], color=color, label=label)
            onset = onset_of(steps, values)
            if onset is not None:
                axes.plot([onset], [changes[steps.index(onset)]], "v", color=color, markersize=8)
    axes.set_ylabel("NLL above the start, nats; ▾ onset")
    axes.set_yscale("symlog", linthresh=RISE)


def net_push(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """Net push on the logit of each control token by place in the message, for one run: the mean over the
    steps up to the fall, with two standard errors. For several runs the sum over places of the three tokens
    that are pushed most. It is that of RL: SFT, which may push back, is not counted."""
    names: list[str] = []
    for i, run in enumerate(runs):
        series = pushes_before_fall(run)
        rows = [(f"{token} {place}", values) for (token, place), values in series.items()]
        if len(runs) > 1:
            of_token = {token: [v for (one, _), v in series.items() if one == token] for token in run.tokens}
            rows = [(token, [sum(values) for values in zip(*parts)]) for token, parts in of_token.items()]
        found = [(name, *mean_and_error(values)) for name, values in rows if len(values) > 1]
        found = sorted(found, key=lambda row: -abs(row[1]))[: 12 if len(runs) == 1 else 3]
        label = "mean ± 2 standard errors" if len(runs) == 1 else run.name
        at = range(len(names), len(names) + len(found))
        errors = [2 * error for _, _, error in found]
        middles = [middle for _, middle, _ in found]
        axes.plot(middles, at, "o", color=COLORS[i % 9], label=label)
        axes.errorbar(middles, at, xerr=errors, fmt="none", color=COLORS[i % 9], capsize=2)
        names += [name.replace("$", r"\$") for name, _, _ in found]
    axes.axvline(0, color="#999999", linewidth=0.6)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylabel("token and place" if len(runs) == 1 else "token")
    axes.invert_yaxis()


def bias_force(axes: Axes, runs: Sequence[RunFiles]) -> None:
    """The force of the policy loss on one bias per control token, the sum over all places: from good and from
    bad rollouts, and their net force, added up over the steps up to the fall."""
    marks = {"from good rollouts": "^", "from bad ones": "v", "net": "o"}
    for i, run in enumerate(runs):
        kept = pushes_up_to(run, fall_step(run))
        forces: list[list[float]] = []
        for token in run.tokens:
            pairs = [tokens.get(token, (0, 0)) for places in kept for tokens in places.values()]
            good, bad = (sum(pair[sign] for pair in pairs) for sign in (0, 1))
            forces.append([good, bad, good + bad])
        for k, (name, mark) in enumerate(marks.items()):
            label = name if len(runs) == 1 else f"{run.name}, {name}"
            at = [place + 0.15 * (k - 1) for place in range(len(forces))]
            color = COLORS[(k if len(runs) == 1 else i) % 9]
            axes.plot(at, [row[k] for row in forces], mark, color=color, label=label, markersize=5)
        axes.set_xticks(range(len(run.tokens)), [t.replace("$", r"\$") for t in run.tokens], rotation=40)
    axes.axhline(0, color="#999999", linewidth=0.6)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel("push on the logit, summed over steps")


def pushes_before_fall(run: RunFiles) -> dict[tuple[str, str], list[float]]:
    """The net push on each (control token, place) in every step up to the fall, else in all, in
    thousandths."""
    kept = pushes_up_to(run, fall_step(run))
    places = list(dict.fromkeys(place for one in kept for place in one))
    return {
        (token, place): [1000 * sum(one.get(place, {}).get(token, (0, 0))) for one in kept]
        for token in run.tokens
        for place in places
    }


def fall_step(run: RunFiles) -> int | None:
    """The step of the run's fall, if it fell."""
    return fall_of(run.series("success")[1])


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
    "net push": net_push,
    "bias force": bias_force,
    "divergence": divergence,
    "token classes": token_classes,
    "turn survival": turn_survival,
}


# Of figures that are not over steps.
XLABELS = {"net push": "net push, thousandths a step, up to the fall", "bias force": ""}


def about(title: str) -> str:
    """What a figure shows, in words: the docstring of its function."""
    return " ".join((FIGURES[title].__doc__ or "").split())


def draw(runs: Sequence[RunFiles], directory: Path) -> list[Path]:
    """Write every figure as PNG; returns their paths."""
    paths = []
    for title, figure in FIGURES.items():
        canvas = Figure(figsize=(5.5, 3.6))
        axes = canvas.subplots()
        with matplotlib.rc_context({"lines.marker": ".", "lines.markersize": 4}):  # a single step is a point
            figure(axes, runs)
        axes.set_title(title)
        axes.set_xlabel(XLABELS.get(title, "RL step"))
        axes.grid(alpha=0.3)
        if title not in XLABELS:
            axes.locator_params(axis="x", integer=True)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            labels = [label.replace("$", r"\$") for label in labels]
            beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
            axes.legend(handles, labels, fontsize=7.5, ncols=1 + len(labels) // 15, **beside)
        elif not axes.has_data():
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        paths.append(directory / f"{title.replace(' ', '_')}.png")
        canvas.savefig(paths[-1], dpi=110, bbox_inches="tight")
    return paths
