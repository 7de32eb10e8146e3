"""Run a study, many training runs side by side, and write its table: `python -m nanotoolrl.study NAME`.

A study is a list of runs, each a name and the flags of `train.py`. Runs that are finished are not made again,
broken ones are resumed, and the table is made anew from the run directories each time, so a study can grow.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nanotoolrl.chat import MESSAGE_STATES
from nanotoolrl.evaluate import Scores

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 5  # steps over which sampled success is averaged

SCREEN = "--scheme grpo --eval-count 100 --eval-every 10 --eval-part 100"
COLLAPSE_SEARCH = {
    "updates4-lr4e-4": "--steps 25 --updates 4 --lr 4e-4",
    "lr1e-3": "--steps 40 --lr 1e-3 --warmup 20",
    "updates4-lr8e-4": "--steps 20 --updates 4 --lr 8e-4",
    "updates16-lr2e-4": "--steps 20 --updates 16 --lr 2e-4",
    "lr1.5e-3": "--steps 15 --lr 1.5e-3",
    "small-batch-lr4e-4": "--steps 160 --prompts 4 --lr 4e-4 --eval-every 40 --probe-every 8",
    "lr4e-4": "--steps 40 --lr 4e-4",
    "lr8e-4": "--steps 60 --lr 8e-4 --warmup 20",
    "unclipped": "--steps 20 --updates 4 --lr 4e-4 --clip 0.9 --clip-high 10 --dual-clip 100",
    "temperature1.3": "--steps 30 --temperature 1.3 --lr 4e-4",
    "sequence": "--steps 40 --lr 8e-4 --loss-agg sequence",
}
STUDIES = {
    "collapse-search": {name: f"{SCREEN} {flags}" for name, flags in COLLAPSE_SEARCH.items()},
    "collapse": {
        f"seed{seed}": f"--scheme grpo --preset collapse --seed {seed} --eval-every 40 --eval-part 400"
        for seed in range(5)
    },
}


def run(directory: Path, flags: str) -> int:
    """One run of train.py on one thread, its output beside the directory; returns the exit code. One that is
    unfinished, or now wants more --steps, goes on from its checkpoint."""
    command = [sys.executable, "train.py", "--out", str(directory)]
    command += f"{flags} --threads 1 --show-every 0".split()
    if (directory / "checkpoint.pt").exists():
        steps = (directory / "metrics.csv").read_text().count("\n") - 1
        if (directory / "result.json").exists() and f"--steps {steps} " in flags + " ":
            return 0
        command.append("--resume")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f"{directory.name}.log").open("a") as log:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode


def row(name: str, flags: str, directory: Path) -> dict:
    """What a run's files say, for one line of the table.

    Greedy success: before, the best on the way (on `--eval-part` tasks), after. Sampled success: a mean of 5
    steps. The spike is the largest of the run; NLLs are ratios of the last measurement to the start.
    `halved_*` is measured at the first step, after the first 5, whose sampled success is at most half of
    theirs; `end_*` are the message states of the last 5 steps.
    """
    with (directory / "metrics.csv").open() as file:
        steps = [{k: float(v) if v else math.nan for k, v in line.items()} for line in csv.DictReader(file)]
    probes = [json.loads(line) for line in (directory / "probes.jsonl").read_text().splitlines()]
    result = directory / "result.json"
    scores = json.loads(result.read_text()) if result.exists() else {}
    greedy = {when: Scores(**values).success for when, values in scores.items()}
    sampled = [mean([s["success"] for s in steps[max(0, i + 1 - WINDOW) : i + 1]]) for i in range(len(steps))]
    full = sampled[WINDOW - 1 :] or sampled[-1:]
    halved = next((s for s, mean in zip(steps[WINDOW:], full[1:]) if mean <= full[0] / 2), None)
    spike, token = max((v["growth"], token) for line in probes for token, v in line.get("tokens", {}).items())
    cells = {
        "run": name,
        "flags": flags,
        "steps": len(steps),
        "minutes": sum(s["seconds"] for s in steps) / 60,
        "greedy_before": greedy.get("before"),
        "greedy_best": max((s["eval_success"] for s in steps if s["eval_success"] >= 0), default=None),
        "greedy_after": greedy.get("after"),
        "sampled_start": full[0],
        "sampled_best": max(full),
        "sampled_end": full[-1],
        "spike": spike,
        "spike_token": token,
        "halved_step": halved and int(halved["step"]),
    }
    start, measured = probes[0], [s for s in steps if not math.isnan(s["nll_control"])]
    for kind in ("nll_control", "nll_content"):
        if measured:
            cells[kind] = measured[-1][kind] / start[kind]
        if measured and halved:
            near = min(measured, key=lambda s: abs(s["step"] - halved["step"]))
            cells[f"halved_{kind}"] = near[kind] / start[kind]
    last = steps[-WINDOW:]
    return cells | {f"end_{state}": mean([s[f"state_{state}"] for s in last]) for state in MESSAGE_STATES}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def write(table: Path, rows: list[dict]) -> None:
    """The table as CSV, empty where a column does not apply."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows([{k: text(v) for k, v in row.items()} for row in rows])


def text(value: object) -> object:
    """A cell: four digits; empty where there is no number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> int:
    """The command: returns 1 if a run failed (its log says why), else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    parser.add_argument("--runs", default="runs", help="directory for the run directories")
    parser.add_argument("--table", help="CSV (default: data/results/STUDY.csv)")
    args = parser.parse_args(argv)
    home = Path(args.runs) / args.study
    table = Path(args.table or ROOT / "data" / "results" / f"{args.study.replace('-', '_')}.csv")
    study, failed, rows = STUDIES[args.study], 0, {}
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(study), unit="run") as bar:

        def go(name: str) -> tuple[str, int]:
            return name, run(home / name, study[name])

        for name, code in pool.map(go, study):
            bar.update()
            if code:
                failed += 1
                bar.write(f"{name} failed, see {home / name}.log")
            if (home / name / "metrics.csv").exists():
                rows[name] = row(name, study[name], home / name)
                write(table, list(rows.values()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
