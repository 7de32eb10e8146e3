"""The promises of README.md and docs/: examples run, numbers come from data/results, names exist."""

import argparse
import ast
import csv
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from bench.command import goals
from bench.measure import markdown
from bench.memory import RANK, memory_table
from bench.parity import Parity
from bench.parts import Parts, parts_table
from bench.steps import slopes_table
from nanotoolrl import calls, commandline, env
from nanotoolrl.calls import FORMATS, message_state, parse_calls, render_calls
from nanotoolrl.commandline import parse
from nanotoolrl.look import boxes, replication, studies
from nanotoolrl.look.arms import falls_table, numbers, read_arms, shown, spread_of, table_of
from nanotoolrl.look.doctor import COLLAPSED
from nanotoolrl.look.evaluate import Scores, states_table, table
from nanotoolrl.look.falls import HEALTHY, WINDOW, fall_of, means
from nanotoolrl.look.figures import FIGURES
from nanotoolrl.look.metrics import metrics, metrics_page
from nanotoolrl.look.replication import cells, fell
from nanotoolrl.look.results import changed, courses, finished, pooled, written
from nanotoolrl.look.rows import null_of
from nanotoolrl.schemes import Scheme
from nanotoolrl.signals import SCHEMES
from nanotoolrl.world.observe import call_tool
from nanotoolrl.world.tasks import load_tasks

ROOT = Path(train.__file__).parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README, COLLAPSE, SPEED = (PAGES[name] for name in ("README.md", "docs/noise-collapse.md", "docs/speed.md"))
START = PAGES["docs/start.md"]
WHY = PAGES["docs/why.md"]
ADDED = "docs/6-add-your-own.md"  # its commands run in a copy that has what the page adds
RESULTS = ROOT / "data" / "results"
COLLAPSE_STATES = ("call", "reply", "malformed", "polluted", "overlong", "bare")
# What a test adds to a command, where the command does not say otherwise: a run in seconds.
SMALL = "--preset smoke --steps 1 --eval-count 0 --prompts 2 --group 2 --probe-tasks 2 --max-messages 4"
SMALL += " --threads 1 --show-every 0"


def blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """The parts of a page by their headings of the second order."""
    return dict(part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])


# -------------------------------------------------------------------------------------- commands on the pages
def commands(text: str) -> list[str]:
    """What a page tells to type: the lines of its console blocks, and what is in backticks and begins like a
    command. `&&` begins another one; comments and redirections are left out."""
    found = [line for block in blocks("console", text) for line in block.splitlines()]
    found += re.findall(r"`(python [^`]+)`", text)
    parts = [part.strip() for line in found for part in re.sub(r"\s#.*", "", line).split(" && ")]
    return [re.sub(r" >\S+$", "", part) for part in parts]


def split(command: str) -> tuple[str, list[str]]:
    """(program, arguments) of a command that runs Python: a script, a module, or "-c"; else ("", [])."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        first = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[first], words[first + 1 :]
    if words[0] != "python":
        return "", []
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1], words[2:]


COMMANDS = {
    command: split(command)
    for name, text in PAGES.items()
    for command in commands(text)
    if name != ADDED and split(command)[0]
}


class Parsed(BaseException):
    """A parser has read its arguments: the command has done enough."""


def parser_of(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of a command, which has accepted the arguments; nothing else of the command has run."""
    read, heard = argparse.ArgumentParser.parse_args, []

    def parse_and_stop(self, argv=None, namespace=None):
        heard.append(self)
        read(self, argv, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(Parsed):
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=False)
    return heard[-1]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_page_is_accepted_by_its_parser(command, monkeypatch, capsys, pytestconfig):
    program, arguments = COMMANDS[command]
    markers = pytestconfig.getini("markers")
    if program == "-c":
        compile(arguments[0], command, "exec")
    elif program == "pytest":
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert set(given) <= {"-m", "-n"}  # the latter is xdist's
        assert "-m" not in given or any(one.startswith(f"{given['-m']}:") for one in markers)
    elif program == "train.py":
        try:
            parse(arguments)
        except SystemExit as stop:  # --list
            assert stop.code == 0, capsys.readouterr().err
    else:
        parser_of(program, arguments, monkeypatch)


def run(command: list[str], cwd: Path, home: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a command of the tree at `home` with another working directory."""
    program = [str(home / command[0]), *command[1:]] if command[0].endswith(".py") else command
    environment = os.environ | {"PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"}
    how = {"cwd": cwd, "env": environment, "stdin": subprocess.DEVNULL, "timeout": 600}
    return subprocess.run([sys.executable, *program], capture_output=True, text=True, **how)


def succeeds(command: list[str], cwd: Path, home: Path = ROOT) -> str:
    """Run a command that must succeed; its output."""
    done = run(command, cwd, home)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


def cheap(program: str, arguments: list[str]) -> bool:
    """Whether a command takes seconds and needs no more than what is committed."""
    if {"--list", "--help"} & {*arguments} or program == "nanotoolrl.look.metrics":
        return True
    if program == "sample.py":
        return "--model" not in arguments
    return "--export" in arguments and not any(word.startswith("bfcl:") for word in arguments)


# What a page shows of the output of a command: from the first message of a user on, whole.
SHOWN = dict(
    re.findall(r"in `(python [^`]+)`:\n\n```text\n(?:.*?\n)??( +user \| .*?)```", README, re.M | re.S)
)
CHEAP = [command for command, (program, arguments) in COMMANDS.items() if cheap(program, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("command", CHEAP)
def test_a_cheap_command_on_a_page_runs(command, tmp_path):
    said = succeeds(shlex.split(command)[1:], tmp_path)
    assert said
    assert said.endswith(SHOWN.get(command, ""))
    program, arguments = COMMANDS[command]
    if "--list" in arguments:
        assert all(re.search(rf"^{name} ", said, re.MULTILINE) for name in SCHEMES)
    if "--export" in arguments:
        exported = (tmp_path / arguments[arguments.index("--export") + 1]).read_text(encoding="utf-8")
        name = arguments[arguments.index("--tasks") + 1]
        assert [json.loads(line)["extra_info"]["id"] for line in exported.splitlines()] == [
            task.id for task in load_tasks(name)
        ]


def test_every_kind_of_cheap_command_is_on_a_page():
    kinds = {(COMMANDS[command][0], *(x for x in COMMANDS[command][1] if x[:2] == "--")) for command in CHEAP}
    assert {("sample.py",), ("train.py", "--list")} <= kinds
    assert any("--export" in kind for kind in kinds)
    assert SHOWN and set(SHOWN) <= set(CHEAP)


def test_the_two_commands_stand_where_ci_looks():
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python train.py --scheme hint" in lines
    assert (
        "pip install -r requirements.txt pytest pytest-xdist hypothesis && python -m pytest -n auto" in lines
    )


# ----------------------------------------------------------------------------------------- names on the pages
@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_on_a_page_exist(name):
    text = PAGES[name]
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / name).parent.joinpath(target).exists(), target
    new = set(re.findall(r"here `([\w.]+)`", text))
    for path in re.findall(r"`((?:nanotoolrl|bench|data|docs|tests)/[\w./-]*|[\w-]+\.py)`", text):
        assert (ROOT / path).exists() or path in new, path
    for module in re.findall(r"-m (nanotoolrl[.\w]*\w|bench)", text):
        assert importlib.util.find_spec(module), module


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_flags_on_the_pages_exist(monkeypatch):
    """In one of the commands on the pages, or in the settings of an example."""
    known = {"--index-url", "--no-deps"}  # of pip
    known |= {"--nproc", "--shutdown-timeout"}  # of torchrun; the first with _per_node
    for program, arguments in dict(COMMANDS.values()).items():
        if program in ("train.py", "pytest", "-c"):
            continue
        with monkeypatch.context() as patch:
            parser = parser_of(program, arguments, patch)
        known |= {name for action in parser._actions for name in action.option_strings}
    known |= {name for action in commandline.command_line()._actions for name in action.option_strings}
    examples = re.findall(r'settings=\{"(\w+)"', PAGES[ADDED])
    known |= {"--" + name.replace("_", "-") for name in examples}
    for name, text in PAGES.items():
        assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known, name


def test_the_reading_order_names_every_part_of_the_core():
    names = set(re.findall(r"[\w.]+/?", blocks("text", sections(README)["Read in this order"])[0]))
    doors = {"bench", "evaluate", "report", "study", "tasks"}  # old names of commands
    parts = [path for path in (ROOT / "nanotoolrl").iterdir() if not path.name.startswith("__")]
    for part in parts:
        name = f"{part.name}{'/' if part.is_dir() else ''}"
        assert name in names or part.stem in doors, name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


# ----------------------------------------------------------------------------- numbers from committed results
def default_runs(kind: str) -> dict[int, Path]:
    """The committed runs of the default command by seed: `hint`, or `no-hint`, which is without one."""
    paths = (RESULTS / "first" / kind).glob("seed*/config.json")
    return {seed: path for path in paths for seed in [json.loads(path.read_text())["seed"]]}


def stored_scores(path: Path) -> dict[str, Scores]:
    """The scores that `evaluate --json` wrote."""
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return {name: Scores(**values) for name, values in scores.items()}


def first_table(kind: str) -> str:
    """Markdown: what the runs of the default command ended with, a row for each seed."""
    lines = []
    for seed, path in sorted(default_runs(kind).items()):
        result = json.loads((path.parent / "result.json").read_text(encoding="utf-8"))
        cells = [str(seed)]
        for way in result["before"]:
            before, after = (Scores(**result[when][way]) for when in ("before", "after"))
            change = after.since(before)
            moved = f"{100 * change.share:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
            cells.append(f"{100 * before.success:.1f} to {100 * after.success:.1f}: {moved}")
        lines.append(f"| {' | '.join(cells)} |")
    header = f"| seed | {' | '.join(result['before'])} |"
    return "\n".join([header, "|---" * len(cells) + "|", *lines])


# ---------------------------------------------------------------------------------- the collapse of structure
WORDS = ("none", "one", "two", "three", "four", "five")


def dose_arms() -> dict:
    """The arms of the committed study of the dose."""
    return read_arms(RESULTS / "dose.csv")


def span(values, digits=1) -> str:
    """Example: "0.0 to 1.0"; a single number where both are alike."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def claims() -> list[str]:
    """README's first table: what broke from the study of the dose, what helped from that of the methods."""
    arms, methods = dose_arms(), rescue_arms()
    half, other = replication.arms_of("both"), replication.arms_of("other-base")
    exact, spike = arms["guard0"], arms["guard1"]
    falls = numbers(spike, "fall")
    gain = [100 * x for x in numbers(spike, "above_null")]
    first = [
        row["onset_structure"] and float(row["onset_structure"]) < float(row["onset_value"] or "inf")
        for row in spike
    ]
    never = sum(not row["onset_value"] for row in spike)

    def of(way):
        return span([100 * x for x in numbers(spike, f"judged {way}")])

    def before(way):
        return f"{100 * numbers(spike, f'before {way}')[0]:.1f}"

    rows = {
        "RL alone collapses: success falls abruptly, the call structure breaks": (
            f"plain GRPO: {len(numbers(exact, 'fall'))} of {len(exact)} seeds in 20 steps. If bad rollouts "
            f"cannot lower control tokens (`--preset spike`): {len(falls)} of {len(spike)}, at step "
            f"{spread_of(falls)}, from half of its best in {slides(methods['grpo'])} steps"
        ),
        "it gains or holds first": (
            f"no gain: {span(gain)} points from an untrained model in the first ten steps; where nothing is "
            f"spared, {span([100 * x for x in numbers(exact, 'above_null')])}"
        ),
        'a few control tokens break first (`<tool_call>`, `{"`, `<\\|im_end\\|>`)': (
            "openers of replies first, spared or not; in calls, structure before values in "
            f"{sum(map(bool, first))} of {len(spike)} seeds, and values never in {never} of them"
        ),
        "the skill stays intact behind the broken format": (
            f"at the fall the trained format solves {of('hermes')} % ({before('hermes')} before), with all "
            f"given but the values in calls {of('forced skeleton')} ({before('forced skeleton')}), in python "
            f"{of('python')} ({before('python')}), in xml {of('xml')} ({before('xml')})"
        ),
        "SFT on failures or on reflections, interleaved with RL, rescues a run": (
            f"fell: {fell(methods, 'grpo', 'ets', 'prs')}; with half the rollouts "
            f"{fell(half, 'grpo', 'ets', 'prs')}; so from another base "
            f"{fell(other, 'exact', 'grpo', 'ets', 'prs')}. RL (which spares) between the bursts of SFT "
            f"costs: `ets` less `bursts` {written(changed(methods, 'ets', 'closing', 'bursts'), '+')} points"
        ),
        "hints and off-policy rollouts do not": f"fell: {fell(methods, 'hint', 'ops')}",
        "interleaving costs accuracy out of distribution": (
            f"{cells(methods, 'ets', 'prs')} of other formats: `prs` in python "
            f"{written(changed(methods, 'prs', 'python ood'), '+')} points. In its own format `ets` "
            f"{written(changed(methods, 'ets', 'hermes ood'), '+')}, but without RL (`bursts`) "
            f"{written(changed(methods, 'bursts', 'hermes ood'), '+')}"
        ),
        "(not the paper's) a rescue with fewer of these costs": held(half),
    }
    return [f"| {claim} | {found} |" for claim, found in rows.items()]


def slides(rows) -> str:
    """How many steps before their falls runs were last at half of their best or above it, as means of two."""
    found = []
    for row in rows:
        before = means(courses([row])[0])[: int(row["fall"]) - WINDOW]
        found.append(len(before) - max(i for i, value in enumerate(before) if value >= HEALTHY * max(before)))
    return span(found, 0)


def held(arms) -> str:
    """What became of `guard-kl`, with half the rollouts."""
    rows, since = arms["guard-kl"], written(changed(arms, "guard-kl", "closing", "ets"), "+")
    ends = [f"{shown(numbers(rows, name), 100, 0)} %" for name in ("sampled_end", "null_end")]
    return (
        "`guard-kl`, a KL term that holds control tokens alone to the start, with half the rollouts, chosen "
        "after two of its seeds: fell "
        f"{len(numbers(rows, 'fall'))} of {len(rows)}; sampled success {ends[0]}, untrained {ends[1]}, plain "
        f"GRPO {shown(numbers(arms['exact'], 'sampled_end'), 100, 0)} %; "
        f"greedy, from `ets`, {since}. Of five cells of other formats or tasks it loses in "
        f"{losses(arms, 'guard-kl')}; `ets` with it and more SFT, in all formats (`ets-held`), in "
        f"{losses(arms, 'ets-held')}"
    )


def losses(arms, name) -> str:
    """How many of the cells in which a method may lose have an interval below 0, and which."""
    changes = {way: changed(arms, name, " ".join(way)) for way in replication.KEPT}
    lost = {way: found for way, found in changes.items() if found.high < 0}
    said = ", ".join(f"{way} on `{tasks}` {written(found, '+')}" for (way, tasks), found in lost.items())
    return f"{len(lost)} ({said})" if lost else "none"


def kept(rows, ways) -> str:
    """What is left, in % of the start's, over runs and ways of playing."""
    shares = [
        100 * float(row[f"judged {way}"]) / float(row[f"before {way}"])
        for row in rows
        for way in ways
        if row.get(f"judged {way}")
    ]
    return span(shares, 0)


def falls_text() -> str:
    """What docs/why.md says below the table of falls."""
    spike = dose_arms()["guard1"]

    def left(way):
        return span([100 * x for x in numbers(spike, f"left {way}")], 0)

    replies = span([100 * x for x in numbers(spike, "replies")], 0)
    return (
        "In each of these runs structure is what broke, and the skill stands behind it. A message whose "
        "structure the run writes, with the words of the untrained model, solves "
        f"{left('its structure')} % of what that one solves; "
        f"the reverse {left('its values')} %. With all but the values in calls given a run solves "
        f"{kept(spike, ['forced skeleton'])} % of what the untrained model does so, in a foreign format "
        f"{kept(spike, ['python', 'xml'])} %: its turns do not end there either. The forced prefix alone "
        f"brings back little, {kept(spike, ['forced prefix'])} %: what broke are the ends of bodies, calls "
        f"and turns more than the opener. Of its messages {replies} % are replies, "
        f"{100 * numbers(spike, 'before replies')[0]:.0f} % before: it calls on where it should answer."
    )


def predictions() -> list[str]:
    """The rows of the table of predictions that the dose decides."""
    arms = dose_arms()
    falls = ", ".join(str(len(numbers(rows, "fall"))) for rows in arms.values())
    stop = [shown(numbers(rows, "net <|im_end|>"), 1, 2) for rows in arms.values()]
    tag = shown(numbers(arms["guard0"], "net <tool_call>"), 1, 2)
    fell = [row for rows in arms.values() for row in rows if row["fall"]]
    before = sum(
        bool(row["onset_structure"]) and float(row["onset_structure"]) < float(row["onset_value"] or "inf")
        for row in fell
    )
    none = sum(not row["onset_structure"] for row in fell)
    spike = arms["guard1"]
    broke = sum(row["lost"] == "structure" for row in spike)
    rows = {
        "Trained exactly as sampled, structure has no coherent push, and nothing collapses": (
            f"held but for `<tool_call>`: no fall in {len(arms['guard0'])} seeds; the push on the stop token "
            f"is {stop[0]}, on `<tool_call>` {tag}: calling pays"
        ),
        "The push grows with the dose": f"held: on the stop token {'; '.join(stop)}",
        "Runs fall where the push is coherent, and in its measure": (
            f"held in order: {falls} of {len(spike)} seeds by dose, the earlier the larger; a threshold, not "
            "a proportion"
        ),
        "Structure goes first": (
            f"held among the tokens of calls: of {len(fell)} runs that fell, structure has its onset before "
            f"values in {before}, has none yet in {none}, and has it after values in "
            f"{len(fell) - before - none}. Openers of replies rise first, but do so in the exact arm, too"
        ),
        "The skill stands behind the broken structure": (
            f"held: in {broke} of {len(spike)} seeds of the full dose structure is lost and values are not"
        ),
    }
    return [f"| {what} | {found} |" for what, found in rows.items()]


def test_what_the_page_says_of_the_falls_and_the_predictions():
    assert falls_text() in " ".join(WHY.split()), falls_text()
    for line in predictions():
        assert line in WHY, line
    for name in ("roundtrip", "roundtrip-parts", "mismatch", "regime", "spared"):
        assert f"`{name}`" in WHY and name in studies.STUDIES


def test_the_claims_are_counted_in_the_committed_results():
    for line in claims():
        assert line in README, line


def test_the_tables_of_the_dose_are_made_from_the_committed_study():
    arms = dose_arms()
    assert [row["run"] for rows in zip(*arms.values()) for row in rows] == list(studies.STUDIES["dose"])
    assert table_of(arms) in WHY, table_of(arms)
    rows = [row for found in arms.values() for row in found]
    assert falls_table(rows) in WHY, falls_table(rows)


def test_what_the_page_says_of_the_null():
    spans = {arm: span([100 * x for x in numbers(rows, "above_null")]) for arm, rows in dose_arms().items()}
    said = f"{spans['guard0']} points above it without a guard, {spans['guard1']} with all of it"
    assert said in " ".join(WHY.split())


def test_the_transcripts_are_the_committed_ones():
    """Before: a test runs the command. At the fall: what it printed of the run that the page names."""
    for path in (RESULTS / "dose").glob("transcript-*.txt"):
        text = path.read_text(encoding="utf-8")
        assert f"```text\n{text[text.index('     user |') :]}```" in README, path.name


# ------------------------------------------------------------------------------------------------- the rescue
def rescue_arms() -> dict:
    """The arms of the committed study of the methods."""
    return finished(read_arms(RESULTS / "main.csv"))


def rescued() -> list[str]:
    """README's table of five methods in the setting that collapses."""
    arms, lines = rescue_arms(), []
    for name in ("exact", "grpo", "hint", "ops", "ets", "prs", "bursts"):
        rows = arms[name]
        falls = numbers(rows, "fall")
        fell = f"{len(falls)} of {len(rows)}" + (f", at step {spread_of(falls)}" if falls else "")
        ends = [f"{shown(numbers(rows, 'sampled_end'), 100, 0)}", written(pooled(rows, "closing"))]
        lines.append(f"| {' | '.join([f'`{name}`', fell, *ends])} |")
    return lines


def test_the_table_of_collapse_and_rescue_is_made_from_the_committed_study():
    arms = rescue_arms()
    assert "\n".join(rescued()) in README, "\n".join(rescued())
    null = shown(numbers(arms["grpo"], "null_end"), 100, 0)
    start = f"Untrained: sampled {null}, greedy {written(pooled(arms['untrained'], 'closing'))}."
    assert start in " ".join(README.split()), start


def test_hpt_made_the_run_that_ets_sync_is():
    hpt, sync = (read_arms(RESULTS / f"{name}.csv") for name in ("ablate", "schedule"))
    for one, other in zip(hpt["hpt"], sync["ets-sync"]):
        assert one["course"] == other["course"] and "run that `ets-sync` is" in PAGES["docs/results.md"]


def test_the_page_of_what_replicates_is_what_its_command_prints():
    assert PAGES["docs/results.md"] == replication.page()


@pytest.mark.parametrize("name", ["main", *(name for name, *_ in replication.OTHERS)])
def test_committed_runs_of_methods_are_of_the_present_studies(name):
    arms = replication.arms_of(name)
    flags = {row["run"]: row["flags"] for rows in arms.values() for row in rows if row["flags"]}
    assert flags == {run: studies.STUDIES[name][run] for run in flags}
    assert (RESULTS / f"{name}.csv").exists() == bool(flags)


# ----------------------------------------------------------------------------------------------- one collapse
def test_the_excerpts_of_one_collapse_are_from_its_transcripts():
    """Each a run of whole lines of a file that the page names."""
    found = [path.read_text(encoding="utf-8") for path in (RESULTS / "spike").glob("step-*.txt")]
    shown = [block for block in blocks("text", PAGES["docs/2-one-collapse.md"]) if "assistant |" in block]
    assert len(shown) == 4
    for block in shown:
        assert any(f"\n{block}" in text for text in found), block


def test_what_the_page_of_one_collapse_says():
    text = " ".join(PAGES["docs/2-one-collapse.md"].split())
    with (RESULTS / "spike" / "metrics.csv").open() as file:
        steps = list(csv.DictReader(file))
    success = [float(row["success"]) for row in steps]
    assert fall_of(success) == 14 and "falls below a quarter of its best at step 14" in text
    slide = [f"{share:.2f}".removeprefix("0") for share in success[10:15]]
    assert f"{slide[0]} in step 11, {', '.join(slide[1:])} in step 15; then nothing" in text
    assert max(success[15:]) < 0.02
    assert sum(int(row["contrast_groups"]) for row in steps[-5:]) == 1
    assert "one group with contrast in the last five steps" in text
    row = dose_arms()["guard1"][0]
    left, before = (100 * float(row[f"{when} forced skeleton"]) for when in ("judged", "before"))
    assert f"with all but the values in calls given: {left:.1f} % of 400 tasks, {before:.1f} before" in text
    probes = [json.loads(line) for line in (RESULTS / "spike" / "probes.jsonl").read_text().splitlines()]
    tag = {line["step"]: line["tokens"]["<tool_call>"]["start_reply"] for line in probes}
    assert f"the tag where a reply is due, {tag[0]:.2f} to {tag[14]:.2f};".replace("0.", ".") in text


def test_what_the_page_of_the_noise_collapse_says():
    """Four of five seeds by the doctor's rule; by how much sampled success rises, and an untrained model's
    would; which tokens have lost more nats where success has halved."""
    with (RESULTS / "collapse.csv").open() as file:
        seeds = list(csv.DictReader(file))
    fell = [float(row["greedy_after"]) < COLLAPSED * float(row["greedy_before"]) for row in seeds]
    assert sum(fell) == 4 and "Four of five seeds collapse by the doctor's rule" in COLLAPSE
    ours, nulls, above = [], [], []
    for row in seeds:
        settings = {"scheme": "grpo", "prompts": 4, "group": 8, "seed": int(row["run"][4:])}
        null = null_of(settings, 100)
        means = [sum(null[i : i + 20]) / 20 for i in range(81)]
        ours.append(float(row["sampled_best"]) - float(row["sampled_start"]))
        nulls.append(max(means) - means[0])
        above.append(float(row["sampled_best"]) - max(means))
    text = " ".join(COLLAPSE.split())
    assert f"by {100 * min(ours):.0f} to {100 * max(ours):.0f} points over that" in text
    assert f"in the same order, by {100 * min(nulls):.0f} to {100 * max(nulls):.0f}:" in text
    better = [x for x in above if x > 0]
    said = f"{WORDS[len(better)]} of five seeds, by {100 * min(better):.0f} to {100 * max(better):.0f} points"
    assert said in text
    with (RESULTS / "dose.csv").open() as file:
        start = next(csv.DictReader(file))
    lost = {
        kind: [(float(row[f"halved_nll_{kind}"]) - 1) * float(start[f"start_nll_{kind}"]) for row in seeds]
        for kind in ("control", "content")
    }
    first = [round(a, 2) > round(b, 2) for a, b in zip(lost["control"], lost["content"])]
    assert first == [False, True, False, False, False]
    assert f"in seed 2 both have lost {lost['control'][2]:.2f}" in text
    assert all(f"{float(start[f'start_nll_{kind}']):.3f}" in text for kind in lost)


@pytest.mark.parametrize("kind", ["hint", "no-hint"])
def test_the_tables_of_the_default_run_are_made_from_its_committed_runs(kind):
    assert first_table(kind) in START, first_table(kind)
    seeds = sorted(default_runs(kind))
    assert seeds == list(range(len(seeds))) and len(seeds) > 2


def test_the_table_of_what_was_tried_is_the_committed_one():
    with (RESULTS / "first_search.csv").open() as file:
        tried = [f"| `{flags}` | {step} | {on} | {best} |" for flags, step, on, best in csv.reader(file)][1:]
    assert len(tried) > 5 and "\n".join(tried) in START
    for line in tried:
        parse(line.split("`")[1].split())


def test_what_the_page_says_of_the_default_run():
    """How often sampled success has doubled on the tasks trained on, and the worst and best of each."""
    ends = [json.loads((path.parent / "result.json").read_text()) for path in default_runs("hint").values()]
    moved = {
        way: [(Scores(**end["before"][way]).success, Scores(**end["after"][way]).success) for end in ends]
        for way in ends[0]["before"]
    }
    trained = [after / before for before, after in moved["trained on, sampled"]]
    assert min(trained) >= 2 and f"{min(trained):.1f} to {max(trained):.1f} times" in START
    assert f"each of {('three', 'four', 'five')[len(ends) - 3]} seeds" in START
    changes = [100 * (after - before) for before, after in moved["held out, sampled"]]
    assert f"between {min(changes):+.1f} and {max(changes):+.1f} points" in START
    assert all(after >= before for before, after in moved["trained on, greedy"])
    greedy = [Scores(**end["after"]["held out, greedy"]) for end in ends]
    drops = [one.since(Scores(**end["before"]["held out, greedy"])) for one, end in zip(greedy, ends)]
    low, high = (100 * bound(drop.share for drop in drops) for bound in (min, max))
    assert f"by {low:+.1f} to {high:+.1f}" in START
    sampled = f"{min(changes):+.0f} to {max(changes):+.0f}"
    told = f"in five seeds: sampled success {sampled} points, greedy {low:.0f} to {high:.0f}."
    assert f"on unseen tasks, {told}" in README
    assert all(drop.low <= 0 <= drop.high for drop in drops) and "no greedy change excludes 0" in START
    gains = [
        Scores(**end["after"]["held out, sampled"]).since(Scores(**end["before"]["held out, sampled"]))
        for end in ends
    ]
    assert sum(gain.low > 0 for gain in gains) == 2 and "Two of the former exclude 0" in " ".join(
        START.split()
    )


def test_the_goals_and_what_was_measured_are_those_of_the_committed_results():
    results = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "bench").glob("*.json")}
    assert goals(results) in SPEED, goals(results)


def test_the_speed_tables_are_made_from_the_committed_results():
    for path in sorted((RESULTS / "bench").glob("*.json")):
        result = json.loads(path.read_text())
        if "parity" in result:
            assert str(Parity(**result["parity"])) in SPEED
            continue
        if "parts" in result:
            assert parts_table([Parts(**one) for one in result["parts"]]) in SPEED
        else:
            assert markdown(result) in SPEED
        if "slopes" in result:
            assert slopes_table(result["slopes"]) in SPEED
        assert result["command"] == f"python -m nanotoolrl.bench {path.stem}"


def test_the_memory_table_is_made_by_its_command():
    assert memory_table() in PAGES["docs/real-models.md"]


def test_the_memory_table_of_adapters_is_made_by_its_command():
    pytest.importorskip("peft", reason="adapters are those of the package peft")
    assert f"--lora {RANK}" in PAGES["docs/real-models.md"]
    assert memory_table(RANK) in PAGES["docs/real-models.md"]


def test_the_page_of_signals_is_what_its_command_prints():
    """Of the schemes that are known here: one that somebody just adds needs no box."""
    assert PAGES["docs/3-signals.md"] == boxes.page(listed())
    assert boxes.page() == boxes.page(SCHEMES)


def test_the_table_of_the_collapse_is_made_from_the_committed_study():
    with (RESULTS / "collapse.csv").open() as file:
        seeds = list(csv.DictReader(file))
    assert [row["run"] for row in seeds] == list(studies.STUDIES["collapse"])
    for row in seeds:
        greedy = [f"{100 * float(row[f'greedy_{when}']):.1f}" for when in ("before", "best", "after")]
        ratios = [
            f"{float(row[f'{when}nll_control']):.1f} / {float(row[f'{when}nll_content']):.1f}"
            for when in ("halved_", "")
        ]
        shares = [f"{100 * float(row[f'end_{state}']):.0f}" for state in COLLAPSE_STATES]
        cells = [row["run"][4:], *greedy, row["halved_step"], *ratios]
        cells += [f"{float(row['spike']):.0f} `{row['spike_token']}`", *shares]
        assert f"| {' | '.join(cells)} |" in COLLAPSE, " | ".join(cells)


def test_the_formats_after_the_collapse_are_those_of_the_committed_scores():
    def shown(share):
        return f"{100 * share[0]:.1f} [{100 * share[1]:.1f}, {100 * share[2]:.1f}]"

    def line(name, success):
        cells = [shown(success[key]) for key in ("hermes", "forced prefix", "python", "xml")]
        return f"| {name} | {' | '.join(cells)} |"

    def scores(name):
        return {format: one.of("all") for format, one in stored_scores(home / f"{name}.json").items()}

    home = RESULTS / "collapse"
    for name in studies.STUDIES["collapse"]:
        if (home / f"doctor-{name}.json").exists():
            doctor = json.loads((home / f"doctor-{name}.json").read_text())
            assert line("before", doctor["reference"]["success"]) in COLLAPSE
            success = doctor["model"]["success"]
        else:
            success = scores(f"formats-{name}") | {"forced prefix": scores(f"forced-{name}")["hermes"]}
        assert line(name[4:], success) in COLLAPSE
        assert all(share[3] == 400 for share in success.values())


def test_the_search_is_whole():
    """Every run of the study has a row in the committed table."""
    with (RESULTS / "collapse_search.csv").open() as file:
        assert {row["run"] for row in csv.DictReader(file)} == set(studies.COLLAPSE_SEARCH)


def test_the_model_card_is_made_from_the_committed_scores():
    card = (ROOT / "data" / "nano" / "README.md").read_text()
    for path in sorted((RESULTS / "base").glob("*.json")):
        columns = stored_scores(path)
        assert table(columns) in card
        assert states_table(columns) in card or path.stem != "sampled"
        assert f"--json data/results/base/{path.name}`" in card


def test_committed_runs_are_whole_and_made_with_the_present_defaults():
    runs = {}
    for kind, flags in {"hint": "", "no-hint": "--hint-count 0"}.items():
        runs |= {path.parent: f"--seed {seed} {flags}" for seed, path in default_runs(kind).items()}
    for folder, flags in runs.items():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == list(range(1, config["steps"] + 1))
        now = vars(parse(flags.split())[0])
        same = set(now) & set(config) - {"out", "threads", "show_every"}  # others came later
        assert {key: config[key] for key in same} == {key: now[key] for key in same}
        assert (folder / "result.json").exists()


# ------------------------------------------------------------------------------------------------ the metrics
def test_the_page_of_metrics_is_what_its_command_prints():
    """Of the schemes that are known here: one that somebody just adds needs no page."""
    assert PAGES["docs/metrics.md"] == metrics_page(listed())
    assert listed() and metrics_page(SCHEMES) == metrics_page()


def listed() -> dict[str, Scheme]:
    """The schemes that a study of methods runs."""
    flags = [flags for name in boxes.STUDIES for flags in studies.STUDIES[name].values()]
    run = {re.search(r"--scheme (\S+)", one).group(1) for one in flags}
    return {name: scheme for name, scheme in SCHEMES.items() if name in run}


def test_every_metric_is_explained():
    """With its unit and its line, and with the schemes that declare it."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", PAGES["docs/metrics.md"], re.MULTILINE)
    explained = {name: (unit, about) for name, unit, about, _ in rows}
    assert explained == {name: tuple(metric) for name, metric in metrics(listed()).items()}
    owners = {name: set(re.findall(r"`([\w-]+)`", schemes)) for name, _, _, schemes in rows}
    for scheme in listed().values():
        assert {name for name in owners if scheme.name in owners[name]} == set(scheme.metrics)


# ----------------------------------------------------------------------------------------------- add your own
ADD = sections(PAGES[ADDED])
MORE = ("A scheme", "A signal")


def example(title: str) -> tuple[str, str]:
    """(file, code) of a section: lines for the end of a file that is there, or a new file."""
    (code,) = blocks("python", ADD[title])
    if at := re.search(r"\bend of `([\w/.]+)`", re.sub(r"\s+", " ", ADD[title])):
        return at[1], code
    folder, name = re.search(r"`([\w/]+/)`, here `([\w.]+)`", ADD[title]).groups()
    return folder + name, code


def copied(path: Path, *titles: str) -> Path:
    """A copy of what runs need, with what these sections add; nothing else in it is changed."""
    for part in ("nanotoolrl", "data/tasks", "data/nano"):
        shutil.copytree(ROOT / part, path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("train.py", "sample.py"):
        shutil.copy(ROOT / part, path)
    for title in titles:
        name, code = example(title)
        before = (path / name).read_text(encoding="utf-8") + "\n\n" if (path / name).exists() else ""
        (path / name).write_text(before + code, encoding="utf-8")
    altered = [
        one.relative_to(path).as_posix()
        for one in path.rglob("*")
        if one.is_file() and not same(one, ROOT / one.relative_to(path))
    ]
    assert sorted(altered) == sorted(example(title)[0] for title in titles)
    return path


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same."""
    return other.exists() and one.read_bytes() == other.read_bytes()


def lines_of(title: str) -> list[list[str]]:
    """The commands of a section, made small: without `python`, and what trains writes into `run`."""
    found = []
    for block in blocks("console", ADD[title]):
        for command in block.splitlines():
            words = shlex.split(command)[1:]
            if words[0] == "train.py" and "--list" not in words:
                for flag, value in re.findall(r"(--\S+) (\S+)", SMALL):
                    words += [] if flag in words else [flag, value]
                words += ["--out", "run"]
            found.append(words)
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names_in(code: str) -> tuple[str, list[str]]:
    """(name of the function, names of the metrics in its decorator)."""
    (function,) = ast.parse(code).body
    declared = {keyword.arg: keyword.value for keyword in function.decorator_list[0].keywords}
    return function.name, list(ast.literal_eval(declared["metrics"]))


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """A copy of the project with a scheme and a signal more."""
    return copied(tmp_path_factory.mktemp("both") / "copy", *MORE)


@pytest.mark.slow
def test_a_scheme_and_a_signal_are_listed(both, tmp_path):
    said = succeeds(["train.py", "--list"], tmp_path, both)
    added = {names_in(example(title)[1])[0] for title in MORE}
    assert added.isdisjoint(SCHEMES)
    assert all(re.search(rf"^{name} ", said, re.MULTILINE) for name in (*SCHEMES, *added))
    page = succeeds(["-m", "nanotoolrl.look.metrics"], tmp_path, both)
    new = set(page.splitlines()) ^ set(metrics_page().splitlines())
    added = {name for title in MORE for name in names_in(example(title)[1])[1]}
    assert {re.match(r"\| `(\w+)`", line)[1] for line in new} == added != set()


@pytest.mark.slow
@pytest.mark.parametrize("title", MORE)
def test_a_scheme_or_a_signal_takes_nothing_but_its_lines(title, both, tmp_path):
    """It runs, its metric is a column, its run goes on and is reported on."""
    name, (metric,) = names_in(example(title)[1])
    (command,) = [words for words in lines_of(title) if "--list" not in words]
    assert command[command.index("--scheme") + 1] == name
    succeeds(command, tmp_path, both)
    assert [float(row[metric]) >= 0 for row in rows_of(tmp_path / "run")] == [True]
    succeeds([*command, "--steps", "2", "--resume"], tmp_path, both)
    assert [float(row[metric]) >= 0 for row in rows_of(tmp_path / "run")] == [True, True]
    said = succeeds(["-m", "nanotoolrl.report", "run", "--out", "page"], tmp_path, both)
    assert "page: page/report.html" in said
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        "report.html",
        *(f"{title.replace(' ', '_')}.png" for title in FIGURES),
    }


@pytest.mark.slow
def test_a_metric_that_is_not_declared_is_refused_by_name(tmp_path):
    home = copied(tmp_path / "copy", "A scheme")
    (said,) = blocks("text", ADD["A metric"])
    name, (metric,) = names_in(example("A scheme")[1])
    odd = re.search(rf"{name} measured (\w+),", said)[1]
    path = home / example("A scheme")[0]
    whole = path.read_text(encoding="utf-8")
    start, _, end = whole.rpartition(f'"{metric}"')  # where it is returned
    path.write_text(f'{start}"{odd}"{end}', encoding="utf-8")
    (command,) = [words for words in lines_of("A scheme") if "--list" not in words]
    done = run(command, tmp_path, home)
    assert done.returncode == 2 and said in done.stderr
    assert rows_of(tmp_path / "run") == []


def test_add_a_tool(classes):
    exec(example("A domain and its tools")[1], {"__name__": "nanotoolrl.world.domains.weather"})
    task = env.Task.from_json(blocks("json", ADD["A domain and its tools"])[0])
    assert env.replay(task, [[env.Call("get_rain", {"city": "Oslo"})]]) == 1
    assert "there is Oslo" in str(call_tool(task.new_world(), env.Call("get_rain", {"city": "Rome"})))


@pytest.mark.slow
def test_a_domain_takes_nothing_but_its_file(tmp_path):
    home = copied(tmp_path / "copy", "A domain and its tools")
    (tmp_path / "my_tasks.jsonl").write_text(blocks("json", ADD["A domain and its tools"])[0])
    shown, *_ = [succeeds(command, tmp_path, home) for command in lines_of("A domain and its tools")]
    assert '"name": "get_rain"' in shown and '{"millimetres": 3}' in shown
    assert rows_of(tmp_path / "run")


def test_add_a_call_format(monkeypatch, splits):
    """What it writes it reads, the ground truth earns the reward, and the other formats go on as they are."""
    before = dict(FORMATS)
    code = example("A call format")[1]
    name = re.match(r'FORMATS\["(\w+)"\]', code)[1]
    monkeypatch.setitem(FORMATS, name, None)  # taken away at the end
    exec(code, dict(vars(calls)))
    assert {key: one for key, one in FORMATS.items() if key != name} == before
    for task in splits["test"][::7]:
        truth = [turn.calls for turn in task.turns]
        assert env.replay(task, truth, name) == 1
        for turn in filter(None, truth):
            text = render_calls(turn, name)
            assert parse_calls(text, name) == turn and message_state(text, name) == "call"
            assert text.startswith(FORMATS[name].prefix)
            assert message_state(text, "hermes") == "foreign"
    assert message_state("<call>", name) == "bare" and message_state("<call>go</call>", name) == "malformed"


@pytest.mark.slow
def test_a_call_format_takes_nothing_but_its_lines(tmp_path):
    home = copied(tmp_path / "copy", "A call format")
    for command in lines_of("A call format"):
        said = succeeds(command, tmp_path, home)
        if "--oracle" in command:
            assert "<call>{" in said
    assert rows_of(tmp_path / "run")


def real_run(name: str) -> tuple[Path, list[dict[str, str]], dict]:
    """(directory, lines of metrics.csv, config) of a committed run with real weights."""
    folder = RESULTS / "real" / name
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return folder, rows, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_the_run_with_real_weights_is_told_as_it_was():
    page = " ".join(PAGES["docs/real-models.md"].split())
    folder, rows, config = real_run("sft")
    count = config["eval_part"]
    played = [row for row in rows if row["eval_success"]]
    (*steps, last), (*solved, final) = zip(
        *((row["step"], f"{count * float(row['eval_success']):.0f}") for row in played)
    )
    told = f"{', '.join(solved)} and {final} greedily after steps {', '.join(steps)} and {last}"
    assert f"of the same {count} tasks of `test` it solved {told}" in page
    tokens = sum(int(row["sft_tokens"]) for row in rows)
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    count = f"{len(rows)} steps of {config['sft_batch']} conversations"
    assert f"{count} (`data/results/real/sft`, {tokens:,} trained tokens, {minutes:.0f} minutes" in page
    losses = [float(rows[i]["sft_loss"]) for i in (0, -1)]
    assert f"the SFT loss {losses[0]:.2f} in the first step and {losses[1]:.3f} in the last" in page
    assert (config["sft_lr"], config["dtype"], config["model"]) == (1e-4, "bf16", "runs/smollm2")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    before, after = (Scores(**result[when]["held out, greedy"]) for when in ("before", "after"))
    assert before.success == 0 and before.of("all").n == 400 and before.states.keys() == {"overlong", "reply"}
    share = str(after.of("all")).split(" n=")[0].replace(" [", " % [")
    assert f"Of all 400 tasks of `test` it solves {share}, and none before" in page
    assert ", ".join(f"{100 * after.of(name).share:.0f} % of {name}" for name in after.rewards) in page
    broken = sum(after.states.get(state, 0) for state in calls.UNHEALTHY_STATES)
    said, cut = sum(after.states.values()), before.states["overlong"]
    assert f"Of {said:,} messages {broken} are broken" in page
    told = f"before training {cut} of {sum(before.states.values())} were cut at the limit and none was a call"
    assert told in page


def test_rl_with_real_weights_is_told_as_it_was():
    page = " ".join(PAGES["docs/real-models.md"].split())
    folder, rows, config = real_run("grpo")
    size = f"{len(rows)} steps of GRPO of {config['prompts']} tasks and {config['group']} rollouts each"
    assert f"RL from there: {size}" in page and config["guard"] == 0
    half = len(rows) // 2
    assert half == 12

    def halves(columns):
        sums = [100 * sum(float(row[name]) for name in columns) for row in rows]
        return sum(sums[:half]) / half, sum(sums[half:]) / half

    success, unhealthy = halves(["success"]), halves([f"state_{name}" for name in calls.UNHEALTHY_STATES])
    first, last = (f"{x:.0f} % in the {which} twelve" for x, which in zip(success, ("first", "last")))
    assert f"Sampled success is {first} steps and {last}, on other tasks" in page
    told = f"{unhealthy[0]:.1f} % are unhealthy in the first half, {unhealthy[1]:.1f} % in the second"
    assert f"Of the messages {told}" in page
    after, before = (
        Scores(**json.loads((RESULTS / "real" / name / "scores.json").read_text())["scores"]["hermes"])
        for name in ("grpo", "sft")
    )
    assert after.of("all").share == before.of("all").share
    told = (
        f"{100 * after.success:.1f} % before and after, a difference of {written(after.since(before), '+')}"
    )
    assert f"on {after.of('all').n} tasks of `test` {told} points" in page
    lines = (folder / "probes.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = [found["tokens"] for found in map(json.loads, lines) if found.get("tokens")]
    stop, opener = ([at[name]["required"] for at in (tokens[0], tokens[-1])] for name in ("<|im_end|>", "<"))
    assert f"is {stop[0]:.3f} at both ends" in page and f"{stop[0]:.3f}" == f"{stop[1]:.3f}"
    assert f"where one is due, {opener[0]:.2f} and {opener[1]:.2f}" in page
