"""Every performance row, beside its peers, in one run: `python -m nanotoolrl.bench kernel|sampler|step`.
`parts` shows where a decode step's time goes, `growth` how a step's time grows, `before` what a revision took
for the same runs. `whole` times the first commands, `busy` a short run beside other work. `memory` is
arithmetic: which settings fit real models into which GPUs.

Each builds its workload, checks every result before its speed is looked at, runs the peers that are installed
in turns, and prints medians with their spread, peak memory, error, and the share of a limit that is measured
in the same run. It exits with 1 if a result is wrong, however fast. `--json FILE` writes it down; the tables
of docs/speed.md are made from such files by `markdown`.

Peers: TRL, Liger and cut-cross-entropy if installed, and what one would write without them.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.kernel import kernel
from bench.measure import OURS, Arm, Row, machine, table
from bench.memory import RANK, memory_table
from bench.parity import check_parity
from bench.parts import parts, parts_table
from bench.runs import before, busy, whole
from bench.sampling import sampler
from bench.steps import draw, growth, slopes, slopes_table, step
from nanotoolrl.cli import MOST_THREADS, command, cpu_threads, number
from nanotoolrl.config import Refused
from nanotoolrl.files import check_writable, finite
from nanotoolrl.loading import BUILT_IN, DTYPES, ModelError, load
from nanotoolrl.world.tasks import load_tasks

COMMANDS = {
    "kernel": kernel,
    "sampler": sampler,
    "step": step,
    "growth": growth,
    "before": before,
    "whole": whole,
    "busy": busy,
}
REPEATS = {"growth": 1, "whole": 1, "busy": 3, "before": 3}  # where they are not those of all

# (result file, how its row begins, what is looked at: times as fast as the fastest peer, share of the limit,
# or seconds; goal)
GOALS = (
    ("kernel", "linear log-prob", "fastest peer", 1.0),
    ("kernel", "linear log-prob", "limit", 0.8),
    ("sampler", "decode, 1 row", "fastest peer", 1.5),
    ("sampler", "decode, 64 rows", "fastest peer", 1.5),
    ("sampler", "(a)", "fastest peer", 12.0),
    ("sampler", "(b)", "fastest peer", 12.0),
    ("step", "GRPO step", "fastest peer", 10.0),
    ("before", "python train.py --scheme hint", "fastest peer", 2.0),
    ("before", "its sampling", "fastest peer", 2.5),
    ("whole", "python train.py --scheme hint", "seconds", 150.0),
    ("whole", "python train.py --preset collapse", "seconds", 180.0),
)


def goals(results: dict[str, dict]) -> str:
    """Markdown: what was aimed at and what was measured, by the names of result files."""
    lines = ["| what | goal | measured | |", "|---|---|---|---|"]
    for file, start, kind, goal in GOALS:
        raw = next(row for row in results[file]["rows"] if row["name"].startswith(start))
        row = Row(**raw | {"arms": [Arm(**arm) for arm in raw["arms"]]})
        ours, *others = row.arms
        peers = [arm for arm in others if not arm.name.startswith(OURS)]
        if kind == "seconds":
            aim, value, met = f"at most {goal:.0f} s", f"{ours.median:.0f} s", ours.median <= goal
        elif kind == "limit":
            share = row.limit / ours.median
            aim, value, met = f"{goal:.0%} of the limit", f"{share:.0%}", share >= goal
        else:
            peer = min(peers, key=lambda arm: arm.median)
            ratio = peer.median / ours.median
            aim, value, met = f"{goal:g}x {peer.name}", f"{ratio:.2f}x", ratio >= goal
        lines.append(f"| {row.name} | {aim} | {value} | {'met' if met else 'not met'} |")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    """The command: returns 0, 1 if a result is wrong, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m nanotoolrl.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "what", choices=("kernel", "sampler", "step", "growth", "parts", "before", "whole", "busy", "memory")
    )
    parser.add_argument(
        "--repeats",
        type=number(int, above=0),
        help="timed runs of every arm (default: 5 on a CPU, 20 on a GPU; of before and busy 3, of growth and "
        "whole 1)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    threads = number(int, above=0, most=MOST_THREADS)
    parser.add_argument("--threads", type=threads, default=cpu_threads(), help="CPU threads")
    parser.add_argument("--model", default=BUILT_IN, help="of step (default: %(default)s)")
    parser.add_argument("--parity", action="store_true", help="step: only compare sampler and trainer")
    parser.add_argument(
        "--dtype", default="auto", choices=tuple(DTYPES), help="of the weights, with --parity"
    )
    parser.add_argument("--revision", default="6a21ee6", help="of before (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="of growth: draw it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result down")
    args = parser.parse_args(argv)
    if args.what == "memory":
        print(memory_table())
        try:
            print(f"\nwith --lora {RANK}:\n\n{memory_table(RANK)}")
        except ValueError as absent:
            print(f"\n{absent}")
        return 0
    torch.set_num_threads(args.threads)
    try:
        device = torch.empty(0, device=args.device).device
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            check_writable(args.json)
    except (OSError, RuntimeError, AssertionError) as error:  # the last: no CUDA
        parser.error(str(error))
    try:
        repeats = args.repeats or REPEATS.get(args.what) or (20 if device.type == "cuda" else 5)
        if args.parity:
            policy = load(args.model, device=args.device, dtype=DTYPES[args.dtype])
            parity = check_parity(policy, load_tasks("train")[::19])
            print(parity)
            good, body = not parity.wrong(policy.dtype), {"parity": asdict(parity)}
        elif args.what == "parts":
            found = parts(device, args.small)
            print(parts_table(found))
            good, body = True, {"parts": [asdict(one) for one in found]}
        else:
            extra = {"step": {"model": args.model}, "before": {"revision": args.revision}}.get(args.what, {})
            rows = COMMANDS[args.what](device, repeats, args.small, **extra)
            print(table(rows))
            good = not any(arm.wrong for row in rows for arm in row.arms)
            body = {"rows": [asdict(row) for row in rows]}
            if args.what == "growth":
                body["slopes"] = slopes(rows)
                print(slopes_table(body["slopes"]))
                if args.figure:
                    draw(rows, args.figure)
    except (ModelError, Refused) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if args.json:
        files = ("--json", "--figure", str(args.json), str(args.figure))
        given = [x for x in argv or sys.argv[1:] if x not in files]
        line = "python -m nanotoolrl.bench " + " ".join(given)
        args.json.write_text(
            json.dumps(finite({"command": line, "machine": machine(device)} | body), indent=1) + "\n",
            encoding="utf-8",
        )
    if not good:
        print("bench: a result is wrong, see above", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
