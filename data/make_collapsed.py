"""Make the collapsed model and the files of docs/2-one-collapse.md: `python data/make_collapsed.py`.

They come from one run of 6 minutes, `train.py --scheme grpo --preset spike` on one thread, and its twin of
`--guard 0`: data/results/spike has the logs and what the model plays at five moments, data/collapsed the
model at the fall, in bf16.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanotoolrl  # noqa: E402, F401  (before torch)

# isort: split
import torch  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from nanotoolrl.loading import BUILT_IN, COLLAPSED, load  # noqa: E402

MOMENTS = (0, 6, 10, 14, 20)  # steps: before, held, on the way, the fall, the end
TASK = "test-005-base"  # the first of more than one turn in its category that the model solves before
LOGS = ("config.json", "metrics.csv", "probes.jsonl", "result.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/grpo-spike-s0"), help="directory of the run")
    args = parser.parse_args()
    exact = args.run.with_name(f"{args.run.name}-exact")
    for out, more in ((args.run, ["--keep-every", "1"]), (exact, ["--guard", "0"])):
        flags = ["--scheme", "grpo", "--preset", "spike", "--threads", "1", "--show-every", "0", *more]
        flags += ["--out", str(out), *(["--resume"] if out.exists() else [])]
        if not (out / "result.json").exists() and (code := train.main(flags)):
            return code
    results = ROOT / "data" / "results" / "spike"
    results.mkdir(parents=True, exist_ok=True)
    for name in LOGS:
        shutil.copyfile(args.run / name, results / name)
    shutil.copyfile(exact / "probes.jsonl", results / "exact-probes.jsonl")
    for step in MOMENTS:
        model = str(args.run / "models" / f"step-{step}") if step else BUILT_IN
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            sample.main(["--model", model, "--task", TASK])
        (results / f"step-{step}.txt").write_text(said.getvalue(), encoding="utf-8")
    load(args.run / "models" / "fall", dtype=torch.bfloat16).save(COLLAPSED)
    config = json.loads((COLLAPSED / "config.json").read_text(encoding="utf-8"))
    print(f"{COLLAPSED}: {config['dtype']}; {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
