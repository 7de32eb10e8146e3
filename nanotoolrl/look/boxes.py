"""docs/3-signals.md, a box for every scheme: `python -m nanotoolrl.look.boxes` prints it.

What a scheme is comes from the registry and from its docstring, what became of it from the committed studies.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nanotoolrl.cli import printer
from nanotoolrl.config import SETTINGS, flag
from nanotoolrl.look.arms import Row, numbers, percent, read_arms, spread_of
from nanotoolrl.look.results import START, changed, finished, pooled, written
from nanotoolrl.schemes import Scheme
from nanotoolrl.signals import SCHEMES

RESULTS = Path(__file__).resolve().parent.parent.parent / "data" / "results"
STUDIES = ("main", "ablate", "both")  # tables in which a method may be

PAGE = """# 3. Signals

Who supervises, and how: each scheme by its idea, its equation, where it comes from and what we do otherwise,
what it logs, and what became of it where GRPO collapses. The text of a box is the docstring of the
function, so the page is what `python -m nanotoolrl.look.boxes` prints. Results are those of
`--preset rescue`, in which bad rollouts spare control tokens, `grpo` included: greedy success in % of 200
`test` tasks, with an interval for other tasks and other seeds, and the change from the untrained model,
paired by task; [what replicates](results.md) says what they mean. Collapsed: at the end below a quarter of
success before. Fell: sampled success was below a quarter of its best on the way. A run can do one without the
other. A box without a result waits for its study.

A = (R - mean R) / (std R + 1e-6) is the advantage of a rollout, r the ratio of the probability of one of its
tokens to that at sampling. [Schedules, judges and settings that go with any of them](schemes.md) are on their
own page; [add your own](6-add-your-own.md) shows how to write one.

{contents}

{boxes}
"""


def page(schemes: Mapping[str, Scheme] = SCHEMES) -> str:
    """The whole page."""
    arms = known_arms()
    contents = " · ".join(f"[{name}](#{name})" for name in schemes)
    boxes = "\n\n".join(box(scheme, arms) for scheme in schemes.values())
    return PAGE.format(contents="\n".join(textwrap.wrap(contents, 118)), boxes=boxes)


def known_arms() -> dict[str, list[Row]]:
    """The arms of all committed studies of methods, and the untrained model."""
    found: dict[str, list[Row]] = {}
    for name in STUDIES:
        if (RESULTS / f"{name}.csv").exists():
            found = read_arms(RESULTS / f"{name}.csv") | found
    return found


def box(scheme: Scheme, arms: Mapping[str, Sequence[Row]]) -> str:
    """What is to be said of one scheme, as Markdown."""
    text = inspect.getdoc(scheme.step) or ""
    lines = [
        f"## {scheme.name}",
        "",
        f"**{scheme.about}**",
        "",
        text,
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {said} |" for name, said in facts(scheme, arms) if said]
    return "\n".join(lines)


def facts(scheme: Scheme, arms: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, str]]:
    """The rows of its table; those about which there is nothing to say are empty."""
    yield "source", scheme.source
    yield "run it", f"`python train.py {flags_of(scheme.name, arms)}`"
    shared = [name for name in scheme.settings if sum(name in one.settings for one in SCHEMES.values()) > 1]
    own = [f"`{flag(name)}` {SETTINGS[name].about}" for name in scheme.settings if name not in shared]
    yield "its settings", "; ".join(own)
    yield "shared with others", ", ".join(f"`{flag(name)}`" for name in shared)
    yield "schedules", ", ".join(f"`{name}`" for name in scheme.schedules)
    yield "is grpo at", ", ".join(f"`{flag(name)} {value:g}`" for name, value in scheme.neutral.items())
    yield "logs", "; ".join(f"`{name}` {about}" for name, (_, about) in scheme.metrics.items())
    yield "result", outcome(scheme.name, arms)


def flags_of(name: str, arms: Mapping[str, Sequence[Row]]) -> str:
    """Those that made the result, or would."""
    rows = finished(arms).get(name)
    return re.sub(r" --seed \d+", "", rows[0]["flags"]) if rows else f"--scheme {name} --preset rescue"


def outcome(name: str, arms: Mapping[str, Sequence[Row]]) -> str:
    """What became of the runs of a method."""
    rows = finished(arms).get(name, [])
    if not rows:
        return ""
    falls = numbers(rows, "fall")
    fell = f", {len(falls)} fell at step {spread_of(falls)}" if falls else ""
    collapsed = f"{sum(numbers(rows, 'collapsed')):.0f} of {len(rows)} seeds collapsed{fell}"
    change = written(changed({**arms, name: rows}, name, "closing"), "+")
    since = f", change {change}" if change and START in arms else ""
    sampled = numbers(rows, "sampled_end")
    held = f"; sampled at the end {percent(sum(sampled) / len(sampled)):.0f} %" if sampled else ""
    return f"{collapsed}; {written(pooled(rows, 'closing'))}{since}{held}"


main = printer("nanotoolrl.look.boxes", "Print docs/3-signals.md, a box for every scheme.", page)


if __name__ == "__main__":
    sys.exit(main())
