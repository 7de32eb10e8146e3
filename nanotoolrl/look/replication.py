"""docs/results.md, what replicates and what does not: `python -m nanotoolrl.look.replication` prints it.

Everything on the page that can change with a study is made from its table in data/results.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill

from nanotoolrl.cli import printer
from nanotoolrl.look.arms import Row, heading, line_of, numbers, read_arms, shown, spread_of
from nanotoolrl.look.intervals import Share
from nanotoolrl.look.results import changed, finished, measured, pooled, tables, written
from nanotoolrl.look.studies import STUDIES

RESULTS = Path(__file__).resolve().parent.parent.parent / "data" / "results"
Arms = Mapping[str, Sequence[Row]]

PAGE = """# What replicates, and what does not

```console
python -m nanotoolrl.study main --grid 100      # every method, five seeds; resumable; --seeds 2 makes two
python -m nanotoolrl.study lr --known data/results/lr.csv       # only the runs that a table lacks
python -m nanotoolrl.look.results runs/main/main.csv --figure rescue.png        # tables and figure of yours
python -m nanotoolrl.look.replication           # this page, from data/results
```

The setting is `--preset rescue`: the one of [one collapse](2-one-collapse.md), for 24 steps. Bad rollouts
spare control tokens (`--guard 1`) in every method but `exact`, so `grpo` here is GRPO with that break, and
`exact` is GRPO. Signals that are interleaved make their burst of SFT between rounds of four steps, five
bursts in all: a run ends where it has been without help the longest. Every setting of a method of `main` is
its scheme's default; none was chosen on `test`. `ets-held` and `guard-kl` (last section) were picked by what
two seeds of them did there. The base model stopped training by its success on `test`
(`data/nano/README.md`), which flatters the untrained model a little.

Success is greedy, in %, on 200 tasks of `test`; in the tables of formats on 100 of `test` and 100 of `ood`,
hence other numbers for one model. Intervals are for other tasks (clustered by index) and, where there is more
than one seed, for other seeds. A change is from the untrained model, in points, paired
by task. Collapsed: below a quarter of success before, the doctor's rule. Fell: sampled success, the mean of
two steps, below a quarter of its best. The two can differ: the first is of greedy success on unseen tasks,
the second of sampled success on those trained on. Sampled at the end: over the last 640 rollouts, whose
tasks each run of `main` has seen once before, and whose ground truth its SFT may have shown; beside it what
the untrained model is expected to show on the same tasks. Runs of `grpo` and `exact` begin as those of the
[dose](why.md) did with the same seeds: one collapse, seen twice.

![Sampled success over steps, every seed thin, their mean thick](../data/figures/rescue.png)

## What was run

Minutes are of one thread, of what is finished, evaluations not counted: `main` takes about {hours:.0f}
hours on 2 cores, and its grids half as long again.

{studies}

## Claim by claim

Out of distribution, changes are in points from the untrained model, on tasks of other domains (`ood`). A cell
is a method in a format that it did not train; it counts if its interval lies below 0.

{claims}

## Every method

{main}

The paper's numbers are averages of its Table 1, of one seed, without intervals. Its untrained models solve
3.5 and 12.5 % where ours solves 35, so there is less to gain here.

## Other formats and other tasks

{ood}

{others}## What this does not say

- The collapse is made by sparing control tokens: `exact` has none. Whether the paper's runs had this break
  is not shown.
- The base model was trained with about one message in a hundred `bare`, and as many in each other unhealthy
  state (`data/nano/README.md`): the collapse makes likelier what is there already.
- A base model of a million parameters has seen all three formats and all tools: "out of distribution" is
  out of that of reinforcement learning.
- Methods differ in how many tokens SFT shows; the column says how many.
"""
# The studies of the page, in its order: (its name, a heading, what is asked).
OTHERS = (
    (
        "other-base",
        "Another base",
        "The methods of `main`, from a base of another seed (`--model data/nano-s1`).",
    ),
    (
        "schedule",
        "Synchronous or interleaved",
        "A signal in every update, or in bursts; its references are in the last section.",
    ),
    (
        "lr",
        "Learning rates",
        "Two orders around the preset's 2e-4, of RL and of SFT; the references are in the last section.",
    ),
    (
        "ablate",
        "What else prevents a fall",
        "`grpo` (of the last section) with other settings, or another signal. `cispo` and `gspo` are to be "
        "compared with `updates3`. `hpt` made the run that `ets-sync` is.",
    ),
    (
        "both",
        "In distribution and out of it",
        "Is there a setting that keeps success, here, in other formats and on other tasks? No loss is seen "
        "of a method if none of its seeds falls and no interval in its line lies below 0; how large a loss "
        "that leaves open is in the intervals. It is said of three seeds or more, played in all formats. "
        "Candidates have two seeds; `ets-held` and `guard-kl`, whose first two were promising, got five, on "
        "the same tasks, and the first two count.",
    ),
)


def page() -> str:
    """The whole page."""
    main = arms_of("main")
    made = list(tables(main))
    minutes = [x for rows in main.values() for x in numbers(rows, "minutes")]
    others = [
        section(name, about, text) for name, about, text in OTHERS if (RESULTS / f"{name}.csv").exists()
    ]
    return PAGE.format(
        studies=studies_table(),
        hours=sum(minutes) / len(minutes) * len(STUDIES["main"]) / 60 / 2,
        claims=claims_table(main),
        main=made[0],
        ood="\n\n".join(made[1:]) or "Not measured yet.",
        others="".join(others),
    )


def arms_of(name: str) -> dict[str, list[Row]]:
    """The finished runs of a committed table, by arm; {} where there is none."""
    path = RESULTS / f"{name}.csv"
    return finished(read_arms(path)) if path.exists() else {}


def studies_table() -> str:
    """A line per study: how much of it is there."""
    lines = heading(
        ["study", "runs", "of", "seeds of a method", "minutes a run", "threads, versions, machine"]
    )
    for name in ("main", *(name for name, *_ in OTHERS)):
        arms = {arm: rows for arm, rows in arms_of(name).items() if arm != "untrained"}
        rows = [row for found in arms.values() for row in found]
        minutes, made = numbers(rows, "minutes"), sorted({str(row["made_with"]) for row in rows})
        cells = [
            f"`{name}`",
            len(rows),
            len(STUDIES[name]),
            spread_of([len(found) for found in arms.values()]),
        ]
        lines.append(
            line_of([*cells, f"{sum(minutes) / len(minutes):.0f}" if minutes else "", "; ".join(made)])
        )
    return "\n".join(lines)


def section(name: str, title: str, about: str) -> str:
    """A study of its own: its tables, and a blank line behind."""
    arms = arms_of(name)
    look = LOOK if any(len(rows) == 1 for arm, rows in arms.items() if arm != "untrained") else ""
    answer = [kept_table(arms)] if name == "both" else []
    text = fill(about + HALVED + look, 110, break_on_hyphens=False)
    return "\n\n".join([f"## {title}", text, *answer, *tables(arms)]) + "\n\n"


def kept_table(arms: Arms) -> str:
    """A line per method but the two that it is compared with: what it gains and what it keeps."""
    ways = {f"{way} {tasks}": f"{way} on `{tasks}`" for way, tasks in KEPT}
    heads = ["method", "seeds", "fell", "sampled, from untrained", "greedy, from `ets`", "from `prs`"]
    lines = heading([*heads, "seeds in all formats", *ways.values(), "so"])
    for arm, rows in arms.items():
        if arm in ("ets", "prs", "untrained"):
            continue
        ends = [numbers([row], "sampled_end") + numbers([row], "null_end") for row in rows]
        gain = [pair[0] - pair[1] for pair in ends if len(pair) == 2]
        beside = [changed(arms, arm, "closing", other) for other in ("ets", "prs")]
        found = [changed(arms, arm, way) for way in ways]
        cells = [f"`{arm}`", len(rows), len(numbers(rows, "fall")), shown(gain, 100, 0)]
        cells += [*(written(one, "+") for one in beside), measured(rows)]
        lines.append(line_of([*cells, *(written(one, "+") for one in found), kept(rows, [*beside, *found])]))
    return "\n".join(lines)


def kept(rows: Sequence[Row], found: Sequence[Share | None]) -> str:
    """What can be said of a method: whether it falls, and whether one of these changes lies below 0."""
    if len(rows) >= ENOUGH and numbers(rows, "fall"):
        return "it falls"
    if measured(rows) < ENOUGH or None in found:
        return "open"
    return "it loses" if any(one.high < 0 for one in found if one) else "no loss is seen"


def claims_table(arms: Arms) -> str:
    """A line per claim of the paper: what became of it."""
    other = arms_of("other-base")
    return "\n".join(
        [*heading(["the paper", "here", "counted"]), *map(line_of, claims(arms, arms_of("both"), other))]
    )


def claims(arms: Arms, half: Arms, other: Arms) -> Iterator[tuple[str, str, str]]:
    """(the claim, what became of it, what is counted and measured of it). half: arms of `both`; other: of
    `other-base`."""
    every, none = (
        all(share(found, name) == each for found in (arms, other) if name in found)
        for name, each in (("grpo", 1), ("exact", 0))
    )
    yield (
        "RL alone collapses",
        "not if trained as sampled; with the break it does" if every and none else MIXED,
        f"collapsed: {collapsed(arms, 'exact', 'grpo')} seeds; `grpo`, in which bad rollouts spare control "
        f"tokens, falls at step {falls(arms, 'grpo')}{elsewhere(other, 'exact', 'grpo')}",
    )
    before = ("sft_rl", "sft_rl-foreign")
    yield (
        "SFT before RL prevents it (Qwen2.5), or does not (Qwen3)",
        "it does not" if share(arms, *before) == 1 else MIXED,
        f"collapsed: {collapsed(arms, *before)}, falling at step {falls(arms, *before)}; `sft_rl` began at "
        f"{sampled(arms, 'sft_rl', 'start')} sampled",
    )
    yield (
        "Off-policy rollouts and hints do not prevent it",
        "they do not" if share(arms, "ops", "hint") == 1 else MIXED,
        f"collapsed: {collapsed(arms, 'ops', 'hint')}; falling at step {falls(arms, 'ops', 'hint')}"
        f"{elsewhere(other, 'ops', 'hint')}",
    )
    ends = ", ".join(f"`{name}` {sampled(arms, name)}" for name in ("ets", "prs", "grpo"))
    rows = [row for found in (arms, half, other) for name in ("ets", "prs") for row in found.get(name, ())]
    yield (
        "SFT on failures or on reflections, interleaved, does",
        "no run falls" if every and not numbers(rows, "fall") else MIXED,
        f"fell: {fell(arms, 'ets', 'prs')}; with half the rollouts {fell(half, 'ets', 'prs')}"
        f"{elsewhere(other, 'ets', 'prs')}. Collapsed: {collapsed(arms, 'ets', 'prs')}. Sampled success at "
        f"the end, on the tasks trained on: {ends}. Greedy on `test`: {greedy(arms, 'ets', 'prs')}",
    )
    gain = changed(arms, "ets", "closing", "bursts")
    yield (
        "RL gains from it",
        "open" if gain is None else side(gain, "it does", "no: with the break it costs", "open"),
        f"SFT without RL: {collapsed(arms, 'bursts')} collapsed, greedy {greedy(arms, 'bursts')}; RL between "
        f"the bursts, `ets` less `bursts`: {written(gain, '+')} points. Beginning anew without SFT: "
        f"{collapsed(arms, 'restart')} collapsed",
    )
    yield (
        "The skill stands behind the broken format",
        cells(arms, "grpo", so="less of it at the end"),
        cost(arms, "grpo"),
    )
    yield (
        "SFT alone costs accuracy out of distribution",
        cells(arms, "sft", "sft-foreign"),
        cost(arms, "sft", "sft-foreign"),
    )
    yield (
        "Interleaving costs accuracy out of distribution, too",
        cells(arms, "ets", "prs"),
        f"{cost(arms, 'ets', 'prs')}; without RL, {cost(arms, 'bursts')}",
    )


HALVED = " All with half the rollouts a step (`--prompts 8`)."
LOOK = " Of some methods there is one seed so far, whose intervals are for other tasks: a look, not a claim."
# What a method may lose: its own format on other tasks, other formats on both.
KEPT = (("hermes", "ood"), *((way, tasks) for tasks in ("ood", "test") for way in ("python", "xml")))
ENOUGH = 3  # seeds to say anything of a method
MIXED = "it depends on the seed or the method"


def share(arms: Arms, *names: str) -> float:
    """Of all seeds of these methods, those that collapsed."""
    found = [x for name in names for x in numbers(arms[name], "collapsed")]
    return sum(found) / len(found)


def cells(arms: Arms, *names: str, so: str = "it does") -> str:
    """In how many foreign formats on foreign tasks these methods are below the untrained model."""
    costs = [changed(arms, name, f"{way} ood") for name in names for way in ("python", "xml")]
    worse = [side(found, "", so, "") for found in costs if found]
    return f"{so}, in {sum(map(bool, worse))} of {len(worse)} cells" if worse else "open"


def side(found: Share, above: str, below: str, between: str) -> str:
    """One of three words: an interval above 0, below 0, or around it."""
    return above if found.low > 0 else below if found.high < 0 else between


def collapsed(arms: Arms, *names: str) -> str:
    """How many seeds of each method. Example: "`grpo` 5 of 5, `ets` 0 of 5"."""
    return ", ".join(
        f"`{name}` {sum(numbers(arms[name], 'collapsed')):.0f} of {len(arms[name])}" for name in names
    )


def fell(arms: Arms, *names: str) -> str:
    """How many runs of each method. Example: "`grpo` 5 of 5, `ets` 0 of 5"."""
    return ", ".join(
        f"`{name}` {len(numbers(arms[name], 'fall'))} of {len(arms[name])}" for name in names if name in arms
    )


def elsewhere(other: Arms, *names: str) -> str:
    """What is added of the runs of these methods from another base; "" where there is none."""
    found = fell(other, *names)
    return f". From another base, with half the rollouts, fell: {found}" if found else ""


def falls(arms: Arms, *names: str) -> str:
    """The steps at which runs of these methods fell."""
    return spread_of([step for name in names for step in numbers(arms[name], "fall")])


def sampled(arms: Arms, name: str, when: str = "end") -> str:
    """Sampled success over 640 rollouts, with its interval over seeds."""
    return f"{shown(numbers(arms[name], f'sampled_{when}'), 100, 0)} %"


def greedy(arms: Arms, *names: str) -> str:
    """Greedy success of each, with its interval."""
    return ", ".join(f"`{name}` {written(pooled(arms[name], 'closing'))}" for name in names)


def cost(arms: Arms, *names: str) -> str:
    """What became of other formats on other tasks, in points from the untrained model, of these methods."""
    if not any(row.get("digits python ood") for row in arms[names[0]]):
        return "not measured yet"
    return "; ".join(
        f"`{name}` in python {written(changed(arms, name, 'python ood'), '+')}, in xml "
        f"{written(changed(arms, name, 'xml ood'), '+')}, in its own format "
        f"{written(changed(arms, name, 'hermes ood'), '+')}"
        for name in names
    )


main = printer(
    "nanotoolrl.look.replication", "Print docs/results.md, what replicates and what does not.", page
)


if __name__ == "__main__":
    sys.exit(main())
