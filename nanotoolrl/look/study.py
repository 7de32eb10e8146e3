"""Run a study, many training runs side by side, and write its table: `python -m nanotoolrl.study NAME`.

A study is a list of runs, each a name and the flags of `train.py`. Runs that are finished are not made again,
broken ones are resumed, and the table is made anew from the run directories each time, so a study can grow.
One that was begun elsewhere goes on from its table (`--known`).
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanotoolrl.cli import available_cores, command, number
from nanotoolrl.commandline import parse, stored_config
from nanotoolrl.config import Refused
from nanotoolrl.files import check_writable, write_atomically
from nanotoolrl.look import report
from nanotoolrl.look.arms import arms_of, draw, falls_table, read_rows, table_of
from nanotoolrl.look.falls import fall_of
from nanotoolrl.look.rows import UNTRAINED, row, untrained_row
from nanotoolrl.look.rundir import logged_steps
from nanotoolrl.look.runfiles import Unreadable, read_run
from nanotoolrl.look.studies import STUDIES

ROOT = Path(__file__).resolve().parent.parent.parent
REFUSED = 2  # exit code of a run that was made with other settings, or cannot be made
ENDED = 130  # of one that has not begun when the study is ended
SECONDS = 2.0  # between two looks at how far the runs are


STARTS = threading.Lock()  # the model that runs began from is looked at once, whoever is first


class Children:
    """The runs that are going on. `end` asks them to save and stop, and lets none begin any more."""

    def __init__(self) -> None:
        self.going: set[subprocess.Popen] = set()
        self.ended = False
        self.lock = threading.Lock()

    def run(self, command: list[str], log: Path) -> int:
        """Run a command with its output in a log; the exit code."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("a", encoding="utf-8") as file:
            with self.lock:
                if self.ended:
                    return ENDED
                # In a session of its own: Ctrl-C at the terminal is not for it, but for `end`.
                child = subprocess.Popen(
                    command, env=environment, stdout=file, stderr=file, cwd=ROOT, start_new_session=True
                )
                self.going.add(child)
            code = child.wait()
            with self.lock:
                self.going.discard(child)
            return code

    def end(self) -> None:
        """Ask all to save and stop. Whoever waits for `run` gives them the time for it."""
        with self.lock:
            self.ended = True
            for child in self.going:
                child.terminate()


def run(directory: Path, flags: str, children: Children, count: int = 0, grid: int = 0) -> int:
    """One run of train.py on one thread, its output beside the directory; returns the exit code. One that is
    unfinished, or now wants more --steps, goes on from its checkpoint; one with other settings is refused.
    count: tasks that the doctor then plays (`judge`), grid: those of the grid (`score_grid`); 0: none."""
    code = train(directory, flags, children)
    if code:
        return code
    judged = judge(directory, count, children) if count else 0
    scored = score_grids(directory, grid, children) if grid else 0
    return 1 if judged or scored else 0  # 2 would say that the run has other settings


def train(directory: Path, flags: str, children: Children) -> int:
    """The run itself."""
    arguments = [*shlex.split(flags), "--threads", "1", "--show-every", "0", "--out", str(directory)]
    if (directory / "config.json").exists():
        wanted = parse(arguments)[0]
        if (directory / "result.json").exists() and logged_steps(directory / "metrics.csv") == wanted.steps:
            try:
                made = stored_config(directory / "config.json")
            except Refused:  # of another version of this program
                return REFUSED
            return 0 if made.but(out=wanted.out) == wanted else REFUSED
        arguments.append("--resume")
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return children.run(command, directory.parent / f"{directory.name}.log")


def write(table: Path, rows: list[dict]) -> None:
    """The table as CSV, empty where a column does not apply."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    written = io.StringIO()
    writer = csv.DictWriter(written, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: text(v) for k, v in row.items()} for row in rows])
    write_atomically(table, written.getvalue())


def text(value: object) -> object:
    """A cell: four digits; empty where there is no number."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def command_line() -> argparse.ArgumentParser:
    """The flags, and their help."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    jobs = number(int, above=0, most=1024)
    parser.add_argument(
        "--jobs", type=jobs, default=available_cores(), help="runs side by side, one thread each"
    )
    parser.add_argument("--runs", default="runs", help="directory for the run directories")
    seeds = number(int, above=0, most=1024)
    parser.add_argument("--seeds", type=seeds, help="make the first so many of each setting (default: all)")
    parser.add_argument(
        "--model", help="the model that every run begins from, seen from the repository's directory"
    )
    looks = {
        "--judge": "have the doctor judge each run that falls, at its fall, on so many tasks",
        "--grid": "score each run, at its end and at its fall, in all formats on so many tasks of `test` "
        "and of `ood`",
    }
    for name, about in looks.items():
        count = number(int, least=0, most=10_000)
        parser.add_argument(name, type=count, default=0, metavar="TASKS", help=f"{about} (default: 0)")
    known = "a table of this study: runs that it has, with the same flags, are not made; their lines are kept"
    parser.add_argument("--known", type=Path, metavar="TABLE", help=known)
    parser.add_argument("--figure", type=Path, help="draw the arms of the study into this PNG")
    parser.add_argument("--table", help="CSV to write (default: RUNS/STUDY/STUDY.csv, beside its runs)")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """The command: returns 1 if a run failed (its log says why), 2 if refused, 130 if ended, else 0."""
    args = command_line().parse_args(argv)
    home = Path(args.runs).resolve() / args.study
    table = Path(args.table or home / f"{args.study}.csv")
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        check_writable(table)
        base = f" --model {shlex.quote(args.model)}" if args.model else ""
        seeds = args.seeds or math.inf
        study = {name: flags + base for name, flags in STUDIES[args.study].items() if seed_of(flags) < seeds}
        known = known_rows(args.known, study, home) if args.known else {}
        if args.judge and not any(settings(flags).get("keep_fall") for flags in study.values()):
            raise ValueError("--judge: no run of this study keeps the model of its fall (--keep-fall)")
    except (OSError, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    names, codes = [name for name in study if name not in known], dict[str, int]()
    asked = (args.judge, args.grid)
    children = Children()
    with (
        interrupting(signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)),
        ThreadPoolExecutor(args.jobs) as pool,
        tqdm(
            total=sum(steps_of(study[name]) for name in names), initial=made_steps(names, home), unit="step"
        ) as bar,
    ):
        waiting = {pool.submit(run, home / name, study[name], children, *asked): name for name in names}
        try:
            while len(codes) < len(waiting):
                going = [one for one, name in waiting.items() if name not in codes]
                finished = wait(going, SECONDS, FIRST_COMPLETED).done
                for done in finished:
                    name = waiting[done]
                    codes[name] = done.result()
                    if codes[name]:
                        bar.write(f"{name} failed or has other settings, see {home / name}.log")
                    if codes[name] == REFUSED:
                        study.pop(name)
                if finished:
                    write(table, rows(study, home, known))
                bar.update(made_steps(names, home) - bar.n)
                bar.set_postfix_str(f"{len(codes)} of {len(waiting)} runs")
        except KeyboardInterrupt:
            children.end()
            pool.shutdown(cancel_futures=True)
            write(table, rows(study, home, known))
            print("stopped; the runs are saved, the same command goes on", file=sys.stderr)
            return 130
    made = rows(study, home, known)
    if found := arms_of([line for line in made if line["run"] in study]):
        print(table_of(found))
        print(falls_table(made))
        if args.figure:
            draw(found, args.figure)
    if args.study == "demo" and not any(codes.values()):
        return report.main([*(str(home / name) for name in names), "--out", str(home / "report"), "--open"])
    return 1 if any(codes.values()) else 0


def seed_of(flags: str) -> int:
    """The seed that a run is to have; 0 of one that cannot be made."""
    return settings(flags).get("seed", 0)


def steps_of(flags: str) -> int:
    """The steps that a run is to make; 0 of one that cannot be made."""
    return settings(flags).get("steps", 0)


def settings(flags: str) -> dict[str, Any]:
    """The settings of a run; {} of one that cannot be made."""
    with contextlib.suppress(Refused, SystemExit):
        return vars(parse(shlex.split(flags))[0])
    return {}


def made_steps(names: Iterable[str], home: Path) -> int:
    """The steps that runs have made."""
    return sum(logged_steps(home / name / "metrics.csv") for name in names)


@contextlib.contextmanager
def interrupting(*numbers: int) -> Iterator[None]:
    """While it is open these signals do what Ctrl-C does, but for those that were ignored before (nohup). In
    the main thread; elsewhere nothing changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fallen(directory: Path) -> Path | None:
    """The model of the step at which a run fell, if it did and was kept."""
    model = directory / "models" / "fall"
    return model if model.is_dir() and fall_of(read_run(directory).series("success")[1]) else None


def judge(directory: Path, count: int, children: Children) -> int:
    """Have the doctor judge a finished run at its fall, if it fell and that was not done yet; its page is
    doctor.json in the run directory. The model it began from is judged once, into start-NAME.json beside the
    runs. Returns the exit code."""
    model, start = fallen(directory), read_run(directory).config["model"]
    if not model:
        return 0
    known = directory.parent / start_page("start", start)
    with STARTS:
        code = look(["--doctor"], start, known, count, children)
    how = ["--doctor", "--compare", str(known)]
    return code or look(how, model, directory / "doctor.json", count, children)


def score_grids(directory: Path, count: int, children: Children) -> int:
    """Score a finished run in all formats, and with the prefix forced, on tasks of its own and of other
    domains, if that was not done yet: at its end into grid.json, at its fall into grid-fall.json in the run
    directory. The model it began from is scored once, into grid-NAME.json beside the runs. Returns the exit
    code."""
    start, fall = read_run(directory).config["model"], fallen(directory)
    with STARTS:
        code = look(["--grid"], start, directory.parent / start_page("grid", start), count, children)
    code = code or look(["--grid"], directory / "model", directory / "grid.json", count, children)
    return code or (look(["--grid"], fall, directory / "grid-fall.json", count, children) if fall else 0)


def start_page(kind: str, model: str) -> str:
    """The name of a page about the model that runs began from: of each model its own."""
    return f"{kind}-{model.strip('/').replace('/', '_')}.json"


def look(how: list[str], model: Path | str, page: Path, count: int, children: Children) -> int:
    """`evaluate` a model on so many tasks into a page, if that was not done since it was written; the exit
    code. What it prints goes to a log beside the page."""
    if stored_arguments(page).get("count") == count and page.stat().st_mtime >= newest(model):
        return 0
    command = [sys.executable, "-m", "nanotoolrl.evaluate", *how, "--model", str(model)]
    return children.run([*command, "--count", str(count), "--json", str(page)], page.with_suffix(".log"))


def newest(model: Path | str) -> float:
    """When a model's directory was last written, in seconds; 0 of one that is known by its name."""
    return max((part.stat().st_mtime for part in (ROOT / model).glob("*")), default=0.0)


def stored_arguments(page: Path) -> dict:
    """The flags of a page that `evaluate --json` wrote; {} where nothing can be read."""
    try:
        return json.loads(page.read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def rows(study: dict[str, str], home: Path, known: dict[str, dict]) -> list[dict]:
    """A line for every run that has made a step, with the settings of the study; above them one for the model
    that they began from, once a run has ended. known: lines of runs that are not here (`known_rows`)."""
    runs = {}
    for name in study:
        with contextlib.suppress(Unreadable):
            runs[name] = read_run(home / name)
    starts = [
        untrained_row(files, home / start_page("grid", files.config["model"])) for files in runs.values()
    ]
    first = known.get(UNTRAINED) or next((start for start in starts if start), None)
    lines = known | {name: row(name, study[name], files) for name, files in runs.items()}
    found = [lines[name] for name in study if name in lines]
    return [first, *found] if first else found


def known_rows(table: Path, study: dict[str, str], home: Path) -> dict[str, dict]:
    """The lines of a table by run, of those that are finished, have the flags of the study, and are not in
    the directory home; with the line of the model that they began from. Raises OSError, ValueError where the
    table cannot be read."""
    try:
        lines = {line["run"]: dict(line) for line in read_rows(table)}
        found = {
            name: line
            for name, line in lines.items()
            if line.get("flags") == study.get(name)
            and line["steps"] == str(steps_of(study[name]))
            and line["greedy_after"]
            and not (home / name / "config.json").exists()
        }
    except (KeyError, csv.Error) as error:
        raise ValueError(f"{table} is no table of a study: {error!r}") from error
    return {UNTRAINED: lines[UNTRAINED]} | found if found and UNTRAINED in lines else found


if __name__ == "__main__":
    sys.exit(main())
